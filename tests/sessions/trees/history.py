"""Histories of sessions with trees of turns: each step is done by the service and by the model.

A model client lets a history decide each piece of each reply. After each step all answers about what the step has
touched are those of the model; at the end all answers about everything are, and once more after a restart of all
workers.
"""

import tempfile
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import msgspec
import trio
from hypothesis import event
from trio.testing import wait_all_tasks_blocked

from service.errors import InvalidRequestError, ModelError, RefusedError
from service.ids import new_item_id, public_id, scoped
from service.models.client import Usage
from service.sessions.commands import NewItems, NewSession, NewTurn
from service.sessions.turns.turn import Turn
from service.sessions.upkeep.checkpoints import checkpoint_turns
from service.sessions.upkeep.expiry import sweep
from service.storage import search
from service.storage.records import Item, SessionPatch
from service.storage.sqlite import SqliteStore, metadata
from tests.sessions.puppet import Reply
from tests.sessions.trees.comparisons import T0, Comparison
from tests.sessions.trees.model import FUNCTION, Model, ModelSession, ModelTurn, Part
from tests.sessions.trees.steps import (
    BEGINNING,
    MEETS_CRASHED,
    SESSION_IDS,
    Add,
    Cancel,
    Checkpoint,
    Crash,
    Create,
    DeleteItem,
    DeleteSession,
    DeleteTurn,
    Exchange,
    Finish,
    Fork,
    Move,
    Patch,
    Place,
    Restart,
    Retry,
    Say,
    Start,
    Step,
    Sweep,
    Wait,
)
from tests.sessions.trees.workers import STEP_S, Ground, Worker, Workers, pages
from tests.sessions.turns.test_calls_in_prompts import short
from tests.storage.conftest import MEMORY_DISK

T = TypeVar("T")
C = TypeVar("C")


@dataclass(eq=False)
class Live:
    """A turn that is open: its worker, and its reply once it runs."""

    turn: Turn
    worker: Worker
    reply: Reply | None = None


class BothRefusedError(Exception):
    """The service has refused a step for the same reason as the model."""


def item_of(part: Part) -> Item:
    match part.kind:
        case "call":
            item_id = new_item_id("function_call")
            return Item(
                id=item_id, type="function_call", role="assistant", text=part.text, call_id=part.call_id, name=FUNCTION
            )
        case "output":
            item_id = new_item_id("function_call_output")
            return Item(id=item_id, type="function_call_output", role="user", text=part.text, call_id=part.call_id)
        case _:
            return Item(id=new_item_id("message"), role=part.kind, text=part.text)


class History:
    """Does each step with the service and with the model."""

    def __init__(self, nursery: trio.Nursery, ground: Ground) -> None:
        self.model = Model()
        self.workers = Workers(nursery, ground, clock=self._clock)
        self.comparison = Comparison(self.workers, self.model)
        self._live: dict[str, Live] = {}  # the open turns, by id
        self._ever: list[str] = []  # the ids of all turns that there ever were
        self._met: str | None = None  # the session that the last piece or end of a reply was about
        self._unnoticed = 0  # how many workers have died since the last step, and have no successor yet
        self._crashed_in: set[str] = set()  # the sessions of which these workers ran turns
        self._numbers = count(1)

    def _clock(self) -> datetime:
        return T0 + timedelta(seconds=self.model.now)

    def _number(self) -> int:
        """A number that makes a text, or what is counted, different from all others."""
        return next(self._numbers)

    async def both(self, check: Callable[[], C], call: Callable[[Worker], Awaitable[T]]) -> tuple[C, T]:
        """Ask the model and the service. Raises BothRefusedError if both refuse."""
        checked: list[C] = []
        answers: list[T] = []
        expected = found = None
        try:
            checked.append(check())
        except RefusedError as error:
            expected = type(error)
        try:
            answers.append(await self.workers.ask(call))
        except RefusedError as error:
            found = type(error)
        assert found == expected
        if found is not None:
            raise BothRefusedError
        return checked[0], answers[0]

    # Steps

    async def run(self, history: Iterable[tuple[Step, int]]) -> None:
        for step, first in history:
            self.workers.call_next(first)
            with trio.fail_after(STEP_S):
                await self.take(step)
        with trio.fail_after(STEP_S):
            await self._notice()
            await self.comparison.compare_all(self._ever)
            for _ in self.workers.serving.copy():
                await self._restart(Restart(0))
            await self.comparison.compare_all(self._ever)
            for worker in self.workers.serving:
                await worker.stop()

    async def take(self, step: Step) -> None:
        if isinstance(step, MEETS_CRASHED) and len(self._crashed_in) == 1:
            step = msgspec.structs.replace(step, session_id=min(self._crashed_in))
        else:
            await self._notice()
        if not self._unnoticed:  # else the dead worker's turns end in the moment of its death
            self.model.now += 1
        was_unnoticed = self._unnoticed
        try:
            await _ACTIONS[type(step)](self, step)
        except BothRefusedError:
            event(f"{type(step).__name__} is refused")
        else:
            event(type(step).__name__)
        if self._unnoticed and not was_unnoticed:
            return  # to look would end the turns of the dead worker
        await self._notice()
        await wait_all_tasks_blocked()
        await self.comparison.compare(self._touched(step), self._ever)

    def _touched(self, step: Step) -> set[str]:
        """The sessions that a step may have changed."""
        match step:
            case Fork():
                return {step.session_id, self._id_of_copy(step)}
            case Wait() | Sweep() | Checkpoint() | Restart() | Crash():
                return set(SESSION_IDS)
            case Say() | Finish():
                return set() if self._met is None else {self._met}
            case _:
                return {step.session_id}

    def _pick(self, session_id: str, pick: int) -> str:
        """The id of a turn: one of this session, the newest first; then one that is gone, or is elsewhere."""
        session = self.model.sessions.get(session_id)
        own = [] if session is None else list(reversed(session.turns))
        others = [name for name in self._ever if name not in own][-2:]
        found = [*own, *others, "turn_none"]
        return found[pick % len(found)]

    def _at(self, session_id: str, place: Place) -> tuple[str | None, bool]:
        """The parent of a new turn, and whether the call names it."""
        session = self.model.sessions.get(session_id)
        if place == "head":
            return (None if session is None else session.head), False
        if place == "root":
            return None, True
        how, pick = place
        turn_id = self._pick(session_id, pick)
        if how == "beside" and session is not None and turn_id in session.turns:
            return session.turns[turn_id].parent, True
        return turn_id, True

    def _running(self, pick: int) -> tuple[ModelSession, ModelTurn, Reply] | None:
        running = [
            (session, turn)
            for session in self.model.sessions.values()
            for turn in reversed(session.open)
            if turn.state == "running"
        ]
        self._met = None
        if not running:
            return None
        session, turn = running[pick % len(running)]
        reply, self._met = self._live[turn.id].reply, session.id
        assert reply is not None
        return session, turn, reply

    async def _create(self, step: Create) -> None:
        owner = step.session_id.partition("/")[0]
        new = NewSession(
            id=public_id(step.session_id), owner=owner, title=step.title, idle_timeout_s=step.idle_timeout_s
        )
        await self.both(
            lambda: self.model.check_create(step.session_id), lambda worker: worker.sessions.create_session(new)
        )
        self.model.create(step.session_id, step.idle_timeout_s, step.title)

    async def _patch(self, step: Patch) -> None:
        changes = SessionPatch(title=step.title, metadata=step.metadata)
        session, _ = await self.both(
            lambda: self.model.session(step.session_id),
            lambda worker: worker.sessions.update_session(step.session_id, changes),
        )
        self.model.patch(session, step.title, step.metadata)

    async def _move(self, step: Move) -> None:
        session = self.model.find(step.session_id)
        head = None if step.turn is None else self._pick(step.session_id, step.turn)
        seen = "turn_none" if step.is_stale or session is None else session.head
        changes = SessionPatch(head=head, seen_head=seen)
        await self.both(
            lambda: self.model.check_move(step.session_id, head, seen),
            lambda worker: worker.sessions.update_session(step.session_id, changes),
        )
        self.model.move(self.model.session(step.session_id), head)

    async def _start(self, step: Start) -> None:
        session = self.model.find(step.session_id)
        parent, is_named = self._at(step.session_id, step.place)
        parts = [Part("user", f"{step.words} n{self._number()}")]
        if step.answers and session is not None and parent in session.turns:
            calls = dict.fromkeys(session.turns[parent].calls)
            parts = [Part("output", f"out n{self._number()}", name) for name in calls] + parts
        new = NewTurn(
            items=tuple(map(item_of, parts)),
            parent=parent if is_named else msgspec.UNSET,
            on_conflict=step.on_conflict,
            background=True,
        )

        async def start(worker: Worker) -> tuple[Worker, Turn]:
            turn, watch = await worker.sessions.start_turn(step.session_id, new)
            watch.release()
            return worker, turn

        how, begun = await self.both(
            lambda: self.model.check_start(step.session_id, step.on_conflict, parent, is_named=is_named), start
        )
        await self._begin(begun, how, step, parent, parts)

    async def _retry(self, step: Retry) -> None:
        """As ``retry_turn`` of the API does it."""
        retried = self._pick(step.session_id, step.turn)

        async def retry(worker: Worker) -> tuple[Worker, Turn]:
            old = await worker.sessions.get_turn(step.session_id, retried)
            if not any(item.role == "user" for item in old.input):
                raise InvalidRequestError("no input")
            items = tuple(msgspec.structs.replace(item, id=new_item_id(item.type)) for item in old.input)
            new = NewTurn(items=items, parent=old.parent, on_conflict=step.on_conflict, background=True)
            turn, watch = await worker.sessions.start_turn(step.session_id, new)
            watch.release()
            return worker, turn

        how, begun = await self.both(lambda: self.model.check_retry(step.session_id, retried, step.on_conflict), retry)
        old = self.model.session(step.session_id).turns[retried]
        await self._begin(begun, how, step, old.parent, [*old.said])

    async def _begin(
        self,
        accepted: tuple[Worker, Turn],
        how: Literal["branches", "follows"],
        step: Start | Retry,
        parent: str | None,
        parts: list[Part],
    ) -> None:
        worker, turn = accepted
        session = self.model.session(step.session_id)
        begun = ModelTurn(turn.id, parent, parts, self.model.now)
        ended = self.model.start(session, begun, step.on_conflict, branches=how == "branches")
        assert turn.siblings == session.siblings(begun)
        self._ever.append(turn.id)
        self._live[turn.id] = Live(turn, worker)
        await self._wait_ended(ended)
        if begun.state == "running":
            await self._wait_asked(session, begun)
            if step.replies is not None:
                await self._tell(begun, step.replies)

    async def _wait_ended(self, turns: Sequence[ModelTurn]) -> None:
        for turn in turns:
            await self._live.pop(turn.id).turn.wait_ended()

    async def _wait_asked(self, session: ModelSession, turn: ModelTurn) -> None:
        """Wait until a turn asks its model, and compare what it asks."""
        live = self._live[turn.id]
        live.reply = await live.worker.client.next_reply()
        prompt = live.reply.request.prompt
        assert [short(item) for item in prompt] == session.prompt(turn)
        last = next(item for item in reversed(prompt) if item.role != "system")
        assert last.role in ("user", "tool"), "the model is asked something"

    async def _say(self, step: Say) -> None:
        if (found := self._running(step.running)) is not None:
            _, turn, _ = found
            await self._tell(turn, step.words)

    async def _tell(self, turn: ModelTurn, words: str | None) -> None:
        """Let the model send a piece of its reply; a call, if there are no words."""
        reply = self._live[turn.id].reply
        assert reply is not None
        reply.usage = usage = self._usage()
        if words is None:
            call_id = str(len(turn.calls) + 1)
            reply.call(call_id, "{}", name=FUNCTION)
            self.model.say(turn, Part("call", "{}", call_id), usage)
        else:
            reply.say(f"{words} ")
            self.model.say(turn, Part("assistant", f"{words} "), usage)
        await wait_all_tasks_blocked()

    def _usage(self) -> Usage:
        number = self._number()
        cached = number % 3 or msgspec.UNSET
        return Usage(input_tokens=number, output_tokens=2 * number, reasoning_tokens=number % 5, cached_tokens=cached)

    async def _finish(self, step: Finish) -> None:
        if (found := self._running(step.running)) is None:
            return
        session, turn, reply = found
        if step.fails:
            reply.fail(ModelError("upstream_error", "No."))
            following = self.model.end(session, [turn], "failed", "upstream_error")
        else:
            reply.usage = turn.usage = self._usage()
            reply.finish("tool_calls" if turn.calls else "stop")
            following = self.model.end(session, [turn], "completed")
        await self._wait_ended([turn])
        await self._follow(session, following)

    async def _follow(self, session: ModelSession, following: ModelTurn | None) -> None:
        if following is not None:
            await self._wait_asked(session, following)

    async def _cancel(self, step: Cancel) -> None:
        turn_id = self._pick(step.session_id, step.turn)

        def check() -> ModelSession:
            session = self.model.session(step.session_id)
            session.check_turn(turn_id)
            return session

        session, record = await self.both(check, lambda worker: worker.sessions.cancel_turn(step.session_id, turn_id))
        assert not record.is_open
        turn = session.turns[turn_id]
        if turn.is_open:
            following = self.model.end(session, [turn], "cancelled", "requested")
            await self._wait_ended([turn])
            await self._follow(session, following)

    async def _add(self, step: Add) -> None:
        parent, is_named = self._at(step.session_id, step.place)
        parts = [part for exchange in step.exchanges for part in self._parts_of(exchange)]
        parts = parts or [Part("user", f"ape n{self._number()}")]
        new = NewItems(items=tuple(map(item_of, parts)), parent=parent if is_named else msgspec.UNSET)
        _, added = await self.both(
            lambda: self.model.check_add(step.session_id, parent, is_named=is_named),
            lambda worker: worker.sessions.add_items(step.session_id, new),
        )
        self.model.add(self.model.session(step.session_id), parent, parts, [turn.id for turn in added])
        self._ever += [turn.id for turn in added]

    def _parts_of(self, exchange: Exchange) -> list[Part]:
        number = self._number()
        told = (
            Part("system", f"note n{number}") if exchange.note else None,
            Part("output", f"out n{number}", "1") if exchange.answer else None,
            Part("user", f"{exchange.asks} n{number}") if exchange.asks else None,
            Part("assistant", f"{exchange.replies} r{number}") if exchange.replies else None,
            Part("call", "{}", "1") if exchange.calls else None,
        )
        return [part for part in told if part is not None]

    async def _delete_turn(self, step: DeleteTurn) -> None:
        turn_id = self._pick(step.session_id, step.turn)
        await self.both(
            lambda: self.model.check_delete_turn(step.session_id, turn_id),
            lambda worker: worker.sessions.delete_turn(step.session_id, turn_id),
        )
        self.model.delete_turn(self.model.session(step.session_id), turn_id)

    async def _delete_item(self, step: DeleteItem) -> None:
        turn_id = self._pick(step.session_id, step.turn)
        record = self.comparison.seen.get(turn_id)
        items = [] if record is None else [item.id for item in (*record.input, *record.output)]
        index = step.item % len(items) if items else 0
        item_id = items[index] if items else new_item_id("message")
        session = self.model.find(step.session_id)
        turn = None if session is None else session.turns.get(turn_id)
        exists = bool(items) and turn is not None and index < len(turn.parts)
        await self.both(
            lambda: self.model.check_delete_item(step.session_id, turn_id, exists=exists),
            lambda worker: worker.sessions.delete_item(step.session_id, item_id),
        )
        self.model.delete_item(self.model.session(step.session_id), turn_id, index)

    def _id_of_copy(self, step: Fork) -> str:
        return scoped(step.session_id.partition("/")[0], step.name)

    async def _fork(self, step: Fork) -> None:
        at = None if step.turn is None else self._pick(step.session_id, step.turn)
        copy_id = self._id_of_copy(step)
        await self.both(
            lambda: self.model.check_fork(step.session_id, at, copy_id),
            lambda worker: worker.sessions.fork_session(step.session_id, at=at, copy_id=step.name),
        )
        copies = await pages(self.workers.turns(copy_id))
        self.model.fork(self.model.session(step.session_id), at, copy_id, [turn.id for turn in copies])
        self._ever += [turn.id for turn in copies]

    async def _delete_session(self, step: DeleteSession) -> None:
        session, _ = await self.both(
            lambda: self.model.session(step.session_id), lambda worker: worker.sessions.delete_session(step.session_id)
        )
        await self._wait_ended(session.open)
        del self.model.sessions[step.session_id]

    async def _wait(self, step: Wait) -> None:
        self.model.now += step.seconds

    async def _sweep(self, _step: Sweep) -> None:
        removed = 0
        for worker in self.workers.serving:
            removed += await sweep(worker.store, clock=self._clock, store_timeout_s=STEP_S)
        assert removed == self.model.delete_expired()

    async def _checkpoint(self, _step: Checkpoint) -> None:
        for worker in self.workers.serving:
            await checkpoint_turns(worker.store, worker.sessions.open_turns(), store_timeout_s=STEP_S)
        for session in self.model.sessions.values():
            for turn in session.open:
                turn.kept = [*turn.replied], turn.usage

    async def _restart(self, step: Restart) -> None:
        """Stop a worker in good order, and start another one in its place."""
        worker = self.workers.serving.pop(step.worker % len(self.workers.serving))
        await worker.stop()
        rank = self.model.next_rank()
        for session, turns in self._open_turns_of(worker):
            await self._wait_ended(turns)
            self.model.end(session, turns, "interrupted", "shutdown", rank=rank)
        assert (await self.workers.open()).recovered == 0

    async def _crash(self, step: Crash) -> None:
        if self.workers.ground.folder is None:  # a memory store does not outlive its process
            await self._restart(Restart(step.worker or 0))
            return
        if step.is_kept:
            await self._checkpoint(Checkpoint())
        serving = self.workers.serving
        if step.worker is None or len(serving) == 1:
            dead = serving.copy()
            assert isinstance(dead[0].store, SqliteStore)
            await self.workers.ground.leave_as_killed(dead[0].store)
            for worker in dead:
                await worker.stop()
        else:
            at_work = {live.worker for live in self._live.values()}
            choice = [worker for worker in serving if worker in at_work] or serving
            dead = [choice[step.worker % len(choice)]]
            await dead[0].kill()
        self.workers.serving = [worker for worker in serving if worker not in dead]
        rank = self.model.next_rank()
        open_before = len(self._live)
        for session, turns in self._open_turns_of(*dead):
            self.model.crash(session, turns, rank=rank)
            self._crashed_in.add(session.id)
            for turn in turns:
                del self._live[turn.id]
        self._unnoticed = len(dead)
        if step.is_noticed or not self.workers.serving:
            await self._notice()
            recovered = sum(worker.recovered for worker in self.workers.serving[-len(dead) :])
            assert recovered == open_before - len(self._live)

    async def _notice(self) -> None:
        """Start workers in place of those that have died."""
        while self._unnoticed:
            await self.workers.open()
            self._unnoticed -= 1
        self._crashed_in.clear()

    def _open_turns_of(self, *workers: Worker) -> list[tuple[ModelSession, list[ModelTurn]]]:
        found = [
            (session, [turn for turn in session.open if self._live[turn.id].worker in workers])
            for session in self.model.sessions.values()
        ]
        return [(session, turns) for session, turns in found if turns]


_ACTIONS: dict[type[Step], Callable[[History, Any], Awaitable[None]]] = {
    Create: History._create,
    Patch: History._patch,
    Move: History._move,
    Start: History._start,
    Retry: History._retry,
    Say: History._say,
    Finish: History._finish,
    Cancel: History._cancel,
    Add: History._add,
    DeleteTurn: History._delete_turn,
    DeleteItem: History._delete_item,
    Fork: History._fork,
    DeleteSession: History._delete_session,
    Wait: History._wait,
    Sweep: History._sweep,
    Checkpoint: History._checkpoint,
    Restart: History._restart,
    Crash: History._crash,
}


async def run(history: Iterable[tuple[Step, int]], *, store: Literal["memory", "sqlite"], workers: int = 1) -> None:
    """Run a history with new workers on a new store."""
    with (
        tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder,
        patch.object(search, "SEARCH_S", STEP_S),  # the machine may be slow
        patch.object(metadata, "SEARCH_S", STEP_S),
    ):
        async with trio.open_nursery() as nursery:
            both = History(nursery, Ground(Path(folder) if store == "sqlite" else None))
            for _ in range(workers):
                await both.workers.open()
            await both.run([*((step, 0) for step in BEGINNING), *history])
