"""Everything at once: generated histories in which callers, replies, timeouts and the store meet at the same instants.

Everything here happens at full seconds, in an order that Trio draws anew each time. The tests do not expect one
outcome. They check each outcome: a turn ends once, for a cause that existed, and leaves nothing behind.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random
from typing import Any, Literal, cast

import hypothesis
import msgspec
import pytest
import trio
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import EventsLostError, RefusedError, SessionExistsError, SessionNotFoundError, StoreError
from service.sessions.commands import NewSession, NewTurn, OnConflict
from service.sessions.events.event_log import Events
from service.sessions.events.events import Event, TurnCancelled, TurnCompleted, TurnDelta, TurnFailed, TurnInterrupted
from service.sessions.sessions import Sessions, open_sessions
from service.sessions.turns.turn import Turn, Watch
from service.sessions.upkeep.expiry import sweep
from service.sessions.upkeep.recovery import recover_once
from service.settings import Settings
from service.stop_state import Phase, StopState
from service.storage.memory import MemoryStore
from service.storage.records import BegunTurn, EventsPage, OnDisconnect, TurnRecord
from service.storage.store import Store
from tests.sessions.puppet import frames_in, frames_of, kinds, open_stage, pieces_of, read_all
from tests.sessions.scripts import Script, ScriptedReplies, token
from tests.sessions.unreliable_store import UnreliableStore
from tests.storage.rows import a_turn, ended, said, told

T0 = datetime(2030, 1, 1, tzinfo=UTC)
SESSIONS = ("a", "b")
TURN_TIMEOUT_S = 6
SETTINGS = Settings(
    idle_timeout_s=20,
    first_token_timeout_s=3,
    next_token_timeout_s=2,
    turn_timeout_s=TURN_TIMEOUT_S,
    disconnect_grace_s=1,
    live_turns_max=6,
    queued_turns_max=2,
    store_timeout_s=5,
    cleanup_timeout_s=2,
)
TERMINAL = TurnCompleted | TurnFailed | TurnCancelled | TurnInterrupted


class Start(msgspec.Struct, frozen=True):
    """``patience_s``: how long the caller waits for the acceptance; ``stays_s``: how long it stays afterwards."""

    session_id: str
    script: Script
    on_conflict: OnConflict
    on_disconnect: OnDisconnect
    stays_s: int
    patience_s: int


class Observe(msgspec.Struct, frozen=True):
    turn: int
    stays_s: int


class Cancel(msgspec.Struct, frozen=True):
    turn: int
    patience_s: int


class Delete(msgspec.Struct, frozen=True):
    session_id: str
    patience_s: int


class Create(msgspec.Struct, frozen=True):
    session_id: str


class Sweep(msgspec.Struct, frozen=True):
    pass


Act = Start | Observe | Cancel | Delete | Create | Sweep
Ending = Literal["rest", "drain", "unwind"]

session_ids = st.sampled_from(["a", "a", "b"])
picks = st.integers(0, 3)
stays = st.sampled_from([0, 1, 1, 2, 3, 100])
scripts = st.builds(
    Script,
    st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0]), max_size=4).map(tuple),
    st.sampled_from(["finish", "finish", "finish", "fail", "crash", "silence"]),
    st.sampled_from([0.0, 1.0, 2.0]),
    close_s=st.sampled_from([0.0, 0.0, 1.0]),
)


def _starts(on_conflict: OnConflict) -> st.SearchStrategy[Act]:
    return st.builds(
        Start,
        session_ids,
        scripts,
        st.just(on_conflict),
        st.sampled_from(["cancel", "cancel", "continue"]),
        stays_s=stays,
        patience_s=st.sampled_from([0, 1, 100, 100]),
    )


acts: st.SearchStrategy[Act] = st.one_of(
    _starts("reject"),
    _starts("queue"),
    _starts("queue"),
    _starts("supersede"),
    st.builds(Observe, picks, stays),
    st.builds(Observe, st.just(0), st.just(1)),
    st.builds(Cancel, picks, st.sampled_from([0, 1, 100])),
    st.sampled_from([Delete("a", 0), Delete("a", 100), Create("a"), Create("a"), Create("b"), Sweep()]),
)
histories = st.lists(st.lists(acts, max_size=4), min_size=4, max_size=14)


@dataclass
class Accepted:
    key: str
    turn: Turn
    start: Start
    at: datetime
    released: bool = False


@dataclass
class Races:
    sessions: Sessions
    store: UnreliableStore
    client: ScriptedReplies
    accepted: list[Accepted] = field(default_factory=list)
    keys: int = 0
    # The possible causes of ends, each noted before its request is made.
    cancelled: set[str] = field(default_factory=set)
    superseded: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    read: defaultdict[str, list[tuple[int, Events]]] = field(default_factory=lambda: defaultdict(list))

    def clock(self) -> datetime:
        return T0 + timedelta(seconds=trio.current_time())

    async def act(self, act: Act) -> None:
        """Run one caller; a refusal is a valid answer."""
        with suppress(RefusedError, StoreError):
            match act:
                case Start():
                    await self._start(act)
                case Observe(pick, stays_s):
                    await self._observe(pick, stays_s)
                case Cancel(pick, patience_s):
                    if (picked := self._picked(pick)) is not None:
                        self.cancelled.add(picked.turn.id)
                        with trio.move_on_after(patience_s):
                            record = await self.sessions.cancel_turn(picked.turn.session_id, picked.turn.id)
                            assert not record.is_open, "a cancel waits for the end"
                case Delete(session_id, patience_s):
                    self.deleted.add(session_id)
                    before = [accepted.turn for accepted in self.accepted if accepted.turn.session_id == session_id]
                    with trio.move_on_after(patience_s) as patience:
                        await self.sessions.delete_session(session_id)
                    if not patience.cancelled_caught:
                        assert all(turn.ended.is_set() for turn in before), "a deletion ends the turns first"
                case Create(session_id):
                    await self.sessions.create_session(NewSession(id=session_id))
                case Sweep():
                    await sweep(cast("Store", self.store), clock=self.clock, store_timeout_s=5)

    async def _start(self, start: Start) -> None:
        key = f"k{self.keys}"
        self.keys += 1
        self.client.expect(key, start.session_id, start.script)
        if start.on_conflict == "supersede":
            self.superseded.add(start.session_id)
        new = NewTurn(text=key, on_conflict=start.on_conflict, on_disconnect=start.on_disconnect)
        answer = None
        with trio.move_on_after(start.patience_s):
            answer = await self.sessions.start_turn(start.session_id, new)
        if answer is None:
            return
        turn, watch = answer
        accepted = Accepted(key, turn, start, self.clock())
        self.accepted.append(accepted)
        await self._stay(accepted, turn.log, watch, start.stays_s)

    async def _observe(self, pick: int, stays_s: int) -> None:
        if (picked := self._picked(pick)) is not None:
            log, watch = await self.sessions.open_events(picked.turn.session_id, picked.turn.id)
            await self._stay(picked, log, watch, stays_s)

    async def _stay(self, accepted: Accepted, log: Events, watch: Watch, stays_s: int) -> None:
        """Read until the end, or until the caller's time is over."""
        try:
            with watch, trio.move_on_after(stays_s):
                events = await read_all(log)
                assert isinstance(events[-1], TERMINAL)
                assert as_if_stored(await frames_in(log)) == as_if_stored(frames_of(accepted.turn.log))
        finally:
            accepted.released = True

    def _picked(self, pick: int) -> Accepted | None:
        return self.accepted[-1 - pick] if pick < len(self.accepted) else None

    # Checks afterwards

    async def check_ends(self) -> None:
        for accepted in self.accepted:
            assert accepted.turn.ended.is_set()
            events = await read_all(accepted.turn.log)
            record = accepted.turn.record()
            check_events(events, record)
            self.check_cause(accepted, record)
            event(f"{record.state} {record.reason or (record.error and record.error.code) or ''}")
        assert self.client.open == {}, "every upstream stream is closed"

    async def check_answers(self) -> None:
        """Check that no ended turn is shown as open, even if its end is not in the store yet."""
        for turn in (accepted.turn for accepted in self.accepted):
            with suppress(RefusedError):
                assert as_kept(await self.sessions.get_turn(turn.session_id, turn.id)) == as_kept(turn.record())

    def check_interrupted_at(self, moment: datetime) -> None:
        """Check that after ``moment`` only the closes of upstream streams went on."""
        for accepted in self.accepted:
            ended_at = accepted.turn.record().ended_at
            assert ended_at is not None
            assert ended_at <= max(moment, accepted.at) + timedelta(seconds=1)

    def check_cause(self, accepted: Accepted, record: TurnRecord) -> None:
        """Check that the turn ended for a cause that existed."""
        script = accepted.start.script
        full = "".join(token(accepted.key, number) for number in range(1, len(script.tokens) + 1))
        assert full.startswith(record.text)
        match record.state, record.reason or (record.error and record.error.code):
            case "completed", None:
                assert (script.last, record.text) == ("finish", full)
            case "cancelled", "requested":
                assert record.id in self.cancelled
            case "cancelled", "superseded":
                assert record.session_id in self.superseded
            case "cancelled", "disconnected":
                assert accepted.released
                assert accepted.start.on_disconnect == "cancel"
            case "cancelled", "session_deleted":
                assert record.session_id in self.deleted
            case "failed", "turn_timeout":
                assert record.started_at is not None
                assert record.ended_at is not None
                assert record.ended_at - record.started_at >= timedelta(seconds=TURN_TIMEOUT_S)
            case "failed", ("first_token_timeout" | "next_token_timeout"):
                assert script.last == "silence" or max(*script.tokens, script.last_s, 0) >= 2
            case "failed", "upstream_error":
                assert (script.last, record.text) == ("fail", full)
            case "failed", "internal_error":
                assert (script.last, record.text) == ("crash", full)
            case "failed", "store_unavailable":
                assert self.store.faulty
            case "interrupted", "shutdown":
                pass
            case other:
                pytest.fail(f"{other} is no end")

    async def check_store(self) -> None:
        """Check that the store agrees with the logs, has no open turn, and each turn's parent is the turn before it."""
        store, now = self.store.inner, self.clock()
        page = await store.list_sessions(limit=100, after=None, status=None, now=now)
        for session in page.data:
            assert session.open_turns == 0
            turns = (await store.list_turns(session.id, limit=1000, after=None, now=now)).data
            assert not any(turn.is_open for turn in turns)
            assert [turn.parent for turn in turns] == [None, *(turn.id for turn in turns)][: len(turns)]
            assert session.head == (turns[-1].id if turns else None)
            assert session.message_count == len(turns) + sum(1 for turn in turns if turn.text)
            kept = {turn.id: turn for turn in turns}
            for turn in (accepted.turn for accepted in self.accepted):
                if turn.id in kept:
                    assert kept[turn.id] == as_kept(turn.record())
                    assert await told(store, session.id, turn.id) == pieces_of(turn.log)

    async def check_nothing_is_left(self) -> None:
        await wait_all_tasks_blocked()
        assert self.sessions._acceptance._nursery.child_tasks == frozenset()
        assert self.sessions._active._sessions == {}
        statistics = self.sessions.statistics()
        assert (statistics.turns_queued, statistics.turns_running, statistics.sessions_live) == (0, 0, 0)

    async def check_sessions_go_on(self) -> None:
        for session_id in SESSIONS:
            with suppress(SessionExistsError):
                await self.sessions.create_session(NewSession(id=session_id))
            self.keys += 1
            self.client.expect(f"k{self.keys}", session_id, Script(tokens=(0,), last="finish", last_s=0))
            turn, watch = await self.sessions.start_turn(session_id, NewTurn(text=f"k{self.keys}"))
            with watch:
                assert (await turn.wait_ended()).state == "completed"


def check_events(events: Sequence[Event], record: TurnRecord) -> None:
    """Check that the events are one whole story, and that the record tells the same."""
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [isinstance(event, TERMINAL) for event in events] == [False] * (len(events) - 1) + [True]
    story = [kind for kind in kinds(list(events)) if kind != "turn.delta"]
    assert story[:-1] in (["turn.queued"], ["turn.started"], ["turn.queued", "turn.started"], [])
    assert "".join(event.text for event in events if isinstance(event, TurnDelta)) == record.text
    terminal = events[-1]
    assert isinstance(terminal, TERMINAL)
    assert terminal.text_length == len(record.text)
    assert (story[-1], terminal.seq) == (f"turn.{record.state}", record.last_seq)


def as_kept(turn: TurnRecord) -> TurnRecord:
    """The turn as the store has it: never with the note that its end was not stored."""
    return msgspec.structs.replace(turn, stored=True)


def as_if_stored(frames: Sequence[bytes]) -> list[bytes]:
    """The events as the store has them: the last one never says that it was not stored."""
    return [*frames[:-1], frames[-1].replace(b',"stored":false', b"")]


async def _run(history: Sequence[Sequence[Act]], *, ending: Ending, random: Random, faulty: bool) -> None:
    store, client, stop = UnreliableStore(random, faulty=faulty), ScriptedReplies(), StopState()

    def clock() -> datetime:
        return T0 + timedelta(seconds=trio.current_time())

    with trio.fail_after(100_000):
        async with (
            open_sessions(
                store=cast("Store", store), client_for=lambda _model: client, clock=clock, settings=SETTINGS, stop=stop
            ) as sessions,
            trio.open_nursery() as callers,
        ):
            races = Races(sessions, store, client)
            interrupted_at = None
            store.quick = True
            for session_id in SESSIONS:
                await sessions.create_session(NewSession(id=session_id))
            store.quick = False
            for instant in history:
                for act in instant:
                    callers.start_soon(races.act, act)
                await trio.sleep(1)
            if ending == "drain":
                stop.enter(Phase.DRAINING)
                if random.random() < 0.5:
                    sessions.drain.interrupt_queued()
                with trio.move_on_after(random.choice([0, 2])):
                    await sessions.drain.wait_idle()
                stop.enter(Phase.INTERRUPTING)
                sessions.drain.interrupt_all()
                interrupted_at = clock()
            if ending != "unwind":
                await sessions.drain.wait_idle()
                store.quick = True
                await races.check_answers()
                if interrupted_at is not None:
                    races.check_interrupted_at(interrupted_at)
                await trio.sleep(200)  # the last callers leave
                await recover_once(sessions, shared=False)
                await races.check_ends()
                await races.check_nothing_is_left()
                await races.check_store()
            if ending == "rest":
                await races.check_sessions_go_on()
            callers.cancel_scope.cancel()
        await races.check_ends()
        if not faulty:
            await races.check_store()


common = settings(
    phases=set(hypothesis.Phase) - {hypothesis.Phase.explain}, suppress_health_check=[HealthCheck.too_slow]
)


@settings(common, max_examples=3 * settings().max_examples, report_multiple_bugs=False)
@given(
    history=histories,
    ending=st.sampled_from(["rest", "drain", "unwind"]),
    faulty=st.booleans(),
    seed=st.integers(0, 2**32),
    order=st.random_module(),  # the order in which Trio runs the ready tasks
)
def test_each_turn_ends_once_in_any_race_and_nothing_is_left(
    history: list[list[Act]], ending: Ending, faulty: bool, seed: int, order: object
) -> None:
    random = Random(seed)
    with capture_logs():
        trio.run(
            partial(_run, history, ending=ending, random=random, faulty=faulty), clock=MockClock(autojump_threshold=0)
        )


# Cases that such histories found once.


async def test_client_that_comes_back_at_the_very_moment_of_its_abandonment(autojump_clock: MockClock) -> None:
    """The client finds a running turn, or a cancelled one; Trio draws which."""
    ends = set()
    async with open_stage(disconnect_grace_s=1) as stage:
        for _ in range(20):
            session = await stage.sessions.create_session(NewSession())
            turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="hi"))
            reply = await stage.puppet.next_reply()
            watch.release()
            await trio.sleep(1)
            _, second = await stage.sessions.open_events(session.id, turn.id)
            with second:
                reply.finish()
                record = await turn.wait_ended()
            ends.add((record.state, record.reason))
    assert ("cancelled", "disconnected") in ends
    assert ends <= {("cancelled", "disconnected"), ("completed", None)}


@pytest.mark.parametrize("happened", [True, False])
async def test_acceptance_that_the_store_breaks_off_leaves_no_open_turn(
    autojump_clock: MockClock, happened: bool
) -> None:
    class BreaksOff(MemoryStore):
        async def begin_turn(self, turn: TurnRecord, **rest: Any) -> BegunTurn:
            if happened:
                await super().begin_turn(turn, **rest)
            raise StoreError("The line is bad.")

    async with open_stage(BreaksOff()) as stage:
        session = await stage.sessions.create_session(NewSession())
        with pytest.raises(StoreError):
            await stage.sessions.start_turn(session.id, NewTurn(text="hi"))
        await stage.sessions.pending_writes.retry()
        assert (await stage.store.get_session(session.id, now=stage.clock())).open_turns == 0
        turns = await stage.sessions.list_turns(session.id, limit=10)
        assert [turn.state for turn in turns.data] == ["failed"] * happened
        assert stage.sessions.statistics().ends_not_stored == 0


async def test_events_of_a_session_that_goes_away_meanwhile_are_not_an_empty_stream(autojump_clock: MockClock) -> None:
    class SlowEvents(MemoryStore):
        async def read_events(self, *args: Any, **options: Any) -> EventsPage:
            await trio.sleep(1)
            return await super().read_events(*args, **options)

    async with open_stage(SlowEvents()) as stage, trio.open_nursery() as nursery:
        session = await stage.sessions.create_session(NewSession())
        turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="hi"))
        with watch:
            (await stage.puppet.next_reply()).finish()
            await turn.wait_ended()
        nursery.start_soon(stage.sessions.delete_session, session.id)
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.open_events(session.id, turn.id)


async def test_events_that_were_not_kept_are_lost_and_not_an_empty_stream(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = a_turn(session_id=session.id)
        await stage.store.begin_turn(turn, now=stage.clock())
        await stage.store.end_turn(ended(turn, "interrupted", text="half a"), runs=said("half a"), now=stage.clock())
        with pytest.raises(EventsLostError) as lost:
            await stage.sessions.open_events(session.id, turn.id)
        assert (lost.value.after, lost.value.state, lost.value.text) == (1, "interrupted", "half a")


async def test_interrupt_ends_queued_turns_too_and_none_of_them_starts(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        new = NewTurn(text="hi", on_conflict="queue", background=True)
        turns = [(await stage.sessions.start_turn(session.id, new))[0] for _ in range(3)]
        await stage.puppet.next_reply()
        assert stage.sessions.drain.interrupt_all() == 3
        with trio.fail_after(1):
            await stage.sessions.drain.wait_idle()
        records = [turn.record() for turn in turns]
    assert [(record.state, record.reason) for record in records] == [("interrupted", "shutdown")] * 3
    assert kinds(await read_all(turns[2].log)) == ["turn.queued", "turn.interrupted"]
