"""A port that a setting names and that all workers share: the master binds it, and hands the socket down.

So the port stays open while workers come and go, and no worker that hangs holds up connections for the others. A worker
that finds another address in its settings, because they have changed, refuses to start: it would serve the old one.
"""

import os
import socket

from hypercorn.config import Config

from service.errors import StartupError
from service.hosting.worker_main import SharedFile
from service.setting_types import split_host_port

BACKLOG = 1024


class SharedPort:
    """The port of one setting.

    Args:
        setting: The name of the setting.
    """

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._shared = f"lastcall_{setting}"
        """Where hypercorn's configuration, which workers get, has the socket."""
        self._shared_address = f"{self._shared}_address"
        """Where it has the address, also if that is None. It is not there unless a master of ours shares its ports."""

    def share(self, config: Config, address: str | None) -> None:
        """Bind the port for all workers, and leave the socket to them in ``config``. For the master.

        Args:
            address: None if the setting names none: the workers may have none, either.

        Raises:
            StartupError: The port is taken, or the address is not one of this machine.
        """
        if address is not None:
            setattr(config, self._shared, SharedFile(self._bind(address).detach()))
        setattr(config, self._shared_address, address)

    def open(self, config: Config, address: str | None) -> socket.socket | None:
        """Return the listening socket, the master's or a new one; None if the setting names no address.

        Raises:
            StartupError: As :meth:`share`; or the setting has changed since; or there are several workers, and no
                socket that they share.
        """
        at_first = getattr(config, self._shared_address, address)
        if address != at_first:
            raise StartupError(
                f"{self._setting} has changed from {at_first or 'no address'} to {address or 'no address'}: a reload "
                "does not change it, restart the service."
            )
        if address is None:
            return None
        shared: SharedFile | int | None = getattr(config, self._shared, None)
        if shared is not None:
            return socket.socket(fileno=os.dup(shared.descriptor if isinstance(shared, SharedFile) else shared))
        if config.workers > 1:
            raise StartupError(
                f"{self._setting} with several workers needs lastcall serve --workers, or hypercorn's "
                "--config python:service.hosting.hypercorn_config: hypercorn's own master shares no port among them."
            )
        return self._bind(address)

    def _bind(self, address: str) -> socket.socket:
        host, port = split_host_port(address)
        try:
            family, kind, protocol, _, name = socket.getaddrinfo(
                host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except OSError as error:
            raise StartupError(f"Cannot listen on {self._setting} {address}: {error.strerror}") from error
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(name)
            listening.listen(BACKLOG)
        except OSError as error:
            listening.close()
            raise StartupError(f"Cannot listen on {self._setting} {address}: {error.strerror}") from error
        return listening


METRICS_PORT = SharedPort("metrics_bind")
