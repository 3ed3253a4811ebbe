"""The event log: exact, in order and ended for every reader, at any pace; and its events on the wire."""

import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api.http.event_frames import read_frames
from service.api.native.event_frames import decode_frame, encode_frame
from service.ids import public_id
from service.models.client import Usage
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import (
    Event,
    Piece,
    TurnCancelled,
    TurnCompleted,
    TurnDelta,
    TurnFailed,
    TurnInterrupted,
    TurnQueued,
    TurnReasoning,
    TurnResumed,
    TurnStarted,
)
from service.sessions.events.kept_events import opening_of, runs_of
from service.steps import at_once
from service.storage.pieces import STARTED, Run, join, texts_by_item
from service.storage.records import Failure
from tests.sessions.puppet import frames_of
from tests.storage.rows import a_turn

MIB = 1024 * 1024
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # lone surrogates never reach an event
seqs = st.integers(1, 2**53)
counts = st.integers(0, 2**31)


def _delta(log: EventLog, text: str = "x") -> TurnDelta:
    return TurnDelta(seq=log.last_seq + 1, text=text)


def _end(log: EventLog) -> TurnCompleted:
    return TurnCompleted(seq=log.last_seq + 1, finish_reason="stop", usage=None, text_length=0)


def _filled(*sizes: int) -> EventLog:
    log = EventLog(bytes_max=MIB)
    for size in sizes:
        assert log.append(_delta(log, "x" * size))
    return log


# Reading


@st.composite
def paces(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    """A reader: when it joins, after which seq, how many bytes it takes at once, how long it stalls in between."""
    return (
        draw(st.integers(0, 15)),
        draw(st.integers(0, 6)),
        draw(st.sampled_from([1, 60, 200, MIB])),
        draw(st.lists(st.integers(0, 6), max_size=5)),
    )


async def _read_to_the_end(log: EventLog, joins: int, cursor: int, bytes_max: int, stalls: list[int]) -> bytes:
    await _pause(joins)
    pauses = iter(stalls)
    got: list[bytes] = []
    while True:
        await log.wait_beyond(cursor)
        frames, after = read_frames(log, cursor, encode=encode_frame, bytes_max=bytes_max)
        if not frames:
            assert log.closed, "a woken reader finds something, or the end"
            return b"".join(got)
        assert after > cursor
        got.append(frames)
        cursor = after
        await _pause(next(pauses, 0))


async def _pause(checkpoints: int) -> None:
    for _ in range(checkpoints):
        await trio.lowlevel.checkpoint()


@given(bursts=st.lists(st.lists(texts, max_size=4), max_size=8), readers=st.lists(paces(), max_size=5))
def test_every_reader_gets_exactly_what_follows_its_cursor(
    bursts: list[list[str]], readers: list[tuple[int, int, int, list[int]]]
) -> None:
    log = EventLog(bytes_max=MIB)
    received: dict[int, bytes] = {}

    async def write() -> None:
        for burst in bursts:
            for text in burst:
                assert log.append(_delta(log, text))
            await _pause(1)
        log.close(_end(log))

    async def read(number: int) -> None:
        received[number] = await _read_to_the_end(log, *readers[number])

    async def run() -> None:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                for number in range(len(readers)):
                    nursery.start_soon(read, number)

    trio.run(run, clock=MockClock(autojump_threshold=0))

    events = [text for burst in bursts for text in burst]
    frames = [encode_frame(TurnDelta(seq=seq, text=text)) for seq, text in enumerate(events, 1)]
    frames.append(encode_frame(TurnCompleted(seq=len(frames) + 1, finish_reason="stop", usage=None, text_length=0)))
    assert frames_of(log) == frames
    assert received == {number: b"".join(frames[cursor:]) for number, (_, cursor, _, _) in enumerate(readers)}


@given(
    lengths=st.lists(st.sampled_from([0, 1, 20, 300, 20_000]), max_size=12),
    ends=st.booleans(),
    reads=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 30_000)), min_size=1, max_size=8),
)
def test_a_read_is_the_longest_that_fits_but_at_least_one_frame(
    lengths: list[int], ends: bool, reads: list[tuple[int, int]]
) -> None:
    log = EventLog(bytes_max=MIB)
    for length in lengths:
        log.append(_delta(log, "x" * length))
        read_frames(log, log.last_seq - 1, encode=encode_frame, bytes_max=MIB)  # a reader at the end of the log
    if ends:
        log.close(_end(log))
    frames = frames_of(log)
    for cursor, bytes_max in reads:
        joined, after = read_frames(log, cursor, encode=encode_frame, bytes_max=bytes_max)
        if cursor >= len(frames):
            assert (joined, after) == (b"", cursor)
            continue
        assert joined == b"".join(frames[cursor:after])
        assert cursor < after <= len(frames)
        assert len(joined) <= bytes_max or after == cursor + 1
        assert after == len(frames) or len(joined) + len(frames[after]) > bytes_max


pieces = st.builds(TurnDelta, item=st.just(0), text=texts) | st.builds(TurnReasoning, item=st.just(1), text=texts)
EDGES = [254, 255, 256, 510, 511, 20_000]


@given(
    told=st.lists(pieces | st.builds(TurnDelta, text=st.sampled_from(["é" * length for length in EDGES])), max_size=20),
    repeats=st.integers(1, 12),
    cursors=st.lists(st.integers(0, 260), max_size=4),
)
def test_a_log_tells_the_events_and_the_texts_that_were_appended(
    told: list[TurnDelta | TurnReasoning], repeats: int, cursors: list[int]
) -> None:
    log = EventLog(bytes_max=16 * MIB)
    all_events: list[Event] = [TurnQueued(seq=1, session_id="s", turn_id="t")]
    all_events.append(TurnStarted(seq=2, session_id="s", turn_id="t", model="m"))
    for piece in told * repeats:
        all_events.append(msgspec.structs.replace(piece, seq=len(all_events) + 1))
    for event in all_events:
        assert log.append(event)
    for cursor in (0, *cursors):
        assert list(log.events(after=cursor)) == all_events[cursor:]
        texts: dict[int, str] = {}
        for event in all_events[cursor:]:
            if isinstance(event, TurnDelta | TurnReasoning):
                texts[event.item] = texts.get(event.item, "") + event.text
        of_runs: dict[int, str] = {}
        for item, text in texts_by_item(log.runs(after=cursor), log.text(after=cursor)):
            of_runs[item] = of_runs.get(item, "") + text
        assert of_runs == texts
        if cursor == 0:
            assert log.texts() == texts
            assert all("".join(log.text_pieces(item)) == text for item, text in texts.items())
        assert log.text(after=cursor) == "".join(
            [event.text for event in all_events[cursor:] if isinstance(event, Piece)]
        )
        assert log.runs(after=cursor) == list(runs_of(all_events[cursor:]))
        alike = all_events[cursor : cursor + log.alike_after(cursor)]
        assert all(isinstance(event, Piece) for event in alike)
        assert len({event.item for event in alike if isinstance(event, Piece)}) <= 1


@given(
    st.lists(
        st.one_of(st.integers(1, 150), st.integers(-(2**31), -1), st.sampled_from([TurnDelta, TurnReasoning])),
        max_size=6,
    ),
    st.data(),
)
def test_a_log_with_gaps_is_read_from_any_seq_live_and_restored(parts: list[Any], data: st.DataObject) -> None:
    """A number of pieces, a gap before a resumption, or the kind of the pieces that follow."""
    live, kind = EventLog(bytes_max=MIB), TurnDelta
    assert live.append(TurnStarted(seq=1, session_id="s", turn_id="t", model="m"))
    for part in parts:
        if not isinstance(part, int):
            kind = part
        elif part < 0:
            seq = live.last_seq - part
            assert live.append(TurnResumed(seq=seq, attempt=2, mode="continue", text_length=0))
        else:
            for number in range(part):
                item = 0 if kind is TurnDelta else 1
                assert live.append(kind(seq=live.last_seq + 1, item=item, text=f"{number} "))
    told = list(live.events())
    restored = EventLog(bytes_max=MIB)
    turn = msgspec.structs.replace(a_turn("t", "s"), model="m")
    texts = live.texts()
    steps = restored.restore(
        live.runs(),
        [texts.get(0, ""), texts.get(1, "")],
        event_of=partial(opening_of, turn),
        kind_of=lambda item: (TurnDelta, TurnReasoning)[item],
    )
    at_once(steps)
    assert restored.size == live.size
    edges = [
        seq for event in told if isinstance(event, TurnResumed) for seq in (event.seq - 2, event.seq - 1, event.seq)
    ]
    drawn = data.draw(st.lists(st.sampled_from([0, *(event.seq for event in told)]), max_size=4))
    cursors = [0, *edges, *drawn]
    for log in (live, restored):
        assert log.last_seq == live.last_seq
        assert list(log.events()) == told
        for after in cursors:
            rest = [event for event in told if event.seq > after]
            assert list(log.events(after=after)) == rest
            assert log.runs(after=after) == join(runs_of(rest))
            assert log.text(after=after) == "".join(event.text for event in rest if isinstance(event, Piece))
            alike = rest[: log.alike_after(after)]
            assert len({type(event) for event in alike}) <= 1
            assert all(isinstance(event, Piece) for event in alike)


def test_only_a_resumption_may_follow_a_gap() -> None:
    log = _filled(1)
    with pytest.raises(AssertionError, match="wrong seq"):
        log.append(TurnDelta(seq=3, text="x"))


async def test_a_log_that_is_left_ends_for_all_who_wait_without_a_terminal_event(autojump_clock: MockClock) -> None:
    log = _filled(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.wait_beyond, 1)
        nursery.start_soon(log.wait_closed)
        await wait_all_tasks_blocked()
        log.leave()
    assert (log.closed, log.is_moved, log.last_seq) == (True, True, 1)


def test_a_read_past_the_end_is_empty_and_moves_nothing() -> None:
    log = _filled(1, 1)
    for cursor in (2, 7):
        assert log.read_after(cursor) == []
        assert read_frames(log, cursor, encode=encode_frame, bytes_max=MIB) == (b"", cursor)
    assert EventLog(bytes_max=MIB).read_after(0) == []


def test_many_streams_at_the_end_of_a_log_cost_one_encoding_of_each_event() -> None:
    encoded: list[int] = []

    def encode(event: Event) -> bytes:
        encoded.append(event.seq)
        return encode_frame(event)

    log = EventLog(bytes_max=MIB)
    cursors = [0] * 50
    for burst in (1, 3, 70, 1):
        for _ in range(burst):
            log.append(_delta(log))
        for stream, cursor in enumerate(cursors):
            expected = b"".join(map(encode_frame, log.events(after=cursor)))
            frames, cursors[stream] = read_frames(log, cursor, encode=encode, bytes_max=MIB)
            assert frames == expected
        assert encoded == list(range(1, log.last_seq + 1))


def test_a_long_log_takes_little_memory_beside_its_text() -> None:
    log = EventLog(bytes_max=16 * MIB)
    texts = [f"{number:04d}" for number in range(10_000)]
    tracemalloc.start()
    try:
        for text in texts:
            log.append(_delta(log, text))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 10_000 * (4 + 4) * 1.1, "four bytes of text, and less than five beside it"


def test_events_that_were_read_do_not_change_with_the_log() -> None:
    log = _filled(1)
    read = log.read_after(0)
    log.append(_delta(log))
    assert len(read) == 1


def test_a_stalled_reader_costs_the_log_nothing() -> None:
    log = _filled(1)
    _, cursor = read_frames(log, 0, encode=encode_frame, bytes_max=MIB)
    for _ in range(1000):
        log.append(_delta(log))
    log.close(_end(log))
    assert log._waiting == {}, "only readers that wait are registered"
    late, cursor = read_frames(log, cursor, encode=encode_frame, bytes_max=MIB)
    assert (late, cursor) == (b"".join(frames_of(log)[1:]), 1002), "all that it missed comes in one go"


# Waking


def _append_one(log: EventLog) -> None:
    log.append(_delta(log))


def _close(log: EventLog) -> None:
    log.close(_end(log))


@pytest.mark.parametrize("news", [_append_one, _close])
async def test_news_wakes_every_waiting_reader(autojump_clock: MockClock, news: Callable[[EventLog], None]) -> None:
    log = _filled(1, 1)
    awake = []

    async def wait(cursor: int) -> None:
        await log.wait_beyond(cursor)
        awake.append(cursor)

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            for cursor in (1, 2, 2):
                nursery.start_soon(wait, cursor)
            await wait_all_tasks_blocked()
            assert awake == [1], "who has something to read does not wait"
            news(log)
    assert awake == [1, 2, 2]


async def test_a_reader_beyond_the_end_waits_for_its_turn_or_the_end(autojump_clock: MockClock) -> None:
    log = _filled(1)
    awake = []

    async def wait() -> None:
        await log.wait_beyond(3)
        awake.append(log.last_seq)

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            for _ in range(2):
                log.append(_delta(log))
                await wait_all_tasks_blocked()
            assert awake == []
            log.append(_delta(log))
        assert awake == [4]
        log.close(_end(log))
        await log.wait_beyond(100)


async def test_a_waiting_reader_can_leave_and_the_others_stay(autojump_clock: MockClock) -> None:
    log = EventLog(bytes_max=MIB)
    awake = []

    async def wait(name: str, scope: trio.CancelScope) -> None:
        with scope:
            await log.wait_beyond(0)
            awake.append(name)

    leaver, stayer = trio.CancelScope(), trio.CancelScope()
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "leaver", leaver)
            nursery.start_soon(wait, "stayer", stayer)
            await wait_all_tasks_blocked()
            leaver.cancel()
            await wait_all_tasks_blocked()
            log.append(_delta(log))
    assert awake == ["stayer"]


async def test_a_task_that_is_woken_for_its_heartbeat_wakes_also_if_its_reader_takes_an_event_then(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.sessions.events.event_log.WOKEN_MAX", 0)  # as if others had used it up

    class Taking:
        def take_appended(self, now: float) -> bool:
            return True

    log = EventLog(bytes_max=MIB)
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(log.wait_to_read, Taking())
            await wait_all_tasks_blocked()
            for task in nursery.child_tasks:
                log.wake(task)
            log.append(_delta(log))


# Writing


def test_a_log_is_never_larger_than_its_bound_and_the_end_always_fits() -> None:
    bytes_max = 4096
    log = EventLog(bytes_max=bytes_max)
    accepted = [log.append(_delta(log, "é" * 50)) for _ in range(100)]
    assert accepted == sorted(accepted, reverse=True), "what is as large as what was refused is refused"
    before = frames_of(log)
    assert (bytes_max - 2048) // (100 + 4) == len(before)
    log.close(
        TurnFailed(
            seq=log.last_seq + 1, error=Failure("log_too_large", "x" * 150 + "\U0001f600" * 300), text_length=10**9
        )
    )
    assert frames_of(log)[:-1] == before, "what was refused left nothing"


def test_the_bound_is_exact() -> None:
    fits = EventLog(bytes_max=2048 + 100 + 8)
    assert fits.append(_delta(fits, "x" * 100))
    too_large = EventLog(bytes_max=2048 + 100 + 7)
    assert not too_large.append(_delta(too_large, "x" * 100))
    assert (too_large.last_seq, frames_of(too_large), too_large.closed) == (0, [], False)
    assert too_large.append(_delta(too_large, "x" * 99)), "a smaller event still fits"


def test_nothing_is_written_after_the_end_or_out_of_order() -> None:
    log = _filled(1)
    with pytest.raises(AssertionError):
        log.append(TurnDelta(seq=3, text="a gap"))
    with pytest.raises(AssertionError):
        log.append(TurnDelta(seq=1, text="a repetition"))
    log.close(_end(log))
    with pytest.raises(AssertionError):
        log.append(_delta(log))
    with pytest.raises(AssertionError):
        log.close(_end(log))
    assert log.last_seq == 2


# On the wire

usages = st.builds(Usage, input_tokens=counts, output_tokens=counts, reasoning_tokens=counts)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(TurnQueued, seq=seqs, session_id=texts, turn_id=texts),
    st.builds(TurnStarted, seq=seqs, session_id=texts, turn_id=texts, model=texts),
    st.builds(TurnDelta, seq=seqs, text=texts),
    st.builds(TurnReasoning, seq=seqs, text=texts),
    st.builds(
        TurnCompleted,
        seq=seqs,
        finish_reason=st.sampled_from(["stop", "length", "content_filter", "tool_calls"]),
        usage=st.none() | usages,
        text_length=counts,
        stored=st.booleans(),
    ),
    st.builds(TurnFailed, seq=seqs, error=st.builds(Failure, texts, texts), text_length=counts, stored=st.booleans()),
    st.builds(
        TurnCancelled,
        seq=seqs,
        reason=st.sampled_from(["requested", "superseded", "disconnected", "session_deleted"]),
        text_length=counts,
        stored=st.booleans(),
    ),
    st.builds(
        TurnInterrupted,
        seq=seqs,
        reason=st.sampled_from(["shutdown", "crash"]),
        text_length=counts,
        stored=st.booleans(),
    ),
)


LINE_ENDS = "".join(map(chr, (*range(0x20), 0x7F, 0x85, 0xA0, 0x2028, 0x2029)))
"""Every character that some client takes for a line end, and similar characters."""


@given(events)
@example(TurnDelta(seq=1, text="\r\n\r\ndata: data: \u2028\x00"))
def test_a_frame_is_its_event_with_the_public_id_of_the_session(event: Event) -> None:
    told = decode_frame(encode_frame(event))
    if isinstance(event, TurnQueued | TurnStarted):
        event = msgspec.structs.replace(event, session_id=public_id(event.session_id))
    assert told == event


@given(events)
@example(TurnDelta(seq=1, text=LINE_ENDS))
def test_a_frame_is_one_event_for_any_reader_of_event_streams(event: Event) -> None:
    r"""With any text (CR, LF, ``data: ``) a frame has two lines and an empty one, with any of the three line ends."""
    frame = encode_frame(event)
    assert frame.endswith(b"\n\n")
    assert b"\r" not in frame
    assert len(frame.decode().splitlines()) == 3, "httpx and others split lines as Python does"
    id_line, data_line = frame[:-2].split(b"\n")
    assert id_line == b"id: %d" % event.seq
    assert data_line.startswith(b'data: {"type":"turn.')


def test_line_ends_of_unicode_are_escaped_and_nothing_else_is() -> None:
    frame = encode_frame(TurnDelta(seq=3, text="a\x85b\u2028c\u2029d…\xa0é\u2027\u202a👋"))
    assert frame.partition(b'"text":"')[2] == 'a\\u0085b\\u2028c\\u2029d…\xa0é\u2027\u202a👋"}\n\n'.encode()


def test_frames_that_were_kept_before_line_ends_were_escaped_are_escaped_as_they_are_read() -> None:
    for text in ("a\u2028", "\x85\u2029", "é"):
        kept = f'id: 1\ndata: {{"type":"turn.delta","seq":1,"text":"{text}"}}\n\n'.encode()
        assert encode_frame(decode_frame(kept)) == encode_frame(TurnDelta(seq=1, text=text))


def test_a_delta_on_the_wire_is_lean() -> None:
    frame = encode_frame(TurnDelta(seq=3, text="Hi 👋"))
    assert frame == 'id: 3\ndata: {"type":"turn.delta","seq":3,"text":"Hi 👋"}\n\n'.encode()


def test_stored_is_in_an_event_only_if_it_is_false() -> None:
    end = TurnCancelled(seq=2, reason="requested", text_length=0)
    assert b"stored" not in encode_frame(end)
    assert b'"stored":false' in encode_frame(TurnCancelled(seq=2, reason="requested", text_length=0, stored=False))


def test_a_long_log_is_restored_in_steps_of_few_events() -> None:
    pieces = 20_000
    log = EventLog(bytes_max=MIB)
    steps = log.restore(
        [Run(STARTED), Run(0, b"\x03" * pieces)],
        ["abc" * pieces],
        event_of=partial(opening_of, a_turn("t", "s")),
        kind_of=lambda _: TurnDelta,
    )
    seqs = [0, *(log.last_seq for _ in steps)]
    assert max(after - before for before, after in pairwise(seqs)) <= 65
    assert log.last_seq == pieces + 1
    assert log.text() == "abc" * pieces
