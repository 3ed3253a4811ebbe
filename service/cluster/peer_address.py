"""The addresses of the service's processes, as the store tells them to each other.

``@lastcall-NONCE`` names a process that only processes of its machine reach: the name of an abstract Unix socket
(unix(7)). ``tls://HOST:PORT/lastcall-NONCE?place=PLACE`` names a process of a replica that listens on a port: the
processes in the same place use its Unix socket, all others the port. The nonce is made anew for each process, so an
address never means another process, even where its host and port do.
"""

import os
import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Self

import msgspec

from service.setting_types import split_host_port

_NONCE_BYTES = 16
_PLACE_DIGITS = 16
_TLS = re.compile(r"tls://(?P<where>[^/\s]+)/(?P<instance>[\w.-]+)\?place=(?P<place>[0-9a-f]+)")
_INSTANCE = re.compile(rf"lastcall-[0-9a-f]{{{2 * _NONCE_BYTES}}}")
_BOOT = "/proc/sys/kernel/random/boot_id"
_NAMESPACES = ("net", "user")


class PeerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process of this service is reached.

    Args:
        instance: The name of the process, which no other process ever has: also that of its Unix socket.
        host: The host of its replica; empty if it listens on no port.
        place: Where its Unix socket is reached, see :func:`this_place`.
    """

    instance: str
    host: str = ""
    port: int = 0
    place: str = ""

    @classmethod
    def made(cls, *, host: str = "", port: int = 0) -> Self:
        """A new address for this process."""
        return cls(
            instance=f"lastcall-{token_hex(_NONCE_BYTES)}", host=host, port=port, place=this_place() if host else ""
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of an address. A text in any other form is the name of a Unix socket."""
        found = _TLS.fullmatch(text)
        if found is None:
            return cls(instance=text.removeprefix("@") if text.startswith("@") else text)
        host, port = split_host_port(found["where"])
        return cls(instance=found["instance"], host=host, port=int(port or 0), place=found["place"])

    def __str__(self) -> str:
        if not self.host:
            return self.unix_name
        return f"tls://{shown_host_port(self.host, self.port)}/{self.instance}?place={self.place}"

    @staticmethod
    def is_instance(name: str) -> bool:
        """Whether a name has the form of those that :meth:`made` gives."""
        return _INSTANCE.fullmatch(name) is not None

    @property
    def unix_name(self) -> str:
        """The name of the Unix socket, as :func:`service.cluster.peer_socket.socket_name` takes it."""
        return f"@{self.instance}" if "/" not in self.instance else self.instance

    @property
    def is_far(self) -> bool:
        """Whether this process reaches the other one only through its port."""
        return bool(self.host) and self.place != this_place()


def shown_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@cache
def this_place() -> str:
    """A digest of what processes share that reach each other's abstract sockets and know each other's users.

    It covers the boot of the machine, the namespaces of the network and of users, and the user. Where the kernel does
    not tell one of these, no other process is in the same place.

    Source: proc_sys_kernel(5), ``random/boot_id``; namespaces(7): two processes are in the same namespace if the
    device and inode of its file are the same.
    """
    try:
        namespaces = [os.stat(f"/proc/self/ns/{kind}") for kind in _NAMESPACES]  # noqa: PTH116  one call, no Path
        parts = [Path(_BOOT).read_text(), *(f"{it.st_dev}:{it.st_ino}" for it in namespaces), str(os.getuid())]
    except OSError:
        parts = [_NOWHERE, str(os.getpid())]
    return sha256("\0".join(parts).encode()).hexdigest()[:_PLACE_DIGITS]


_NOWHERE = token_hex(_NONCE_BYTES)
"""Stands for the place of a process that cannot tell where it is."""
