"""Writes that are too large for one step take several, and are still all or nothing."""

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
import trio

from service.errors import StoreError
from service.models.client import TextDelta
from service.sessions.events import outcome
from service.sessions.turns.turn import Turn
from service.settings import Settings
from service.storage.pieces import Run
from service.storage.records import Checkpoint, Item
from service.storage.sqlite import event_pages, open_sqlite_store, store, turns
from tests.sessions.puppet import Puppet, pieces_of
from tests.storage.rows import T0, a_session, a_turn, at, ended, said, told

STEP_LENGTH = 100
TEXTS = [f"{number:010d}" for number in range(75)]
TEXT = "".join(TEXTS)
STEPS = 7
"""The number of steps that are stored before the last one."""

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "STEP_LENGTH_MAX", STEP_LENGTH)
    monkeypatch.setattr(event_pages, "ROW_LENGTH_MAX", STEP_LENGTH)


def a_checkpoint(texts: list[str], *, after: int = 0) -> Checkpoint:
    items = () if after else (Item(id="out", role="assistant", text=""),)
    return Checkpoint(session_id="s", turn_id="t", after=after, runs=said(*texts), text="".join(texts), items=items)


def failing_at(step: int, call: Call) -> Call:
    """``call``, but the disk is full from the call with this number on."""
    calls = 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > step:
            calls = 0
            raise apsw.FullError("full")
        return call(*args, **kwargs)

    return run


async def test_no_step_writes_more_than_its_part(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    keep = event_pages.keep

    def note(db: apsw.Connection, turn: int, runs: list[Run], text: str, *, after: int) -> None:
        written.append(len(text))
        keep(db, turn, runs, text, after=after)

    monkeypatch.setattr(event_pages, "keep", note)
    async with open_sqlite_store(path) as opened:
        await opened.create_session(a_session(), now=T0)
        await opened.begin_turn(a_turn(), now=T0)
        await opened.checkpoint_turns([a_checkpoint(TEXTS)])
        await opened.end_turn(ended(a_turn(), text=TEXT * 2), runs=said(*TEXTS * 2), now=T0, after=len(TEXTS))
        assert await told(opened, "s", "t") == TEXTS * 2
    assert max(written) <= STEP_LENGTH
    assert len(written) == 2 * (STEPS + 1)


@pytest.mark.parametrize("step", range(STEPS + 1))
@pytest.mark.parametrize("what", ["end", "checkpoint"])
async def test_a_crash_in_the_middle_leaves_the_last_checkpoint(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str, step: int
) -> None:
    kept = ["H", "el"]
    async with open_sqlite_store(path) as opened:
        await opened.create_session(a_session(), now=T0)
        await opened.begin_turn(a_turn(), now=T0)
        await opened.checkpoint_turns([a_checkpoint(kept)])
        monkeypatch.setattr(turns, "stage_events", failing_at(step, turns.stage_events))
        for name in ("end", "checkpoint"):
            monkeypatch.setattr(turns, name, failing_at(0, getattr(turns, name)))
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "end": lambda: opened.end_turn(
                ended(a_turn(), text="Hel" + TEXT), runs=said(*kept, *TEXTS), now=T0, after=2
            ),
            "checkpoint": lambda: opened.checkpoint_turns([a_checkpoint(TEXTS, after=2)]),
        }
        for _ in range(2):
            with pytest.raises(StoreError):
                await calls[what]()
            assert await told(opened, "s", "t") == kept, "what is not there yet is not seen either"
    async with open_sqlite_store(path) as opened:
        assert await opened.recover(now=at(1)) == 1
        turn = await opened.get_turn("s", "t", now=at(1))
        assert (turn.state, turn.reason, turn.text) == ("interrupted", "crash", "Hel")
        assert await told(opened, "s", "t") == kept
        assert (await opened.get_session("s", now=at(1))).open_turns == 0


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:5]])
@pytest.mark.parametrize("step", range(STEPS + 1))
async def test_a_write_that_failed_in_the_middle_is_replaced_by_the_next_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: int, texts: list[str]
) -> None:
    async with open_sqlite_store(path) as opened:
        await opened.create_session(a_session(), now=T0)
        await opened.begin_turn(a_turn(), now=T0)
        with monkeypatch.context() as failing:
            failing.setattr(turns, "stage_events", failing_at(step, turns.stage_events))
            failing.setattr(turns, "checkpoint", failing_at(0, turns.checkpoint))
            with pytest.raises(StoreError):
                await opened.checkpoint_turns([a_checkpoint(TEXTS)])
        await opened.checkpoint_turns([a_checkpoint(texts)])
    async with open_sqlite_store(path) as opened:
        await opened.recover(now=at(1))
        assert (await opened.get_turn("s", "t", now=at(1))).text == "".join(texts)
        assert await told(opened, "s", "t") == texts


@pytest.mark.parametrize("first", ["checkpoint", "end"])
async def test_two_large_writes_of_a_turn_at_once_leave_no_hole(
    path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """An end and a checkpoint with the same beginning, the second begun at every point of the first."""
    monkeypatch.setattr(store, "STEP_LENGTH_MAX", 20)
    async with open_sqlite_store(path) as opened:
        for number in range(38):
            session, name = f"s{number}", f"t{number}"
            await opened.create_session(a_session(session), now=T0)
            await opened.begin_turn(a_turn(name, session), now=T0)
            checkpoint = msgspec.structs.replace(a_checkpoint(TEXTS[:-1]), session_id=session, turn_id=name)
            calls: list[Callable[[], Awaitable[object]]] = [
                partial(opened.checkpoint_turns, [checkpoint]),
                partial(opened.end_turn, ended(a_turn(name, session), text=TEXT), runs=said(*TEXTS), now=T0),
            ]
            if first == "end":
                calls.reverse()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(calls[0])
                before = opened.writer.steps
                while opened.writer.steps < before + number:  # noqa: ASYNC110  the write is in a thread
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(calls[1])
            assert await told(opened, session, name) == TEXTS


async def test_an_end_that_is_tried_again_after_a_late_acknowledgement_has_no_event_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Puppet()
    turn = Turn(a_turn(), client=client, system_message=None, on_disconnect="continue", settings=Settings())
    turn.start(T0)
    turn.take([TextDelta(text) for text in TEXTS[:5]])
    async with open_sqlite_store(path) as opened:
        await opened.create_session(a_session(), now=T0)
        await opened.begin_turn(a_turn(), now=T0)
        checkpoint = turn.checkpoint()
        assert checkpoint is not None
        await opened.checkpoint_turns([checkpoint])  # its acknowledgement comes later
        turn.take([TextDelta(text) for text in TEXTS[5:]])
        turn.decide(outcome.Completed("stop"))
        record = turn.finish(T0)
        with monkeypatch.context() as failing:
            failing.setattr(turns, "end", failing_at(0, turns.end))
            with pytest.raises(StoreError):
                await opened.end_turn(record, runs=turn.log.runs(), now=T0, after=turn.stored_seq)
        turn.note_checkpoint(checkpoint)
        await opened.end_turn(record, runs=turn.log.runs(), now=T0, after=turn.stored_seq)
        assert (await opened.get_turn("s", "t", now=T0)).text == TEXT
        assert await told(opened, "s", "t") == pieces_of(turn.log)
