"""The adoption of suspended turns, which this process goes on with.

After a stop the clients of hundreds of turns come at once, each for its own session. Their sessions go to the store
together: a step of the store takes all that wait when it begins, and those that come meanwhile are in the next one.
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


class Adoptions:
    """Adopts the turns of sessions, many in one step of the store.

    Args:
        nursery: The nursery of the sessions supervisor. The task that asks the store runs in it, while callers wait.
        make_live: Adds an adopted turn to its session and starts it, without a checkpoint.
        begin_trace: Begins the span of an adopted turn, in the context of the caller who asked for its session.

    Attributes:
        unresolved: The sessions whose turns the store may have given to this process in a call that it has not
            answered, or that failed, in this order. The next adoption of such a session has these turns.
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
        self._waiting: dict[str, _Asked] = {}
        self._alone: dict[str, None] = {}
        """The sessions that are asked for alone, because a step with several of them did not take them."""
        self._is_running = False

    def __repr__(self) -> str:
        return f"<Adoptions: {len(self._waiting)} sessions wait>"

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
        asked = self._waiting[session.id] = _Asked(session, has_no_client=has_no_client)
        if not self._is_running:
            self._is_running = True
            self._nursery.start_soon(self._run, name="adoptions")
        try:
            with self._stop.until(Phase.RELEASING, shield=True), answered_within(within_s):
                await asked.answered.wait()
        finally:
            asked.is_left = True
            if self._waiting.get(session.id) is asked:
                del self._waiting[session.id]
        if not asked.answered.is_set():
            raise ShuttingDownError
        if asked.error is not None:
            raise asked.error

    async def _run(self) -> None:
        """Ask the store as long as sessions wait."""
        try:
            with log_context():  # and not that of the request that had the task started
                while self._waiting:
                    await trio.lowlevel.checkpoint()  # the sessions whose callers come in this round
                    await self._adopt_some(self._take_some())
        finally:
            self._is_running = False
            for asked in self._waiting.values():
                asked.answer(ShuttingDownError())

    def _take_some(self) -> list["_Asked"]:
        """The sessions of the next step: one that is asked for alone, or as many others as one step takes."""
        first = next((it for it in self._waiting if it in self._alone), None)
        ids = list(islice(self._waiting, _AT_ONCE)) if first is None else [first]
        return [self._waiting.pop(it) for it in ids]

    async def _adopt_some(self, asked: Sequence["_Asked"]) -> None:
        """Adopt the turns of some sessions, and answer their callers; or let them wait for a step of their own."""
        sessions = {it.session.id: it for it in asked if not it.is_left}
        if not sessions:
            return
        self.unresolved.update(dict.fromkeys(sessions))
        adopted: Mapping[str, Adoption] | None = None
        try:
            with self._stop.until(Phase.RELEASING, shield=True), self._pending_writes.writing():
                adopted = await self._store.adopt_turns(
                    list(sessions),
                    now=self._clock(),
                    continues=self._can_continue,
                    running=[turn.id for it in asked for turn in it.session.turns],
                    path_bytes_max=self._path_bytes_max,
                )
        except StoreError as error:
            self._alone.update(dict.fromkeys(sessions if len(sessions) > 1 else ()))
            for it in asked:
                it.answer(error)
        except Exception as error:  # noqa: BLE001  of one of them: its caller gets the error
            if len(sessions) == 1:
                self._alone.pop(asked[0].session.id, None)
                asked[0].answer(error)
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

    def _give_all(self, sessions: Mapping[str, "_Asked"], adopted: Mapping[str, Adoption]) -> Steps[None]:
        for session_id, asked in sessions.items():
            if session_id in adopted:
                self._alone.pop(session_id, None)
                try:
                    yield from self._give(asked, adopted[session_id])
                except Exception as error:  # the next adoption of the session has the turns that do not run
                    if asked.is_left:
                        logger.exception("adopted turns do not run yet: giving them failed", session_id=session_id)
                    asked.answer(error)
                yield
            else:
                self._ask_alone([asked])

    def _ask_alone(self, asked: Iterable["_Asked"]) -> None:
        for it in asked:
            if not it.is_left:
                self._alone[it.session.id] = None
                self._waiting.setdefault(it.session.id, it)

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


class _Asked:
    """A caller that waits for the adoption of a session's turns, and holds the session meanwhile.

    Attributes:
        is_left: Whether the caller waits no longer: then the session may be another object by now.
        has_no_client: Whether the clients of the turns have had the time to come back, and have not.
        error: What the caller gets instead of the turns.
    """

    def __init__(self, session: ActiveSession, *, has_no_client: bool) -> None:
        self.session = session
        self.has_no_client = has_no_client
        self.context = copy_context()
        self.answered = trio.Event()
        self.is_left = False
        self.error: Exception | None = None

    def answer(self, error: Exception | None = None) -> None:
        self.error = error
        self.answered.set()
