"""Access: callers need an API key; without keys only this machine may call."""

import hmac
import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv6Address, ip_address
from typing import Self

from service.errors import RefusedError
from service.settings import Settings

_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9.-]+))(?::[0-9]*)?")

Address = tuple[str, int | None] | None
"""An ASGI ``client`` or ``server``; None on a Unix socket."""


class UnauthorizedError(RefusedError):
    """API keys are set, and the request has no valid one."""

    code = "unauthorized"

    def __init__(self) -> None:
        super().__init__('This server requires an API key: send "Authorization: Bearer <key>".')


class LoopbackOnlyError(RefusedError):
    """No API keys are set, and the request does not go from this machine to this machine."""

    code = "loopback_only"

    def __init__(self) -> None:
        super().__init__(
            "Without API keys only requests from this machine to a loopback address and host name are served; "
            "set api_keys (LASTCALL_API_KEYS) to serve others."
        )


class ProxiedRequestError(RefusedError):
    """No API keys are set, and a proxy has passed the request on, perhaps for a remote caller."""

    code = "proxied_without_keys"

    def __init__(self, header: str) -> None:
        super().__init__(
            f"A proxy has passed this request on: it has the header {header}. Without API keys only callers on this "
            "machine are served, and behind a proxy they look like all others; set api_keys (LASTCALL_API_KEYS)."
        )


@dataclass(frozen=True)
class Access:
    """The access rule. It keeps digests of the keys, not the keys."""

    key_digests: tuple[bytes, ...]

    @classmethod
    def by(cls, settings: Settings) -> Self:
        return cls(tuple(_digest(key.get_secret_value()) for key in settings.api_keys))

    def check(
        self,
        *,
        authorization: str | None,
        host: str | None,
        client: Address,
        server: Address,
        proxy_header: str | None,
    ) -> None:
        """Return if the request may pass.

        The host name is checked against DNS rebinding: otherwise a web page whose name points to this machine could
        call through the user's own browser. A Unix socket needs keys: its client is usually a proxy, which calls from
        this machine for remote callers. A proxy may also call a loopback address; only the headers that a proxy adds
        tell it from a local caller.

        Args:
            proxy_header: A header by which the request says that a proxy has passed it on.

        Raises:
            UnauthorizedError
            ProxiedRequestError
            LoopbackOnlyError
        """
        if self.key_digests:
            if not self._has_key(authorization or ""):
                raise UnauthorizedError
        elif proxy_header is not None:
            raise ProxiedRequestError(proxy_header)
        elif not (
            client is not None
            and server is not None
            and is_loopback(client[0])
            and is_loopback(server[0])
            and is_loopback_host(host or "")
        ):
            raise LoopbackOnlyError

    def _has_key(self, authorization: str) -> bool:
        """Whether a key matches. All digests are always compared, so the time tells nothing about the keys."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self.key_digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


@lru_cache(maxsize=1024)
def is_loopback(address: str) -> bool:
    """Whether an IP address is a loopback address."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return (mapped or ip).is_loopback


def is_loopback_host(host: str) -> bool:
    """Whether a ``Host`` header names this machine: ``localhost``, ``127.…`` or ``[::1]``, with any port."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match["ipv6"] or match["name"]
    return name.lower() == "localhost" or is_loopback(name)
