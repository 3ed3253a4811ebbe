"""The body of an event stream: all that is ready in one piece, comments in silence, an end that was sent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from quart import Request
from trio.testing import MockClock
from werkzeug.datastructures import Headers

from service.api.http.event_stream import EventStream, read_seen, wants_stream
from service.api.http.face_frames import Step, encoder_of, find_place
from service.api.http.held_bytes import HeldBytes, counting_bytes
from service.api.native.event_frames import encode_frame
from service.errors import EventsDeletedError, InvalidRequestError, SessionNotFoundError, StoreError
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import Event, Piece, TurnCompleted, TurnDelta
from service.sessions.events.streams import Streams
from service.sessions.upkeep.heartbeats import run_heartbeats
from service.stop_state import Phase, StopState


def delta(seq: int) -> TurnDelta:
    return TurnDelta(seq=seq, text=f"token {seq} ")


def terminal(seq: int) -> TurnCompleted:
    return TurnCompleted(seq=seq, finish_reason="stop", usage=None, text_length=1)


class NumberedState:
    """Each event is a frame with its number."""

    def piece(self, event: Piece, number: int) -> bytes:
        return b"data: %d\n\n" % number

    def step(self, event: Event, number: int, gap: int) -> Step:
        return Step([b"data: %d end\n\n" % number], self)


class NumberedFace:
    turn: Any = None  # it repeats no texts
    key = "numbered"
    end = b"data: over\n\n"

    def begin(self) -> NumberedState:
        return NumberedState()


class Opened:
    """A log with some deltas, and a stream of it."""

    def __init__(
        self,
        deltas: int = 0,
        *,
        after: int = 0,
        streams: Streams | None = None,
        scope: dict[str, object] | None = None,
    ) -> None:
        self.streams = streams or Streams(streams_max=2, heartbeat_interval_s=15, stop=StopState())
        self.log = EventLog(bytes_max=1 << 20)
        self.append(deltas)
        self.slot = self.streams.open_stream()
        self.stream = EventStream(self.log, self.slot, after=after, encode=encode_frame, scope=scope or {})

    def append(self, deltas: int) -> None:
        for _ in range(deltas):
            assert self.log.append(delta(self.log.last_seq + 1))

    def close(self) -> None:
        self.log.close(terminal(self.log.last_seq + 1))


@asynccontextmanager
async def opened_heartbeats(streams: Streams) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(run_heartbeats, streams)
        yield
        nursery.cancel_scope.cancel()


async def test_the_first_piece_has_the_retry_line_and_everything_ready() -> None:
    opened = Opened(2)
    assert await anext(opened.stream) == b"retry: 1000\n" + encode_frame(delta(1)) + encode_frame(delta(2))


async def test_events_that_are_ready_come_in_one_piece() -> None:
    opened = Opened()
    assert await anext(opened.stream) == b"retry: 1000\n"
    opened.append(3)
    assert await anext(opened.stream) == b"".join(encode_frame(delta(seq)) for seq in (1, 2, 3))


async def test_silence_is_filled_with_heartbeats_and_loses_nothing(autojump_clock: MockClock) -> None:
    opened = Opened(1)
    async with opened_heartbeats(opened.streams):
        await anext(opened.stream)
        for beat in (1, 2, 3):
            assert await anext(opened.stream) == b": heartbeat\n"
            assert trio.current_time() == 15 * beat
        opened.append(1)
        assert await anext(opened.stream) == encode_frame(delta(2))


async def test_every_blank_line_ends_an_event(autojump_clock: MockClock) -> None:
    """Some decoders make an event of each blank line after an id: httpx-sse 0.4.3, openai-python before 2.38."""
    opened = Opened()
    received = b""
    async with opened_heartbeats(opened.streams):
        for deltas in (0, 0, 2, 0, 1, 0, 0):
            opened.append(deltas)
            received += await anext(opened.stream)
        opened.close()
        received += await anext(opened.stream)
    assert received.count(b": heartbeat\n") == 4
    *blocks, rest = received.split(b"\n\n")
    assert rest == b""
    assert [block.count(b"data: ") for block in blocks] == [1] * 4


async def test_the_silence_of_each_stream_is_measured_by_itself(autojump_clock: MockClock) -> None:
    streams = Streams(streams_max=3, heartbeat_interval_s=15, stop=StopState())
    early, lively, late = (Opened(1, streams=streams) for _ in range(3))
    pieces: dict[Opened, list[tuple[float, bytes]]] = {}

    async def read(opened: Opened) -> None:
        pieces[opened] = []
        while trio.current_time() < 40:
            piece = await anext(opened.stream)
            pieces[opened].append((trio.current_time(), piece.partition(b"\n")[0]))

    async with opened_heartbeats(streams), trio.open_nursery() as nursery:
        nursery.start_soon(read, early)
        nursery.start_soon(read, lively)
        await trio.sleep(10)
        nursery.start_soon(read, late)
        lively.append(1)
        await trio.sleep(10)
        lively.append(1)
    beat = b": heartbeat"
    assert pieces[early] == [(0, b"retry: 1000"), (15, beat), (30, beat), (45, beat)]
    assert pieces[lively] == [(0, b"retry: 1000"), (10, b"id: 2"), (20, b"id: 3"), (35, beat), (50, beat)]
    assert pieces[late] == [(10, b"retry: 1000"), (25, beat), (40, beat)]


async def test_a_stream_that_left_gets_no_heartbeat_and_a_reader_that_is_not_silent_none_either(
    autojump_clock: MockClock,
) -> None:
    opened = Opened(1)
    await anext(opened.stream)
    other = opened.streams.open_stream()
    async with opened_heartbeats(opened.streams), trio.open_nursery() as nursery:
        nursery.start_soon(other.wait_beyond, opened.log, 1)
        await trio.sleep(10)
        with trio.move_on_after(10):
            await anext(opened.stream)
            pytest.fail("its own silence began at 10")
        opened.slot.close(ended=False)
    assert trio.current_time() == 20


async def test_streams_that_have_left_do_not_pile_up_until_the_time_of_a_heartbeat(autojump_clock: MockClock) -> None:
    streams = Streams(streams_max=1000, heartbeat_interval_s=10**6, stop=StopState())
    log = EventLog(bytes_max=1 << 20)
    for _ in range(1000):
        slot = streams.open_stream()
        with trio.move_on_after(0.001):
            await slot.wait_beyond(log, 0)
        slot.close()
    assert len(streams._due) < 100


async def test_where_the_end_is_a_moment_away_nothing_is_written_before_it(autojump_clock: MockClock) -> None:
    stop = StopState(interrupts_at_once=True)
    opened = Opened(1, streams=Streams(streams_max=2, heartbeat_interval_s=15, stop=stop))
    await anext(opened.stream)
    stop.expect_notice(lambda: stop.enter(Phase.DRAINING))
    opened.append(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_close_later, opened, 0.05)
        assert await anext(opened.stream) == encode_frame(delta(2)) + encode_frame(terminal(3))


async def test_a_stream_whose_pieces_take_long_to_write_writes_fewer_of_them(autojump_clock: MockClock) -> None:
    opened = Opened(1)
    await anext(opened.stream)
    await trio.sleep(0.05)  # as long as this write takes in a busy event loop
    opened.append(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_append_later, opened, 0.04)
        piece = await anext(opened.stream)
    assert piece == encode_frame(delta(2)) + encode_frame(delta(3))
    opened.append(1)
    assert await anext(opened.stream) == encode_frame(delta(4)), "the stream paused although there was time"


async def test_the_terminal_event_ends_a_pause(autojump_clock: MockClock) -> None:
    opened = Opened(1)
    await anext(opened.stream)
    await trio.sleep(0.09)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_close_soon, opened, 0.03)
        started_at = trio.current_time()
        assert await anext(opened.stream) == encode_frame(terminal(2))
        assert trio.current_time() - started_at == pytest.approx(0.03)


async def test_a_backlog_is_written_without_pauses(autojump_clock: MockClock) -> None:
    opened = Opened(5000)
    started_at = trio.current_time()
    while opened.stream._seq < 5000:
        await anext(opened.stream)
        await trio.sleep(0.05)
    pieces = (trio.current_time() - started_at) / 0.05
    assert pieces == pytest.approx(round(pieces))


async def _close_later(opened: Opened, after_s: float) -> None:
    await trio.sleep(after_s)
    opened.close()


async def _append_later(opened: Opened, seconds: float) -> None:
    await trio.sleep(seconds)
    opened.append(1)


async def test_a_stream_that_waits_wakes_for_the_terminal_event(autojump_clock: MockClock) -> None:
    opened = Opened()
    await anext(opened.stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_close_soon, opened)
        assert await anext(opened.stream) == encode_frame(terminal(1))
    assert trio.current_time() == 1


async def _close_soon(opened: Opened, seconds: float = 1) -> None:
    await trio.sleep(seconds)
    opened.close()


async def test_the_slot_is_ended_only_once_the_piece_with_the_terminal_event_was_sent() -> None:
    opened = Opened(1)
    opened.close()
    assert (await anext(opened.stream)).endswith(encode_frame(terminal(2)))
    assert (opened.streams.open, opened.streams.ended) == (1, 0)
    with pytest.raises(StopAsyncIteration):
        await anext(opened.stream)
    assert (opened.streams.open, opened.streams.ended) == (0, 1)


async def test_a_stream_that_joins_between_the_last_delta_and_the_terminal_event_gets_both() -> None:
    opened = Opened(1, after=1)
    assert await anext(opened.stream) == b"retry: 1000\n"
    opened.close()
    assert await anext(opened.stream) == encode_frame(terminal(2))


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(0, 30))
async def test_a_replay_from_any_seq_is_exact(appends: list[int], seen: int) -> None:
    opened = Opened(max(seen, 30), after=seen)
    received = await anext(opened.stream)
    for count in appends:
        opened.append(count)
        if count:
            received += await anext(opened.stream)
    opened.close()
    async for piece in opened.stream:
        received += piece
    last = opened.log.last_seq
    expected = b"".join(encode_frame(delta(seq)) for seq in range(seen + 1, last)) + encode_frame(terminal(last))
    assert received == b"retry: 1000\n" + expected


async def test_a_large_backlog_comes_in_bounded_pieces() -> None:
    opened = Opened(5000)
    opened.close()
    sizes = [len(piece) async for piece in opened.stream]
    assert len(sizes) > 2
    assert max(sizes) <= 64 * 1024 + len(b"retry: 1000\n")


@pytest.mark.parametrize("error", [StoreError("It hangs."), SessionNotFoundError("s"), EventsDeletedError("t")])
async def test_a_replay_that_cannot_be_read_further_is_cut(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def fail(_: int) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    opened = Opened(3)
    await anext(opened.stream)
    opened.append(2)
    monkeypatch.setattr(opened.log, "load_after", fail)
    assert [piece async for piece in opened.stream] == []
    assert (opened.streams.open, opened.streams.ended, opened.streams.aborted) == (0, 0, 1)


async def test_a_replay_that_is_cut_says_so_where_its_face_has_a_frame_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: int) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreError("It hangs.")

    opened = Opened(3)
    stream = EventStream(opened.log, opened.slot, after=0, encode=encode_frame, cut=b"data: cut\n\n", scope={})
    await anext(stream)
    opened.append(2)
    monkeypatch.setattr(opened.log, "load_after", fail)
    assert [piece async for piece in stream] == [b"data: cut\n\n"]
    assert (opened.streams.open, opened.streams.ended, opened.streams.aborted) == (0, 0, 1)


@pytest.mark.parametrize(
    ("header", "query", "seen"),
    [
        (None, b"", (0, "after")),
        (None, b"after=7", (7, "after")),
        ("", b"after=7", (7, "after")),
        ("12", b"after=7", (12, "Last-Event-ID")),
        (None, b"lastEventId=3", (3, "lastEventId")),
        (None, b"Last-Event-ID=3", (3, "Last-Event-ID")),
        (None, b"after=7&lastEventId=3", (3, "lastEventId")),
        (None, b"&lastEventId=3", (3, "lastEventId")),
        (None, b"lastEventId=&after=7", (7, "after")),
        (None, b"lastEventId=0&after=7", (0, "lastEventId")),
        (None, b"lastEventId=5&Last-Event-ID=5", (5, "lastEventId")),
        ("12", b"lastEventId=3&after=7", (12, "Last-Event-ID")),
        ("", b"lastEventId=3", (3, "lastEventId")),
    ],
)
def test_the_header_wins_over_the_id_of_the_query_and_that_over_after(
    header: str | None, query: bytes, seen: tuple[int, str]
) -> None:
    headers = Headers() if header is None else Headers({"Last-Event-ID": header})
    assert tuple(read_seen(_request(headers, query))) == seen


@pytest.mark.parametrize("query", [b"_=1700000000", b"_=1&_=2", b"after=7&t=a&t=b", b"%00=%ff", b"x", b"LASTEVENTID=9"])
def test_names_that_are_not_known_are_ignored(query: bytes) -> None:
    assert read_seen(_request(Headers(), query)).seq == (7 if b"after" in query else 0)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (b"lastEventId=x", "lastEventId"),
        (b"lastEventId=2.0", "lastEventId"),
        (b"lastEventId=-1", "lastEventId"),
        (b"lastEventId=%202", "lastEventId"),
        (b"lastEventId=2%0A", "lastEventId"),
        (b"lastEventId=%C2%B2", "lastEventId"),
        (b"lastEventId=1111111111111111", "lastEventId"),
        (b"Last-Event-ID=x", "Last-Event-ID"),
        (b"lastEventId=2&lastEventId=2", "lastEventId"),
        (b"lastEventId=2&Last-Event-ID=3", "lastEventId"),
        (b"after=x&lastEventId=2", "after"),
    ],
)
def test_an_invalid_id_in_the_query_and_two_that_differ_are_refused(query: bytes, field: str) -> None:
    for headers in (Headers(), Headers({"Last-Event-ID": "5"})):
        with pytest.raises(InvalidRequestError) as refused:
            read_seen(_request(headers, query))
        assert refused.value.field == field


def test_two_headers_that_differ_are_refused() -> None:
    with pytest.raises(InvalidRequestError):
        read_seen(_request(Headers([("Last-Event-ID", "5"), ("Last-Event-ID", "6")])))


@pytest.mark.parametrize("header", ["-1", "1.5", "abc", "²", "1" * 16, "0x1", " "])
def test_an_invalid_last_event_id_is_refused(header: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_seen(_request(Headers({"Last-Event-ID": header})))
    assert refused.value.field == "Last-Event-ID"


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        (None, False),
        ("*/*", False),
        ("application/json", False),
        ("text/*", False),
        ("text/event-stream", True),
        ("Text/Event-Stream", True),
        ("text/event-stream, */*;q=0.5", True),
        ("application/json, text/event-stream", True),
        ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream;q=0", False),
        ("text/event-stream;charset=utf-8", True),
        ("Text/Event-Stream; Charset=utf-8;q=0.9, */*;q=0.1", True),
        ("text/event-stream;charset=utf-8;q=0", False),
        ("application/json;charset=utf-8, text/event-stream;charset=utf-8;q=0.5", False),
    ],
)
def test_a_client_gets_a_stream_if_its_accept_header_prefers_one(accept: str | None, streams: bool) -> None:
    headers = Headers() if accept is None else Headers({"Accept": accept})
    assert wants_stream(_request(headers)) is streams


def _request(headers: Headers, query: bytes = b"") -> Request:
    async def push(path: str, headers: Headers) -> None:
        pass

    from quart_trio.wrappers import TrioRequest

    return TrioRequest("GET", "http", "/", query, headers, "", "1.1", {}, send_push_promise=push)  # type: ignore[typeddict-item]


async def opened_in_a_face(deltas: int, *, seen: int, scope: dict[str, object] | None = None) -> Opened:
    opened = Opened(deltas)
    face = NumberedFace()
    place = await find_place(opened.log, face, seen=seen)
    opened.stream = EventStream(
        opened.log,
        opened.slot,
        after=place.seq,
        encode=encoder_of(opened.log, face).encode,
        opening=place.rest,
        heartbeat=b": heartbeat\n\n",
        scope=scope or {},
    )
    return opened


async def test_a_stream_of_a_face_begins_after_the_frames_that_were_seen_and_ends_with_the_faces_end() -> None:
    opened = await opened_in_a_face(3, seen=1)
    assert await anext(opened.stream) == b"data: 1\n\ndata: 2\n\n"
    opened.append(1)
    assert await anext(opened.stream) == b"data: 3\n\n"
    opened.close()
    assert await anext(opened.stream) == b"data: 4 end\n\ndata: over\n\n"
    with pytest.raises(StopAsyncIteration):
        await anext(opened.stream)


async def test_a_stream_of_a_face_without_a_frame_yet_begins_with_a_comment() -> None:
    opened = await opened_in_a_face(2, seen=2)
    assert await anext(opened.stream) == b": heartbeat\n\n"


async def test_a_stream_of_a_face_that_has_no_frame_left_says_only_that_it_is_over() -> None:
    opened = await opened_in_a_face(1, seen=0)
    opened.close()
    place = await find_place(opened.log, NumberedFace(), seen=2)
    assert place == (2, b"data: over\n\n", False, 0, False)


async def test_a_large_piece_counts_while_its_client_takes_it() -> None:
    held = HeldBytes()
    scope: dict[str, object] = {}
    counted = counting_bytes(scope, held)
    opened = Opened(scope=scope)
    assert opened.log.append(TurnDelta(seq=1, text="x" * 100_000))
    piece = await anext(opened.stream)
    assert held.bytes == len(piece) - len(b"retry: 1000\n") > 100_000
    opened.append(1)
    await anext(opened.stream)
    assert held.bytes == 0
    assert opened.log.append(TurnDelta(seq=3, text="x" * 100_000))
    await anext(opened.stream)
    counted.release()
    assert held.bytes == 0
