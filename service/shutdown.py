"""The shutdown: the phases in order, each with a bound of its own, and the report at the end.

=============  ========================================================  ===========================
phase          what happens                                              at most
=============  ========================================================  ===========================
lame_duck      readiness is 503, everything still works                  ``lame_duck_timeout_s``
draining       new work is refused, queued turns are interrupted,        ``drain_timeout_s``
               running turns may finish
closing        the listeners close                                       0.1 s
interrupting   the turns that still run are interrupted and stored,      ``cleanup_timeout_s``
               and their streams get the terminal event; or they are
               suspended, and another process goes on with them
releasing      streams send their last chunk; the host closes the        ``release_timeout_s``
               connections, then the tree closes clients and the store
released       nothing is left; the host's server may return
=============  ========================================================  ===========================

Before them the phase is ``serving`` and, from the moment at which a signal is seen until its notice arrives in the
event loop, ``expected``: readiness is 503 from then on. The phase is the only state of a stop (``stop_state.py``).

Without an open turn the phases after the lame duck take no time. An error in a phase does not stop the later phases:
the error counts as a fault and is reported. The report counts the closing as a part of the interrupting.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from itertools import pairwise
from typing import Protocol, TypeVar

import msgspec
import structlog
import trio

from service.sessions.sessions import Sessions
from service.sessions.statistics import SessionsStatistics
from service.settings import Settings
from service.stop_state import Phase, StopState
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics

logger = structlog.get_logger("lastcall.shutdown")

PHASE_MARGIN_S = 0.1
"""Added to the bound of a phase, so that inner waits with the same bound expire before the phase does."""
LATE_CLOSE_S = 0.2
"""The time for a step that begins when the time of its phase is over."""
NOTHING = SessionsStatistics(**dict.fromkeys(SessionsStatistics.__struct_fields__, 0))
T = TypeVar("T")


_REPORTED = {
    "lame_duck": Phase.LAME_DUCK,
    "draining": Phase.DRAINING,
    "interrupting": Phase.CLOSING,
    "releasing": Phase.RELEASING,
}
"""The phases of the report, and with which phase each of them begins."""


class Host(Protocol):
    """What the shutdown asks of the code that serves the service's clients."""

    async def close_listeners(self) -> None:
        """Take no more connections, because the ends of all streams will keep the event loop busy.

        Awaited after the drain, before the first running turn is interrupted.
        """

    def close_listeners_at_once(self) -> bool:
        """Do the same without waiting, as far as possible. Returns whether :meth:`close_listeners` need not follow."""

    async def wait_clients_gone(self) -> None:
        """Wait until no client can send a request over a connection that it has. Idle connections close meanwhile.

        Awaited in the drain while no turn is open, if other processes serve in this one's place: a request that comes
        after the drain would have no time for its stream.
        """


class NoHost(Host):
    """The host where other code owns the listeners."""

    async def close_listeners(self) -> None:
        await trio.lowlevel.checkpoint()

    def close_listeners_at_once(self) -> bool:
        return False

    async def wait_clients_gone(self) -> None:
        await trio.lowlevel.checkpoint()


class ShutdownReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a shutdown. Turns and streams count from the notice on.

    Attributes:
        reason: The source of the first notice: ``SIGTERM``, ``SIGINT``, ``parent died``, ``max requests``...
        phases_ms: Milliseconds by phase: ``notice`` (from the signal until the service knows of the stop), the phases
            of the table above, and ``total``.
        turns_finished: Turns that were completed, failed or cancelled.
        turns_interrupted: Turns that the shutdown ended, queued turns too.
        turns_suspended: Turns that the shutdown left to another process, or to the next start (``on_interrupt``).
        turns_lost: Turns that another process took over, because it took this one for dead.
        streams_ended: Event streams that were sent to their end.
        streams_aborted: Event streams whose client was gone or did not read.
        connections_aborted: Connections that were closed by force.
        clients_closed: Model clients that were closed.
        tasks_left: Tasks of the service that still exist at the end. Any number but 0 is a fault.
        faults: The errors, in their order. Each fault took no more time than the bound of its step.
    """

    reason: str
    phases_ms: dict[str, float]
    turns_finished: int
    turns_interrupted: int
    turns_suspended: int
    turns_lost: int
    streams_ended: int
    streams_aborted: int
    connections_aborted: int
    clients_closed: int
    tasks_left: int
    faults: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return not self.faults

    def count(self, metrics: Metrics) -> None:
        """Count the shutdown, for the workers that serve on."""
        metrics.add_gaps()
        metrics.add(families.SHUTDOWNS, "clean" if self.clean else "faults")
        metrics.add(families.TASKS_LEFT, by=self.tasks_left)
        for phase, took_ms in self.phases_ms.items():
            metrics.observe(families.SHUTDOWN_PHASE, phase, value=took_ms / 1000)

    def log(self) -> None:
        """Log the report: the last line of every shutdown."""
        log = logger.info if self.clean else logger.error
        log("shutdown report", **msgspec.structs.asdict(self))


class Shutdown(StopState):
    """One shutdown: :meth:`notice` begins it, :meth:`run` runs its phases, :meth:`report` sums it up."""

    def __init__(self, settings: Settings, host: Host | None = None) -> None:
        super().__init__(interrupts_at_once=settings.lame_duck_timeout_s == settings.drain_timeout_s == 0)
        self._settings = settings
        self._host = host or NoHost()
        self._reason = ""
        self._notice_age_s = 0.0
        self._sessions: Sessions | None = None
        self._before = NOTHING
        self._faults: list[str] = []
        self._clients_closed = 0
        self._connections_aborted = 0

    def __repr__(self) -> str:
        reason = f", by {self._reason}" if self._reason else ""
        return f"<Shutdown: {self.phase}{reason}>"

    @property
    def reason(self) -> str:
        """The source of the first notice; empty before it."""
        return self._reason

    # Calls from outside

    def notice(self, reason: str, *, age_s: float = 0, is_replaced: bool = False) -> None:
        """Begin the stop of the service. The first notice counts; later ones only say whether it is still replaced.

        Args:
            age_s: How long ago the signal was seen, if it was seen outside of the event loop.
            is_replaced: Whether other processes serve in this one's place.
        """
        was_replaced = self.is_replaced
        self.note_replaced(is_replaced)
        if self.phase >= Phase.LAME_DUCK:
            if was_replaced and not is_replaced and self.phase >= Phase.DRAINING and self._sessions is not None:
                with self.noting_faults("interrupting queued turns"):
                    self._sessions.drain.interrupt_queued()
            return
        self._reason = reason
        self._notice_age_s = age_s
        if self._sessions is not None:
            self._before = self._sessions.statistics()
        self.enter(Phase.LAME_DUCK if self._settings.lame_duck_timeout_s else Phase.DRAINING)
        if self.interrupts_at_once and self._sessions is not None:
            self._interrupt_at_once(self._sessions)

    def hurry(self) -> None:
        """Skip the rest of the lame duck and of the drain, as for a second Ctrl+C."""
        self.enter(Phase.CLOSING)

    def note_fault(self, what: str) -> None:
        """Note an error of the shutdown; the report names the fault, and the exit code changes."""
        self._faults.append(what)

    @contextmanager
    def noting_faults(self, what: str) -> Iterator[None]:
        """Turn an error of the body into a fault, so that the steps after the body still run."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.note_fault(f"{what}: {error!r}")

    @asynccontextmanager
    async def closing(self, opened: AbstractAsyncContextManager[T], what: str) -> AsyncIterator[T]:
        """Open a part of the service, and bound its closing: a close that is slow or fails is a fault.

        All parts share the time of the release. A part that closes after that time still gets :data:`LATE_CLOSE_S`.
        """
        part = await opened.__aenter__()
        try:
            yield part
        finally:
            deadline = self.closing_deadline()
            with self.noting_faults(f"closing {what}"), trio.CancelScope(deadline=deadline, shield=True) as bound:
                await opened.__aexit__(None, None, None)
            if bound.cancel_called:
                self.note_fault(f"closing {what} took longer than release_timeout_s")

    def closing_deadline(self) -> float:
        """The moment until which a part that closes now may take."""
        now = trio.current_time()
        return max(self.entered_at.get(Phase.RELEASING, now) + self._settings.release_timeout_s, now + LATE_CLOSE_S)

    def note_client_closed(self) -> None:
        self._clients_closed += 1

    def note_connections_aborted(self, count: int) -> None:
        self._connections_aborted += count

    # The phases

    async def run(self, sessions: Sessions, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wait for the notice, then run the phases. This is the shutdown watcher, a child of the service.

        Returns when all turns have ended. An error of this task ends the service; a fault in a phase does not.
        """
        self._sessions = sessions
        self._before = sessions.statistics()
        task_status.started()
        await self.reached(Phase.LAME_DUCK)
        if self._settings.lame_duck_timeout_s:
            with self.until(Phase.CLOSING, deadline=self._wait_deadline(self._settings.lame_duck_timeout_s)):
                await trio.sleep_forever()
        self.enter(Phase.DRAINING)
        await self._drain(sessions)
        await self.close_listeners()
        await self._interrupt(sessions)
        self.enter(Phase.RELEASING)

    def _wait_deadline(self, within_s: float) -> float:
        """The deadline of the lame duck or the drain.

        Where ``shutdown_timeout_s`` is below the sum of the phases, the phases after the drain keep their full time.
        """
        settings = self._settings
        before_ends_s = settings.shutdown_total_s - settings.cleanup_timeout_s - settings.release_timeout_s - 1
        return min(trio.current_time() + within_s, self.entered_at[Phase.LAME_DUCK] + before_ends_s)

    def _interrupt_at_once(self, sessions: Sessions) -> None:
        """Interrupt all turns within the notice; :meth:`run` repeats the steps, but runs late in a busy event loop."""
        with self.noting_faults("interrupting running turns at once"):
            self.enter(Phase.CLOSING)
            if self._host.close_listeners_at_once():
                self.enter(Phase.INTERRUPTING)
                sessions.drain.interrupt_all()

    async def _drain(self, sessions: Sessions) -> None:
        with self.noting_faults("interrupting queued turns"):
            sessions.drain.interrupt_queued()
        # Without a drain there is no checkpoint here: under load one checkpoint costs a whole round of the event loop,
        # in which every stream runs.
        if not self._settings.drain_timeout_s:
            return
        with self.until(Phase.CLOSING, deadline=self._wait_deadline(self._settings.drain_timeout_s)):
            await sessions.drain.wait_idle()
            while self.is_replaced:
                with self.noting_faults("waiting for clients"):
                    await self._host.wait_clients_gone()
                if sessions.drain.is_idle:
                    break
                await sessions.drain.wait_idle()

    async def close_listeners(self) -> None:
        """Close the host's listeners. The host calls this itself where there is no service: after a crash, say."""
        self.enter(Phase.CLOSING)
        with self.noting_faults("closing the listeners"):
            await self._host.close_listeners()
        self.enter(Phase.INTERRUPTING)

    async def _interrupt(self, sessions: Sessions) -> None:
        with self.noting_faults("interrupting running turns"):
            sessions.drain.interrupt_all()
        with trio.move_on_after(self._settings.cleanup_timeout_s + PHASE_MARGIN_S) as bound:
            await sessions.drain.wait_idle()
            with self.noting_faults("storing what the store refused"):
                await sessions.pending_writes.retry()
        if bound.cancelled_caught:
            left = sessions.statistics()
            if turns := left.turns_running + left.turns_queued:
                self.note_fault(f"{turns} turns did not end within cleanup_timeout_s")
                with self.noting_faults("ending turns that hang"):
                    await sessions.end_hung(within_s=LATE_CLOSE_S)

    # The end

    def report(self, *, tasks_left: int) -> ShutdownReport:
        """The report, once every part is closed."""
        faults = list(self._faults)
        if tasks_left:
            faults.append(f"{tasks_left} tasks were left")
        before = self._before
        after = before if self._sessions is None else self._sessions.statistics()
        if crashed := after.turns_crashed - before.turns_crashed:
            faults.append(f"{crashed} turns crashed; the log has the errors")
        if self._sessions is not None and (unkept := self._sessions.suspensions.not_kept):
            faults.append(f"the store did not take {unkept} suspended turns, which go on as after a crash")
        if after.ends_not_stored:
            faults.append(f"the end of {after.ends_not_stored} turns is not in the store")
        return ShutdownReport(
            reason=self._reason,
            phases_ms=self._phases_ms(),
            turns_finished=_finished(after) - _finished(before),
            turns_interrupted=after.turns_interrupted - before.turns_interrupted,
            turns_suspended=after.turns_suspended - before.turns_suspended,
            turns_lost=after.turns_lost - before.turns_lost,
            streams_ended=after.streams_ended - before.streams_ended,
            streams_aborted=after.streams_aborted - before.streams_aborted,
            connections_aborted=self._connections_aborted,
            clients_closed=self._clients_closed,
            tasks_left=tasks_left,
            faults=tuple(faults),
        )

    def _phases_ms(self) -> dict[str, float]:
        times = [self.entered_at[phase] for phase in _REPORTED.values() if phase in self.entered_at]
        spans = pairwise([*times, trio.current_time()])
        phases_ms = {name: _ms(until - since) for name, (since, until) in zip(_REPORTED, spans, strict=False)}
        phases_ms = {"notice": _ms(self._notice_age_s)} | phases_ms
        return phases_ms | {"total": round(sum(phases_ms.values()), 1)}


def _finished(statistics: SessionsStatistics) -> int:
    return statistics.turns_completed + statistics.turns_failed + statistics.turns_cancelled


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
