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
from service.storage.records import Checkpoint, Item
from service.storage.sqlite import open_sqlite_store, store, turns
from tests.storage.rows import T0, a_session, a_turn, at, ended

STEP_BYTES = 100
EVENTS = [b"%010d" % number for number in range(75)]
STEPS = 7
"""The number of steps that are stored before the last one."""

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "STEP_BYTES_MAX", STEP_BYTES)


def a_checkpoint(text: str, events: list[bytes], *, after: int = 0) -> Checkpoint:
    item = Item(id="out", role="assistant", text=text)
    return Checkpoint(session_id="s", turn_id="t", after=after, events=tuple(events), output=(item,))


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
    keep_events = turns._keep_events

    def note(db: apsw.Connection, turn: int, events: list[bytes], *, after: int) -> None:
        written.append(sum(map(len, events)))
        keep_events(db, turn, events, after=after)

    monkeypatch.setattr(turns, "_keep_events", note)
    async with open_sqlite_store(path) as opened:
        await opened.create_session(a_session(), now=T0)
        await opened.begin_turn(a_turn(), now=T0)
        await opened.checkpoint_turns([a_checkpoint("x", EVENTS)])
        await opened.end_turn(ended(a_turn()), events=EVENTS, now=T0, after=len(EVENTS))
        assert list(await opened.read_events("s", "t")) == EVENTS * 2
    assert max(written) <= STEP_BYTES
    assert len(written) == 2 * (STEPS + 1)


@pytest.mark.parametrize("step", range(STEPS + 1))
@pytest.mark.parametrize("what", ["end", "checkpoint"])
async def test_a_crash_in_the_middle_leaves_the_last_checkpoint(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str, step: int
) -> None:
    kept = [b"1", b"2"]
    async with open_sqlite_store(path) as opened:
        await opened.create_session(a_session(), now=T0)
        await opened.begin_turn(a_turn(), now=T0)
        await opened.checkpoint_turns([a_checkpoint("Hel", kept)])
        monkeypatch.setattr(turns, "stage_events", failing_at(step, turns.stage_events))
        for name in ("end", "checkpoint"):
            monkeypatch.setattr(turns, name, failing_at(0, getattr(turns, name)))
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "end": lambda: opened.end_turn(ended(a_turn()), events=EVENTS, now=T0, after=2),
            "checkpoint": lambda: opened.checkpoint_turns([a_checkpoint("lo", EVENTS, after=2)]),
        }
        for _ in range(2):
            with pytest.raises(StoreError):
                await calls[what]()
            assert list(await opened.read_events("s", "t")) == kept, "what is not there yet is not seen either"
    async with open_sqlite_store(path) as opened:
        assert await opened.recover(now=at(1)) == 1
        turn = await opened.get_turn("s", "t", now=at(1))
        assert (turn.state, turn.reason, turn.text) == ("interrupted", "crash", "Hel")
        assert list(await opened.read_events("s", "t")) == kept
        assert (await opened.get_session("s", now=at(1))).open_turns == 0


@pytest.mark.parametrize("events", [EVENTS, EVENTS[:5]])
@pytest.mark.parametrize("step", range(STEPS + 1))
async def test_a_write_that_failed_in_the_middle_is_replaced_by_the_next_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: int, events: list[bytes]
) -> None:
    async with open_sqlite_store(path) as opened:
        await opened.create_session(a_session(), now=T0)
        await opened.begin_turn(a_turn(), now=T0)
        with monkeypatch.context() as failing:
            failing.setattr(turns, "stage_events", failing_at(step, turns.stage_events))
            failing.setattr(turns, "checkpoint", failing_at(0, turns.checkpoint))
            with pytest.raises(StoreError):
                await opened.checkpoint_turns([a_checkpoint("lost", EVENTS)])
        await opened.checkpoint_turns([a_checkpoint("Hi", events)])
    async with open_sqlite_store(path) as opened:
        await opened.recover(now=at(1))
        assert (await opened.get_turn("s", "t", now=at(1))).text == "Hi"
        assert list(await opened.read_events("s", "t")) == events


@pytest.mark.parametrize("first", ["checkpoint", "end"])
async def test_two_large_writes_of_a_turn_at_once_leave_no_hole(
    path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """An end and a checkpoint with the same beginning, the second begun at every point of the first."""
    monkeypatch.setattr(store, "STEP_BYTES_MAX", 20)
    async with open_sqlite_store(path) as opened:
        for number in range(38):
            session, name = f"s{number}", f"t{number}"
            await opened.create_session(a_session(session), now=T0)
            await opened.begin_turn(a_turn(name, session), now=T0)
            checkpoint = msgspec.structs.replace(a_checkpoint("x", EVENTS[:-1]), session_id=session, turn_id=name)
            calls: list[Callable[[], Awaitable[object]]] = [
                partial(opened.checkpoint_turns, [checkpoint]),
                partial(opened.end_turn, ended(a_turn(name, session)), events=EVENTS, now=T0),
            ]
            if first == "end":
                calls.reverse()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(calls[0])
                before = opened.writer.steps
                while opened.writer.steps < before + number:  # noqa: ASYNC110  the write is in a thread
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(calls[1])
            assert list(await opened.read_events(session, name)) == EVENTS
