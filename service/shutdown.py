"""The shutdown: its phases, in order, each with its own bound, and the report at its end.

=============  ========================================================  ===========================
phase          what                                                      at most
=============  ========================================================  ===========================
lame_duck      readiness is 503, everything still works                  ``lame_duck_timeout_s``
draining       new work is refused, queued turns are interrupted,        ``drain_timeout_s``
               running ones may finish
interrupting   what still runs is interrupted, stored and told           ``cleanup_timeout_s``
releasing      streams send their last chunk; who serves closes the      ``release_timeout_s``
               connections, then the tree closes clients and the store
=============  ========================================================  ===========================

Nothing here waits for what is not there: without an open turn the phases after the lame duck take no
time. Nothing that goes wrong in a phase stops the ones after it: it is a fault, and is reported.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from enum import StrEnum
from typing import TypeVar

import msgspec
import structlog
import trio

from service.sessions.sessions import Sessions
from service.sessions.statistics import SessionsStatistics
from service.settings import Settings

logger = structlog.get_logger("lastcall.shutdown")

SETTLE_S = 0.1
"""What a phase may take beyond its bound, so that those who wait by the same bound come first."""
LATE_CLOSE_S = 0.2
"""What a step gets that comes when the time of its phase is over."""
T = TypeVar("T")


class Phase(StrEnum):
    SERVING = "serving"
    LAME_DUCK = "lame_duck"
    DRAINING = "draining"
    INTERRUPTING = "interrupting"
    RELEASING = "releasing"


PHASES = tuple(Phase)


class ShutdownReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a shutdown did. Counts are of what ended since the notice.

    Attributes:
        reason: Whose notice came first: ``SIGTERM``, ``SIGINT``, ``parent died``, ``max requests``...
        phases_ms: Milliseconds by phase: ``notice`` (from the first sign to the service's knowing), the phases of
            the table above, and ``total``.
        turns_finished: Turns that came to their own end: completed, failed or cancelled.
        turns_interrupted: Turns that the shutdown ended, queued ones too.
        streams_ended: Event streams that were sent to their end.
        streams_aborted: Event streams whose client was gone or did not read.
        connections_aborted: Connections that were closed by force, whatever they carried.
        clients_closed: Model clients that were closed.
        tasks_left: Tasks of the service that are still there at the end. Always 0, or something is wrong.
        faults: What went wrong, in the order it did; each cost its own bound and no more.
    """

    reason: str
    phases_ms: dict[str, float]
    turns_finished: int
    turns_interrupted: int
    streams_ended: int
    streams_aborted: int
    connections_aborted: int
    clients_closed: int
    tasks_left: int
    faults: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return not self.faults

    def log(self) -> None:
        """The one line that ends every shutdown."""
        log = logger.info if self.clean else logger.error
        log("shutdown report", **msgspec.structs.asdict(self))


class Shutdown:
    """One shutdown: told by :meth:`notice`, done by :meth:`run`, summed up by :meth:`report`.

    Attributes:
        close_listeners: Set by who serves, and awaited once the drain is over, before the first running turn is
            interrupted: no more connections are taken from there on, because the ends of all streams are about to
            keep the event loop busy.
        close_listeners_at_once: The same in the call, as far as nothing is to be waited for; whether
            that was all of it.
        phase: Where it is. Only ever goes on.
        accepting: Whether new work is taken. False from the end of the lame duck on.
        expected: Whether a notice has been seen, if only outside of the event loop.
        noticed: Set by the notice.
        work_ended: All turns are stored and their logs are closed; the streams are finishing.
    """

    def __init__(self, settings: Settings) -> None:
        self.phase = Phase.SERVING
        self.accepting = True
        self.expected = False
        self.noticed = trio.Event()
        self.work_ended = trio.Event()
        self.close_listeners: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.close_listeners_at_once: Callable[[], bool] = lambda: False
        self._settings = settings
        self._reason = ""
        self._hurry = trio.Event()
        self._noticed_at = 0.0
        self._phase_started = 0.0
        self._phases_ms: dict[str, float] = {}
        self._release_deadline: float | None = None
        self._sessions: Sessions | None = None
        self._before: SessionsStatistics | None = None
        self._faults: list[str] = []
        self._clients_closed = 0
        self._connections_aborted = 0

    def __repr__(self) -> str:
        reason = f", by {self._reason}" if self._reason else ""
        return f"<Shutdown: {self.phase}{reason}>"

    # Told from outside

    def notice(self, reason: str, *, age_s: float = 0) -> None:
        """The service is to stop. The first notice counts, later ones change nothing.

        Args:
            age_s: How long ago the first sign was seen, where that was outside the event loop.
        """
        if self.noticed.is_set():
            return
        self._reason = reason
        self.expected = True
        self._phases_ms["notice"] = round(age_s * 1000, 1)
        self._noticed_at = self._phase_started = trio.current_time()
        self._enter(Phase.LAME_DUCK)
        if self._settings.lame_duck_timeout_s == 0:
            self._refuse_work()
        self.noticed.set()
        if self._is_hasty:
            self._interrupt_at_once()

    def expect_notice(self, arrive: Callable[[], None]) -> None:
        """The notice has been seen outside of the event loop, and is on its way. From any thread.

        Where turns are interrupted at once, what streams could write until then would only hold up the ends: so they do
        not, and the first that would have has the notice arrive.

        Args:
            arrive: Gives the notice, within the event loop. May be called more than once.
        """
        self.expected = True
        if self._is_hasty and self._sessions is not None:
            self._sessions.drain.end_streams_only(arrive)

    def hurry(self) -> None:
        """Skip what is left of the lame duck and of the drain: a second Ctrl+C."""
        self._hurry.set()

    def note_fault(self, what: str) -> None:
        """Something went wrong on the way down; it is reported and changes the exit code."""
        self._faults.append(what)

    @contextmanager
    def noting_faults(self, what: str) -> Iterator[None]:
        """Take an error for a fault: what comes after a step that failed matters more than the failure."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.note_fault(f"{what}: {error!r}")

    @asynccontextmanager
    async def closing(self, opened: AbstractAsyncContextManager[T], what: str) -> AsyncIterator[T]:
        """Open a part of the service whose closing must not hold up the others: a slow or broken one is a fault.

        All of them share the release's time; who comes when it is over gets a little all the same.
        """
        part = await opened.__aenter__()
        try:
            yield part
        finally:
            now = trio.current_time()
            deadline = now + self._settings.release_timeout_s
            if self._release_deadline is not None:
                deadline = max(self._release_deadline, now + LATE_CLOSE_S)
            with self.noting_faults(f"closing {what}"), trio.CancelScope(deadline=deadline, shield=True) as bound:
                await opened.__aexit__(None, None, None)
            if bound.cancel_called:
                self.note_fault(f"closing {what} took longer than release_timeout_s")

    def note_client_closed(self) -> None:
        self._clients_closed += 1

    def note_connections_aborted(self, count: int) -> None:
        self._connections_aborted += count

    # The phases

    async def run(self, sessions: Sessions, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The shutdown watcher, a child of the service: wait for the notice, then run the phases.

        Ends with the work. Its own failure would end the service; a fault in a phase does not.
        """
        self._sessions = sessions
        if not self.accepting:
            sessions.drain.stop_accepting()
        task_status.started()
        await self.noticed.wait()
        self._before = self._before or sessions.statistics()
        if self._settings.lame_duck_timeout_s:
            with trio.CancelScope(deadline=self._wait_deadline(self._settings.lame_duck_timeout_s)):
                await self._hurry.wait()
        self._refuse_work()
        self._enter(Phase.DRAINING)
        await self._drain(sessions)
        self._enter(Phase.INTERRUPTING)
        await self._interrupt(sessions)
        self._enter(Phase.RELEASING)
        self._release_deadline = trio.current_time() + self._settings.release_timeout_s
        self.work_ended.set()

    def _wait_deadline(self, within_s: float) -> float:
        """Until when to wait for clients' sake: a ``shutdown_timeout_s`` below the sum leaves its end to the ends."""
        settings = self._settings
        before_ends_s = settings.shutdown_total_s - settings.cleanup_timeout_s - settings.release_timeout_s - 1
        return min(trio.current_time() + within_s, self._noticed_at + before_ends_s)

    @property
    def _is_hasty(self) -> bool:
        """Whether turns are interrupted as soon as the notice comes."""
        return self._settings.lame_duck_timeout_s == self._settings.drain_timeout_s == 0

    def _interrupt_at_once(self) -> None:
        """Begin with what :meth:`run` does again: a full event loop takes a while until it comes to that task."""
        if self._sessions is None:
            return
        with self.noting_faults("interrupting running turns at once"):
            if self.close_listeners_at_once():
                self._before = self._sessions.statistics()
                self._enter(Phase.DRAINING)
                self._enter(Phase.INTERRUPTING)
                self._sessions.drain.interrupt_all()

    async def _drain(self, sessions: Sessions) -> None:
        with self.noting_faults("interrupting queued turns"):
            sessions.drain.interrupt_queued()
        # Where nothing may be waited for, nothing is: under load a single checkpoint costs a round of the event loop,
        # in which every stream has its turn.
        if not self._settings.drain_timeout_s:
            return
        with trio.CancelScope(deadline=self._wait_deadline(self._settings.drain_timeout_s)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_after, nursery.cancel_scope, self._hurry)
                await sessions.drain.wait_idle()
                nursery.cancel_scope.cancel()

    async def _interrupt(self, sessions: Sessions) -> None:
        with self.noting_faults("closing the listeners"):
            await self.close_listeners()
        with self.noting_faults("interrupting running turns"):
            sessions.drain.interrupt_all()
        with trio.move_on_after(self._settings.cleanup_timeout_s + SETTLE_S) as bound:
            await sessions.drain.wait_idle()
            with self.noting_faults("storing what the store refused"):
                await sessions.pending_writes.settle()
        if bound.cancelled_caught:
            left = sessions.statistics()
            if turns := left.turns_running + left.turns_queued:
                self.note_fault(f"{turns} turns did not end within cleanup_timeout_s")
                with self.noting_faults("ending turns that hang"):
                    await sessions.end_hung(within_s=LATE_CLOSE_S)

    def _refuse_work(self) -> None:
        self.accepting = False
        if self._sessions is not None:
            self._sessions.drain.stop_accepting()

    def _enter(self, phase: Phase) -> None:
        """Go on to a phase, or stay where that has been reached already."""
        if PHASES.index(phase) <= PHASES.index(self.phase):
            return
        now = trio.current_time()
        if self.phase is not Phase.SERVING:
            self._phases_ms[str(self.phase)] = _ms(now - self._phase_started)
        self.phase = phase
        self._phase_started = now

    # The end

    def report(self, *, tasks_left: int) -> ShutdownReport:
        """Sum up, once everything is closed."""
        faults = list(self._faults)
        if tasks_left:
            faults.append(f"{tasks_left} tasks were left")
        phases_ms = self._phases_ms | {str(self.phase): _ms(trio.current_time() - self._phase_started)}
        phases_ms["total"] = round(sum(phases_ms.values()), 1)
        before = self._before or NOTHING
        after = before if self._sessions is None else self._sessions.statistics()
        if crashed := after.turns_crashed - before.turns_crashed:
            faults.append(f"{crashed} turns crashed; the log says how")
        if after.ends_not_stored:
            faults.append(f"the end of {after.ends_not_stored} turns is not in the store")
        return ShutdownReport(
            reason=self._reason,
            phases_ms=phases_ms,
            turns_finished=_finished(after) - _finished(before),
            turns_interrupted=after.turns_interrupted - before.turns_interrupted,
            streams_ended=after.streams_ended - before.streams_ended,
            streams_aborted=after.streams_aborted - before.streams_aborted,
            connections_aborted=self._connections_aborted,
            clients_closed=self._clients_closed,
            tasks_left=tasks_left,
            faults=tuple(faults),
        )


NOTHING = SessionsStatistics(**dict.fromkeys(SessionsStatistics.__struct_fields__, 0))


async def _cancel_after(scope: trio.CancelScope, event: trio.Event) -> None:
    await event.wait()
    scope.cancel()


def _finished(statistics: SessionsStatistics) -> int:
    return statistics.turns_completed + statistics.turns_failed + statistics.turns_cancelled


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
