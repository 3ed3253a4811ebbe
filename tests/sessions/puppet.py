"""A model client whose every step a test decides, and a stage to run sessions on.

The client can hang at exactly one phase (the head of the reply, a token, the close), as a test of cancellation
needs. The contract of the model clients is tested in ``tests/models``.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import trio

from service.api.native.event_frames import decode_frame, encode_frame
from service.errors import ModelError
from service.models.client import (
    NO_OPTIONS,
    ArgumentsDelta,
    CallOpened,
    EncryptedReasoning,
    Finished,
    FinishReason,
    ModelEvent,
    ModelRequest,
    Options,
    Progress,
    PromptItem,
    ReasoningDelta,
    TakeEvents,
    TextDelta,
    Usage,
    relay_received,
)
from service.sessions.events.event_log import EventLog, Events
from service.sessions.events.events import Event, Piece
from service.sessions.sessions import Sessions, open_sessions
from service.settings import Settings
from service.stop_state import StopState
from service.storage.memory import MemoryStore
from service.storage.records import BegunTurn, TurnRecord
from service.telemetry.metrics.metrics import Metrics
from service.telemetry.tracing import Tracing

CAP_S = 60
"""Bound on a step of a store with threads: no pause of this process is so long."""
IN_A_FILE = {"store_timeout_s": CAP_S, "cleanup_timeout_s": CAP_S}
"""The settings of a stage on such a store, whose clock is the real one."""


class LeavesPathsOut(MemoryStore):
    """Has only paths that are too long to be read with a write."""

    async def begin_turn(self, turn: TurnRecord, **rest: Any) -> BegunTurn:
        return BegunTurn((await super().begin_turn(turn, **rest)).session)


class Reply:
    """One reply, which a test writes step by step."""

    def __init__(self, request: ModelRequest) -> None:
        self.request = request
        self.closed = trio.Event()
        self._ready: list[ModelEvent] = []
        self._calls = 0
        self._error: Exception | None = None
        self._changes = trio.lowlevel.ParkingLot()
        self.usage: Usage | None = None
        """What the upstream has counted: set by a test, and with the end of the reply."""

    def say(self, *texts: str) -> None:
        self._put(*(TextDelta(text) for text in texts))

    def think(self, *texts: str) -> None:
        self._put(*(ReasoningDelta(text) for text in texts))

    def encrypt(self, text: str, upstream: str = "") -> None:
        self._put(EncryptedReasoning(text, upstream))

    def call(self, call_id: str, *arguments: str, name: str = "f", upstream: str = "") -> None:
        """Open a call, and send its arguments in these pieces."""
        number, self._calls = self._calls, self._calls + 1
        self._put(CallOpened(number, call_id, name, upstream))
        self.argue(number, *arguments)

    def argue(self, number: int, *arguments: str) -> None:
        """Send pieces of the arguments of a call; calls are numbered from 0."""
        self._put(*(ArgumentsDelta(number, piece) for piece in arguments))

    def work(self) -> None:
        self._put(Progress())

    def finish(self, reason: FinishReason = "stop") -> None:
        self._put(Finished(finish_reason=reason, usage=self.usage or Usage(input_tokens=1, output_tokens=2)))

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changes.unpark_all()

    def _put(self, *events: ModelEvent) -> None:
        self._ready.extend(events)
        self._changes.unpark_all()

    async def relay(self, take: TakeEvents) -> None:
        await relay_received(self, take)

    async def receive(self) -> Sequence[ModelEvent]:
        await trio.lowlevel.checkpoint()
        while not self._ready and self._error is None:
            await self._changes.park()
        if self._ready:
            events, self._ready = self._ready, []
            if isinstance(events[-1], Finished):
                self.usage = events[-1].usage
            return events
        assert self._error is not None
        raise self._error


class Puppet:
    """A model client. Replies queue up in :meth:`next_reply` as turns ask for them."""

    name = "puppet"

    def __init__(self) -> None:
        self.open_replies = 0
        self.refuse: ModelError | None = None
        self.takes_bytes: int | None = None
        """The longest prompt that the client does not refuse as too long."""
        self.counts_refused: Usage | None = None
        """What the upstream counts for a prompt that it refuses so."""
        self.asked: list[tuple[PromptItem, ...]] = []
        """Every prompt that the client got, refused or not."""
        self.continues = False
        """Whether the client goes on with a reply that was cut off."""
        self.hang_before_head = False
        self.close_s = 0.0
        """The time that leaving a reply takes, even if the leave is cancelled."""
        self._send, self._receive = trio.open_memory_channel[Reply](1000)

    def can_continue(self, text: str, options: Options = NO_OPTIONS) -> bool:
        return self.continues

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncIterator[Reply]:
        await trio.lowlevel.checkpoint()
        self.asked.append(request.prompt)
        if self.refuse is not None:
            raise self.refuse
        if self.takes_bytes is not None and sum(len(it.text.encode()) for it in request.prompt) > self.takes_bytes:
            too_long = ModelError("context_too_long", "Too long.")
            too_long.usage = self.counts_refused
            raise too_long
        reply = Reply(request)
        self.open_replies += 1
        self._send.send_nowait(reply)
        try:
            if self.hang_before_head:
                await trio.sleep_forever()
            yield reply
        finally:
            self.open_replies -= 1
            reply.closed.set()
            if self.close_s:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + self.close_s):
                    await trio.sleep_forever()
                await trio.lowlevel.checkpoint()  # noqa: ASYNC102  like a close that can be cancelled

    async def next_reply(self) -> Reply:
        with trio.fail_after(1000):
            return await self._receive.receive()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class TestClock:
    """Wall time that a test moves."""

    __test__ = False

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class Stage:
    """Sessions on a memory store with a puppet."""

    def __init__(
        self, sessions: Sessions, store: MemoryStore, puppet: Puppet, clock: TestClock, stop: StopState
    ) -> None:
        self.sessions = sessions
        self.store = store
        self.puppet = puppet
        self.clock = clock
        self.stop = stop


@asynccontextmanager
async def open_stage(store: MemoryStore | None = None, /, **settings: Any) -> AsyncIterator[Stage]:
    """Sessions with these settings over the defaults; on exit the stage checks that none of their parts is left.

    Args:
        settings: And ``tracing``, which makes the spans of turns, and ``metrics``, which count.
    """
    tracing: Tracing | None = settings.pop("tracing", None)
    metrics: Metrics | None = settings.pop("metrics", None)
    store = store or MemoryStore()
    puppet = Puppet()
    clock = TestClock()
    stop = StopState()
    async with open_sessions(
        store=store,
        client_for=lambda _model: puppet,
        clock=clock,
        settings=Settings.model_validate(settings),
        stop=stop,
        tracing=tracing,
        metrics=metrics,
    ) as sessions:
        yield Stage(sessions, store, puppet, clock, stop)
    assert puppet.open_replies == 0, "a model call outlived its turn"
    statistics = sessions.statistics()
    assert (statistics.turns_running, statistics.turns_queued, statistics.sessions_live) == (0, 0, 0)


async def frames_in(log: Events, *, after: int = 0) -> list[bytes]:
    """The frames that a reader of a log or a replay gets now, after a seq."""
    frames: list[bytes] = []
    while True:
        await log.load_after(after)
        events = log.read_after(after)
        if not events:
            return frames
        frames += map(encode_frame, events)
        after = events[-1].seq


def pieces_of(log: EventLog) -> list[str]:
    """The texts of all pieces so far, one by one."""
    return [event.text for event in log.events() if isinstance(event, Piece)]


async def read_all(log: Events, *, after: int = 0) -> list[Event]:
    """The events after a seq, up to the end of the log, as a client that decodes frames sees them."""
    events: list[Event] = []
    cursor = after
    with trio.fail_after(10_000):
        while True:
            await log.wait_beyond(cursor)
            await log.load_after(cursor)
            new = log.read_after(cursor)
            if not new:
                return events
            events += [decode_frame(encode_frame(event)) for event in new]
            cursor = new[-1].seq


def frames_of(log: EventLog) -> list[bytes]:
    """The frames of all events so far."""
    return [encode_frame(event) for event in log.events()]


def kinds(events: list[Event]) -> list[str]:
    """The ``type`` of each event."""
    return [str(type(event).__struct_config__.tag) for event in events]
