"""Turns that a test tells, event by event, and the ways in which a client of a face may read them."""

from collections.abc import Sequence
from typing import Any, cast

import msgspec
from hypothesis import strategies as st

from service.api.http.event_frames import EncodeFrame, read_frames
from service.api.http.face_frames import EndedTurn, Face, encoder_of, find_place
from service.api.http.held_bytes import HeldBytes, RequestBytes
from service.models.client import (
    ArgumentsDelta,
    CallOpened,
    EncryptedReasoning,
    ModelEvent,
    ReasoningDelta,
    TextDelta,
    Usage,
)
from service.sessions.events import outcome
from service.sessions.events.event_log import Events
from service.sessions.events.replay import Replay, Replays
from service.sessions.turns.turn import Turn, restored_log
from service.settings import Settings
from service.steps import at_once
from service.storage.pieces import Run, count, last_seq, skip, text_of
from service.storage.records import SEQ_AFTER_CRASH, EventsPage, TurnRecord
from service.storage.rules import released, resumed
from tests.sessions.puppet import Puppet
from tests.storage.rows import T0, a_turn, at

TURN_ID = "turn_" + "0a" * 16
MIB = 1024 * 1024


def a_told_turn(*, is_queued: bool = False, **fields: Any) -> Turn:
    """A turn that has been accepted, and does not run yet if ``is_queued``."""
    record = msgspec.structs.replace(
        a_turn(TURN_ID, "sess_" + "6f" * 16, state="queued" if is_queued else "running"), **fields
    )
    turn = Turn(record, client=Puppet(), system_message=None, on_disconnect="continue", settings=Settings())
    if not is_queued:
        turn.start(T0)
    return turn


def end_turn(turn: Turn, end: outcome.Outcome, *, usage: Usage | None = None) -> None:
    """End a turn as its task does, once the store has taken the end."""
    turn.note_spent(usage)
    assert turn.decide(end)
    turn.conclude(turn.finish(at(1)), stored=True)


def crashed(turn: Turn, *, events: int) -> TurnRecord:
    """The record of a turn whose process has died after a checkpoint of its first events."""
    runs = first_runs(turn.log.runs(), events)
    items = turn.begun_items()
    begun = {run.item for run in runs if run.item >= 0} | {-3 - run.item for run in runs if run.item <= -3}
    texts = dict.fromkeys(range(len(items)), "")
    for run, text in _texts(runs, turn.log.text()):
        texts[run.item] += text
    output = tuple(
        msgspec.structs.replace(item, text=texts[index])
        for index, item in enumerate(items[: max(begun, default=-1) + 1])
    )
    return msgspec.structs.replace(
        turn.record(),
        state="interrupted",
        reason="crash",
        ended_at=at(2),
        output=output,
        last_seq=SEQ_AFTER_CRASH,
    )


def adopted(turn: Turn, *, events: int, crashes: bool, continues: bool = True) -> Turn:
    """A turn whose first events were kept, as another process goes on with it after a stop or a crash."""
    kept = first_runs(turn.log.runs(), events)
    record = crashed(turn, events=events)
    record = msgspec.structs.replace(record, state="running", reason=None, ended_at=None, last_seq=events)
    if crashes:
        record = released(record, record.output, ())
    it = resumed(record, kept, continues=continues)
    settings = Settings()
    log = at_once(restored_log(it.turn, it.runs, bytes_max=settings.log_bytes_max))
    return Turn(it.turn, client=Puppet(), system_message=None, on_disconnect="continue", settings=settings, log=log)


def first_runs(runs: Sequence[Run], events: int) -> list[Run]:
    """The first events of runs."""
    first: list[Run] = []
    for run in runs:
        if events <= 0:
            break
        taken = run if run.events <= events else Run(run.item, run.lengths[: run.end_of(events)])
        first.append(taken)
        events -= taken.events
    return first


def _texts(runs: Sequence[Run], text: str) -> list[tuple[Run, str]]:
    texts = []
    start = 0
    for run in runs:
        if run.item >= 0:
            texts.append((run, text[start : start + run.length]))
            start += run.length
    return texts


class _Store:
    """The events of one turn, in pages."""

    def __init__(self, record: TurnRecord, runs: Sequence[Run], page_events: int) -> None:
        self.record = record
        self.runs = list(runs)
        self.page_events = page_events

    async def read_events(self, _session_id: str, _turn_id: str, *, after: int = 0, length_max: int = 0) -> EventsPage:
        runs = first_runs(list(skip(self.runs, after)), self.page_events)
        texts = [item.text for item in self.record.output]
        return EventsPage(
            after=after,
            runs=tuple(runs),
            text=text_of(self.runs, texts, after=after, events=count(runs)),
            kept=last_seq(self.runs),
            ended=True,
            text_length=len(self.record.text),
        )


async def replay_of(record: TurnRecord, runs: Sequence[Run], *, page_events: int = 5) -> Replay:
    """A replay of an ended turn, of a few events a page."""

    async def read_turn(_: bool) -> TurnRecord:
        return record

    replays = Replays(cast("Any", _Store(record, runs, page_events)), store_timeout_s=5)
    return await replays.open(record.session_id, record.id, after=0, read_turn=read_turn)


async def replay_of_told(turn: Turn, *, page_events: int = 5) -> tuple[EndedTurn, Replay]:
    """The same turn, as it is in the store after its end."""
    record = turn.record()
    return EndedTurn(record), await replay_of(record, turn.log.runs(), page_events=page_events)


async def read_to_the_end(log: Events, face: Face, *, seen: int = 0, bytes_max: int = MIB) -> bytes:
    """What a client gets that has seen the first frames."""
    place = await find_place(log, face, seen=seen)
    encode = encoder_of(log, face).encode
    told, seq = place.rest, place.seq
    while True:
        await log.load_after(seq)
        frames, seq = _next_frames(log, face, seq, encode=encode, seen=place.seen, bytes_max=bytes_max)
        if not frames:
            return told
        told += frames


def _next_frames(
    log: Events, face: Face, seq: int, *, encode: EncodeFrame, seen: int = 0, bytes_max: int
) -> tuple[bytes, int]:
    """The next frames as a stream reads them, and the seq of the last of them: long ones piece by piece."""
    frames, seq = read_frames(log, seq, encode=encode, bytes_max=bytes_max)
    if frames:
        return frames, seq
    held = HeldBytes()
    long = encoder_of(log, face).open_long(log, seq, seen=seen, held=RequestBytes(held))
    if long is None:
        return b"", seq
    pieces = []
    while not long.is_over:
        pieces.append(long.take())
    assert all(pieces)
    long.close()
    assert held.bytes == 0
    return b"".join(pieces), log.read_after(seq)[0].seq


class Follower:
    """A stream that reads a live log, a piece at a time."""

    def __init__(self, log: Events, face: Face, *, bytes_max: int = MIB) -> None:
        self.told = b""
        self._log = log
        self._face = face
        self._encode = encoder_of(log, face).encode
        self._bytes_max = bytes_max
        self._seq = 0

    def read(self, *, to_the_end: bool = False) -> None:
        while True:
            frames, self._seq = _next_frames(
                self._log, self._face, self._seq, encode=self._encode, bytes_max=self._bytes_max
            )
            self.told += frames
            if not frames or not to_the_end:
                return


texts = st.text(min_size=1, max_size=6) | st.sampled_from(
    ["\u2028", "\x85\n\r", '"%d%b"', '"text":@,"output":@,"arguments":@', "%", "👋", "é" * 300]
)


@st.composite
def replies(draw: st.DrawFn) -> list[ModelEvent]:
    """What a model says: texts, reasoning and calls, in turns."""
    told: list[ModelEvent] = []
    calls = 0
    for kind in draw(
        st.lists(st.sampled_from(["text", "text", "reasoning", "encrypted", "call", "arguments"]), max_size=14)
    ):
        match kind:
            case "text":
                told.append(TextDelta(draw(texts)))
            case "reasoning":
                told.append(ReasoningDelta(draw(texts)))
            case "encrypted":
                told.append(EncryptedReasoning(draw(texts), draw(st.sampled_from(["", '{"format":"x","n":1}']))))
            case "call":
                upstream = draw(st.sampled_from(["", '{"extra_content":{"google":{"thought_signature":"\u2028"}}}']))
                name = draw(st.sampled_from(["get", "tools__get"]))
                told.append(CallOpened(calls, f"call_{calls}", name, upstream))
                calls += 1
            case "arguments" if calls:
                told.append(ArgumentsDelta(draw(st.integers(0, calls - 1)), draw(texts)))
    return told


ends: st.SearchStrategy[outcome.Outcome] = st.sampled_from(
    [
        outcome.Completed("stop"),
        outcome.Completed("tool_calls"),
        outcome.Completed("length"),
        outcome.Completed("content_filter"),
        outcome.failed("upstream_error", "The model server failed."),
        outcome.failed("rate_limited", "Wait."),
        outcome.failed("context_too_long", "Too long."),
        outcome.Cancelled("requested"),
        outcome.Cancelled("disconnected"),
        outcome.Interrupted("shutdown"),
    ]
)
