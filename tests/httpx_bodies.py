"""A pytest plugin: the body of an httpx request in tests, which leaves no generator when the request breaks off.

httpx sends a body from an async generator. A connection that breaks within the body, as when a test ends the server,
or a cancelled call leaves it to the garbage collector, and Trio warns: https://github.com/encode/httpx/issues/3686.
The body is the one of our client. ``tests/test_httpx_bodies.py`` fails once httpx leaves no generator any more.
"""

from collections.abc import AsyncIterator

import httpx
from lastcall_client import _Body

HTTPX_OWN = httpx.ByteStream.__aiter__


def _begin(body: httpx.ByteStream) -> AsyncIterator[bytes]:
    return aiter(_Body(b"".join(body)))


httpx.ByteStream.__aiter__ = _begin  # type: ignore[method-assign, assignment]
