"""The metrics loop: measures once a second what nothing counts where it happens, and how late the event loop is."""

import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import trio

from service.clock import Clock
from service.errors import StoreError
from service.models.client import CountsConnections, ModelClient
from service.sessions.sessions import Sessions
from service.sessions.statistics import TurnsMeasured
from service.steps import in_steps
from service.storage.store import Store
from service.storage.store_deadline import answered_within
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics

INTERVAL_S = 1.0
STEP_S = 0.001
"""The time after which the measuring of turns lets other tasks run."""
COUNT_TIMEOUT_S = 1.0
"""How long an answer waits for the number of the sessions in the store; then it has the number of the answer before."""
COUNT_SHARE_MAX = 0.05
"""Bound on the time that the store spends on that number: with a million sessions it takes a while to count them."""
_PAGE_BYTES = resource.getpagesize()


class Gauges:
    """Measures one service. Opened by the supervisor.

    Attributes:
        metrics: Where the numbers go.
    """

    def __init__(
        self, metrics: Metrics, *, store: Store, sessions: Sessions, clients: Sequence[ModelClient], clock: Clock
    ) -> None:
        self.metrics = metrics
        self._store = store
        self._sessions = sessions
        self._clients = [client for client in clients if isinstance(client, CountsConnections)]
        self._clock = clock
        self._cpu_s = 0.0
        self._count_again_at = -1.0
        python = ".".join(map(str, sys.version_info[:3]))
        metrics.set(families.BUILD, version("lastcall"), python, to=1)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Measure every second until cancelled. A child task of the service: its failure ends the service."""
        await self.measure()
        task_status.started()
        due_at = trio.current_time()
        while True:
            due_at = max(due_at + INTERVAL_S, trio.current_time())  # a freeze is one late run, and not many
            await trio.sleep_until(due_at)
            self.metrics.observe(families.LOOP_LAG, value=max(trio.current_time() - due_at, 0))
            await self.measure()

    async def measure(self) -> None:
        """Measure now. Takes about a tenth of a millisecond, and the same for each 500 open turns, in steps.

        And the same for each thousand of pieces of replies that have come since the last time, in one step.
        """
        self._note(await in_steps(self._sessions.measure_turns(), step_s=STEP_S))

    def _note(self, turns: TurnsMeasured) -> None:
        metrics = self.metrics
        metrics.add_gaps()
        metrics.set(families.TURNS_OPEN, "running", to=turns.running)
        metrics.set(families.TURNS_OPEN, "queued", to=turns.queued)
        metrics.set(families.ENDS_PENDING, to=self._sessions.pending_writes.turns)
        metrics.set(families.LOG_BYTES, to=turns.log_bytes)
        metrics.set(families.STORE_REFUSES, to=self._sessions.pending_writes.refusal is not None)
        metrics.set(families.TASKS, to=trio.lowlevel.current_statistics().tasks_living)
        metrics.set(families.WORKERS, to=1)
        for client in self._clients:
            active, idle = client.count_connections()
            metrics.set(families.UPSTREAM_CONNECTIONS, client.name, "active", to=active)
            metrics.set(families.UPSTREAM_CONNECTIONS, client.name, "idle", to=idle)
        used = resource.getrusage(resource.RUSAGE_SELF)
        before, self._cpu_s = self._cpu_s, used.ru_utime + used.ru_stime
        metrics.add(families.CPU, by=self._cpu_s - before)
        with suppress(OSError):  # no descriptor is left: the former number stays
            metrics.set(families.MEMORY, to=int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES)

    async def count_sessions(self) -> None:
        """Count the sessions in the store, unless that was done just now. Waits :data:`COUNT_TIMEOUT_S` at most."""
        began_at = trio.current_time()
        if began_at < self._count_again_at:
            return
        self._count_again_at = began_at + COUNT_TIMEOUT_S
        try:
            with answered_within(COUNT_TIMEOUT_S):
                now = self._clock()
                for state in ("running", "idle"):
                    count = await self._store.count_sessions(status=state, now=now)
                    self.metrics.set(families.SESSIONS, state, to=count)
        except StoreError:
            return
        ended_at = trio.current_time()
        self._count_again_at = ended_at + (ended_at - began_at) / COUNT_SHARE_MAX
