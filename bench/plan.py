"""The two messages between the harness and a load client: the plan, and the result."""

from typing import Literal

import msgspec

from bench.wire import StreamResult


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request. ``$n`` (the number of the client) and captured values are put into path and body."""

    method: str = "POST"
    path: str
    headers: dict[str, str] = {}
    body: str = ""
    capture: dict[str, str] = {}  # name -> key of the JSON object in the response


class Streams(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Clients that send requests one after another and read the last one's response as an event stream.

    Args:
        half_close: Shut down the sending side once the last request is sent; go on reading.
        sends_ahead: Send the last request once more without waiting for the end of its response.
        stalled: Read nothing of the stream, with a small receive buffer. Ready once the server's
            send queue does not change any more.
        repeat: Streams one after another, each on a connection of its own.
        ready_at: The client is ready when the response's ``head`` or its first ``token`` is there, or at the ``end``
            of its last stream.
        leave_after_tokens: Close the connection in mid-stream after this many tokens; 0: never.
        cancel_after_tokens: Cancel the turn, over another connection, after this many tokens; 0: never. The
            response's Location names the turn.
        keep_delays: Note each token's way from the model to here, in ``LoadResult.delays_ns``.
        at_once: Open all connections at the same moment, and not some after others.
    """

    name: str
    count: int
    stream: Request
    before: tuple[Request, ...] = ()
    half_close: bool = False
    sends_ahead: bool = False
    stalled: bool = False
    repeat: int = 1
    ready_at: Literal["head", "token", "end"] = "token"
    leave_after_tokens: int = 0
    cancel_after_tokens: int = 0
    keep_delays: bool = False
    at_once: bool = False


class Idle(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Clients that have had an answer and keep their connection open."""

    name: str = "idle"
    count: int
    request: Request


class Unfinished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Clients that have sent a part of a request: half of its head, or its head and a byte of its body each 100 ms.

    ``tls`` ones have sent a TLS ClientHello and read nothing.
    """

    name: str
    count: int
    kind: Literal["head", "body", "tls"]
    path: str = "/chat"


class Http2Streams(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One HTTP/2 connection (prior knowledge) with ``count`` event streams in it."""

    name: str
    count: int
    stream: Request


class Calls(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Clients that send these requests in a row, ``repeat`` times, on one connection at a time, and close it.

    An answer that says so is the last one of its connection.

    A client is ready when its ``first`` request has been answered, or at the ``end`` of its last one.
    """

    name: str
    count: int
    requests: tuple[Request, ...]
    repeat: int = 1
    ready_at: Literal["first", "end"] = "end"


class Prober(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Opens a new connection each ``interval_s`` and sends one request on it."""

    name: str = "prober"
    request: Request
    interval_s: float = 0.01


Group = Streams | Idle | Unfinished | Http2Streams | Calls | Prober


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The groups of clients to open, and the loopback port of the server."""

    port: int
    groups: tuple[Group, ...]
    host: str = "127.0.0.1"


class RudeResult(msgspec.Struct, kw_only=True):
    """The end of a connection that is not a stream."""

    group: str
    number: int
    state: Literal["open", "answered", "closed", "reset", "unreachable"] = "open"
    status: int | None = None
    ended_at: float | None = None


class ProbeResult(msgspec.Struct, kw_only=True):
    """The answer to one new connection.

    ``answered``: a complete response, ``status`` says which; ``incomplete``: closed within it;
    ``reset``, also after a silent wait; ``refused`` at the connect; ``silent``: nothing, or not all, when
    the client stopped looking.
    """

    group: str
    at: float
    sent_at: float | None = None  # the request
    outcome: Literal["answered", "incomplete", "closed", "reset", "refused", "silent"] = "silent"
    status: int | None = None
    retry_after: bool = False
    connection_close: bool = False
    answered_at: float | None = None
    late_s: float = 0  # the load client's own worst delay meanwhile: it shares the machine

    @property
    def waited_s(self) -> float:
        """The time until the answer or the close; infinite without one."""
        return float("inf") if self.answered_at is None else self.answered_at - self.at


class CallsResult(msgspec.Struct, kw_only=True):
    """The calls of one client: the first call without success ends them."""

    group: str
    number: int
    answered_at: list[float] = []
    note: str = ""


class LoadResult(msgspec.Struct, kw_only=True):
    """All observations of the load client."""

    streams: list[StreamResult] = []
    rude: list[RudeResult] = []
    probes: list[ProbeResult] = []
    calls: list[CallsResult] = []
    tokens_by_second: list[tuple[float, int]] = []  # (time, tokens received so far), sampled
    delays_ns: dict[str, list[int]] = {}  # by group, if ``keep_delays``: from the model's send to the receipt
