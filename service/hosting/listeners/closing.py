"""The moment at which the listeners close: hypercorn serves until the drain is over, and no client is left waiting.

hypercorn closes its listeners as soon as it is told to stop. The port stays open, because the master holds it too: a
client that connects then waits in the backlog until the process is gone, and is reset. So hypercorn's triggers are
held back during the drain, and each new client gets an answer. Proven by
``tests/hosting/listeners/test_closing.py``.
"""

import os
from collections.abc import Callable
from math import inf

import trio

from service.hosting.hypercorn.worker import Master, Worker
from service.hosting.listeners.listeners import Listeners
from service.hosting.listeners.worker_status import StatusBeacon, WorkerStatus, holds_socket, statuses_of_others
from service.stop_state import Phase, StopState

MASTER_LATE_S = 0.025
"""How long to wait for the master's event: a signal to the process group may reach a worker before its master."""
MASTER_BUSY_S = 0.05
"""How long a master may run between a worker's end and its next wait, also on a busy machine."""
MASTER_POLL_INTERVAL_S = 0.01
OTHERS_POLL_INTERVAL_S = 0.25
WAITING_S = 0.025
"""How long clients that waited when the listeners closed may hold up the ends of turns."""


class DeferredTermination:
    """Stands in for hypercorn's ``context.terminate``: hypercorn stops when the listeners are closed, and not before.

    Args:
        wish: Called when hypercorn wants to stop, because of ``--max-requests``.
    """

    def __init__(self, stop: StopState, wish: Callable[[], None]) -> None:
        self._stop = stop
        self._wish = wish

    async def set(self) -> None:
        self._wish()

    async def clear(self) -> None:
        raise AssertionError("hypercorn does not clear it")

    async def wait(self) -> None:
        await self._stop.reached(Phase.INTERRUPTING)

    def is_set(self) -> bool:
        return self._stop.phase >= Phase.INTERRUPTING


class ListenerShutdown:
    """Closes the listeners of a worker, in the way that fits what its master and the other workers do."""

    def __init__(self, worker: Worker, listeners: Listeners) -> None:
        self._not_answering = {WorkerStatus.LEAVING}
        self._worker = worker
        self._listeners = listeners
        self._beacon = StatusBeacon()

    def give_up_start(self) -> None:
        """Note that this worker will not serve; workers that still start then do not count as answering either."""
        self._not_answering = {WorkerStatus.LEAVING, WorkerStatus.STARTING}

    def show_serving(self) -> None:
        """Show the other workers that this worker serves."""
        self._beacon.show(WorkerStatus.SERVING)

    async def leave_clients_to_others(self) -> None:
        """Take no clients while this worker drains and others serve. The caller cancels this when the listeners close.

        If the whole service stops, no other worker will answer: then this worker takes clients again at once.
        """
        self._beacon.show(WorkerStatus.DRAINING)
        if self._worker.config.workers < 2:
            return
        others_serve, look_at = False, -inf
        while True:
            now = trio.current_time()
            if self._master_stops:
                others_serve = False
            elif now >= look_at:
                others_serve, look_at = WorkerStatus.SERVING in self._statuses_of_others(), now + OTHERS_POLL_INTERVAL_S
            self._listeners.accept_clients(not others_serve)
            await trio.sleep(MASTER_POLL_INTERVAL_S)

    async def close_listeners(self) -> None:
        """Take no more clients. Returns once the clients that waited have their answers, or after :data:`WAITING_S`."""
        with trio.move_on_after(MASTER_LATE_S):
            while not self._try_close() and not self._master_stops:  # noqa: ASYNC110  the master has no event for this
                await trio.sleep(0.001)
        with trio.move_on_after(MASTER_BUSY_S):
            while self._master_stops and not self._try_close():  # noqa: ASYNC110
                await trio.sleep(0.001)
        if not self._listeners.is_closed:
            self._close(followed=not self._master_stops)
        with trio.move_on_after(WAITING_S):
            await self._listeners.wait_served()

    def close_listeners_at_once(self) -> bool:
        """Close the listeners if that needs no waiting. Returns whether :meth:`close_listeners` need not follow."""
        return self._try_close() and self._listeners.has_served

    @property
    def _master_stops(self) -> bool:
        """Whether the master's event shows that it was told to stop or to reload."""
        master = self._worker.master
        return master is not None and master.wants_stop()

    def _try_close(self) -> bool:
        """Close the listeners if it is known already whether another worker will answer. Idempotent."""
        if self._listeners.is_closed:
            return True
        followed: bool | None = False
        if self._listeners.open.is_set() and self._worker.master is not None:
            with self._beacon.looking():
                followed = self._another_worker_follows(self._worker.master)
        if followed is not None:
            self._close(followed=followed)
        return followed is not None

    def _close(self, *, followed: bool) -> None:
        self._beacon.show(WorkerStatus.LEAVING)
        if self._listeners.open.is_set():
            self._listeners.stop_accepting(refuse_waiting=not followed and not self._others_answer())

    def _another_worker_follows(self, master: Master) -> bool | None:
        """Whether the master will start another worker in this worker's place, as in a reload.

        None while this is not known yet.
        """
        if not master.is_alive():
            return False
        if not master.wants_stop():
            return None
        # A stop or a reload. Only in a reload does the master wait for all of its workers with its sockets open.
        waits_for = master.waits_for()
        holds_sockets = holds_socket(master.pid, self._listeners.sockets)
        if waits_for is None and holds_sockets:
            return None
        return waits_for == "all workers" and holds_sockets

    def _others_answer(self) -> bool:
        """Whether another worker on these sockets serves, or is about to."""
        return self._statuses_of_others() - self._not_answering != set()

    def _statuses_of_others(self) -> set[WorkerStatus]:
        master = self._worker.master
        if master is None or self._worker.config.workers == 1:
            return set()
        with self._beacon.looking():
            return set(statuses_of_others(self._listeners.sockets, parent=os.getppid()))
