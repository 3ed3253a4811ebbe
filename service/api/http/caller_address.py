"""The caller's address behind a trusted proxy, for logs. It never widens access.

Each proxy on the way adds its caller's address to the right of ``X-Forwarded-For`` or ``Forwarded`` (RFC 7239). The
addresses to the left of it came with the request, so any caller may have written them. So both headers are read from
the right, as long as the writer of an address is trusted: first the peer, then each address that was read.

A client may send the header that its proxy does not write. If both headers are there and give different callers,
neither counts. ``X-Forwarded-Host`` and similar headers are not read.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import islice
from typing import Self

from service.api.http.access import Address
from service.setting_types import UNIX_PEERS
from service.settings import Settings

HOPS_MAX = 32
"""Addresses that are read, from the right. A request passes fewer proxies."""
LINE_MAX = 4096
"""Characters of a header's line that are read, from the right."""

IP = IPv4Address | IPv6Address

_PORT = r"(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]+))?"
_NODE = re.compile(
    rf"\[(?P<ipv6>[0-9A-Fa-f:.]{{2,45}})\]{_PORT}|(?P<ipv4>[0-9.]{{7,15}}){_PORT}|(?P<bare>[0-9A-Fa-f:.]{{2,45}})"
)
_PAIR = r'(?P<name{n}>[A-Za-z0-9!#$%&\'*+.^_`|~-]+)\s*=\s*(?:"(?P<quoted{n}>(?:[^"\\]|\\.)*)"|(?P<token{n}>[^\s;,="]+))'
_ONE_PAIR = re.compile(_PAIR.format(n=""))
_ELEMENT = re.compile(rf"(?:{re.sub(r'[?]P<[a-z]+{n}>', '?:', _PAIR)}\s*(?:;\s*|$))+")


@dataclass(frozen=True)
class TrustedProxies:
    """The proxies that ``trusted_proxies`` names."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    unix_peers: bool = False

    @classmethod
    def by(cls, settings: Settings) -> Self:
        names = settings.trusted_proxies
        return cls(tuple(ip_network(name) for name in names if name != UNIX_PEERS), UNIX_PEERS in names)

    def __bool__(self) -> bool:
        return bool(self.networks) or self.unix_peers

    def caller_of(self, peer: Address, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        """Return the caller's address as the trusted proxies name it; None if only the peer is known."""
        if not self._trusts_peer(peer):
            return None
        told = {
            self._walk(nodes_of(lines))
            for name, nodes_of in ((b"x-forwarded-for", _listed_nodes), (b"forwarded", _forwarded_nodes))
            if (lines := [value.decode("latin-1") for key, value in headers if key.lower() == name])
        }
        return told.pop() if len(told) == 1 else None

    def _trusts_peer(self, peer: Address) -> bool:
        if peer is None:
            return self.unix_peers
        address = _address_of(peer[0].partition("%")[0])
        return address is not None and self._trusts(address)

    def _trusts(self, address: IP) -> bool:
        return any(address in network for network in self.networks)

    def _walk(self, nodes: Iterable[str]) -> str | None:
        """Return the first address from the right that is not trusted, or the last one that can be read."""
        nearest = None
        for node in islice(nodes, HOPS_MAX):
            address = _address_of(node)
            if address is None:
                break
            nearest = str(address)
            if not self._trusts(address):
                break
        return nearest


def _address_of(node: str) -> IP | None:
    """Read the address of ``192.0.2.1``, ``192.0.2.1:80``, ``2001:db8::1`` or ``[2001:db8::1]:80``; None otherwise."""
    found = _NODE.fullmatch(node)
    if found is None:
        return None
    try:
        address = ip_address(found["ipv6"] or found["ipv4"] or found["bare"])
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address


def _parts_from_the_right(line: str) -> list[str]:
    parts = line[-LINE_MAX:].rsplit(",", HOPS_MAX)
    if len(line) > LINE_MAX:
        parts[0] = "cut off"
    return parts[::-1]


def _listed_nodes(lines: Sequence[str]) -> Iterator[str]:
    """Yield the nodes of ``X-Forwarded-For``, from the right. Empty elements do not count (RFC 9110, 5.6.1)."""
    for line in reversed(lines):
        yield from filter(None, (part.strip() for part in _parts_from_the_right(line)))


def _forwarded_nodes(lines: Sequence[str]) -> Iterator[str]:
    """Yield the ``for=`` of each element of ``Forwarded``, from the right; empty for an element without a valid one.

    The shortest valid end of the line counts as an element, so a quote that a client has left open cannot hide elements
    that the proxy has added. A comma within quotes makes an element of several parts.
    """
    for line in reversed(lines):
        element = ""
        for part in _parts_from_the_right(line):
            element = f"{part},{element}" if element else part.strip()
            if _ELEMENT.fullmatch(element.strip()):
                yield _for_of(element)
                element = ""
        if element:
            yield ""


def _for_of(element: str) -> str:
    values = [
        re.sub(r"\\(.)", r"\1", pair["quoted"]) if pair["token"] is None else pair["token"]
        for pair in _ONE_PAIR.finditer(element)
        if pair["name"].lower() == "for"
    ]
    return values[0] if len(values) == 1 else ""
