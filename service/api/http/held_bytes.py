"""The bytes of requests and answers that are in memory, bounded in all (``held_bytes_max``).

The body of a request counts while it arrives and until it is parsed or its answer begins; an answer counts from its
making until its client has taken it. Beyond the bound a body is refused before it is read, or when it grows, and an
answer to a GET before it is made. So are the answers of a PATCH, and of a POST that can be repeated. The answer of
another call that has changed something counts, but is never refused: the caller could not repeat the call. Event
streams hold a seq and one piece, which counts only if it is large, and is never refused. A stream of an ended turn in a
face whose frames need the turn's record counts the record until its end, and is refused as an answer to a GET is.

An input of more than ``input_bytes_max`` counts until its turn has ended and no request keeps the turn any more, as a
stream does that is not read. It is refused before the turn begins.

Short messages and cancels have to work while large requests have taken all room. So small requests have a reserve
beyond the bound, a quarter of it, and are refused when the reserve is full, too. Tiny requests, such as probes, are
never refused: the connection of each takes fifty times as much. Nor are the metrics, which tell of the refusals.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, Self

from quart import request

from service.api.http.repeats import repeat_is_allowed
from service.errors import LimitError

SMALL_BYTES = 16 * 1024
"""A request that holds no more than this may use the reserve."""
TINY_BYTES = 1024
"""A request that holds no more than this is never refused."""
_RESERVE = 0.25
"""The reserve for small requests, as a share of the bound."""

_KEY = "lastcall.request_bytes"


class HeldBytesLimitError(LimitError):
    """Requests and answers hold ``held_bytes_max`` bytes."""

    code = "held_bytes_limit"

    def __init__(self) -> None:
        super().__init__(
            "This server holds as many bytes of requests and answers as it may (held_bytes_max); try again later."
        )


class HeldBytes:
    """The bytes that all requests of an application hold.

    Attributes:
        bytes: How many there are.
    """

    def __init__(self, *, bytes_max: float = inf) -> None:
        self.bytes = 0
        self._bytes_max = bytes_max

    def __repr__(self) -> str:
        return f"<HeldBytes: {self.bytes} of {self._bytes_max}>"

    def has_room_for(self, size: int, *, is_small: bool = False) -> bool:
        bound = self._bytes_max * (1 + _RESERVE) if is_small else self._bytes_max
        return self.bytes + size <= bound


class RequestBytes:
    """The bytes that one request holds. All of them are given back when the request is over."""

    def __init__(self, held: HeldBytes) -> None:
        self._held = held
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<RequestBytes: {self._bytes} of {self._held!r}>"

    def beside(self) -> "RequestBytes":
        """Bytes of the same application that do not end with this request. Their user releases them."""
        return RequestBytes(self._held)

    def check(self, size: int) -> None:
        """Raises: HeldBytesLimitError: There is no room for ``size`` bytes more."""
        total = self._bytes + size
        if total > TINY_BYTES and not self._held.has_room_for(size, is_small=total <= SMALL_BYTES):
            raise HeldBytesLimitError

    def take(self, size: int) -> None:
        """Hold more bytes. Raises: HeldBytesLimitError: There is no room; nothing has changed."""
        self.check(size)
        self.add(size)

    def add(self, size: int) -> None:
        """Hold more bytes, or fewer (a negative number), also beyond the bound."""
        self._bytes += size
        self._held.bytes += size

    def release(self) -> None:
        """Hold nothing any more. Idempotent."""
        self.add(-self._bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def counting_bytes(scope: dict[str, Any], held: HeldBytes) -> RequestBytes:
    """Count the bytes of the request of this ASGI scope; to be entered around the ASGI call."""
    counted = scope[_KEY] = RequestBytes(held)
    return counted


def bytes_of(scope: Any) -> RequestBytes:
    """Return the bytes of the request of this ASGI scope; without a bound where nothing counts them."""
    counted: RequestBytes = scope.setdefault(_KEY, RequestBytes(HeldBytes()))
    return counted


@contextmanager
def room_for_answer(size: int) -> Iterator[None]:
    """Hold ``size`` bytes while the answer to the current request is made. Raises: As :func:`hold_answer`."""
    hold_answer(size)
    try:
        yield
    finally:
        bytes_of(request.scope).add(-size)


def hold_answer(size: int) -> None:
    """Count the answer to the current request until the request is over.

    Raises:
        HeldBytesLimitError: There is no room, and the request can be repeated.
    """
    counted = bytes_of(request.scope)
    # A PATCH that is repeated changes nothing more.
    if request.method in ("GET", "HEAD", "PATCH") or repeat_is_allowed():
        counted.take(size)
    else:
        counted.add(size)
