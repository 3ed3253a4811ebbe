"""Faces whose frames depend on the events before: the same frames live, late, replayed, resumed and after a crash."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.http.face_frames import NUMBERS_PER_ATTEMPT, EndedTurn, FaceEncoder, encoder_of, find_place
from service.models.client import ModelEvent, TextDelta
from service.sessions.events import outcome
from service.sessions.events.events import Event
from service.sessions.turns.turn import Turn
from service.storage.records import SEQ_AFTER_CRASH
from tests.api.counting_face import CountingFace
from tests.api.told_turns import (
    Follower,
    a_told_turn,
    adopted,
    crashed,
    end_turn,
    ends,
    first_runs,
    read_to_the_end,
    replay_of,
    replay_of_told,
    replies,
)

FACE = CountingFace()


def frames_in(told: bytes) -> list[bytes]:
    frames = [block + b"\n\n" for block in told.split(b"\n\n")]
    assert frames.pop() == b"\n\n"
    return frames


def number_of(frame: bytes) -> int:
    found = re.match(rb"data: (\d+) ", frame)
    assert found is not None
    return int(found[1])


def tell(told: list[ModelEvent], *, is_queued: bool, lag: int, end: outcome.Outcome) -> tuple[Turn, Follower, Follower]:
    """A whole turn, a stream that has read every event at once, and one that is behind."""
    turn = a_told_turn(is_queued=is_queued)
    at_once, behind = Follower(turn.log, FACE), Follower(turn.log, FACE, bytes_max=30)
    at_once.read()
    if is_queued:
        turn.start(turn.record().created_at)
    for place, event in enumerate(told):
        turn.take([event])
        at_once.read()
        if lag and place % lag == 0:
            behind.read()
    end_turn(turn, end)
    at_once.read()
    behind.read(to_the_end=True)
    return turn, at_once, behind


@given(replies(), st.booleans(), st.integers(0, 3), ends)
async def test_every_way_of_reading_tells_the_same_frames(
    told: list[ModelEvent], is_queued: bool, lag: int, end: outcome.Outcome
) -> None:
    turn, at_once, behind = tell(told, is_queued=is_queued, lag=lag, end=end)
    frames = frames_in(at_once.told)
    assert frames.pop() == FACE.end
    assert list(map(number_of, frames)) == list(range(len(frames)))
    assert behind.told == at_once.told
    assert await read_to_the_end(turn.log, FACE) == at_once.told
    _, replay = await replay_of_told(turn)
    assert await read_to_the_end(replay, FACE, bytes_max=40) == at_once.told
    for seen in range(len(frames) + 3):
        rest = b"".join(frames[seen:]) + FACE.end
        assert await read_to_the_end(turn.log, FACE, seen=seen) == rest
        _, replay = await replay_of_told(turn)
        assert await read_to_the_end(replay, FACE, seen=seen) == rest


@given(replies(), st.data())
async def test_after_a_crash_the_kept_frames_are_as_they_were_and_the_others_have_higher_numbers(
    told: list[ModelEvent], data: st.DataObject
) -> None:
    turn = a_told_turn()
    live = Follower(turn.log, FACE)
    turn.take(told)
    live.read(to_the_end=True)
    seen_live = frames_in(live.told)
    kept = data.draw(st.integers(0, turn.log.last_seq))
    record = crashed(turn, events=kept)
    runs = turn.log.runs()
    kept_runs = first_runs(runs, kept)
    after = frames_in(await read_to_the_end(await replay_of(record, kept_runs), FACE))
    assert after.pop() == FACE.end
    numbers = list(map(number_of, after))
    assert numbers[0] == 0
    assert numbers == sorted(set(numbers))
    common = [frame for frame in after if number_of(frame) < SEQ_AFTER_CRASH - 1]
    assert common == seen_live[: len(common)]
    assert numbers[len(common) :], "the end"
    for seen in {0, 1, len(common), len(seen_live), len(seen_live) + 9}:
        rest = await read_to_the_end(await replay_of(record, kept_runs), FACE, seen=seen)
        assert rest == b"".join(frame for frame in after if number_of(frame) >= seen) + FACE.end


def without_comments(frames: list[bytes]) -> list[bytes]:
    return [frame for frame in frames if not frame.startswith(b":")]


@given(replies(), replies(), st.booleans(), st.booleans(), st.data())
async def test_a_turn_that_goes_on_uses_no_number_twice_and_tells_who_has_seen_frames_that_are_gone(
    told: list[ModelEvent],
    more: list[ModelEvent],
    crashes: bool,
    continues: bool,
    data: st.DataObject,
) -> None:
    first = a_told_turn(on_interrupt="continue")
    live = Follower(first.log, FACE)
    first.take(told)
    live.read(to_the_end=True)
    seen_live = frames_in(live.told)
    kept = data.draw(st.integers(1, first.log.last_seq)) if crashes else first.log.last_seq
    second = adopted(first, events=kept, crashes=crashes, continues=continues)
    second.take(more)
    end_turn(second, outcome.Completed("stop"))
    frames = frames_in(await read_to_the_end(second.log, FACE))
    assert frames.pop() == FACE.end
    assert frames.count(b": resumed\n\n") == 1, "clients skip a comment"
    common = frames[: frames.index(b": resumed\n\n")]
    assert common == seen_live[: len(common)]
    frames = without_comments(frames)
    numbers = list(map(number_of, frames))
    assert numbers == sorted(set(numbers))
    assert numbers[-1] < 1 << 31
    goes_on = not crashes and (len(common) == len(seen_live))
    assert (numbers == list(range(len(numbers)))) is goes_on
    assert goes_on or numbers[len(common)] == NUMBERS_PER_ATTEMPT
    _, replay = await replay_of_told(second)
    for log in (second.log, replay):
        for seen in range(len(seen_live) + 1):
            place = await find_place(log, FACE, seen=seen)
            assert place.is_lost is (seen > len(common))
            if not place.is_lost:
                rest = frames_in(await read_to_the_end(log, FACE, seen=seen))
                assert without_comments(rest) == [*frames[seen:], FACE.end]
        for at, number in enumerate(numbers[len(common) :], len(common)):
            rest = frames_in(await read_to_the_end(log, FACE, seen=number + 1))
            assert without_comments(rest) == [*frames[at + 1 :], FACE.end]


async def test_many_streams_of_one_face_cost_one_encoding_of_each_event() -> None:
    turn = a_told_turn()
    streams = [Follower(turn.log, FACE) for _ in range(50)]
    encoded: list[int] = []
    encoder = encoder_of(turn.log, FACE)
    encode = encoder.encode

    def count(event: Event) -> bytes:
        encoded.append(event.seq)
        return encode(event)

    for stream in streams:
        stream._encode = count
    for text in "abc":
        turn.take([TextDelta(text)])
        for stream in streams:
            stream.read()
    assert encoded == [1, 2, 3, 4]
    assert {stream.told for stream in streams} == {streams[0].told}


async def test_a_place_beyond_the_frames_of_a_live_log_is_told() -> None:
    turn = a_told_turn()
    turn.take([TextDelta("a")])
    assert await find_place(turn.log, FACE, seen=4) == (2, b"", False, 0, False)
    assert await find_place(turn.log, FACE, seen=5) == (2, b"", True, 0, False)
    turn.take([TextDelta("b"), TextDelta("c")])
    assert await find_place(turn.log, FACE, seen=5) == (3, b"", False, 0, False)


async def test_a_stream_whose_turn_goes_on_elsewhere_is_not_told_as_over() -> None:
    turn = a_told_turn()
    turn.take([TextDelta("a")])
    turn.leave()
    assert await find_place(turn.log, FACE, seen=4) == (2, b"", False, 0, False)


@pytest.mark.parametrize("is_replay", [False, True])
async def test_a_place_late_in_a_long_text_is_found_without_all_of_its_events(
    is_replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = a_told_turn()
    for number in range(2000):
        turn.take([TextDelta(f"{number} ")])
    end_turn(turn, outcome.Completed("stop"))
    _, log = await replay_of_told(turn, page_events=1500) if is_replay else (turn, turn.log)
    encoded: list[int] = []
    encode = FaceEncoder.encode

    def count(encoder: FaceEncoder, event: Event) -> bytes:
        encoded.append(event.seq)
        return encode(encoder, event)

    monkeypatch.setattr(FaceEncoder, "encode", count)
    seen = 4 + 1800
    assert await find_place(log, FACE, seen=seen) == (1 + 1 + 1800, b"", False, 0, False)
    assert len(encoded) < 200
    monkeypatch.undo()
    whole = frames_in(await read_to_the_end(turn.log, FACE))
    assert frames_in(await read_to_the_end(log, FACE, seen=seen)) == whole[seen:]


@pytest.mark.parametrize("seen", [2, 3])
async def test_a_client_that_has_seen_a_part_of_an_events_frames_gets_the_others(seen: int) -> None:
    turn = a_told_turn()
    turn.take([TextDelta("a"), TextDelta("b")])
    frames = [b"data: 0 begin\n\n", b"data: 1 other\n\n", b"data: 2 open 0\n\n", b"data: 3 +\n\n", b"data: 4 +\n\n"]
    assert await read_to_the_end(turn.log, FACE, seen=seen) == b"".join(frames[seen:])


async def test_a_turn_whose_events_a_crash_has_lost_begins_at_0_all_the_same() -> None:
    turn = a_told_turn()
    record = crashed(turn, events=0)
    replay = await replay_of(record, [])
    end = b"data: %d end\n\n" % SEQ_AFTER_CRASH + FACE.end
    assert await read_to_the_end(replay, FACE) == b"data: 0 begin\n\n" + end
    for seen in (1, 100):
        assert await read_to_the_end(await replay_of(record, []), FACE, seen=seen) == end


async def test_an_ended_turn_tells_its_items_and_its_state() -> None:
    turn = a_told_turn()
    turn.take([TextDelta("a")])
    end_turn(turn, outcome.Completed("stop"))
    ended = EndedTurn(turn.record())
    assert ended.begun_items() == turn.begun_items() == turn.record().output
    assert "completed" in repr(ended)
