"""A store against a simple model of one, and paging while rows come and go, by generated histories."""

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.errors import (
    HeadMovedError,
    ItemNotFoundError,
    RefusedError,
    SessionExistsError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
    TurnsSuspendedError,
)
from service.ids import new_turn_id
from service.models.client import Usage
from service.storage import rules
from service.storage.pieces import Run, last_seq
from service.storage.postgres import open_postgres_store
from service.storage.records import (
    AdoptedTurn,
    EndResult,
    EndState,
    Item,
    Places,
    SessionPatch,
    SessionRecord,
    SessionStatus,
    Siblings,
    SuspendedTurn,
    TreeNode,
    TurnRecord,
)
from service.storage.sqlite import maintenance, open_sqlite_store
from service.storage.store import Store
from tests.postgres_server import PostgresServer
from tests.storage.conftest import IN_PROCESS, MEMORY_DISK, ON_A_SERVER, OpenStore
from tests.storage.rows import a_session, a_turn, adopt, all_turns, at, ended, said, told
from tests.storage.test_store_added_turns import an_added_turn

# Each example opens a store of its own; the fixture only provides the function that opens it.
histories = settings(
    max_examples=3 * settings().max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few_histories = settings(histories, max_examples=max(settings().max_examples // 5, 1))


@dataclass
class Model:
    """The simplest store, for at most ten rows: every query is a scan."""

    sessions: dict[str, SessionRecord] = field(default_factory=dict)
    marked: set[str] = field(default_factory=set)
    turns: dict[str, TurnRecord] = field(default_factory=dict)
    events: dict[str, list[str]] = field(default_factory=dict)
    suspended: dict[str, tuple[Run, ...]] = field(default_factory=dict)
    """The events of the suspended turns."""
    adopted: dict[str, AdoptedTurn] = field(default_factory=dict)
    """The turns that were adopted, until their owner dies or gives them up."""

    def visible(self, now: datetime) -> dict[str, SessionRecord]:
        return {
            name: session
            for name, session in self.sessions.items()
            if name not in self.marked and (session.open_turns > 0 or now < session.expires_at)
        }

    def get(self, name: str, now: datetime) -> SessionRecord:
        if name not in self.visible(now):
            raise SessionNotFoundError(name)
        return self.sessions[name]

    def remove(self, name: str) -> None:
        del self.sessions[name]
        self.marked.discard(name)
        for turn in [turn for turn in self.turns.values() if turn.session_id == name]:
            del self.turns[turn.id]
            self.events.pop(turn.id, None)
            self.suspended.pop(turn.id, None)

    def use(self, name: str, now: datetime, **changes: Any) -> SessionRecord:
        session = msgspec.structs.replace(self.sessions[name], **changes)
        self.sessions[name] = msgspec.structs.replace(
            session, last_accessed_at=now, expires_at=now + timedelta(seconds=session.idle_timeout_s)
        )
        return self.sessions[name]

    def create(self, session: SessionRecord, now: datetime) -> None:
        if session.id in self.sessions:
            if session.id in self.marked or session.id in self.visible(now):
                raise SessionExistsError(session.id)
            self.remove(session.id)
        self.sessions[session.id] = session

    def update(self, name: str, patch: SessionPatch, now: datetime) -> SessionRecord:
        self.get(name, now)
        changes = {key: value for key, value in msgspec.structs.asdict(patch).items() if value is not msgspec.UNSET}
        return self.use(name, now, **changes)

    def mark(self, name: str, now: datetime) -> None:
        self.get(name, now)
        self.marked.add(name)

    def remove_deleted(self, name: str) -> None:
        if name in self.marked:
            self.remove(name)

    def delete_expired(self, now: datetime, limit: int) -> int:
        visible = self.visible(now)
        expired = [s for name, s in self.sessions.items() if name not in visible and name not in self.marked]
        expired.sort(key=lambda session: (session.expires_at, session.id))
        for session in expired[:limit]:
            self.remove(session.id)
        return len(expired[:limit])

    def to_follow(self, turn: TurnRecord, now: datetime) -> SessionRecord:
        """The session of a turn that may begin: nothing follows an ephemeral turn."""
        session = self.get(turn.session_id, now)
        if session.ephemeral:
            raise SessionNotFoundError(session.id)
        self.check_turn(turn.session_id, turn.parent)
        if turn.parent is not None and self.turns[turn.parent].ephemeral:
            raise TurnNotFoundError(turn.parent)
        return session

    def begin(self, turn: TurnRecord, now: datetime) -> SessionRecord:
        session = self.to_follow(turn, now)
        if self.is_nobodys(session):
            raise TurnsSuspendedError(turn.session_id)
        self.turns[turn.id] = turn
        opened = session.open_turns + 1
        if turn.ephemeral:
            return self.use(turn.session_id, now, open_turns=opened)
        count = session.message_count + len(turn.input)
        return self.use(turn.session_id, now, head=turn.id, open_turns=opened, message_count=count)

    def begin_alone(self, turn: TurnRecord, session: SessionRecord, now: datetime) -> SessionRecord:
        """Begin an ephemeral turn with a session of its own."""
        self.create(session, now)
        self.turns[turn.id] = turn
        return self.use(session.id, now, open_turns=1)

    def end_ephemeral(self, turn: TurnRecord, now: datetime) -> None:
        del self.turns[turn.id]
        session = self.sessions[turn.session_id]
        if session.ephemeral:
            self.remove(session.id)
            return
        self.use(
            session.id,
            now,
            open_turns=session.open_turns - 1,
            input_tokens=session.input_tokens + (turn.usage.input_tokens if turn.usage else 0),
            output_tokens=session.output_tokens + (turn.usage.output_tokens if turn.usage else 0),
        )

    def branch(self, turn: TurnRecord, now: datetime) -> SessionRecord:
        if self.is_nobodys(self.to_follow(turn, now)):
            raise TurnsSuspendedError(turn.session_id)
        self.refuse_if_open(turn.parent)
        return self.begin(turn, now)

    def open_turns(self, session_id: str) -> list[TurnRecord]:
        return [turn for turn in self.turns.values() if turn.session_id == session_id and turn.is_open]

    def is_nobodys(self, session: SessionRecord) -> bool:
        """Whether the session has open turns, all of which are suspended."""
        opened = self.open_turns(session.id)
        return bool(opened) and all(turn.id in self.suspended for turn in opened)

    def suspend(self, turns: Sequence[SuspendedTurn], now: datetime) -> set[str]:
        lost = set[str]()
        for it in turns:
            turn = self.turns.get(it.turn.id)
            if turn is None or not turn.is_open:
                lost.add(it.turn.id)
            elif turn.id not in self.suspended:
                self.release(it.turn, it.runs, now)
        return lost

    def release(self, turn: TurnRecord, runs: tuple[Run, ...], now: datetime) -> None:
        self.turns[turn.id], self.suspended[turn.id] = turn, runs
        self.events[turn.id] = [turn.text] if turn.text else []
        self.adopted.pop(turn.id, None)
        self.use(turn.session_id, now)

    def adopt(self, name: str) -> list[AdoptedTurn]:
        if name in self.marked:
            return []
        for turn in self.open_turns(name):
            if turn.id in self.suspended:
                it = rules.resumed(turn, self.suspended.pop(turn.id), continues=True)
                self.adopted[turn.id], self.events[turn.id] = it, [it.turn.text] if it.turn.text else []
                self.turns[turn.id] = msgspec.structs.replace(it.turn, output=())
        return [self.adopted[turn.id] for turn in self.open_turns(name) if turn.id in self.adopted]

    def check_turn(self, session_id: str, turn_id: str | None) -> None:
        if turn_id is not None and (turn_id not in self.turns or self.turns[turn_id].session_id != session_id):
            raise TurnNotFoundError(turn_id)

    def refuse_if_open(self, turn_id: str | None) -> None:
        """Refuse if a turn on the path is open. A turn that has started has only ended turns above it."""
        while turn_id is not None:
            turn = self.turns[turn_id]
            if turn.is_open:
                raise TurnInProgressError(turn.id)
            if turn.started_at is not None or turn.state == "completed":
                return
            turn_id = turn.parent

    def move(self, name: str, head: str | None, seen: str | None, now: datetime) -> SessionRecord:
        session = self.get(name, now)
        if seen != session.head:
            raise HeadMovedError(session.head)
        self.check_turn(name, head)
        for turn_id in (head, session.head):
            self.refuse_if_open(turn_id)
        return self.use(name, now, head=head)

    def add(self, turns: Sequence[TurnRecord], now: datetime) -> SessionRecord:
        session = self.to_follow(turns[0], now)
        self.refuse_if_open(turns[0].parent)
        for turn in turns:
            self.turns[turn.id] = turn
            self.events[turn.id] = [turn.text] if turn.text else []
        count = session.message_count + sum(map(_messages_in, turns))
        return self.use(session.id, now, head=turns[-1].id, message_count=count)

    def followers(self, turn_id: str) -> list[TurnRecord]:
        """A turn and all that follow it."""
        found = [self.turns[turn_id]]
        for turn in found:
            found += [it for it in self.turns.values() if it.parent == turn.id]
        return found

    def delete_turns(self, name: str, turn_id: str, now: datetime) -> None:
        session = self.get(name, now)
        self.check_turn(name, turn_id)
        gone = self.followers(turn_id)
        self.refuse_open(gone)
        for turn in gone:
            del self.turns[turn.id]
            self.events.pop(turn.id, None)
        head = gone[0].parent if session.head in {turn.id for turn in gone} else session.head
        count = session.message_count - sum(map(_messages_in, gone))
        self.sessions[name] = msgspec.structs.replace(session, head=head, message_count=count)

    def delete_turn(self, name: str, turn_id: str, now: datetime, *, with_session: bool) -> None:
        session = self.get(name, now)
        self.check_turn(name, turn_id)
        below = self.followers(turn_id)
        self.refuse_open(below)
        top = below[0]
        if len(below) > 1:
            self.turns[turn_id] = rules.emptied(top)
            self.events.pop(turn_id, None)
            count = session.message_count - _messages_in(top)
            self.sessions[name] = msgspec.structs.replace(session, message_count=count)
            return
        while top.parent is not None and self.turns[top.parent].is_emptied and len(self.siblings(top)) == 1:
            top = self.turns[top.parent]
        self.delete_turns(name, top.id, now)
        if with_session and all(turn.session_id != name for turn in self.turns.values()):
            self.remove(name)

    def delete_item(self, turn_id: str, name: str, item_id: str, now: datetime) -> None:
        session = self.get(name, now)
        turn = self.turns.get(turn_id)
        if turn is None or turn.session_id != name or turn.find_item(item_id) is None:
            raise ItemNotFoundError(item_id)
        self.refuse_open(self.followers(turn_id))
        left = rules.without_items(turn, [item_id])
        self.turns[turn_id] = left
        if left.events_deleted:
            self.events.pop(turn_id, None)
        self.sessions[name] = msgspec.structs.replace(session, message_count=session.message_count - 1)

    def refuse_open(self, turns: Sequence[TurnRecord]) -> None:
        for turn in turns:
            if turn.is_open:
                raise TurnInProgressError(turn.id)

    def fork(self, turn: TurnRecord, copy_id: str, now: datetime) -> int:
        """The number of turns of the copy."""
        if self.get(turn.session_id, now).ephemeral:
            raise SessionNotFoundError(turn.session_id)
        self.check_turn(turn.session_id, turn.id)
        path = self.path(turn.id)
        for it in reversed(path):
            if it.is_open:
                raise TurnInProgressError(it.id)
        if copy_id in self.sessions and (copy_id in self.marked or copy_id in self.visible(now)):
            raise SessionExistsError(copy_id)
        return len(path)

    def crash(self, now: datetime) -> int:
        """The owner of all open turns dies, and another one recovers them. Returns how many there were."""
        ended_by_it = 0
        for turn in [turn for turn in self.turns.values() if turn.is_open and turn.id not in self.suspended]:
            kept = self.adopted.get(turn.id, AdoptedTurn(turn=turn, runs=()))
            if rules.resumes(turn):
                released = rules.released(turn, kept.turn.output, ())
                self.release(released, kept.runs, now)
                continue
            ended_by_it += 1
            if turn.ephemeral:
                self.end_ephemeral(turn, now)
                continue
            self.adopted.pop(turn.id, None)
            end = {"state": "interrupted", "reason": "crash", "ended_at": now}
            end |= {"last_seq": rules.seq_after_crash(turn.attempt), "output": kept.turn.output}
            self.turns[turn.id] = msgspec.structs.replace(turn, **end)
            session = self.sessions[turn.session_id]
            messages = session.message_count + len(kept.turn.output)
            self.use(turn.session_id, now, open_turns=session.open_turns - 1, message_count=messages)
        for name in [*self.marked]:
            self.remove(name)
        return ended_by_it

    def siblings(self, turn: TurnRecord) -> list[str]:
        return [it.id for it in self.turns.values() if (it.session_id, it.parent) == (turn.session_id, turn.parent)]

    def start(self, turn_id: str, now: datetime) -> bool:
        if turn_id in self.suspended:
            return False
        if turn_id in self.turns and self.turns[turn_id].state == "queued":
            self.turns[turn_id] = msgspec.structs.replace(self.turns[turn_id], state="running", started_at=now)
        return turn_id in self.turns and self.turns[turn_id].state == "running"

    def end(self, turn: TurnRecord, events: Sequence[str], now: datetime) -> EndResult:
        if turn.ephemeral:
            if turn.id not in self.turns:
                return EndResult.ALREADY_KEPT
            if turn.id in self.suspended:
                return EndResult.LOST
            self.end_ephemeral(turn, now)
            return EndResult.KEPT
        is_open = turn.id in self.turns and self.turns[turn.id].is_open and turn.id not in self.suspended
        if not is_open:
            return EndResult.ALREADY_KEPT if self.turns.get(turn.id) == turn else EndResult.LOST
        self.adopted.pop(turn.id, None)
        self.turns[turn.id] = turn
        self.events[turn.id] = [*events]
        session = self.sessions[turn.session_id]
        self.use(
            turn.session_id,
            now,
            open_turns=session.open_turns - 1,
            message_count=session.message_count + (1 if turn.text else 0),
            input_tokens=session.input_tokens + (turn.usage.input_tokens if turn.usage else 0),
            output_tokens=session.output_tokens + (turn.usage.output_tokens if turn.usage else 0),
        )
        return EndResult.KEPT

    def listing(self, status: SessionStatus | None, now: datetime) -> list[SessionRecord]:
        found = [it for it in self.visible(now).values() if status in (None, it.status) and not it.ephemeral]
        return sorted(found, key=lambda session: (session.created_at, session.id), reverse=True)

    def path(self, turn_id: str) -> list[TurnRecord]:
        found: list[TurnRecord] = []
        next_id: str | None = turn_id
        while next_id in self.turns:
            found.insert(0, self.turns[next_id])
            next_id = self.turns[next_id].parent
        return found


def _messages_in(turn: TurnRecord) -> int:
    return len(turn.input) + len(turn.output)


# A history is a list of steps over a few names, so that steps meet.

session_ids = st.sampled_from(["a", "b", "c"])
picks = st.integers(0, 5)  # an earlier turn, counted from the newest
STATUSES: list[SessionStatus | None] = [None, "idle", "running"]


class Wait(msgspec.Struct, frozen=True):
    seconds: int


class Create(msgspec.Struct, frozen=True):
    session_id: str
    idle_timeout_s: int


class Update(msgspec.Struct, frozen=True):
    session_id: str
    idle_timeout_s: int | None
    title: str | None


class Mark(msgspec.Struct, frozen=True):
    session_id: str


class Remove(msgspec.Struct, frozen=True):
    session_id: str


class Expire(msgspec.Struct, frozen=True):
    limit: int


class Begin(msgspec.Struct, frozen=True):
    session_id: str
    parent: int | None
    state: Literal["queued", "running"]
    messages: int


class BeginEphemeral(msgspec.Struct, frozen=True):
    """An ephemeral turn, which follows the picked turn, or has a session of its own."""

    session_id: str
    parent: int | None
    is_alone: bool


class Branch(msgspec.Struct, frozen=True):
    """A turn beside others: it follows the picked turn, or is beside it; its path must have ended."""

    turn: int
    is_sibling: bool


class Move(msgspec.Struct, frozen=True):
    session_id: str
    turn: int | None
    seen: int | None | Literal["head"]


class Add(msgspec.Struct, frozen=True):
    """Two turns that are complete at once."""

    session_id: str
    parent: int | None
    texts: tuple[str, str]


class DeleteTurns(msgspec.Struct, frozen=True):
    turn: int


class DeleteTurn(msgspec.Struct, frozen=True):
    turn: int
    with_session: bool


class DeleteItem(msgspec.Struct, frozen=True):
    turn: int
    item: Literal["in-0", "in-1", "out"]


class Fork(msgspec.Struct, frozen=True):
    turn: int


class BeginLasting(msgspec.Struct, frozen=True):
    """A turn that may outlive its owner."""

    session_id: str
    parent: int | None
    on_interrupt: Literal["retry", "continue"]
    state: Literal["queued", "running"]


class Suspend(msgspec.Struct, frozen=True):
    """Some turns, each with a reply so far."""

    turns: tuple[int, ...]
    text: str


class Adopt(msgspec.Struct, frozen=True):
    session_id: str


Lasting = BeginLasting | Suspend | Adopt


class Restart(msgspec.Struct, frozen=True):
    pass


class Start(msgspec.Struct, frozen=True):
    turn: int


class End(msgspec.Struct, frozen=True):
    turn: int
    state: EndState
    text: str
    tokens: int | None


Step = (
    Wait
    | Create
    | Update
    | Mark
    | Remove
    | Expire
    | Begin
    | BeginEphemeral
    | Branch
    | Move
    | Fork
    | Add
    | DeleteTurns
    | DeleteTurn
    | DeleteItem
    | Start
    | End
    | BeginLasting
    | Suspend
    | Adopt
)

steps = st.one_of(
    st.builds(Wait, st.integers(-2, 15)),
    st.builds(Create, session_ids, st.integers(1, 30)),
    st.builds(Create, session_ids, st.integers(1, 30)),
    st.builds(Update, session_ids, st.none() | st.integers(1, 30), st.none() | st.text(max_size=3)),
    st.builds(Mark, session_ids),
    st.builds(Remove, session_ids),
    st.builds(Expire, st.integers(1, 3)),
    st.builds(Begin, session_ids, st.none() | picks, st.sampled_from(["queued", "running"]), st.integers(0, 3)),
    st.builds(Begin, session_ids, st.none() | picks, st.sampled_from(["queued", "running"]), st.integers(0, 3)),
    st.builds(BeginEphemeral, session_ids, st.none() | picks, st.booleans()),
    st.builds(Branch, picks, st.booleans()),
    st.builds(Branch, picks, st.booleans()),
    st.builds(Move, session_ids, st.none() | picks, st.sampled_from(["head", "head", None, 0])),
    st.builds(Fork, picks),
    st.builds(Add, session_ids, st.none() | picks, st.tuples(st.sampled_from(["", "Hi"]), st.just("Ho"))),
    st.builds(DeleteTurns, picks),
    st.builds(DeleteTurn, picks, st.booleans()),
    st.builds(DeleteItem, picks, st.sampled_from(["in-0", "in-1", "out"])),
    st.builds(
        BeginLasting,
        session_ids,
        st.none() | picks,
        st.sampled_from(["retry", "continue"]),
        st.sampled_from(["queued", "running"]),
    ),
    st.builds(Suspend, st.lists(picks, min_size=1, max_size=3).map(tuple), st.sampled_from(["", "Hi", "é\U0001f600"])),
    st.builds(Adopt, session_ids),
    st.builds(Start, picks),
    st.builds(
        End,
        picks,
        st.sampled_from(["completed", "failed", "cancelled", "interrupted"]),
        st.sampled_from(["", "Hi", "é\U0001f600"]),
        st.none() | st.integers(0, 9),
    ),
    st.builds(End, picks, st.just("completed"), st.just("Hi"), st.just(1)),
)


@dataclass
class History:
    """Does the same steps in a store and in the model."""

    store: Store
    model: Model
    seconds: int = 0
    begun: list[TurnRecord] = field(default_factory=list)
    _moved: tuple[str | None, str | None] = (None, None)
    """The head that a step sets, and the head that its caller has seen before it."""
    _asked: list[SuspendedTurn] = field(default_factory=list)

    @property
    def now(self) -> datetime:
        return at(self.seconds)

    def picked(self, pick: int) -> TurnRecord:
        return self.begun[-1 - pick] if pick < len(self.begun) else a_turn("never")

    async def take(self, step: Step) -> None:
        """Do the step in both, and check that both return or raise the same."""
        if isinstance(step, Wait):
            self.seconds = max(0, self.seconds + step.seconds)
            return
        self._moved = self._heads(step) if isinstance(step, Move) else (None, None)
        expected, found = self._in_model(step), await self._in_store(step)
        assert found == expected, step

    def _turn(self, step: Begin) -> TurnRecord:
        """The turn for both, a new one each time."""
        return a_turn(
            f"t{len(self.begun)}",
            step.session_id,
            parent=None if step.parent is None else self.picked(step.parent).id,
            state=step.state,
            texts=["x" * n for n in range(step.messages)],
        )

    def _ephemeral(self, step: BeginEphemeral) -> TurnRecord:
        begins = Begin(step.session_id, None if step.is_alone else step.parent, "running", 1)
        return msgspec.structs.replace(self._turn(begins), ephemeral=True)

    def _alone(self, step: BeginEphemeral) -> SessionRecord | None:
        """The session that is made for the turn."""
        session = self._session(step.session_id, 30)
        return msgspec.structs.replace(session, ephemeral=True) if step.is_alone else None

    def _branch(self, step: Branch) -> TurnRecord:
        beside = self.picked(step.turn)
        parent = beside.parent if step.is_sibling else beside.id
        return a_turn(f"t{len(self.begun)}", beside.session_id, parent=parent)

    def _heads(self, step: Move) -> tuple[str | None, str | None]:
        """The head that the step sets, and the head that it has seen."""
        session = self.model.sessions.get(step.session_id)
        seen = None if step.seen is None or session is None else session.head
        if isinstance(step.seen, int):
            seen = self.picked(step.seen).id
        return None if step.turn is None else self.picked(step.turn).id, seen

    def _added(self, step: Add) -> list[TurnRecord]:
        number = len(self.begun)
        parent = None if step.parent is None else self.picked(step.parent).id
        first = an_added_turn(f"t{number}", parent=parent, replied=step.texts[0])
        second = an_added_turn(f"t{number + 1}", parent=first.id, replied=step.texts[1])
        return [msgspec.structs.replace(turn, session_id=step.session_id) for turn in (first, second)]

    def _lasting(self, step: BeginLasting) -> TurnRecord:
        turn = self._turn(Begin(step.session_id, step.parent, step.state, 1))
        return msgspec.structs.replace(turn, on_interrupt=step.on_interrupt)

    def _suspended(self, step: Suspend) -> list[SuspendedTurn]:
        """The turns with their replies so far. What was kept of an adopted one goes on."""
        found: list[SuspendedTurn] = []
        picked = {turn.id: turn for turn in map(self.picked, step.turns)}
        for turn in (self.model.turns.get(name, begun) for name, begun in picked.items()):
            kept = self.model.adopted.get(turn.id, AdoptedTurn(turn=turn, runs=()))
            before, text = kept.turn.text, "" if turn.state == "queued" else step.text
            runs = (*kept.runs, *(said(text) if text else ()))
            item = Item(id=f"{turn.id}-out", role="assistant", text=before + text)
            output = (item,) if item.text else ()
            so_far = msgspec.structs.replace(turn, output=output, last_seq=last_seq(runs))
            found.append(SuspendedTurn(turn=so_far, runs=runs))
        return found

    def _outlive_in_model(self, step: BeginLasting | Suspend | Adopt) -> object:
        if isinstance(step, BeginLasting):
            return self.model.begin(self._lasting(step), self.now)
        if isinstance(step, Suspend):
            self._asked = self._suspended(step)
            return self.model.suspend(self._asked, self.now)
        return self.model.adopt(step.session_id)

    async def _outlive_in_store(self, step: BeginLasting | Suspend | Adopt) -> object:
        if isinstance(step, BeginLasting):
            turn = self._lasting(step)
            begun = await self.store.begin_turn(turn, now=self.now)
            self.begun.append(turn)
            return begun.session
        if isinstance(step, Suspend):
            return set(await self.store.suspend_turns(self._asked, now=self.now))
        opened = self.model.open_turns(step.session_id)
        running = [turn.id for turn in opened if turn.id not in self.model.adopted]  # as a process names its live turns
        return list(await adopt(self.store, step.session_id, now=self.now, running=running))

    def _edit_in_model(self, step: Add | DeleteTurns | DeleteTurn | DeleteItem) -> object:
        if isinstance(step, Add):
            return self.model.add(self._added(step), self.now)
        turn = self.picked(step.turn)
        if isinstance(step, DeleteTurns):
            self.model.delete_turns(turn.session_id, turn.id, self.now)
        elif isinstance(step, DeleteTurn):
            self.model.delete_turn(turn.session_id, turn.id, self.now, with_session=step.with_session)
        else:
            self.model.delete_item(turn.id, turn.session_id, f"{turn.id}-{step.item}", self.now)
        return None

    async def _edit_in_store(self, step: Add | DeleteTurns | DeleteTurn | DeleteItem) -> object:
        if isinstance(step, Add):
            turns = self._added(step)
            session = await self.store.add_turns(turns, now=self.now)
            self.begun += turns
            return session
        turn = self.picked(step.turn)
        if isinstance(step, DeleteTurns):
            await self.store.delete_turns(turn.session_id, turn.id, now=self.now)
        elif isinstance(step, DeleteTurn):
            revisions = []
            if step.with_session:
                revisions.append(rules.revision_of(await self.store.get_session(turn.session_id, now=self.now)))
            await self.store.delete_turn(turn.session_id, turn.id, now=self.now, session_revisions=revisions)
        else:
            await self.store.delete_item(turn.session_id, f"{turn.id}-{step.item}", now=self.now)
        return None

    def _tree_in_model(self, step: Branch | Move | Fork | BeginEphemeral | Lasting) -> object:
        match step:
            case BeginLasting() | Suspend() | Adopt():
                return self._outlive_in_model(step)
            case BeginEphemeral():
                turn, alone = self._ephemeral(step), self._alone(step)
                return self.model.begin_alone(turn, alone, self.now) if alone else self.model.begin(turn, self.now)
            case Branch():
                turn = self._branch(step)
                session = self.model.branch(turn, self.now)
                places = self.model.siblings(turn)
                return session, Siblings(len(places), len(places))
            case Move(session_id):
                return self.model.move(session_id, *self._moved, self.now)
            case Fork(pick):
                return self.model.fork(self.picked(pick), "copy", self.now)

    async def _tree_in_store(self, step: Branch | Move | Fork | BeginEphemeral | Lasting) -> object:
        match step:
            case BeginLasting() | Suspend() | Adopt():
                return await self._outlive_in_store(step)
            case BeginEphemeral():
                turn = self._ephemeral(step)
                begun = await self.store.begin_turn(turn, now=self.now, creates=self._alone(step))
                self.begun.append(turn)
                return begun.session
            case Branch():
                turn = self._branch(step)
                begun = await self.store.begin_turn(turn, now=self.now, branches=True)
                self.begun.append(turn)
                return begun.session, begun.siblings
            case Move(session_id):
                patch = SessionPatch(head=self._moved[0], seen_head=self._moved[1])
                return await self.store.update_session(session_id, patch, now=self.now)
            case Fork(pick):
                return await self._fork(self.picked(pick))

    async def _fork(self, turn: TurnRecord) -> int:
        """Fork, compare the copy with the path, and delete it. Returns the number of its turns."""
        store, now = self.store, self.now
        copy = await store.fork_session(turn.session_id, at=turn.id, copy_id="copy", now=now)
        copies = await all_turns(store, "copy", now=now)
        path = self.model.path(turn.id)
        assert [it.input_text for it in copies] == [it.input_text for it in path]
        assert [it.parent for it in copies] == [None, *(it.id for it in copies[:-1])]
        assert await store.find_places("copy", [it.id for it in copies]) == Places(
            copy.head, {it.id: Siblings() for it in copies}
        )
        assert copy.head == copies[-1].id
        await store.mark_deleted("copy", now=now)
        await store.remove_deleted("copy")
        return len(copies)

    def _end(self, step: End) -> tuple[TurnRecord, list[str]]:
        usage = None if step.tokens is None else Usage(input_tokens=step.tokens, output_tokens=step.tokens + 1)
        turn = ended(self.picked(step.turn), step.state, text=step.text, usage=usage, now=self.now)
        return turn, [text for text in (step.text[:1], step.text[1:]) if text]

    def _end_in_model(self, step: End) -> EndResult:
        turn, events = self._end(step)
        return self.model.end(turn, events, self.now)

    async def _end_in_store(self, step: End) -> EndResult:
        turn, events = self._end(step)
        return await self.store.end_turn(turn, runs=said(*events), now=self.now)

    def _in_model(self, step: Step) -> object:
        model, now = self.model, self.now
        try:
            match step:
                case Create(session_id, idle_timeout_s):
                    model.create(self._session(session_id, idle_timeout_s), now)
                case Update(session_id):
                    return model.update(session_id, _patch(step), now)
                case Mark(session_id):
                    model.mark(session_id, now)
                case Remove(session_id):
                    model.remove_deleted(session_id)
                case Expire(limit):
                    return model.delete_expired(now, limit)
                case Begin():
                    return model.begin(self._turn(step), now)
                case Branch() | Move() | Fork() | BeginEphemeral() | BeginLasting() | Suspend() | Adopt():
                    return self._tree_in_model(step)
                case Start(turn):
                    return model.start(self.picked(turn).id, now)
                case End():
                    return self._end_in_model(step)
                case Add() | DeleteTurns() | DeleteTurn() | DeleteItem():
                    return self._edit_in_model(step)
        except RefusedError as error:
            return type(error)
        return None

    async def _in_store(self, step: Step) -> object:
        store, now = self.store, self.now
        try:
            match step:
                case Create(session_id, idle_timeout_s):
                    await store.create_session(self._session(session_id, idle_timeout_s), now=now)
                case Update(session_id):
                    return await store.update_session(session_id, _patch(step), now=now)
                case Mark(session_id):
                    await store.mark_deleted(session_id, now=now)
                case Remove(session_id):
                    await store.remove_deleted(session_id)
                case Expire(limit):
                    return await store.delete_expired(now=now, limit=limit)
                case Begin():
                    turn_record = self._turn(step)
                    begun = await store.begin_turn(turn_record, now=now, path_bytes_max=None)
                    self.begun.append(turn_record)
                    path = await store.read_path(turn_record.session_id, turn_record.id, bytes_max=None)
                    assert begun.path is not None
                    assert _in_path(begun.path) == _in_path(path)
                    return begun.session
                case Branch() | Move() | Fork() | BeginEphemeral() | BeginLasting() | Suspend() | Adopt():
                    return await self._tree_in_store(step)
                case Start(turn):
                    return await store.start_turn(self.picked(turn).id, now=now)
                case End():
                    return await self._end_in_store(step)
                case Add() | DeleteTurns() | DeleteTurn() | DeleteItem():
                    return await self._edit_in_store(step)
        except RefusedError as error:
            return type(error)
        return None

    def _session(self, session_id: str, idle_timeout_s: int) -> SessionRecord:
        return a_session(session_id, created=self.seconds, idle_timeout_s=idle_timeout_s)

    async def compare(self) -> None:
        """Check that all queries give the same for both."""
        store, model, now = self.store, self.model, self.now
        for status in STATUSES:
            listing = model.listing(status, now)
            assert await store.count_sessions(status=status, now=now) == len(listing)
            page = await store.list_sessions(limit=2, after=None, status=status, now=now)
            assert list(page.data) == listing[:2]
            assert (page.next is not None) == (len(listing) > 2)
        for session in model.listing(None, now):
            turns = [turn for turn in model.turns.values() if turn.session_id == session.id]
            assert await all_turns(store, session.id, now=now, limit=2) == turns
            tree = await store.list_tree(session.id, limit=100, after=None, now=now)
            assert tree.data == tuple(map(TreeNode.of, turns))
            places = await store.find_places(session.id, [turn.id for turn in self.begun])
            ids = {turn.id: model.siblings(turn) for turn in turns}
            assert places == Places(
                session.head, {name: Siblings(its.index(name) + 1, len(its)) for name, its in ids.items()}
            )
            for parent in {turn.parent for turn in turns}:
                children = await store.list_turns(session.id, limit=100, after=None, now=now, parent=parent)
                assert list(children.data) == [turn for turn in turns if turn.parent == parent]
        waiting = [it for it in model.sessions.values() if model.is_nobodys(it) and it.id not in model.marked]
        waiting.sort(key=lambda session: (session.last_accessed_at, session.id))
        listed = await store.list_suspended(limit=2)
        assert [(it.id, it.awaits_client) for it in listed] == [
            (it.id, all(turn.on_disconnect == "cancel" for turn in model.open_turns(it.id))) for it in waiting[:2]
        ]
        for turn in self.begun:
            found = await store.find_open_turn(turn.session_id, turn.id)
            is_open = turn.id in model.turns and model.turns[turn.id].is_open and turn.session_id not in model.marked
            assert (found is not None) == is_open
            assert found is None or (found.owner, found.is_suspended) == (None, turn.id in model.suspended)
        for turn in self.begun:
            kept = turn.id in model.turns
            assert await told(store, turn.session_id, turn.id) == model.events.get(turn.id, [])
            path = await store.read_path(turn.session_id, turn.id, bytes_max=None)
            assert _in_path(path) == _in_path(model.path(turn.id) if kept else [])
            paged = await store.list_path(turn.session_id, turn.id, limit=2, first=None)
            assert _in_path(paged) == _in_path(model.path(turn.id)[:2] if kept else [])


def _in_path(turns: Sequence[TurnRecord]) -> list[TurnRecord]:
    """The records without what those of a path do not have."""
    return [msgspec.structs.replace(turn, on_interrupt="fail", attempt=1) for turn in turns]


def _patch(step: Update) -> SessionPatch:
    if step.idle_timeout_s is None:
        return SessionPatch(title=step.title)
    return SessionPatch(title=step.title, idle_timeout_s=step.idle_timeout_s)


SUSPENDED_EPHEMERAL: list[Step] = [
    *(BeginEphemeral("a", None, is_alone=True), Suspend((0,), "Hi"), End(0, "completed", "Hi", None), Adopt("a")),
    End(0, "completed", "Hi", None),
]


LIVE: list[Step] = [Create("b", 1), BeginLasting("b", None, "retry", "queued"), Adopt("b")]


@IN_PROCESS
@histories
@example(history=SUSPENDED_EPHEMERAL)
@example(history=LIVE)
@given(st.lists(steps, max_size=40))
async def test_a_store_does_what_a_simple_model_of_it_does(open_store: OpenStore, history: list[Step]) -> None:
    await _compare(open_store, history)


@ON_A_SERVER
@few_histories
@example(history=SUSPENDED_EPHEMERAL)
@example(history=LIVE)
@given(st.lists(steps, max_size=40))
async def test_a_store_on_a_server_does_what_a_simple_model_of_it_does(
    open_store: OpenStore, history: list[Step]
) -> None:
    await _compare(open_store, history)


async def _compare(open_store: OpenStore, history: list[Step]) -> None:
    async with open_store() as store:
        both = History(store, Model())
        for step in history:
            await both.take(step)
            await both.compare()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps | st.just(Restart()), max_size=25))
async def test_a_store_that_loses_its_owner_again_and_again_does_what_the_model_does(
    history: list[Step | Restart],
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as directory:
        async for _ in _lives(partial(open_sqlite_store, f"{directory}/lastcall.db"), history):
            assert maintenance.check(Path(directory, "lastcall.db")) == []


@few_histories
@given(history=st.lists(steps | st.just(Restart()), max_size=25))
async def test_a_store_on_a_server_that_loses_its_owner_again_and_again_does_what_the_model_does(
    postgres: PostgresServer, history: list[Step | Restart]
) -> None:
    with postgres.empty_schema() as schema:
        async for _ in _lives(partial(open_postgres_store, postgres.url, schema_name=schema), history):
            pass


async def _lives(open_again: OpenStore, history: list[Step | Restart]) -> AsyncIterator[None]:
    """Take the steps in a store that is opened again at each restart. Yields after each life of an owner."""
    model, begun, seconds, rest = Model(), list[TurnRecord](), 0, history.copy()
    while True:
        async with open_again() as store:
            both = History(store, model, seconds, begun)
            assert await store.recover(now=both.now) == model.crash(both.now)
            await both.compare()
            while rest and not isinstance(step := rest.pop(0), Restart):
                await both.take(step)
                await both.compare()
            seconds = both.seconds
        yield
        if not rest:
            return


# Paging

Coming = tuple[Literal["create", "delete", "expire", "run", "end"], int]
comings: st.SearchStrategy[Coming] = st.tuples(
    st.sampled_from(["create", "delete", "expire", "run", "end"]), st.integers(0, 30)
)
PAGED_AT = at(100)


@dataclass
class Crowd:
    """Sessions that come and go and change their status."""

    store: Store
    names: list[str] = field(default_factory=list)
    open_turns: dict[str, TurnRecord] = field(default_factory=dict)

    async def change(self, what: Coming) -> None:
        kind, n = what
        if kind == "create":
            self.names.append(f"s{len(self.names)}")
            # Of any age: the clocks of several machines differ.
            await self.store.create_session(a_session(self.names[-1], created=n, idle_timeout_s=1000), now=PAGED_AT)
        elif self.names:
            with suppress(SessionNotFoundError):
                await self._change_one(kind, self.names[n % len(self.names)])

    async def _change_one(self, kind: str, name: str) -> None:
        match kind:
            case "delete":
                await self.store.mark_deleted(name, now=PAGED_AT)
            case "expire":
                await self.store.update_session(name, SessionPatch(idle_timeout_s=0.5), now=at(99))
            case "run" if name not in self.open_turns:
                turn = a_turn(new_turn_id(), name)
                await self.store.begin_turn(turn, now=PAGED_AT)
                self.open_turns[name] = turn
            case "end" if name in self.open_turns:
                await self.store.end_turn(ended(self.open_turns.pop(name)), runs=(), now=PAGED_AT)

    async def matching(self, status: SessionStatus | None) -> set[str]:
        page = await self.store.list_sessions(limit=1000, after=None, status=status, now=PAGED_AT)
        return {session.id for session in page.data}


pages_of_a_crowd = given(
    before=st.lists(comings | st.tuples(st.just("create"), st.integers(0, 30)), max_size=20),
    limit=st.integers(1, 5),
    between=st.lists(st.lists(comings, max_size=4), max_size=8),
)


@IN_PROCESS
@pytest.mark.parametrize("status", STATUSES)
@histories
@pages_of_a_crowd
async def test_a_listing_is_exact_for_what_stays_while_sessions_come_and_go(
    open_store: OpenStore,
    status: SessionStatus | None,
    before: list[Coming],
    limit: int,
    between: list[list[Coming]],
) -> None:
    await _page_a_crowd(open_store, status, before, limit, between)


@ON_A_SERVER
@pytest.mark.parametrize("status", STATUSES)
@few_histories
@pages_of_a_crowd
async def test_a_listing_on_a_server_is_exact_for_what_stays_while_sessions_come_and_go(
    open_store: OpenStore,
    status: SessionStatus | None,
    before: list[Coming],
    limit: int,
    between: list[list[Coming]],
) -> None:
    await _page_a_crowd(open_store, status, before, limit, between)


async def _page_a_crowd(
    open_store: OpenStore,
    status: SessionStatus | None,
    before: list[Coming],
    limit: int,
    between: list[list[Coming]],
) -> None:
    async with open_store() as store:
        crowd = Crowd(store)
        for what in before:
            await crowd.change(what)
        stayed = ever = await crowd.matching(status)
        page = await store.list_sessions(limit=limit, after=None, status=status, now=PAGED_AT)
        found = list(page.data)
        while page.next is not None:
            assert len(page.data) == limit
            assert len(found) < 200, "the listing has no end"
            for what in between.pop() if between else []:
                await crowd.change(what)
                matching = await crowd.matching(status)
                stayed, ever = stayed & matching, ever | matching
            page = await store.list_sessions(limit=limit, after=page.next, status=status, now=PAGED_AT)
            found += page.data

    places = [(session.created_at, session.id) for session in found]
    assert places == sorted(set(places), reverse=True), "in order, and none twice"
    assert stayed <= {session.id for session in found} <= ever
