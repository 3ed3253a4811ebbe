"""A client of Lastcall's native API: one module, on httpx and AnyIO, for Trio and asyncio.

    async with Client("http://localhost:8000", api_key="…") as client:
        session = await client.create_session()
        async for event in client.stream(session["id"], "What is a nursery?"):
            print(event.text, end="", flush=True)

A stream survives cuts, silent connections and restarts of the server: it comes back with ``Last-Event-ID``, and yields
each event once and in order. Each POST has an ``Idempotency-Key``, so a call that was sent again does its work once.

Copy this file where you need it. It needs Python 3.11, httpx 0.28 and AnyIO 4. Refusals are :class:`LastcallError`.
"""

import json
import random
import re
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Generic, Literal, NoReturn, NotRequired, Self, TypedDict, TypeVar, Unpack, cast
from urllib.parse import quote, unquote

import anyio
import httpx

__all__ = [
    "ENDS",
    "Bounds",
    "Client",
    "Event",
    "LastcallError",
    "Message",
    "Page",
    "Pages",
    "Session",
    "SessionOptions",
    "Turn",
    "TurnOptions",
    "TurnStream",
    "Waiting",
    "Watch",
]

ENDS = frozenset({"turn.completed", "turn.failed", "turn.cancelled", "turn.interrupted"})
"""The types of the events that end a turn."""
_PASSING = frozenset({408, 429, 502, 503, 504})
"""The statuses after which the same call may succeed a moment later."""
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""The faults before the request was sent."""
_OUR_FAULTS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
_TURN_PATH = re.compile(r"/sessions/(?P<session>[^/?#]+)/turns/(?P<turn>turn_[0-9a-f]{32})(?:[/?#]|$)")
_REFUSAL_BYTES_MAX = 64 * 1024
_CLOSING_S = 0.2
"""How long the end of the answer may come after the last event, so that the connection can be used again."""
_WAIT_S = 30
_T = TypeVar("_T")


class LastcallError(Exception):
    """A call was refused, or got no answer in time.

    Attributes:
        status: The status of the answer; None if there was none.
        code: For programs: of the server (``turn_in_progress``), or of this client: ``unreachable``, ``timeout``,
            ``cut``, ``malformed_answer``, ``redirected``, ``event_too_large``; ``unknown`` for an answer that is no
            problem document, as of a proxy.
        title, detail: For people.
        request_id: The request's id in the server's log.
        retry_after_s: When to try again, if the answer says it.
        turn_id: The turn that the answer names, e.g. the one that is in the way.
        problem: The whole problem document; empty if there was none.
    """

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int | None = None,
        title: str = "",
        request_id: str | None = None,
        retry_after_s: float | None = None,
        turn_id: str | None = None,
        problem: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.status = status
        self.title = title
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.turn_id = turn_id
        self.problem = problem or {}
        self._turn: tuple[str, str] | None = None

    def __repr__(self) -> str:
        return f"<LastcallError {self.status} {self.code}: {self.detail}>"

    @property
    def is_passing(self) -> bool:
        """Whether the same call may succeed a moment later."""
        return self.status in _PASSING or self.code in {"unreachable", "timeout", "cut"}


class Usage(TypedDict):
    """The tokens of a turn or a session."""

    input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cached_tokens: NotRequired[int]


class Found(TypedDict):
    """Where the words of a search are."""

    turn_id: str | None
    snippet: str


class Session(TypedDict):
    """A session as the server shows it."""

    id: str
    created_at: str
    last_accessed_at: str
    updated_at: str
    expires_at: str
    idle_timeout_s: float
    title: str | None
    model: str | None
    system_message: str | None
    temperature: float | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    status: str
    head: str | None
    message_count: int
    usage: Usage
    owner: NotRequired[str]
    match: NotRequired[Found]


class Siblings(TypedDict):
    """``2 / 3``: the place of a turn among those with the same parent, from 1, and their count."""

    place: int
    count: int


class Failure(TypedDict):
    """Why a turn failed."""

    code: str
    message: str
    param: NotRequired[str]


class Turn(TypedDict):
    """A turn as the server shows it; ``text`` is the reply so far."""

    id: str
    session_id: str
    parent: str | None
    state: str
    reason: str | None
    error: Failure | None
    model: str
    input: str
    text: str
    finish_reason: str | None
    usage: Usage | None
    left_out: dict[str, Any] | None
    created_at: str
    started_at: str | None
    ended_at: str | None
    siblings: NotRequired[Siblings]
    is_head: NotRequired[bool]
    items: NotRequired[list[dict[str, Any]]]
    events_deleted: NotRequired[bool]
    stored: NotRequired[bool]
    on_interrupt: NotRequired[str]
    attempt: NotRequired[int]


class TreeTurn(TypedDict):
    """A turn in the tree of a session, without its texts."""

    id: str
    parent: str | None
    state: str
    created_at: str
    ended_at: str | None


class Message(TypedDict):
    """A message of the conversation, or with a ``type`` a call of the model or the output of a call."""

    id: str
    turn_id: str
    role: str
    text: str
    created_at: str
    type: NotRequired[str]
    call_id: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]
    complete: NotRequired[bool]
    output: NotRequired[str]


class Page(TypedDict, Generic[_T]):
    """A page of a list; ``next`` goes into ``after`` to get the next page."""

    data: list[_T]
    next: str | None
    count: NotRequired[int]
    partial: NotRequired[bool]


class SessionOptions(TypedDict, total=False):
    """What a session may be made with, and what of it may be changed."""

    title: str | None
    model: str | None
    system_message: str | None
    temperature: float | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    idle_timeout_s: float


class TurnOptions(TypedDict, total=False):
    """What a turn may be started with, beside its input. ``on_disconnect`` is ``continue`` if it is left out."""

    model: str | None
    system_message: str | None
    temperature: float | None
    max_output_tokens: int | None
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    top_p: float | None
    text_format: Mapping[str, Any] | None
    reasoning_effort: str | None
    on_conflict: Literal["reject", "queue", "supersede"]
    on_disconnect: Literal["cancel", "continue"]
    on_interrupt: Literal["fail", "retry", "continue"]


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a turn.

    Attributes:
        type: ``turn.delta`` and so on; a newer server may send types that you do not know: pass over them.
        seq: Its position in the turn: it only grows. None in an end that this client read from the turn's record,
            because the server has no events any more (``data["replaces"]`` says why): then ``text`` is the whole
            reply, in place of what was shown.
        data: The whole event.
    """

    type: str
    seq: int | None
    data: Mapping[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        """The piece of the reply in a ``turn.delta``, or of the reasoning in a ``turn.reasoning``; else empty."""
        text = self.data.get("text")
        return text if isinstance(text, str) else ""

    @property
    def is_end(self) -> bool:
        """Whether this event ends the turn."""
        return self.type in ENDS


@dataclass(frozen=True, slots=True)
class Waiting:
    """A client waits before it tries again: ``attempt`` counts from 1 and begins anew with each answer."""

    attempt: int
    delay_s: float
    error: LastcallError


OnWait = Callable[[Waiting], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long a client waits for what.

    Args:
        connect_timeout_s: Bound of a connect.
        timeout_s: Bound of an attempt of a call that is no stream; more than the 30 s that a wait for a turn takes.
        silence_s: A stream that is silent for longer is dead. The server sends a comment every 15 s
            (``heartbeat_interval_s``), so this is three of them.
        pause_s: The first pause between two attempts; each further one is twice as long, by chance up to half of it
            shorter, and never shorter than ``Retry-After``. A stream begins with what its ``retry:`` says.
        pause_max_s: Bound of such a pause.
        patience_s: Bound of all attempts of a call, and of those of a stream since its last event. None: no bound.
        event_bytes_max: Bound of one event.
    """

    connect_timeout_s: float = 10
    timeout_s: float = 65
    silence_s: float = 45
    pause_s: float = 0.5
    pause_max_s: float = 10
    patience_s: float | None = 120
    event_bytes_max: int = 16 * 1024 * 1024


class _Patience:
    """The pauses between the attempts of one call, or of one stream until its next event."""

    def __init__(self, bounds: Bounds, on_wait: OnWait | None) -> None:
        self.attempts = 0
        self.pause_s = bounds.pause_s
        self._bounds = bounds
        self._on_wait = on_wait
        self._spent_s = 0.0
        self._began_at: float | None = None

    def begin(self) -> None:
        """An attempt begins."""
        self._began_at = anyio.current_time()

    def renew(self) -> None:
        """There was progress."""
        self.attempts = 0
        self._spent_s = 0
        self._began_at = None

    async def wait(self, error: LastcallError) -> None:
        """Wait before the next attempt. Raises ``error`` if the patience is over."""
        bounds = self._bounds
        if self._began_at is not None:
            self._spent_s += anyio.current_time() - self._began_at
            self._began_at = None
        backoff_s = min(bounds.pause_max_s, self.pause_s * 2 ** min(self.attempts, 30))
        delay_s = backoff_s * random.uniform(0.5, 1)
        if error.retry_after_s is not None:
            delay_s = max(delay_s, error.retry_after_s + random.uniform(0, self.pause_s))
        if bounds.patience_s is not None and self._spent_s + delay_s > bounds.patience_s:
            raise error
        self.attempts += 1
        self._spent_s += delay_s
        if self._on_wait is not None:
            self._on_wait(Waiting(self.attempts, delay_s, error))
        await anyio.sleep(delay_s)


class Client:
    """A client of one server. It is an async context manager: leaving it closes its streams and connections.

    Args:
        url: The server's address, with the prefix that a proxy adds.
        api_key: The key, or what returns it: it is asked before each request.
        owner: Act for this owner; needs a key that may administer.
        bounds: How long to wait for what.
        http: An httpx client of yours, e.g. with certificates; it stays open when this client is closed.
        on_wait: Called before each pause between two attempts. A stream may have its own.

    Each call that is safe to repeat is repeated while the server is away or busy: reads, cancel, deletions, and POST,
    each with an ``Idempotency-Key`` of its own. A change with a condition (``if_match``, ``seen_head``) whose outcome
    is unknown is not: it could find its own change in its way.

    Cancelling a call closes its connection. A POST that was cancelled may have been done all the same.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | Callable[[], str] | None = None,
        owner: str | None = None,
        bounds: Bounds | None = None,
        http: httpx.AsyncClient | None = None,
        on_wait: OnWait | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.bounds = bounds or Bounds()
        self._api_key = api_key
        self._owner = owner
        self._on_wait = on_wait
        self._is_own = http is None
        # Each stream keeps a connection: httpx' usual bound of 100 would hold up the calls of a program with many.
        self._http = http or httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=20))
        self._streams: set[TurnStream] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all streams and connections. Turns go on or end as their ``on_disconnect`` says."""
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + 5):
            for stream in list(self._streams):
                await stream.aclose()
            if self._is_own:
                await self._http.aclose()

    # Sessions

    async def create_session(
        self, *, id: str | None = None, idempotency_key: str | None = None, **options: Unpack[SessionOptions]
    ) -> Session:
        """Create a session. With an ``id`` that is taken it fails with ``session_exists``."""
        body = {"id": id, **options} if id is not None else {**options}
        return cast(Session, await self._post("/sessions", body, idempotency_key))

    async def get_session(self, session_id: str) -> Session:
        """Get a session."""
        return cast(Session, await self._json("GET", _session(session_id)))

    async def session_etag(self, session_id: str) -> tuple[Session, str | None]:
        """Get a session with its ``ETag``, for ``if_match``."""
        response = await self._call("GET", _session(session_id))
        return cast(Session, _decoded(response)), response.headers.get("ETag")

    async def list_sessions(
        self,
        *,
        limit: int = 20,
        after: str | None = None,
        status: str | None = None,
        q: str | None = None,
        metadata: Mapping[str, str] | None = None,
        count: bool = False,
    ) -> Page[Session]:
        """A page of the sessions, the newest first; with ``q`` those that have all of these words."""
        params = _query(limit=limit, after=after, status=status, q=q, count="true" if count else None)
        params |= {f"metadata.{name}": value for name, value in (metadata or {}).items()}
        return cast(Page[Session], await self._json("GET", "/sessions", params=params))

    def sessions(
        self, *, status: str | None = None, q: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> "Pages[Session]":
        """All sessions, the newest first: read in pages while you iterate."""
        return Pages(
            lambda after: self.list_sessions(limit=100, after=after, status=status, q=q, metadata=metadata),
        )

    def search(self, q: str, *, metadata: Mapping[str, str] | None = None) -> "Pages[Session]":
        """All sessions that have these words, each with its ``match``."""
        return self.sessions(q=q, metadata=metadata)

    async def update_session(
        self, session_id: str, *, if_match: str | None = None, **options: Unpack[SessionOptions]
    ) -> Session:
        """Change settings. With ``if_match``, an ETag, it fails with ``precondition_failed`` if others were faster."""
        headers = {} if if_match is None else {"If-Match": if_match}
        request = self._json(
            "PATCH", _session(session_id), body=options, headers=headers, is_conditional=if_match is not None
        )
        return cast(Session, await request)

    async def rename_session(self, session_id: str, title: str | None, *, if_match: str | None = None) -> Session:
        """Change the title."""
        return await self.update_session(session_id, title=title, if_match=if_match)

    async def switch_to(self, session_id: str, turn_id: str | None, *, seen_head: str | None = None) -> Session:
        """Show another branch: move the head to this turn. With ``seen_head`` only if the head is still that one."""
        body = {"head": turn_id} if seen_head is None else {"head": turn_id, "seen_head": seen_head}
        request = self._json("PATCH", _session(session_id), body=body, is_conditional=seen_head is not None)
        return cast(Session, await request)

    async def delete_session(self, session_id: str, *, if_match: str | None = None) -> None:
        """Delete a session with all that it has; turns that run are cancelled."""
        headers = {} if if_match is None else {"If-Match": if_match}
        await self._call("DELETE", _session(session_id), headers=headers, is_conditional=if_match is not None)

    async def fork_session(
        self, session_id: str, *, at: str | None = None, id: str | None = None, idempotency_key: str | None = None
    ) -> Session:
        """Copy a conversation up to the turn ``at``, the head if left out, into a session of its own."""
        body = _query(at=at, id=id)
        return cast(Session, await self._post(f"{_session(session_id)}/fork", body, idempotency_key))

    # Messages

    def messages(self, session_id: str) -> "Pages[Message]":
        """The conversation: the messages on the path to the head, oldest first."""
        return self._pages(f"{_session(session_id)}/messages")

    async def add_messages(
        self, session_id: str, items: Sequence[Mapping[str, Any]], *, idempotency_key: str | None = None
    ) -> list[Message]:
        """Add messages without asking a model, all or none."""
        path = f"{_session(session_id)}/messages"
        added = await self._post(path, {"items": list(items)}, idempotency_key)
        return cast(list[Message], added["messages"])

    async def delete_message(self, session_id: str, message_id: str) -> None:
        """Delete a message, a call with its results, or a result."""
        await self._call("DELETE", f"{_session(session_id)}/messages/{_part(message_id)}")

    # Turns

    async def start_turn(
        self,
        session_id: str,
        message: str | Sequence[Mapping[str, Any]],
        *,
        parent: str | None | Literal["head"] = "head",
        idempotency_key: str | None = None,
        **options: Unpack[TurnOptions],
    ) -> Turn:
        """Start a turn that runs without a client, and return at once. See :meth:`stream` for the arguments."""
        body = {**_start_body(message, parent, options), "background": True}
        try:
            return cast(Turn, await self._post(f"{_session(session_id)}/turns", body, idempotency_key, located=True))
        except LastcallError as error:
            if error._turn is None or error.status not in (503, 504):
                raise
            return await self.get_turn(*error._turn)  # the turn was accepted, and this is where it is

    def stream(
        self,
        session_id: str,
        message: str | Sequence[Mapping[str, Any]],
        *,
        parent: str | None | Literal["head"] = "head",
        idempotency_key: str | None = None,
        request_id: str | None = None,
        on_wait: OnWait | None = None,
        **options: Unpack[TurnOptions],
    ) -> "TurnStream":
        """Send a message, and stream the reply: the turn begins with the first iteration.

        Args:
            session_id: The session.
            message: A text; or several, and results of calls.
            parent: The turn to follow; ``head`` for the session's head, None to begin the conversation anew.
            idempotency_key: Names this sending, also after a restart of your program: made if left out.
            request_id: Sent as ``X-Request-ID``.
            on_wait: Called before each pause between two attempts.
            options: All else of the body. ``on_disconnect`` is ``continue`` if left out: the turn outlives this
                stream, or its cancellation; call :meth:`cancel` to end it. With ``cancel`` it ends as ``cancelled``
                once no client has its stream, which a lost connection is, too.
        """
        path, body = f"{_session(session_id)}/turns", _start_body(message, parent, options)
        return self._starting(
            path, body, session_id=session_id, key=idempotency_key, on_wait=on_wait, request_id=request_id
        )

    def chat(
        self,
        message: str,
        *,
        session_id: str | None = None,
        on_disconnect: Literal["cancel", "continue"] = "continue",
        on_interrupt: Literal["fail", "retry", "continue"] | None = None,
        idempotency_key: str | None = None,
        on_wait: OnWait | None = None,
    ) -> "TurnStream":
        """Send a message to this session, which is made if it is not there, or to a new one."""
        named = _query(session_id=session_id, on_interrupt=on_interrupt)
        body = {"message": message, "on_disconnect": on_disconnect, **named}
        return self._starting("/chat", body, session_id=session_id, key=idempotency_key, on_wait=on_wait)

    def retry(
        self,
        session_id: str,
        turn_id: str,
        *,
        idempotency_key: str | None = None,
        on_wait: OnWait | None = None,
        **options: Unpack[TurnOptions],
    ) -> "TurnStream":
        """Ask the same again, as a sibling of this turn; options replace the turn's."""
        body = {"on_disconnect": "continue", **options}
        path = f"{_turn(session_id, turn_id)}/retry"
        return self._starting(path, body, session_id=session_id, key=idempotency_key, on_wait=on_wait)

    def edit(
        self,
        turn: Turn,
        message: str | Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        on_wait: OnWait | None = None,
        **options: Unpack[TurnOptions],
    ) -> "TurnStream":
        """Ask something else in the place of this turn: a sibling of it."""
        return self.stream(
            turn["session_id"],
            message,
            parent=turn["parent"],
            idempotency_key=idempotency_key,
            on_wait=on_wait,
            **options,
        )

    def events(
        self, session_id: str, turn_id: str, *, after: int = 0, text: str = "", on_wait: OnWait | None = None
    ) -> "TurnStream":
        """The events of a turn that was started elsewhere, replayed and live.

        Args:
            session_id: The session.
            turn_id: The turn.
            after: The ``seq`` of the last event that you have seen.
            text: The text that you had by then, from which :attr:`TurnStream.text` goes on.
            on_wait: Called before each pause between two attempts.
        """
        _turn(session_id, turn_id)
        stream = TurnStream(self, None, session_id=session_id, on_wait=on_wait or self._on_wait)
        stream.turn_id, stream.seq = turn_id, after
        stream._pieces = [text]
        return stream

    async def get_turn(self, session_id: str, turn_id: str, *, wait_s: int = 0) -> Turn:
        """Get a turn; with ``wait_s``, up to 60, when it has ended, or after so many seconds as it stands."""
        params = {"wait": str(wait_s)} if wait_s else None
        return cast(Turn, await self._json("GET", _turn(session_id, turn_id), params=params))

    async def wait_turn(self, session_id: str, turn_id: str) -> Turn:
        """Return a turn once it has ended. Its end is bounded by the server's ``turn_timeout_s``."""
        while True:
            turn = await self.get_turn(session_id, turn_id, wait_s=_WAIT_S)
            if turn["ended_at"] is not None:
                return turn
            await anyio.sleep(0.05)  # if an answer comes at once, all the same

    def turns(self, session_id: str) -> "Pages[Turn]":
        """All turns of a session, in the order in which they were accepted."""
        return self._pages(f"{_session(session_id)}/turns")

    def siblings(self, turn: Turn) -> "Pages[Turn]":
        """The turns with the parent of this one, itself included, in the order in which they were accepted."""
        return self._pages(f"{_session(turn['session_id'])}/turns", parent=turn["parent"] or "null")

    async def path(self, session_id: str, head: str | None = None) -> list[Turn]:
        """The conversation as turns: those from the first one to ``head``, the session's head if left out."""
        head = head or (await self.get_session(session_id))["head"]
        found: list[Turn] = []
        by_id = {turn["id"]: turn for turn in await self.turns(session_id).collect()} if head else {}
        turn = by_id.get(head or "")
        while turn is not None:
            found.append(turn)
            turn = by_id.get(turn["parent"] or "")
        return found[::-1]

    def tree(self, session_id: str) -> "Pages[TreeTurn]":
        """Ids, parents, states and times of all turns."""
        return self._pages(f"{_session(session_id)}/tree", limit=1000)

    async def cancel(self, session_id: str, turn_id: str) -> Turn:
        """End a turn, and return it ended. A turn that has ended already stays as it is."""
        return cast(Turn, await self._json("POST", f"{_turn(session_id, turn_id)}/cancel"))

    async def delete_turn(self, session_id: str, turn_id: str) -> None:
        """Delete a turn with all that follow it."""
        await self._call("DELETE", _turn(session_id, turn_id))

    # Requests

    async def request(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, params: Mapping[str, str] | None = None
    ) -> Any:
        """Make a call that has no method here, such as ``/admin/tree``: return the JSON of its answer."""
        return await self._json(method, path, body=body, params=params)

    def watch(self, path: str, *, params: Mapping[str, str] | None = None) -> "Watch":
        """Follow a stream that has no method here, such as ``/admin/tree/events``: one connection, without a resume."""
        return Watch(self, path, params)

    def _starting(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        session_id: str | None,
        key: str | None,
        on_wait: OnWait | None,
        request_id: str | None = None,
    ) -> "TurnStream":
        start = _Start(path, body, key or _new_key(), request_id)
        return TurnStream(self, start, session_id=session_id, on_wait=on_wait or self._on_wait)

    def _pages(self, path: str, **query: str | int) -> "Pages[Any]":
        async def load(after: str | None) -> Page[Any]:
            params = _query(**({"limit": 100} | query), after=after)
            return cast(Page[Any], await self._json("GET", path, params=params))

        return Pages(load)

    async def _post(self, path: str, body: Mapping[str, Any], key: str | None, *, located: bool = False) -> Any:
        headers = {"Idempotency-Key": key or _new_key()}
        return await self._json("POST", path, body=body, headers=headers, located=located)

    async def _json(self, method: str, path: str, **request: Any) -> Any:
        return _decoded(await self._call(method, path, **request))

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        is_conditional: bool = False,
        located: bool = False,
    ) -> httpx.Response:
        """Make a call, again while the server is away or busy, and return its answer.

        Args:
            is_conditional: The call is not repeated if it may have been done.
            located: A refusal that says where the turn is ends the call.
        """
        patience = _Patience(self.bounds, self._on_wait)
        may_be_done = False
        while True:
            patience.begin()
            try:
                request = self.build(method, path, body=body, params=params, headers=headers)
                response = await self._answer(request)
            except LastcallError as failed:
                error = failed
                may_be_done |= not isinstance(failed.__cause__, _UNSENT)
            else:
                if response.is_success or (method == "DELETE" and may_be_done and response.status_code == 404):
                    return response
                error = _refusal(response)
                may_be_done |= error.is_passing and error.retry_after_s is None
            if not error.is_passing or (is_conditional and may_be_done) or (located and error._turn is not None):
                raise error
            await patience.wait(error)

    def build(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Request:
        """A request for a call that has no method here, with the key."""
        named = {"Accept": "application/json", **(headers or {})}
        key = self._api_key() if callable(self._api_key) else self._api_key
        if key is not None:
            named["Authorization"] = f"Bearer {key}"
        if self._owner is not None:
            named["Lastcall-Owner"] = self._owner
        bounds = self.bounds
        timeout = httpx.Timeout(bounds.timeout_s, connect=bounds.connect_timeout_s)
        request = self._http.build_request(
            method, f"{self.url}{path}", json=body, params=params, headers=named, timeout=timeout
        )
        request.stream = _Body(request.content)
        return request

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        """The whole answer. Raises: LastcallError, if there is none in time."""
        with _Faults(), anyio.fail_after(self.bounds.timeout_s):
            return await self._http.send(request)

    async def _open(self, request: httpx.Request) -> httpx.Response:
        """The answer without its body, which is a stream. Raises: LastcallError, if there is none in time."""
        bounds = self.bounds
        request.extensions["timeout"] |= {"read": bounds.silence_s}
        with _Faults(), anyio.fail_after(bounds.connect_timeout_s + bounds.silence_s):
            return await self._http.send(request, stream=True)


class _Body(httpx.AsyncByteStream):
    """The body of a request, in one piece.

    httpx' own is a generator, which a connection that breaks within the body, or a cancelled call, leaves to the
    garbage collector: Trio warns (https://github.com/encode/httpx/issues/3686).
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._is_sent = False

    def __aiter__(self) -> Self:
        self._is_sent = False  # a request may be sent again
        return self

    async def __anext__(self) -> bytes:
        if self._is_sent:
            raise StopAsyncIteration
        self._is_sent = True
        return self._content


class _Closed:
    """An iterator over events whose context, when it is left, closes the connection."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def aclose(self) -> None:
        """Close the connection. Idempotent."""
        raise NotImplementedError


class Watch(_Closed):
    """The events of one answer: ``async with client.watch(path) as events:``, and then ``async for event in events``.

    Entering waits for the head of the answer. The iteration ends when the answer does. Leaving closes the connection.

    Raises:
        LastcallError: The call is refused, the server does not answer, or is silent for longer than ``silence_s``.
    """

    def __init__(self, client: Client, path: str, params: Mapping[str, str] | None) -> None:
        self._client = client
        self._path, self._params = path, params
        self._decoder = _EventDecoder(client.bounds.event_bytes_max)
        self._ready: deque[Event] = deque()
        self._response: httpx.Response | None = None
        self._body: AsyncIterator[bytes] | None = None

    async def __aenter__(self) -> Self:
        headers = {"Accept": "text/event-stream"}
        request = self._client.build("GET", self._path, params=self._params, headers=headers)
        response = self._response = await self._client._open(request)
        self._body = response.aiter_bytes()
        try:
            await _check_stream(response, self._body, timeout_s=self._client.bounds.timeout_s)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            if self._body is None:
                raise StopAsyncIteration
            try:
                with _Faults():
                    chunk = await anext(self._body, b"")
            except LastcallError:
                await self.aclose()
                raise
            except BaseException:
                self._body = self._response = None  # cancelled: httpx has closed the connection
                raise
            if not chunk:
                await self.aclose()
            try:
                self._ready.extend(self._decoder.feed(chunk))
            except ValueError as error:
                await self.aclose()
                raise LastcallError("The stream has an event that is no JSON.", code="malformed_answer") from error
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Close the connection. Idempotent."""
        body, response, self._body, self._response = self._body, self._response, None, None
        if response is not None:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + 5):
                await _close(response, body, grace_s=0)


class Pages(Generic[_T]):
    """A list that is read in pages while you iterate."""

    def __init__(self, load: Callable[[str | None], Awaitable[Page[_T]]]) -> None:
        self._load = load
        self._ready: deque[_T] = deque()
        self._next: str | None = None
        self._is_last = False

    def __aiter__(self) -> AsyncIterator[_T]:
        return Pages(self._load)

    async def __anext__(self) -> _T:
        while not self._ready:
            if self._is_last:
                raise StopAsyncIteration
            page = await self._load(self._next)
            self._ready.extend(page["data"])
            self._next = page["next"]
            self._is_last = self._next is None
        return self._ready.popleft()

    async def collect(self) -> list[_T]:
        """All items."""
        return [item async for item in self]


@dataclass(frozen=True, slots=True)
class _Start:
    """The POST that starts a turn: the same in each attempt."""

    path: str
    body: Mapping[str, Any]
    key: str
    request_id: str | None


class TurnStream(_Closed):
    """The events of a turn, each once and in order, across cuts and restarts. Made by the calls of :class:`Client`.

    A loop that may be left before the end belongs into ``async with client.stream(…) as events:``, which closes the
    connection; otherwise the connection is closed with the client. A ``__anext__`` that was cancelled may be called
    again, and goes on after the last event.

    Attributes:
        session_id, turn_id: Known from the answer's head on.
        seq: The seq of the last event that was yielded.
        end: The event that ended the turn, once it was yielded.
    """

    def __init__(self, client: Client, start: _Start | None, *, session_id: str | None, on_wait: OnWait | None) -> None:
        self.session_id = session_id
        self.turn_id: str | None = None
        self.seq = 0
        self.end: Event | None = None
        self._client = client
        self._start = start
        self._patience = _Patience(client.bounds, on_wait)
        self._ready: deque[Event] = deque()
        self._pieces: list[str] = []
        self._body: AsyncIterator[bytes] | None = None
        self._response: httpx.Response | None = None
        self._decoder = _EventDecoder(client.bounds.event_bytes_max)
        self._read_seq = 0
        self._is_over = False
        self._pending: LastcallError | None = None

    def __repr__(self) -> str:
        return f"<TurnStream of {self.turn_id} at seq {self.seq}{' over' if self._is_over else ''}>"

    @property
    def text(self) -> str:
        """The reply so far: of the events that were yielded."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    async def __aenter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            if self._is_over:
                await self.aclose()
                raise StopAsyncIteration
            if self._pending is not None:
                error, self._pending = self._pending, None
                await self._patience.wait(error)
            elif self._body is None:
                await self._connect()
            else:
                await self._read(self._body)
        return self._yielded(self._ready.popleft())

    async def finish(self) -> Event | None:
        """Read to the end, and return it: None if it was seen before. :attr:`text` is the reply then."""
        try:
            async for _ in self:
                pass
        finally:
            await self.aclose()
        return self.end

    async def cancel(self) -> Turn:
        """End the turn, and return it ended. Raises: RuntimeError, before the stream has told its turn."""
        if self.session_id is None or self.turn_id is None:
            raise RuntimeError("the turn has not begun: read its first event, or leave the stream")
        return await self._client.cancel(self.session_id, self.turn_id)

    async def aclose(self) -> None:
        """Close the connection. Idempotent."""
        body, response, self._body, self._response = self._body, self._response, None, None
        if response is not None:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + 5):
                await _close(response, body, grace_s=_CLOSING_S if self._is_over else 0)
        self._client._streams.discard(self)

    def _yielded(self, event: Event) -> Event:
        if event.seq is not None:
            self.seq = event.seq
        if event.type == "turn.delta":
            self._pieces.append(event.text)
        elif event.type == "turn.resumed":
            self._pieces = [self.text[: event.data.get("text_length", 0)]]
        elif event.is_end:
            self.end = event
            if event.seq is None:
                self._pieces = [event.text]
            elif event.data.get("reason") == "crash":  # which may have taken a part of what was shown
                self._pieces = [self.text[: event.data.get("text_length")]]
        return event

    # Attempts

    async def _connect(self) -> None:
        """Make one attempt to open the stream, where it stands now."""
        self._read_seq = max(self._read_seq, self.seq)
        self._patience.begin()
        try:
            response = await self._client._open(self._request())
        except LastcallError as error:
            self._fail(error)
            return
        self._response, self._body = response, response.aiter_bytes()
        self._client._streams.add(self)
        self._learn(_turn_of(response))
        if response.status_code == 204:
            self._is_over = True  # the turn has ended, and all its events were seen
        elif response.status_code != 200:
            await self._take_refusal(response)
        elif not _is_event_stream(response):
            await self.aclose()
            self._fail(_no_stream(response), is_passing=self._read_seq > 0)
        else:
            self._decoder = _EventDecoder(self._client.bounds.event_bytes_max)

    def _request(self) -> httpx.Request:
        stream = {"Accept": "text/event-stream"}
        if self.session_id is not None and self.turn_id is not None:
            seen = {"Last-Event-ID": str(self._read_seq)} if self._read_seq else {}
            return self._client.build("GET", f"{_turn(self.session_id, self.turn_id)}/events", headers=stream | seen)
        assert self._start is not None, "a stream that starts no turn has one"
        start = self._start
        named = {"X-Request-ID": start.request_id} if start.request_id is not None else {}
        headers = stream | {"Idempotency-Key": start.key} | named
        return self._client.build("POST", start.path, body=start.body, headers=headers)

    def _learn(self, turn: tuple[str, str] | None) -> None:
        if turn is not None and self.turn_id is None:
            self.session_id, self.turn_id = turn

    async def _take_refusal(self, response: httpx.Response) -> None:
        assert self._body is not None
        refused = await _read_refusal(response, self._body, timeout_s=self._client.bounds.timeout_s)
        await self.aclose()
        if refused.code in {"events_lost", "events_deleted"} and self.turn_id is not None:
            await self._take_record(refused.code)
        else:
            # A refusal that says where the turn is: it was accepted, and its events are there.
            self._learn(refused._turn if refused.status in (503, 504) else None)
            self._fail(refused)

    async def _take_record(self, code: str) -> None:
        """The server has no events any more: the end of the turn is told by its record."""
        assert self.session_id is not None
        assert self.turn_id is not None
        turn = await self._client.wait_turn(self.session_id, self.turn_id)
        kind = f"turn.{turn['state']}"
        kept = {name: turn[name] for name in ("reason", "error", "finish_reason", "usage", "text")}
        data = {"type": kind, "text_length": len(turn["text"]), "replaces": code, **kept}
        self._ready.append(Event(kind, None, data))
        self._is_over = True

    def _fail(self, error: LastcallError, *, is_passing: bool = False) -> None:
        """Wait before the next attempt. Raises ``error`` if there is to be none."""
        if not (is_passing or error.is_passing):
            raise error
        self._pending = error

    # Events

    async def _read(self, body: AsyncIterator[bytes]) -> None:
        """Read on: until there are events, or the connection has ended."""
        try:
            with _Faults():
                chunk = await anext(body, b"")
        except LastcallError as error:
            await self._cut(error)
            return
        except BaseException:
            self._body = self._response = None  # cancelled: httpx has closed the connection
            self._client._streams.discard(self)
            raise
        try:
            for event in self._decoder.feed(chunk) if chunk else self._decoder.end():
                self._take(event)
        except ValueError:
            await self._cut(LastcallError("The stream has an event that is no JSON.", code="cut"))
            return
        except LastcallError:
            await self.aclose()
            raise
        self._patience.pause_s = self._decoder.retry_s or self._patience.pause_s
        if not chunk and not self._is_over:
            await self._cut(LastcallError("The stream has ended before its turn.", code="cut"))

    def _take(self, event: Event) -> None:
        if event.seq is None or event.seq <= self._read_seq or self._is_over:
            return  # seen before
        self._read_seq = event.seq
        self._patience.renew()
        self._ready.append(event)
        self._is_over = event.is_end
        session_id, turn_id = event.data.get("session_id"), event.data.get("turn_id")
        if isinstance(session_id, str) and isinstance(turn_id, str):
            self._learn((session_id, turn_id))

    async def _cut(self, error: LastcallError) -> None:
        """The connection has ended. A server that has handed the turn over is asked again at once, but not twice."""
        await self.aclose()
        if not self._decoder.has_moved or self._patience.attempts:
            self._pending = error
        else:
            self._patience.attempts = 1


class _EventDecoder:
    """Server-sent events, from chunks that end anywhere: in a line end or in a character, too.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html

    Attributes:
        retry_s: The pause before a reconnect that the stream asks for.
        has_moved: Whether the last comment says that the turn was handed over to another process.
    """

    def __init__(self, event_bytes_max: int) -> None:
        self.retry_s: float | None = None
        self.has_moved = False
        self._event_bytes_max = event_bytes_max
        self._line: list[bytes] = []
        self._size = 0
        self._data: list[bytes] = []
        self._name = ""
        self._after_return = self._has_begun = False

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that are whole now. Raises: ValueError, for one that is no JSON; LastcallError, for a huge one."""
        if self._after_return and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_return = chunk.endswith(b"\r")
        *lines, rest = re.split(rb"\r\n|\r|\n", chunk)
        for line in lines:
            self._add(line)
            yield from self._take_line(b"".join(self._line))
            self._line.clear()
        if rest:
            self._add(rest)

    def end(self) -> Iterator[Event]:
        """The end of the stream: an event without its blank line is none, but a comment is one."""
        if self._line and self._line[0].startswith(b":"):
            yield from self._take_line(b"".join(self._line))

    def _add(self, part: bytes) -> None:
        self._line.append(part)
        self._size += len(part)
        if self._size > self._event_bytes_max:
            raise LastcallError(f"An event has more than {self._event_bytes_max} bytes.", code="event_too_large")

    def _take_line(self, line: bytes) -> Iterator[Event]:
        if not self._has_begun:
            self._has_begun = True
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            data, self._data, self._size = self._data, [], 0
            kind, self._name = self._name, ""
            if data:
                yield _event_of(json.loads(b"\n".join(data)), kind)
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self.has_moved = False
        else:
            self._size -= len(line)  # of no event: a stream may have any number of them
            if name == b"event":
                self._name = value.decode("utf-8", "replace")
            elif name == b"":
                self.has_moved = value.strip() == b"moved"
            elif name == b"retry" and value.isdigit() and len(value) < 9:
                self.retry_s = int(value) / 1000


def _event_of(data: Any, name: str) -> Event:
    """The event with this data; its type is in there, or it is the name of the event in the stream."""
    kind = data.get("type", name) if isinstance(data, dict) else None
    if not isinstance(kind, str) or not kind:
        raise ValueError("an event is an object with a type")
    seq = data.get("seq")
    return Event(kind, seq if isinstance(seq, int) else None, data)


async def _close(response: httpx.Response, body: AsyncIterator[bytes] | None, *, grace_s: float) -> None:
    """Close a response and its body.

    httpx reads a body through generators, one in the other, and closes only the outermost: the others would be left to
    the garbage collector. A read that is cancelled ends all of them.
    """
    if body is not None and not response.is_closed:
        with suppress(httpx.HTTPError), anyio.move_on_after(grace_s) as scope:
            if not grace_s:
                scope.cancel()
            async for _ in body:
                pass
    await response.aclose()


class _Faults:
    """Translates the faults of httpx. Raises: LastcallError"""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            raise LastcallError("The server does not answer.", code="timeout") from error
        if isinstance(error, _OUR_FAULTS):
            return
        if isinstance(error, httpx.TransportError | httpx.DecodingError):
            said = str(error) or type(error).__name__
            raise LastcallError(f"The server cannot be reached: {said}", code="unreachable") from error


async def _check_stream(response: httpx.Response, body: AsyncIterator[bytes], *, timeout_s: float) -> None:
    """Raises: LastcallError, if this answer is no event stream."""
    if response.status_code != 200:
        raise await _read_refusal(response, body, timeout_s=timeout_s)
    if not _is_event_stream(response):
        raise _no_stream(response)


def _is_event_stream(response: httpx.Response) -> bool:
    content_type: str = response.headers.get("Content-Type", "")
    return content_type.startswith("text/event-stream")


def _no_stream(response: httpx.Response) -> LastcallError:
    return LastcallError(f"{response.url} answers no event stream.", code="malformed_answer", status=200)


async def _read_refusal(response: httpx.Response, body: AsyncIterator[bytes], *, timeout_s: float) -> LastcallError:
    """The error of an answer whose body is not read yet."""
    content = b""
    with suppress(LastcallError), _Faults(), anyio.fail_after(timeout_s):
        async for chunk in body:
            content += chunk
            if len(content) > _REFUSAL_BYTES_MAX:
                break
    return _refusal(response, content)


def _refusal(response: httpx.Response, content: bytes | None = None) -> LastcallError:
    """The error of an answer that is no success."""
    status, headers = response.status_code, response.headers
    try:
        problem = json.loads(response.content if content is None else content)
    except ValueError:
        problem = None
    if not isinstance(problem, dict) or not isinstance(problem.get("code"), str):
        problem = {"code": "redirected" if 300 <= status < 400 else "unknown"}
    detail = problem.get("detail") or f"The server answered {status} to {response.request.method} {response.url}."
    error = LastcallError(
        detail,
        code=problem["code"],
        status=status,
        title=problem.get("title") or response.reason_phrase,
        request_id=headers.get("X-Request-ID"),
        retry_after_s=_retry_after_s(headers.get("Retry-After")),
        turn_id=problem.get("turn_id"),
        problem=problem,
    )
    error._turn = _turn_of(response)
    return error


def _retry_after_s(value: str | None) -> float | None:
    """``Retry-After`` in seconds: a number, or the date that a proxy sends."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return min(float(value), 1e9)
    with suppress(ValueError):
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return None


def _turn_of(response: httpx.Response) -> tuple[str, str] | None:
    """The ids of the session and the turn that ``Location`` names: its path may have a prefix that is not ours."""
    found = _TURN_PATH.search(response.headers.get("Location", ""))
    return None if found is None else (unquote(found["session"]), found["turn"])


def _decoded(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        _malformed(response)


def _malformed(response: httpx.Response) -> NoReturn:
    raise LastcallError(f"{response.url} answers no JSON.", code="malformed_answer", status=response.status_code)


def _start_body(
    message: str | Sequence[Mapping[str, Any]], parent: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    at = {} if parent == "head" else {"parent": parent}
    return {"input": message, "on_disconnect": "continue"} | at | dict(options)


def _query(**values: str | int | None) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}


def _session(session_id: str) -> str:
    return f"/sessions/{_part(session_id)}"


def _turn(session_id: str, turn_id: str) -> str:
    return f"{_session(session_id)}/turns/{_part(turn_id)}"


def _part(value: str) -> str:
    """A part of a path. Raises: ValueError, if a URL cannot have it."""
    if value in {"", ".", ".."}:
        raise ValueError(f"{value!r} is no id: a URL cannot have it")
    return quote(value, safe="")


def _new_key() -> str:
    return str(uuid.uuid4())
