"""Sessions against a simple model of them: generated histories, one action at a time, each outcome exact.

Actions at the same instant are for ``test_races.py``. Here no two actions share an instant: callers act a third
of a second after a full one, and every timeout and every reply has a fraction of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from math import inf
from typing import Literal

import msgspec
import trio
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock

from service.errors import (
    BranchLimitError,
    HeadMovedError,
    QueueFullError,
    RefusedError,
    SessionExistsError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnLimitError,
    TurnNotFoundError,
)
from service.models.client import Message
from service.sessions.commands import NewSession, NewTurn, OnConflict
from service.sessions.events.events import TurnCancelled, TurnCompleted, TurnFailed, TurnInterrupted
from service.sessions.sessions import Sessions, open_sessions
from service.sessions.turns.turn import Turn, Watch
from service.sessions.upkeep.expiry import sweep
from service.settings import Settings
from service.stop_state import StopState
from service.storage.memory import MemoryStore
from service.storage.records import OnDisconnect, Places, SessionPatch, Siblings, TurnState
from tests.sessions.puppet import frames_in, frames_of, pieces_of, read_all
from tests.sessions.scripts import Script, ScriptedReplies, token
from tests.storage.rows import told

T0 = datetime(2030, 1, 1, tzinfo=UTC)

IDLE_TIMEOUT_S = 10.4
FIRST_TOKEN_TIMEOUT_S = 3 + 1 / 32
NEXT_TOKEN_TIMEOUT_S = 2 + 1 / 64
TURN_TIMEOUT_S = 5 + 1 / 128
LIVE_TURNS_MAX = 5
QUEUED_TURNS_MAX = 2
BRANCHES_MAX = 3


# The model: no tasks, no scopes; it computes what must happen, and when.


@dataclass(eq=False)
class ModelTurn:
    key: str
    id: str
    session: "ModelSession"
    parent: str | None
    script: Script
    keeps_on: bool
    state: TurnState = "queued"
    detail: str | None = None
    started: float = inf
    abandoned: float = inf
    watches: int = 1
    ended: float = inf

    @property
    def is_open(self) -> bool:
        return self.state in ("queued", "running")

    def next_end(self) -> tuple[float, TurnState, str | None]:
        """The end of the turn if no caller does anything."""
        causes: list[tuple[float, TurnState, str | None]] = [(self.abandoned, "cancelled", "disconnected")]
        if self.state == "running":
            causes += [(self.started + TURN_TIMEOUT_S, "failed", "turn_timeout"), self._end_of_script()]
        return min(causes, key=lambda cause: cause[0])

    def _end_of_script(self) -> tuple[float, TurnState, str | None]:
        now, patience, code = self.started, FIRST_TOKEN_TIMEOUT_S, "first_token_timeout"
        for delay in self.script.tokens:
            if delay > patience:
                return now + patience, "failed", code
            now, patience, code = now + delay, NEXT_TOKEN_TIMEOUT_S, "next_token_timeout"
        if self.script.last == "silence" or self.script.last_s > patience:
            return now + patience, "failed", code
        now += self.script.last_s
        match self.script.last:
            case "finish":
                return now, "completed", None
            case "fail":
                return now, "failed", "upstream_error"
            case "crash":
                return now, "failed", "internal_error"

    def text_at(self, now: float) -> str:
        """The part of the reply that the model has sent by ``now``."""
        due, said = self.started, 0
        for delay in self.script.tokens:
            due += delay
            if due > min(now, self.ended):
                break
            said += 1
        return "".join(token(self.key, number) for number in range(1, said + 1))

    @property
    def path(self) -> list["ModelTurn"]:
        """The turns from the root to this one."""
        parent = next((turn for turn in self.session.turns if turn.id == self.parent), None)
        return [*(parent.path if parent else ()), self]

    def prompt(self) -> list[tuple[str, str]]:
        """What the model is asked: roles and texts of the path, whose turns before this one have ended."""
        found: list[tuple[str, str]] = []
        for turn in self.path:
            if found and found[-1][0] == "user":
                found[-1] = ("user", f"{found[-1][1]}\n\n{turn.key}")
            else:
                found.append(("user", turn.key))
            reply = "" if turn is self or turn.state == "failed" else turn.text_at(inf)
            if reply:
                found.append(("assistant", reply))
        return found


@dataclass(eq=False)
class ModelSession:
    id: str
    idle_timeout_s: float
    deadline: float
    turns: list[ModelTurn] = field(default_factory=list)
    head: str | None = None
    title: str | None = None

    @property
    def open(self) -> list[ModelTurn]:
        return [turn for turn in self.turns if turn.is_open]

    @property
    def running(self) -> int:
        return sum(turn.state == "running" for turn in self.turns)

    def open_on_path(self, turn_id: str | None) -> ModelTurn | None:
        """The last open turn on the path to a turn."""
        path = next((turn.path for turn in self.turns if turn.id == turn_id), [])
        return next((turn for turn in reversed(path) if turn.is_open), None)

    def branches(self, parent: str | None, *, is_named: bool) -> bool:
        """Whether a turn with this parent runs beside the open turns: the parent is named, and its path has ended."""
        return is_named and self.open_on_path(parent) is None

    def siblings(self, turn: ModelTurn) -> Siblings:
        ids = [other.id for other in self.turns if other.parent == turn.parent]
        return Siblings(ids.index(turn.id) + 1, len(ids))

    @property
    def message_count(self) -> int:
        return len(self.turns) + sum(1 for turn in self.turns if not turn.is_open and turn.text_at(inf))

    def use(self, now: float) -> None:
        self.deadline = now + self.idle_timeout_s


class Model:
    def __init__(self, *, grace_s: float) -> None:
        self.grace_s = grace_s
        self.sessions: dict[str, ModelSession] = {}
        self.turns: list[ModelTurn] = []  # turns of deleted sessions too: their logs are still read

    def advance(self, until: float) -> None:
        """Apply everything that happens without a caller until this time."""
        while True:
            candidates = [(*turn.next_end(), turn) for session in self.sessions.values() for turn in session.open]
            if not candidates:
                return
            when, state, detail, turn = min(candidates, key=lambda candidate: candidate[0])
            if when > until:
                return
            self.end(turn, when, state, detail)

    def end(self, turn: ModelTurn, now: float, state: TurnState, detail: str | None) -> None:
        turn.state, turn.detail, turn.ended = state, detail, now
        turn.session.use(now)
        self.start_next(turn.session, now)

    def start_next(self, session: ModelSession, now: float) -> None:
        if session.open and session.open[0].state == "queued":
            session.open[0].state = "running"
            session.open[0].started = now

    def session(self, session_id: str, now: float) -> ModelSession:
        session = self.sessions.get(session_id)
        if session is None or (not session.open and session.deadline <= now):
            raise SessionNotFoundError(session_id)
        return session

    def check_start(
        self, session_id: str, on_conflict: OnConflict, parent: str | None, now: float, *, is_named: bool
    ) -> None:
        """Raise the error that refuses such a turn, if one does."""
        here = self.sessions.get(session_id)
        if here is not None and is_named and parent not in [turn.id for turn in here.open]:
            if here.running >= BRANCHES_MAX:
                raise BranchLimitError("branches")
        elif here is not None:
            self._check_following(here, on_conflict)
        if sum(len(session.open) for session in self.sessions.values()) >= LIVE_TURNS_MAX:
            raise TurnLimitError("limit")
        session = self.session(session_id, now)
        if parent is not None and parent not in [turn.id for turn in session.turns]:
            raise TurnNotFoundError(parent)
        if not session.branches(parent, is_named=is_named):
            self._check_following(session, on_conflict)

    def _check_following(self, session: ModelSession, on_conflict: OnConflict) -> None:
        if session.open and on_conflict == "reject":
            raise TurnInProgressError(session.open[0].id)
        queued = sum(turn.state == "queued" for turn in session.open)
        if session.open and on_conflict == "queue" and queued >= QUEUED_TURNS_MAX:
            raise QueueFullError("full")

    def check_move(self, session_id: str, head: str | None, seen: str | None, now: float) -> ModelSession:
        """Raise the error that refuses to move the head, if one does."""
        session = self.session(session_id, now)
        if seen != session.head:
            raise HeadMovedError(session.head)
        if head is not None and head not in [turn.id for turn in session.turns]:
            raise TurnNotFoundError(head)
        for turn_id in (head, session.head):
            if (still_open := session.open_on_path(turn_id)) is not None:
                raise TurnInProgressError(still_open.id)
        return session

    def start(self, turn: ModelTurn, on_conflict: OnConflict, now: float, *, branches: bool) -> None:
        session = turn.session
        earlier = session.open
        session.turns.append(turn)
        session.head = turn.id
        self.turns.append(turn)
        session.use(now)
        if branches:
            turn.state, turn.started = "running", now
            return
        if on_conflict == "supersede":
            for other in reversed(earlier):  # the queued turns first, so that none of them starts
                self.end(other, now, "cancelled", "superseded")
        self.start_next(session, now)

    def release(self, turn: ModelTurn, now: float) -> None:
        turn.watches -= 1
        if turn.is_open and not turn.watches and not turn.keeps_on:
            turn.abandoned = now + self.grace_s
            if not self.grace_s:
                self.end(turn, now, "cancelled", "disconnected")

    def watch(self, turn: ModelTurn) -> None:
        turn.watches += 1
        if turn.is_open:
            turn.abandoned = inf

    def delete(self, session_id: str, now: float) -> None:
        session = self.session(session_id, now)
        for turn in reversed(session.open):
            self.end(turn, now, "cancelled", "session_deleted")
        del self.sessions[session_id]

    def delete_expired(self, now: float) -> int:
        expired = [s.id for s in self.sessions.values() if not s.open and s.deadline <= now]
        for session_id in expired:
            del self.sessions[session_id]
        return len(expired)


# The callers' actions. A number picks a turn: the newest open turn is 0, turns that have ended come last.


class Create(msgspec.Struct, frozen=True):
    session_id: str
    idle_timeout_s: float | None


class Patch(msgspec.Struct, frozen=True):
    session_id: str
    title: str
    idle_timeout_s: float


class Start(msgspec.Struct, frozen=True):
    session_id: str
    script: Script
    on_conflict: OnConflict
    on_disconnect: OnDisconnect
    background: bool
    parent: int | None | Literal["head"]
    is_sibling: bool
    """Whether the turn is beside the picked one, as a retry or an edit of it is, and does not follow it."""


class Move(msgspec.Struct, frozen=True):
    """Moves the head to a turn. The caller has seen the head, or the parent of that turn in its place."""

    session_id: str
    turn: int | None
    is_stale: bool


class Cancel(msgspec.Struct, frozen=True):
    turn: int


class Release(msgspec.Struct, frozen=True):
    turn: int


class Watching(msgspec.Struct, frozen=True):
    turn: int


class Delete(msgspec.Struct, frozen=True):
    session_id: str


class Sweep(msgspec.Struct, frozen=True):
    pass


class Wait(msgspec.Struct, frozen=True):
    seconds: int


Step = Create | Patch | Start | Move | Cancel | Release | Watching | Delete | Sweep | Wait

session_ids = st.sampled_from(["a", "a", "b"])
picks = st.integers(0, 3)
scripts = st.builds(
    Script,
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.0, 3.0]), max_size=4).map(tuple),
    st.sampled_from(["finish", "finish", "finish", "finish", "fail", "crash", "silence"]),
    st.sampled_from([0.0, 1.0, 2.0, 3.0]),
)


def _starts(on_conflict: OnConflict) -> st.SearchStrategy[Step]:
    return st.builds(
        Start,
        session_ids,
        scripts,
        st.just(on_conflict),
        on_disconnect=st.sampled_from(["cancel", "cancel", "cancel", "continue"]),
        background=st.sampled_from([False, False, False, True]),
        parent=st.sampled_from(["head", "head", "head", "head", None, 0, 1, 2, 3]),
        is_sibling=st.booleans(),
    )


# Half of the steps start a turn or let time pass.
steps: st.SearchStrategy[Step] = st.one_of(
    _starts("reject"),
    _starts("queue"),
    _starts("queue"),
    _starts("supersede"),
    st.builds(Wait, st.integers(1, 3)),
    st.builds(Wait, st.integers(1, 15)),
    st.builds(Create, session_ids, st.sampled_from([None, 2.4, 20.4])),
    st.builds(Patch, session_ids, st.text(max_size=3), st.sampled_from([2.4, 20.4])),
    st.builds(Move, session_ids, st.none() | picks, st.sampled_from([False, False, True])),
    st.builds(Cancel, picks),
    st.builds(Release, picks),
    st.builds(Watching, st.just(0)),
    st.builds(Watching, picks),
    st.builds(Release, st.just(0)),
    st.sampled_from([Sweep(), Delete("a"), Delete("b")]),
)
histories = st.lists(steps, min_size=10, max_size=40)


@dataclass
class History:
    """Does every step twice, with the sessions and with the model, and compares."""

    sessions: Sessions
    store: MemoryStore
    client: ScriptedReplies
    model: Model
    turns: dict[str, Turn] = field(default_factory=dict)
    watches: dict[str, list[Watch]] = field(default_factory=dict)

    @property
    def now(self) -> float:
        return trio.current_time()

    async def run(self, history: Sequence[Step]) -> None:
        for session_id in ("a", "b"):
            await self.take(Create(session_id, None))
        for step in history:
            await self.take(step)
            await trio.testing.wait_all_tasks_blocked()
            await self.compare()

    async def take(self, step: Step) -> None:
        if isinstance(step, Wait):
            await trio.sleep(step.seconds)
            self.model.advance(self.now)
            return
        picked = self._picked(step.turn) if isinstance(step, Cancel | Release | Watching) else None
        expected = found = None
        moved = self._heads(step) if isinstance(step, Move) else (None, None)
        try:
            self._in_model(step, picked)
        except RefusedError as error:
            expected = type(error)
        try:
            await self._in_sessions(step, picked, moved)
        except RefusedError as error:
            found = type(error)
        assert found == expected, step

    def _in_model(self, step: Step, picked: ModelTurn | None) -> None:
        """The type of the error that the step raises, if any; a start is noted once its id is known."""
        model, now = self.model, self.now
        match step:
            case Create(session_id, idle_timeout_s):
                session = model.sessions.get(session_id)
                if session is not None and (session.open or session.deadline > now):
                    raise SessionExistsError(session_id)
                timeout = IDLE_TIMEOUT_S if idle_timeout_s is None else idle_timeout_s
                model.sessions[session_id] = ModelSession(session_id, timeout, now + timeout)
            case Patch(session_id, title, idle_timeout_s):
                session = model.session(session_id, now)
                session.title, session.idle_timeout_s = title, idle_timeout_s
                session.use(now)
            case Start(session_id):
                model.check_start(session_id, step.on_conflict, self._parent(step), now, is_named=step.parent != "head")
            case Move(session_id):
                session = model.check_move(session_id, *self._heads(step), now)
                session.head = self._heads(step)[0]
                session.use(now)
            case Cancel():
                if (turn := self._kept(picked)).is_open:
                    model.end(turn, now, "cancelled", "requested")
            case Release():
                if picked is not None and self.watches[picked.id]:
                    model.release(picked, now)
            case Watching():
                model.watch(self._kept(picked))
            case Delete(session_id):
                model.delete(session_id, now)

    async def _in_sessions(self, step: Step, picked: ModelTurn | None, moved: tuple[str | None, str | None]) -> None:
        sessions = self.sessions
        ids = (picked.session.id, picked.id) if picked is not None else ("a", "turn_none")
        match step:
            case Create(session_id, idle_timeout_s):
                await sessions.create_session(NewSession(id=session_id, idle_timeout_s=idle_timeout_s))
            case Patch(session_id, title, idle_timeout_s):
                await sessions.update_session(session_id, SessionPatch(title=title, idle_timeout_s=idle_timeout_s))
            case Start():
                await self._start(step)
            case Move(session_id):
                head, seen = moved
                await sessions.update_session(session_id, SessionPatch(head=head, seen_head=seen))
            case Cancel():
                assert not (await sessions.cancel_turn(*ids)).is_open, "a cancel waits for the end"
            case Release():
                if picked is not None and self.watches[picked.id]:
                    watch = self.watches[picked.id].pop()
                    watch.release()
                    watch.release()  # a second call changes nothing
            case Watching():
                log, watch = await sessions.open_events(*ids)
                assert await frames_in(log) == frames_of(self.turns[ids[1]].log)
                self.watches[ids[1]].append(watch)
            case Delete(session_id):
                await sessions.delete_session(session_id)
            case Sweep():
                removed = await sweep(self.store, clock=self.clock, store_timeout_s=1)
                assert removed == self.model.delete_expired(self.now)

    async def _start(self, step: Start) -> None:
        key = f"k{len(self.model.turns)}"
        script = step.script.later(2.0 ** -(9 + len(self.model.turns)))
        self.client.expect(key, step.session_id, script)
        parent = self._parent(step)
        before = self.model.sessions.get(step.session_id)
        branches = before is not None and before.branches(parent, is_named=step.parent != "head")
        turn, watch = await self.sessions.start_turn(
            step.session_id,
            NewTurn(
                text=key,
                parent=msgspec.UNSET if step.parent == "head" else parent,
                on_conflict=step.on_conflict,
                on_disconnect=step.on_disconnect,
                background=step.background,
            ),
        )
        self.turns[turn.id] = turn
        self.watches[turn.id] = [watch]
        session = self.model.sessions[step.session_id]
        keeps_on = step.background or step.on_disconnect == "continue"
        self.model.start(
            ModelTurn(key, turn.id, session, parent, script, keeps_on),
            step.on_conflict,
            self.now,
            branches=branches,
        )
        assert turn.siblings == session.siblings(session.turns[-1])

    def _parent(self, step: Start) -> str | None:
        if step.parent is None:
            return None
        if isinstance(step.parent, int):
            picked = self._picked(step.parent)
            if picked is None:
                return "turn_none"
            return picked.parent if step.is_sibling else picked.id
        session = self.model.sessions.get(step.session_id)
        return session.head if session is not None else None

    def _heads(self, step: Move) -> tuple[str | None, str | None]:
        """The head that the step sets, and the head that it has seen."""
        picked = None if step.turn is None else self._picked(step.turn)
        session = self.model.sessions.get(step.session_id)
        seen = session.head if session is not None else None
        head = None if step.turn is None else picked.id if picked is not None else "turn_none"
        return head, "turn_none" if step.is_stale else seen

    def _picked(self, pick: int) -> ModelTurn | None:
        newest_first = self.model.turns[::-1]
        by_interest = sorted(newest_first, key=lambda turn: not turn.is_open)
        return by_interest[pick] if pick < len(by_interest) else None

    def _kept(self, picked: ModelTurn | None) -> ModelTurn:
        """The picked turn, if its session exists and has it. Raises the error that the sessions must raise."""
        session = self.model.session(picked.session.id if picked else "a", self.now)
        if picked is None or picked not in session.turns:
            raise TurnNotFoundError("turn_none")
        return picked

    def clock(self) -> datetime:
        return T0 + timedelta(seconds=self.now)

    async def compare(self) -> None:
        """Compare every answer of the sessions with the model's."""
        model, now = self.model, self.now
        for session_id in ("a", "b"):
            try:
                session = model.session(session_id, now)
            except SessionNotFoundError:
                assert await self._is_gone(session_id)
                continue
            record = await self.sessions.get_session(session_id)
            assert record.head == session.head
            places = await self.store.find_places(session_id, [turn.id for turn in session.turns])
            assert places == Places(session.head, {turn.id: session.siblings(turn) for turn in session.turns})
            for parent in {None, *(turn.parent for turn in session.turns)}:
                children = await self.sessions.list_turns(session_id, limit=100, parent=parent)
                assert [turn.id for turn in children.data] == [it.id for it in session.turns if it.parent == parent]
            assert record.message_count == session.message_count
            assert (record.open_turns, record.title) == (len(session.open), session.title)
            assert abs((record.expires_at - T0).total_seconds() - session.deadline) < 1e-4
            page = await self.sessions.list_turns(session_id, limit=100)
            assert [turn.id for turn in page.data] == [turn.id for turn in session.turns]
            for found, turn in zip(page.data, session.turns, strict=True):
                assert (found.state, found.reason or (found.error and found.error.code)) == (turn.state, turn.detail)
                assert (found.text, found.parent) == (turn.text_at(now), turn.parent)
                assert await self.sessions.get_turn(session_id, turn.id) == found
                assert (await self.store.get_turn(session_id, turn.id, now=self.clock())).state == turn.state
        for turn in model.turns:
            if (asked := self.client.prompts.pop(turn.key, None)) is not None:
                assert [(item.role, item.text) for item in asked if isinstance(item, Message)] == turn.prompt()
        statistics = self.sessions.statistics()
        states = [turn.state for turn in model.turns]
        assert [
            statistics.turns_queued,
            statistics.turns_running,
            statistics.turns_completed,
            statistics.turns_failed,
            statistics.turns_cancelled,
            statistics.turns_interrupted,
        ] == [states.count(state) for state in ("queued", "running", "completed", "failed", "cancelled", "interrupted")]
        assert statistics.sessions_live == sum(1 for session in model.sessions.values() if session.open)
        assert len(self.client.open) == statistics.turns_running, "a running turn has one upstream stream, others none"
        assert all(
            turn.path[-2:-1] == [] or not turn.path[-2].is_open for turn in model.turns if turn.state == "running"
        )

    async def _is_gone(self, session_id: str) -> bool:
        try:
            await self.sessions.get_session(session_id)
        except SessionNotFoundError:
            return True
        return False

    async def compare_logs(self) -> None:
        """After the history: each turn's log has one terminal event, at its end; the store agrees."""
        for turn in self.model.turns:
            events = await read_all(self.turns[turn.id].log)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            terminal = [
                e for e in events if isinstance(e, TurnCompleted | TurnFailed | TurnCancelled | TurnInterrupted)
            ]
            assert terminal == events[-1:]
            record = self.turns[turn.id].record()
            assert (record.state, record.reason or (record.error and record.error.code)) == (turn.state, turn.detail)
            assert terminal[0].text_length == len(turn.text_at(inf))
            assert turn.session.id in self.model.sessions or turn.session.id in ("a", "b")
            if self.model.sessions.get(turn.session.id) is turn.session:
                kept = await self.store.read_path(turn.session.id, turn.id, bytes_max=None)
                assert list(kept)[-1:] == [record]
                assert await told(self.store, turn.session.id, turn.id) == pieces_of(self.turns[turn.id].log)


async def _run(history: Sequence[Step], *, grace_s: float) -> None:
    await trio.sleep(1 / 3)
    store, client, model = MemoryStore(), ScriptedReplies(has_branches=True), Model(grace_s=grace_s)

    def clock() -> datetime:
        return T0 + timedelta(seconds=trio.current_time())

    with trio.fail_after(100_000):
        async with open_sessions(
            store=store,
            client_for=lambda _model: client,
            clock=clock,
            settings=Settings(
                idle_timeout_s=IDLE_TIMEOUT_S,
                first_token_timeout_s=FIRST_TOKEN_TIMEOUT_S,
                next_token_timeout_s=NEXT_TOKEN_TIMEOUT_S,
                turn_timeout_s=TURN_TIMEOUT_S,
                disconnect_grace_s=grace_s,
                live_turns_max=LIVE_TURNS_MAX,
                queued_turns_max=QUEUED_TURNS_MAX,
                branches_max=BRANCHES_MAX,
            ),
            stop=StopState(),
        ) as sessions:
            both = History(sessions, store, client, model)
            await both.run(history)
            now = trio.current_time()
            for turn in model.turns:
                event(f"{turn.state} {turn.detail or ''}")
            for session in model.sessions.values():
                for turn in reversed(session.open):
                    model.end(turn, now, "interrupted", "shutdown")
        await both.compare_logs()
    assert client.open == {}


@settings(max_examples=3 * settings().max_examples, phases=set(Phase) - {Phase.explain})
@given(histories, st.sampled_from([0.0, 3.25]))
def test_sessions_do_what_a_simple_model_of_them_does(history: list[Step], grace_s: float) -> None:
    with capture_logs():  # crashes are part of the histories
        trio.run(partial(_run, history, grace_s=grace_s), clock=MockClock(autojump_threshold=0))
