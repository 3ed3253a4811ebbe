"""Access: callers need an API key; without keys only this machine may call."""

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Self

from service.api_keys import LOCAL, ApiKeys, Caller
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
    """No API keys are set, or none are asked for, and the request does not go from this machine to this machine."""

    code = "loopback_only"

    def __init__(
        self,
        why: str = (
            "Without API keys only requests from this machine to a loopback address and host name are served; "
            "set api_keys (LASTCALL_API_KEYS) to serve others."
        ),
    ) -> None:
        super().__init__(why)


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
    """The access rule."""

    keys: ApiKeys

    @classmethod
    def by(cls, settings: Settings) -> Self:
        """The rule with keys that never change."""
        return cls(ApiKeys(settings))

    @property
    def needs_key(self) -> bool:
        return self.keys.are_set

    def check(
        self,
        *,
        authorization: str | None,
        host: str | None,
        client: Address,
        server: Address,
        proxy_header: str | None,
    ) -> Caller:
        """Return who sends the request, if it may pass.

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
        if self.needs_key:
            return self._caller_with(authorization or "")
        if proxy_header is not None:
            raise ProxiedRequestError(proxy_header)
        if not (
            client is not None
            and server is not None
            and is_loopback(client[0])
            and is_loopback(server[0])
            and is_loopback_host(host or "")
        ):
            raise LoopbackOnlyError
        return LOCAL

    def _caller_with(self, authorization: str) -> Caller:
        scheme, _, key = authorization.partition(" ")
        caller = self.keys.find(key.strip())
        if caller is None or scheme.lower() != "bearer":
            raise UnauthorizedError
        return caller


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
