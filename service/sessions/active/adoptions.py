"""The adoption of suspended turns, which this process goes on with.

After a stop the clients of hundreds of turns come at once, each for its own session. Their sessions go to the store
together: a step of the store takes all that wait when it begins, and those that come meanwhile are in the next one.
A session that such a step does not take, because another transaction has it locked, say, has a step of its own, beside
the others: it may take as long as its caller waits, and holds up no other session. Those that the store puts off
because their turns are large are the first in the next step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import copy_context
from itertools import islice

import msgspec
import structlog
import trio

from service.clock import Clock
from service.errors import InvalidRequestError, OwnedElsewhereError, SessionNotFoundError, ShuttingDownError, StoreError
from service.models.client import ModelClient
from service.sessions.active.pending_writes import PendingWrites
from service.sessions.active.session import ActiveSession
from service.sessions.events import outcome
from service.sessions.turns.turn import Turn, restored_log
from service.sessions.turns.turn_log import log_adoption
from service.settings import Settings
from service.steps import Steps, in_steps
from service.stop_state import Phase, StopState
from service.storage.pieces import Resumed, Run, resumed_run
from service.storage.records import AdoptedTurn, Adoption, SessionRecord, TurnRecord
from service.storage.store import Store
from service.storage.store_deadline import answered_within
from service.telemetry.log_context import log_context
from service.telemetry.metrics.metrics import Metrics

logger = structlog.get_logger("lastcall.adoption")

_AT_ONCE = 64
"""The most sessions in one step of the store; other writes wait for it."""
_ALONE_STEPS_MAX = 8
"""The most steps at the same time for sessions that a step did not take: each may hold up other writes a little."""
_HELD_UP_MAX_S = 0.25
"""How long others wait for a step that has one session only, because no other was there: they would go together."""


class Adoptions:
    """Adopts the turns of sessions, many in one step of the store.

    Args:
        nursery: The nursery of the sessions supervisor. The task that asks the store runs in it, while callers wait.
        make_live: Adds an adopted turn to its session and starts it, without a checkpoint.
        begin_trace: Begins the span of an adopted turn, in the context of the caller who asked for its session.

    Attributes:
        unresolved: The sessions whose turns the store may have given to this process in a call that it has not
            answered, or that failed, in this order; or has of this process, because it did not take their
            suspension. The next adoption of such a session has these turns.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        pending_writes: PendingWrites,
        *,
        stop: StopState,
        make_live: Callable[[ActiveSession, Turn], None],
        begin_trace: Callable[[Turn, TurnRecord], None],
        store: Store,
        client_for: Callable[[str], ModelClient],
        clock: Clock,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.unresolved: dict[str, None] = {}
        self._nursery = nursery
        self._pending_writes = pending_writes
        self._stop = stop
        self._make_live = make_live
        self._begin_trace = begin_trace
        self._store = store
        self._client_for = client_for
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._together = _Line(at_once=_AT_ONCE, tasks_max=1)
        self._alone = _Line(at_once=1, tasks_max=_ALONE_STEPS_MAX)
        self._asked_alone: set[str] = set()
        """The sessions that are asked for alone, because a step with several of them did not take them."""
        self._asked_now: set[str] = set()
        """The sessions that steps are asked for now."""

    def __repr__(self) -> str:
        return f"<Adoptions: {len(self._together.waiting) + len(self._alone.waiting)} sessions wait>"

    @property
    def places(self) -> int:
        """How many sessions have a place among the live turns, because the store may have given their turns to this
        process. Not those with a caller that waits: this caller counts as a turn that arrives."""
        waiting = (self._asked_now, self._together.waiting, self._alone.waiting)
        return sum(not any(it in some for some in waiting) for it in self.unresolved)

    def note_unresolved(self, session_id: str) -> None:
        """Note that the store has a turn of this process that no task runs: the next look of the recovery adopts it."""
        self.unresolved[session_id] = None

    async def adopt(self, session: ActiveSession, *, within_s: float, has_no_client: bool = False) -> None:
        """Adopt the turns of a session whose acceptance the caller holds, and run them.

        Turns that are cancelled without clients wait for theirs, unless ``has_no_client``: then they end at once.

        Shielded: a cancellation after the store's step would leave turns that no task runs. If the time is over before
        the store has answered, such turns are run after the next adoption of the session. The shield ends with the
        stop's phase RELEASING, in which sessions close: then other processes run such turns.

        Raises:
            SessionNotFoundError: There is no such session, or it is being deleted.
            OwnedElsewhereError: Another process runs the session's turns.
            ShuttingDownError
            StoreError
        """
        asked = _Asked(session, until=trio.current_time() + within_s, has_no_client=has_no_client)
        self._ask(asked)
        try:
            with self._stop.until(Phase.RELEASING, shield=True), answered_within(within_s):
                await asked.answered.wait()
        finally:
            asked.is_left = True
            self._together.leave(asked)
            self._alone.leave(asked)
        if not asked.answered.is_set():
            raise ShuttingDownError
        if asked.error is not None:
            raise asked.error

    def _ask(self, asked: "_Asked") -> None:
        """Let a caller wait for a step of the store, after those that wait already."""
        line = self._alone if asked.session.id in self._asked_alone else self._together
        line.waiting[asked.session.id] = asked
        self._start(line)

    def _start(self, line: "_Line") -> None:
        if line.tasks < line.tasks_max:
            line.tasks += 1
            self._nursery.start_soon(self._run, line, name="adoptions")

    async def _run(self, line: "_Line") -> None:
        """Ask the store as long as sessions wait in a line."""
        try:
            with log_context():  # and not that of the request that had the task started
                while line.waiting:
                    await trio.lowlevel.checkpoint()  # the sessions whose callers come in this round
                    some = line.take()
                    if line is self._together and len(some) == 1:
                        self._nursery.start_soon(self._adopt_some, some, name="adoption")
                        with trio.move_on_after(_HELD_UP_MAX_S):
                            await some[0].answered.wait()
                    else:
                        await self._adopt_some(some)
        finally:
            line.tasks -= 1
            for asked in line.waiting.values():
                asked.answer(ShuttingDownError())

    async def _adopt_some(self, asked: Sequence["_Asked"]) -> None:
        """Adopt the turns of some sessions, and answer their callers; or let them wait for a step of their own."""
        sessions = {it.session.id: it for it in asked if not it.is_left}
        if not sessions:
            return
        self.unresolved.update(dict.fromkeys(sessions))
        self._asked_now.update(sessions)
        try:
            await self._adopt_sessions(sessions)
        finally:
            self._asked_now.difference_update(sessions)

    async def _adopt_sessions(self, sessions: Mapping[str, "_Asked"]) -> None:
        asked = sessions.values()
        is_alone = len(sessions) == 1
        within_s = None
        if is_alone:  # it may wait for a lock, for as long as its caller waits: its next caller has the next step
            within_s = max(next(iter(sessions.values())).until - trio.current_time(), 0)
        adopted: Mapping[str, Adoption] | None = None
        try:
            with (
                self._stop.until(Phase.RELEASING, shield=True),
                self._pending_writes.writing(within_s=within_s, late_is_refused=not is_alone),
            ):
                adopted = await self._store.adopt_turns(
                    list(sessions),
                    now=self._clock(),
                    continues=self._can_continue,
                    running=[turn_id for it in asked for turn_id in self._turns_of(it.session)],
                    path_bytes_max=self._path_bytes_max,
                )
        except StoreError as error:
            self._asked_alone.update(sessions)
            for it in asked:
                it.answer(error)
        except Exception as error:  # noqa: BLE001  of one of them: its caller gets the error
            if is_alone:
                self._asked_alone.difference_update(sessions)
                for it in sessions.values():
                    it.answer(error)
            else:
                self._ask_alone(sessions.values())
        else:
            if adopted is None:  # the stop did not wait for the store any longer
                for it in asked:
                    it.answer(ShuttingDownError())
                return
            deadline = trio.current_time() + self._settings.store_timeout_s
            with trio.CancelScope(shield=True, deadline=deadline):  # steps of work, and no waits
                await in_steps(self._give_all(sessions, adopted))
                return
            for it in asked:
                it.answer(StoreError("The turns of too many sessions are to go on here; try again later."))

    def _turns_of(self, session: ActiveSession) -> list[str]:
        """The turns of a session that this process runs or has run, and that the store may have as open ones."""
        return [turn.id for turn in session.turns] + self._pending_writes.ended_in(session.id)

    def _give_all(self, sessions: Mapping[str, "_Asked"], adopted: Mapping[str, Adoption]) -> Steps[None]:
        put_off: list[_Asked] = []
        for session_id, asked in sessions.items():
            if session_id in adopted and adopted[session_id].is_put_off:
                put_off.append(asked)
            elif session_id in adopted:
                self._asked_alone.discard(session_id)
                try:
                    yield from self._give(asked, adopted[session_id])
                except Exception as error:  # the next adoption of the session has the turns that do not run
                    if asked.is_left:
                        logger.exception("adopted turns do not run yet: giving them failed", session_id=session_id)
                    asked.answer(error)
                yield
            else:
                self._ask_alone([asked])
        if len(put_off) == len(sessions):  # a step makes progress; should one not, these do alone
            self._ask_alone(put_off)
        elif put_off:
            self._together.wait_first([it for it in put_off if not it.is_left])
            self._start(self._together)

    def _ask_alone(self, asked: Iterable["_Asked"]) -> None:
        for it in asked:
            if not it.is_left:
                self._asked_alone.add(it.session.id)
                self._ask(it)

    def _give(self, asked: "_Asked", adoption: Adoption) -> Steps[None]:
        """Run the adopted turns of a session, if its caller still holds it, and answer the caller."""
        session = asked.session
        if adoption.owner is not None:
            self.unresolved.pop(session.id, None)
            owner = adoption.owner
            asked.answer(OwnedElsewhereError(session.id, fence=owner.fence, address=owner.address))
        elif adoption.session is None:
            self.unresolved.pop(session.id, None)
            asked.answer(SessionNotFoundError(session.id))
        else:
            turns: list[Turn] = []
            for turn in adoption.turns:
                turns.append((yield from self._adopted(turn, adoption.session)))  # noqa: PERF401  steps
            if asked.is_left:
                return
            for it in turns:
                asked.context.run(self._begin_trace, it, it.record_at_first())
                log_adoption(it)
                if asked.has_no_client and it.record_at_first().on_disconnect == "cancel":
                    it.cut_short(outcome.Cancelled("disconnected"))
                self._make_live(session, it)
            self.unresolved.pop(session.id, None)
            asked.answer()

    def _adopted(self, adopted: AdoptedTurn, session: SessionRecord) -> Steps[Turn]:
        """A turn that another process has begun. One that cannot be restored fails: no other process will have it."""
        try:
            turn = yield from self._restored(adopted.turn, session, adopted.runs)
        except Exception:
            ids = {"session_id": session.id, "turn_id": adopted.turn.id}
            logger.exception("an adopted turn cannot be restored: it fails", **ids)
            return (yield from self._unrestored(adopted.turn, session))
        turn.path = adopted.path
        return turn

    def _restored(self, record: TurnRecord, session: SessionRecord, runs: Sequence[Run]) -> Steps[Turn]:
        """A turn that goes on after these events. It fails if no upstream has its model any more."""
        try:
            client, refusal = self._client_for(record.model), None
        except InvalidRequestError as error:
            client, refusal = self._client_for(self._settings.default_model), error
        log = yield from restored_log(record, runs, bytes_max=self._settings.log_bytes_max)
        turn = Turn(
            record,
            client=client,
            system_message=record.system_message or session.system_message,
            on_disconnect=record.on_disconnect,
            settings=self._settings,
            may_title=record.may_title,
            may_leave_out=record.may_leave_out,
            log=log,
            metrics=self._metrics,
        )
        if refusal is not None:
            turn.cut_short(outcome.failed("model_not_found", str(refusal)))
        return turn

    def _unrestored(self, record: TurnRecord, session: SessionRecord) -> Steps[Turn]:
        """A turn that fails without what it has said, which its readers drop: its end replaces its events."""
        resumed = Resumed(record.last_seq, record.attempt, "retry")
        runs = () if record.state == "queued" else (resumed_run(resumed),)
        turn = yield from self._restored(msgspec.structs.replace(record, output=()), session, runs)
        turn.stored_seq = 0
        if turn.cut_short(outcome.internal_error()):
            turn.crashed = True
        return turn

    def _path_bytes_max(self, turn: TurnRecord) -> int | None:
        return self._settings.prompt_bytes_max_of(turn.model)

    def _can_continue(self, turn: TurnRecord) -> bool:
        """Whether the model of a turn can go on after the text so far."""
        try:
            return self._client_for(turn.model).can_continue(turn.text, turn.options)
        except InvalidRequestError:
            return False
        except Exception:  # within the step of the store, which would fail each time
            ids = {"session_id": turn.session_id, "turn_id": turn.id}
            logger.exception("a model client failed over the reply so far, which begins anew", **ids)
            return False


class _Line:
    """Callers that wait for steps of the store, in the order in which they have asked.

    Attributes:
        waiting: The callers, by the ids of their sessions. A session has one at a time.
        tasks: How many tasks ask the store for them; ``tasks_max`` at the most.
    """

    def __init__(self, *, at_once: int, tasks_max: int) -> None:
        self.waiting: dict[str, _Asked] = {}
        self.tasks = 0
        self.tasks_max = tasks_max
        self._at_once = at_once

    def take(self) -> list["_Asked"]:
        """The callers of the next step."""
        return [self.waiting.pop(it) for it in list(islice(self.waiting, self._at_once))]

    def wait_first(self, some: Iterable["_Asked"]) -> None:
        """Some callers wait for the next step, before the others."""
        self.waiting = {it.session.id: it for it in some} | self.waiting

    def leave(self, asked: "_Asked") -> None:
        """A caller waits no longer."""
        if self.waiting.get(asked.session.id) is asked:
            del self.waiting[asked.session.id]


class _Asked:
    """A caller that waits for the adoption of a session's turns, and holds the session meanwhile.

    Attributes:
        until: How long the caller waits, on Trio's clock.
        is_left: Whether the caller waits no longer: then the session may be another object by now.
        has_no_client: Whether the clients of the turns have had the time to come back, and have not.
        error: What the caller gets instead of the turns.
    """

    def __init__(self, session: ActiveSession, *, until: float, has_no_client: bool) -> None:
        self.session = session
        self.until = until
        self.has_no_client = has_no_client
        self.context = copy_context()
        self.answered = trio.Event()
        self.is_left = False
        self.error: Exception | None = None

    def answer(self, error: Exception | None = None) -> None:
        self.error = error
        self.answered.set()
