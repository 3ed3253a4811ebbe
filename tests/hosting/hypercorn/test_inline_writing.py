"""Events that the appending task writes: each client gets each frame once and in order, whatever its connection takes.

The clock stands still, so no stream makes a pause. On real sockets: ``test_inline_on_sockets.py``.
"""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api.http.event_frames import EncodeFrame
from service.api.http.event_stream import PIECE_WRITER, EventStream, LastPiece
from service.api.http.face_frames import encoder_of
from service.api.native.event_frames import encode_frame
from service.freezes import FreezeWatch
from service.hosting.hypercorn.chunked_response import ChunkedResponse
from service.sessions.events import event_log
from service.sessions.events.event_log import INLINE_READERS_MAX, WOKEN_MAX, EventLog
from service.sessions.events.events import Event, TurnCompleted, TurnDelta
from service.sessions.events.streams import Streams
from service.stop_state import Phase, StopState
from tests.api.counting_face import CountingFace

MIB = 1024 * 1024
PLENTY = 1 << 40


def encode_for_another_face(event: Event) -> bytes:
    return b"event: other\nid: %d\n\n" % event.seq


FACES: tuple[EncodeFrame, ...] = (encode_frame, encode_for_another_face)


def encode_in_states(log: EventLog, *, after: int) -> EncodeFrame:
    """The frames of a face whose frames depend on the events before, up to a seq."""
    encoder = encoder_of(log, CountingFace())
    while encoder.seq < after:
        encoder.skip_some(log)
    return encoder.encode


class Log(EventLog):
    """A log to which a test appends."""

    def __init__(self) -> None:
        super().__init__(bytes_max=64 * MIB)

    def add(self, text: str = "x", *, tells: bool = True) -> None:
        assert self.append(TurnDelta(seq=self.last_seq + 1, text=text), tells=tells)

    def end(self) -> None:
        self.close(TurnCompleted(seq=self.last_seq + 1, finish_reason="stop", usage=None, text_length=0))

    def frames(self, encode: EncodeFrame, *, after: int = 0) -> bytes:
        return b"".join(map(encode, self.events(after=after)))


class FakeConnection:
    """A connection that takes ``room`` bytes. ``by_tasks`` are the writes of the streams' own tasks."""

    def __init__(self, room: int) -> None:
        self.taken = bytearray()
        self.room = room
        self.by_tasks = 0
        self._is_sending = False
        self._room_changes = trio.lowlevel.ParkingLot()

    def give_room(self, size: int) -> None:
        self.room += size
        self._room_changes.unpark_all()

    def write_now(self, data: bytes) -> int:
        return 0 if self._is_sending else self._take(data)

    async def write(self, data: bytes) -> None:
        assert not self._is_sending
        self.by_tasks += 1
        self._is_sending = True
        try:
            while data := data[self._take(data) :]:
                await self._room_changes.park()
        finally:
            self._is_sending = False

    def _take(self, data: bytes) -> int:
        taken = data[: self.room]
        self.taken += taken
        self.room -= len(taken)
        return len(taken)


class Reader:
    """A client's stream, with the part of the host that is between it and its connection."""

    def __init__(
        self, log: EventLog, streams: Streams, *, encode: EncodeFrame = encode_frame, after: int = 0, room: int = PLENTY
    ) -> None:
        self.after = after
        self.encode = encode
        self.connection = FakeConnection(room)
        self.scope = trio.CancelScope()
        self.is_ended = False
        self.response = ChunkedResponse(cast("Any", self.connection))
        self.slot = streams.open_stream()
        self.stream = EventStream(log, self.slot, after=after, encode=encode, scope={PIECE_WRITER: self.response})

    async def run(self) -> None:
        try:
            with self.scope:
                async for piece in self.stream:
                    await self.response.write(piece)
                    self.is_ended = isinstance(piece, LastPiece)
        finally:
            self.slot.close()

    @property
    def received(self) -> bytes:
        """The frames that have arrived, of whole chunks and without comments."""
        return re.sub(rb"^(retry: \d+|: heartbeat)\n", b"", dechunked(bytes(self.connection.taken)), flags=re.MULTILINE)


def dechunked(data: bytes) -> bytes:
    """The chunks that are whole; what follows is the beginning of another chunk."""
    whole = b""
    while data:
        size, found, rest = data.partition(b"\r\n")
        if not found or len(rest) < int(size, 16) + 2:
            break
        whole += rest[: int(size, 16)]
        assert rest[int(size, 16) : int(size, 16) + 2] == b"\r\n", "the chunks are torn"
        data = rest[int(size, 16) + 2 :]
    assert not data or re.match(rb"[0-9a-f]+(\r|$)|\Z", data), "bytes that begin no chunk"
    return whole


@dataclass
class World:
    """A log, its readers, and what a test does with them."""

    nursery: trio.Nursery
    log: Log = field(default_factory=Log)
    stop: StopState = field(default_factory=lambda: StopState(interrupts_at_once=True))
    watch: FreezeWatch = field(
        default_factory=lambda: FreezeWatch(counts_frozen_time=lambda: False, clock=lambda: 0.0, cpu_clock=lambda: 0.0)
    )
    readers: list[Reader] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams = Streams(streams_max=10_000, heartbeat_interval_s=15, stop=self.stop)

    def join(self, **options: Any) -> Reader:
        reader = Reader(self.log, self.streams, **options)
        reader.stream._watch = self.watch
        self.readers.append(reader)
        self.nursery.start_soon(reader.run)
        return reader

    def join_in_face(self, face: int, *, after: int, room: int) -> Reader:
        """Join in one of the faces, the last of which has states."""
        encode = FACES[face] if face < len(FACES) else encode_in_states(self.log, after=after)
        return self.join(encode=encode, after=after, room=room)


@asynccontextmanager
async def opened_world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery)
        nursery.cancel_scope.cancel()


# Any mixture

Step = Callable[[World], Any]
lengths = st.sampled_from([0, 1, 5, 60, 700, 5000, 30_000])
rooms = st.sampled_from([0, 1, 2, 7, 40, 90, 300, 5000, PLENTY])
numbers = st.integers(0, 5)


def of_reader(number: int, act: Callable[[Reader], Any]) -> Step:
    return lambda world: act(world.readers[number % len(world.readers)]) if world.readers else None


def burst(sizes: list[int], *, apart: bool) -> Step:
    def act(world: World) -> None:
        for size in sizes:
            world.log.add("é" * size if size % 2 else "x" * size, tells=apart)
        world.log.tell_readers()

    return act


async def settle(_world: World) -> None:
    await wait_all_tasks_blocked()


async def one_round(_world: World) -> None:
    await trio.lowlevel.checkpoint()


def busy(took_s: float) -> Step:
    return lambda world: setattr(world.watch, "steps_took_s", took_s)


steps: st.SearchStrategy[Step] = st.one_of(
    st.builds(burst, st.lists(lengths, min_size=1, max_size=4), apart=st.booleans()),
    st.builds(burst, st.lists(lengths, min_size=1, max_size=1), apart=st.booleans()),
    st.builds(lambda sizes: burst(sizes * 70, apart=True), st.lists(st.just(1), min_size=1, max_size=1)),
    st.builds(
        lambda face, behind, room: (
            lambda world: world.join_in_face(face, after=max(world.log.last_seq - behind, 0), room=room)
        ),
        st.integers(0, len(FACES)),
        st.integers(0, 90),
        rooms,
    ),
    st.builds(lambda number, size: of_reader(number, lambda it: it.connection.give_room(size)), numbers, rooms),
    st.builds(lambda number: of_reader(number, lambda it: it.scope.cancel()), numbers),
    st.builds(lambda number: of_reader(number, lambda it: it.slot.wake()), numbers),
    st.builds(busy, st.sampled_from([0.0, 0.5])),
    st.just(settle),
    st.just(settle),
    st.just(one_round),
)


def run_world(taken: list[Step], *, ends_only: bool) -> None:
    async def run() -> None:
        with trio.fail_after(1000):
            async with opened_world() as world:
                for room in (PLENTY, 90):
                    world.join(room=room)
                for step in taken:
                    if (wait := step(world)) is not None and not isinstance(wait, Reader):
                        await wait
                if ends_only:
                    world.stop.enter(Phase.CLOSING)
                world.log.end()
                for reader in world.readers:
                    reader.connection.give_room(PLENTY)
                    expected = world.log.frames(reader.encode, after=reader.after)
                    if reader.scope.cancel_called:
                        assert expected.startswith(reader.received)
                await wait_all_tasks_blocked()
                await trio.sleep(1)
                for reader in world.readers:
                    expected = world.log.frames(reader.encode, after=reader.after)
                    if reader.scope.cancel_called:
                        assert expected.startswith(reader.received)
                    else:
                        assert reader.is_ended
                        assert reader.received == expected
                assert world.streams.open == 0
                assert world.streams.ended == sum(reader.is_ended for reader in world.readers)
                assert world.log._waiting == {}

    trio.run(run, clock=MockClock(autojump_threshold=0))


@given(st.lists(steps, max_size=14), st.booleans(), st.booleans())
@example([settle, burst([60], apart=True), burst([60], apart=True)], False, False)
def test_each_reader_gets_each_frame_once_and_in_order(taken: list[Step], ends_only: bool, narrow: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if narrow:  # as with hundreds of readers
            for bound in ("INLINE_READERS_MAX", "WOKEN_MAX", "_WOKEN_BY_WOKEN"):
                monkeypatch.setattr(event_log, bound, 1)
        run_world(taken, ends_only=ends_only)


# One after the other


async def test_a_reader_that_waits_has_an_event_in_the_step_that_appends_it(autojump_clock: MockClock) -> None:
    async with opened_world() as world:
        readers = [world.join(), world.join(encode=encode_for_another_face)]
        await wait_all_tasks_blocked()
        for _ in range(200):
            world.log.add()
            for reader in readers:
                assert reader.received == world.log.frames(reader.encode)
        assert [reader.connection.by_tasks for reader in readers] == [1, 1], "the first piece alone"


async def test_events_that_come_in_one_step_are_one_piece(autojump_clock: MockClock) -> None:
    async with opened_world() as world:
        reader = world.join()
        await wait_all_tasks_blocked()
        before = len(reader.connection.taken)
        burst([3, 3, 3], apart=False)(world)
        chunk = bytes(reader.connection.taken[before:])
        assert chunk == b"%x\r\n%b\r\n" % (len(world.log.frames(encode_frame)), world.log.frames(encode_frame))


async def test_what_a_connection_does_not_take_is_sent_by_the_stream_s_task_and_first(
    autojump_clock: MockClock,
) -> None:
    async with opened_world() as world:
        reader = world.join()
        await wait_all_tasks_blocked()
        reader.connection.taken.clear()
        reader.connection.room = 20
        world.log.add()
        assert len(reader.connection.taken) == 20
        await wait_all_tasks_blocked()
        reader.connection.give_room(PLENTY)
        await wait_all_tasks_blocked()
        frame = world.log.frames(encode_frame)
        assert bytes(reader.connection.taken) == b"%x\r\n%b\r\n" % (len(frame), frame), "the rest alone"
        world.log.add()
        assert reader.received == world.log.frames(encode_frame), "it is written inline again"


async def test_events_after_half_a_piece_follow_it(autojump_clock: MockClock) -> None:
    async with opened_world() as world:
        reader = world.join()
        await wait_all_tasks_blocked()
        reader.connection.room = 20
        for _ in range(3):
            world.log.add()
        assert not reader.response.write_now(b"no piece comes in between")
        await wait_all_tasks_blocked()
        reader.connection.give_room(PLENTY)
        await wait_all_tasks_blocked()
        assert reader.received == world.log.frames(encode_frame)


async def test_a_reader_hears_nothing_where_nothing_was_appended(autojump_clock: MockClock) -> None:
    async with opened_world() as world:
        reader = world.join()
        await wait_all_tasks_blocked()
        reader.stream._writer = None
        world.log.tell_readers()
        assert len(world.log._waiting) == 1


async def test_a_connection_that_takes_nothing_leaves_all_to_the_stream_s_task(autojump_clock: MockClock) -> None:
    async with opened_world() as world:
        reader = world.join()
        await wait_all_tasks_blocked()
        reader.connection.room = 0
        before = len(reader.connection.taken)
        world.log.add()
        world.log.add()
        assert not reader.stream._has_rest
        await wait_all_tasks_blocked()
        reader.connection.give_room(PLENTY)
        await wait_all_tasks_blocked()
        frames = world.log.frames(encode_frame)
        assert bytes(reader.connection.taken[before:]) == b"%x\r\n%b\r\n" % (len(frames), frames), "one piece"


@pytest.mark.parametrize("obstacle", ["busy", "large", "stop", "expected stop", "no writer"])
async def test_where_it_must_not_be_the_appending_task_writes_nothing(autojump_clock: MockClock, obstacle: str) -> None:
    async with opened_world() as world:
        reader = world.join()
        await wait_all_tasks_blocked()
        match obstacle:
            case "busy":
                world.watch.steps_took_s = 0.021
            case "stop":
                world.stop.enter(Phase.LAME_DUCK)
            case "expected stop":
                world.stop.expect_notice(lambda: world.stop.enter(Phase.LAME_DUCK))
            case "no writer":
                reader.stream._writer = None
        before = len(reader.connection.taken)
        world.log.add("x" * (5000 if obstacle == "large" else 5))
        assert len(reader.connection.taken) == before
        if obstacle == "expected stop":
            assert world.stop.phase is Phase.EXPECTED, "the step of a turn begins no stop"
        await wait_all_tasks_blocked()
        if "stop" in obstacle:
            assert len(reader.connection.taken) == before
            assert world.stop.phase is Phase.LAME_DUCK
            world.log.end()
            await wait_all_tasks_blocked()
        assert reader.received == world.log.frames(encode_frame)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in (Phase.SERVING, Phase.EXPECTED)])
async def test_a_stop_between_the_parts_of_a_piece_tears_nothing(autojump_clock: MockClock, phase: Phase) -> None:
    async with opened_world() as world:
        reader = world.join()
        await wait_all_tasks_blocked()
        reader.connection.room = 20
        world.log.add()
        world.stop.enter(phase)
        world.log.add()
        await wait_all_tasks_blocked()
        reader.connection.give_room(PLENTY)
        await wait_all_tasks_blocked()
        world.log.end()
        await wait_all_tasks_blocked()
        assert reader.received == world.log.frames(encode_frame)
        assert (world.streams.open, world.streams.ended) == (0, 1)


async def test_an_encoder_that_fails_ends_its_own_stream_alone(autojump_clock: MockClock) -> None:
    def fail(event: Event) -> bytes:
        if event.seq == 2:
            raise ZeroDivisionError
        return encode_frame(event)

    async with opened_world() as world:
        others = [world.join(), world.join(encode=encode_for_another_face)]
        failing = Reader(world.log, world.streams, encode=fail)
        last = world.join()
        await wait_all_tasks_blocked()

        async def read() -> None:
            with pytest.raises(ZeroDivisionError):
                await failing.run()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            for _ in range(3):
                world.log.add()
            for reader in (*others, last):
                assert reader.received == world.log.frames(reader.encode)
        assert failing.received == encode_frame(TurnDelta(seq=1, text="x"))
        assert world.streams.aborted == 1


async def test_of_many_readers_a_bounded_number_is_served_inline_and_then_others(
    autojump_clock: MockClock,
) -> None:
    async with opened_world() as world:
        for _ in range(5 * INLINE_READERS_MAX):
            world.join()
        await wait_all_tasks_blocked()
        served_before: set[Reader] = set()
        for _ in range(10):
            before = {reader: len(reader.connection.taken) for reader in world.readers}
            world.log.add()
            served = {reader for reader in world.readers if len(reader.connection.taken) > before[reader]}
            assert len(served) == INLINE_READERS_MAX
            assert not served & served_before
            served_before = served
            await wait_all_tasks_blocked()
            assert all(reader.received == world.log.frames(encode_frame) for reader in world.readers)


@pytest.mark.parametrize("news", [Log.add, Log.end])
async def test_of_many_tasks_a_bounded_number_is_woken_in_one_step(
    autojump_clock: MockClock, news: Callable[[Log], None]
) -> None:
    async with opened_world() as world:
        for _ in range(8 * WOKEN_MAX):
            world.join()
        await wait_all_tasks_blocked()
        news(world.log)
        assert len(world.log._waiting) == 7 * WOKEN_MAX
        for reader in world.readers[::3]:
            reader.scope.cancel()
        await wait_all_tasks_blocked()
        for number, reader in enumerate(world.readers):
            if number % 3:
                assert reader.received == world.log.frames(encode_frame)
        assert world.log._to_wake == {}


async def test_a_task_whose_turn_to_wake_has_not_come_sleeps_on_if_its_events_are_written_inline(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("INLINE_READERS_MAX", "WOKEN_MAX"):
        monkeypatch.setattr(event_log, bound, 1)
    async with opened_world() as world:
        for _ in range(4):
            world.join()
        await wait_all_tasks_blocked()
        waiting = [cast("EventStream", reader) for reader in world.log._waiting.values()]
        _woken, _, queued, inline = (it for stream in waiting for it in world.readers if it.stream is stream)
        world.log.add()
        assert inline.received
        inline.scope.cancel()
        world.log.add()
        assert queued.received == world.log.frames(encode_frame)
        await wait_all_tasks_blocked()
        assert b"heartbeat" not in queued.connection.taken
        assert queued.connection.by_tasks == 1


async def test_an_event_is_encoded_once_for_all_readers_of_a_face(autojump_clock: MockClock) -> None:
    encoded: list[int] = []

    def encode(event: Event) -> bytes:
        encoded.append(event.seq)
        return encode_frame(event)

    async with opened_world() as world:
        for room in (PLENTY, PLENTY, 30, PLENTY):
            world.join(encode=encode, room=room)
        await wait_all_tasks_blocked()
        for _ in range(5):
            world.log.add()
            await wait_all_tasks_blocked()
    assert encoded == [1, 2, 3, 4, 5]


async def test_silence_is_counted_from_the_last_event_that_was_written_inline(autojump_clock: MockClock) -> None:
    async with opened_world() as world:
        reader = world.join()
        await wait_all_tasks_blocked()
        await trio.sleep(10)
        world.log.add()
        for at_s, beats in ((15, 0), (24, 0), (25, 1)):
            await trio.sleep(at_s - trio.current_time())
            world.streams.wake_silent()
            await wait_all_tasks_blocked()
            assert reader.connection.taken.count(b": heartbeat") == beats
        assert reader.received == world.log.frames(encode_frame)
