"""The event log: exact, in order and ended for every reader, at any pace; and its events on the wire."""

from collections.abc import Callable

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from service.models.client import Usage
from service.sessions.events.event_log import EventLog, join_frames
from service.sessions.events.events import (
    Event,
    TurnCancelled,
    TurnCompleted,
    TurnDelta,
    TurnFailed,
    TurnInterrupted,
    TurnQueued,
    TurnReasoning,
    TurnStarted,
    decode_frame,
    encode_frame,
)
from service.storage.records import Failure

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
        frames, after = log.read_after(cursor, bytes_max=bytes_max)
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
    assert log.frames() == frames
    assert received == {number: b"".join(frames[cursor:]) for number, (_, cursor, _, _) in enumerate(readers)}


@given(
    frames=st.lists(st.binary(min_size=1, max_size=20), max_size=12),
    cursor=st.integers(0, 14),
    bytes_max=st.integers(0, 200),
)
def test_a_read_is_the_longest_that_fits_but_at_least_one_frame(
    frames: list[bytes], cursor: int, bytes_max: int
) -> None:
    joined, after = join_frames(frames, cursor, bytes_max=bytes_max)
    if cursor >= len(frames):
        assert (joined, after) == (b"", cursor)
        return
    assert joined == b"".join(frames[cursor:after])
    assert cursor < after <= len(frames)
    assert len(joined) <= bytes_max or after == cursor + 1
    assert after == len(frames) or len(joined) + len(frames[after]) > bytes_max


def test_a_read_past_the_end_is_empty_and_moves_nothing() -> None:
    log = _filled(1, 1)
    assert log.read_after(2, bytes_max=MIB) == (b"", 2)
    assert log.read_after(7, bytes_max=MIB) == (b"", 7)
    assert EventLog(bytes_max=MIB).read_after(0, bytes_max=MIB) == (b"", 0)


def test_a_replay_of_what_was_kept_is_the_same_log_closed() -> None:
    log = _filled(5, 6)
    log.close(_end(log))
    again = EventLog.replay(log.frames())
    assert (again.closed, again.last_seq, again.frames()) == (True, 3, log.frames())
    for cursor in range(4):
        assert again.read_after(cursor, bytes_max=1) == log.read_after(cursor, bytes_max=1)


def test_kept_frames_do_not_change_with_the_log() -> None:
    log = _filled(1)
    kept = log.frames()
    log.append(_delta(log))
    assert len(kept) == 1


def test_a_stalled_reader_costs_the_log_nothing() -> None:
    log = _filled(1)
    _, cursor = log.read_after(0, bytes_max=MIB)
    for _ in range(1000):
        log.append(_delta(log))
    log.close(_end(log))
    assert log._readers.statistics().tasks_waiting == 0, "nobody is on the log's books who does not wait"
    late, cursor = log.read_after(cursor, bytes_max=MIB)
    assert (late, cursor) == (b"".join(log.frames()[1:]), 1002), "all that it missed comes in one go"


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


# Writing


def test_a_log_is_never_larger_than_its_bound_and_the_end_always_fits() -> None:
    bytes_max = 4096
    log = EventLog(bytes_max=bytes_max)
    accepted = [log.append(_delta(log, "é" * 50)) for _ in range(100)]
    assert accepted == sorted(accepted, reverse=True), "what is as large as what was refused is refused"
    before = log.frames()
    room = bytes_max - 2048 - sum(map(len, before))
    assert 0 <= room < len(encode_frame(_delta(log, "é" * 50)))
    log.close(
        TurnFailed(
            seq=log.last_seq + 1, error=Failure("log_too_large", "x" * 150 + "\U0001f600" * 300), text_length=10**9
        )
    )
    assert log.frames()[:-1] == before, "what was refused left nothing"
    assert sum(map(len, log.frames())) <= bytes_max


def test_the_bound_is_exact() -> None:
    frame = len(encode_frame(TurnDelta(seq=1, text="x" * 100)))
    fits = EventLog(bytes_max=2048 + frame)
    assert fits.append(_delta(fits, "x" * 100))
    too_large = EventLog(bytes_max=2048 + frame - 1)
    assert not too_large.append(_delta(too_large, "x" * 100))
    assert (too_large.last_seq, too_large.frames(), too_large.closed) == (0, [], False)
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
def test_a_frame_is_its_event(event: Event) -> None:
    assert decode_frame(encode_frame(event)) == event


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
    kept = [
        f'id: {seq}\ndata: {{"type":"turn.delta","seq":{seq},"text":"{text}"}}\n\n'.encode()
        for seq, text in ((1, "a\u2028"), (2, "\x85\u2029"), (3, "é"))
    ]
    log = EventLog.replay(kept)
    read, _ = log.read_after(0, bytes_max=1 << 16)
    assert len(read.decode().splitlines()) == 9
    events = [decode_frame(frame + b"\n\n") for frame in read.split(b"\n\n")[:-1]]
    assert events == [decode_frame(frame) for frame in kept]
    assert log.frames() == kept


def test_a_delta_on_the_wire_is_lean() -> None:
    frame = encode_frame(TurnDelta(seq=3, text="Hi 👋"))
    assert frame == 'id: 3\ndata: {"type":"turn.delta","seq":3,"text":"Hi 👋"}\n\n'.encode()


def test_stored_is_told_only_where_it_is_not() -> None:
    end = TurnCancelled(seq=2, reason="requested", text_length=0)
    assert b"stored" not in encode_frame(end)
    assert b'"stored":false' in encode_frame(TurnCancelled(seq=2, reason="requested", text_length=0, stored=False))
