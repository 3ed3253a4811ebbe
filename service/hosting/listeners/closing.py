"""The moment at which the listeners close: hypercorn serves until the drain is over, and no client is left waiting.

hypercorn closes its listeners as soon as it is told to stop. The port stays open, because the master holds it too: a
client that connects then waits in the backlog until the process is gone, and is reset. So hypercorn's triggers are
held back during the drain, and each new client gets an answer. Proven by
``tests/hosting/listeners/test_closing.py``.
"""

from collections.abc import Callable, Sequence

import msgspec
import trio

from service.cluster.workers import KnownWorker
from service.hosting.hypercorn.worker import Worker
from service.hosting.listeners.listeners import Listeners
from service.hosting.listeners.peer_port import PeerDoor
from service.hosting.listeners.worker_status import StatusBeacon, WorkerStatus
from service.stop_state import Phase, StopState

MASTER_LATE_S = 0.025
"""How long to wait for the master's event: a signal to the process group may reach a worker before its master."""
MASTER_BUSY_S = 0.05
"""How long a master may run between a worker's end and its next wait, also on a busy machine."""
MASTER_POLL_INTERVAL_S = 0.01
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

    def __init__(self, worker: Worker, listeners: Listeners, peer_door: PeerDoor) -> None:
        self._gives_up_start = False
        self._worker = worker
        self._listeners = listeners
        self._peer_door = peer_door
        self._beacon = StatusBeacon(worker.master.open_status_file() if worker.master is not None else None)
        self._beacon.show(WorkerStatus.STARTING)

    def give_up_start(self) -> None:
        """Note that this worker will not serve; workers that still start then do not count as answering either."""
        self._gives_up_start = True

    def show_serving(self) -> None:
        """Show the other workers that this worker serves."""
        self._beacon.show(WorkerStatus.SERVING)

    def workers(self) -> Sequence[KnownWorker]:
        """All workers of the service, as the master has told them; it does not tell of one that stops by itself."""
        master = self._worker.master
        return [self._as_shown(worker) for worker in master.workers] if master is not None else ()

    def _as_shown(self, worker: KnownWorker) -> KnownWorker:
        if worker.status == "serving" and self._beacon.stops(worker.pid):
            return msgspec.structs.replace(worker, status="draining")
        return worker

    async def leave_clients_to_others(self) -> None:
        """Take no clients while this worker drains and others serve. The caller cancels this when the listeners close.

        If the whole service stops, no other worker will answer: then this worker takes clients again at once.
        """
        self._beacon.show(WorkerStatus.DRAINING)
        if self._worker.master is None:
            return
        while True:
            others_serve = not self._master_stops and self._beacon.another_is(WorkerStatus.SERVING)
            self._listeners.accept_clients(not others_serve)
            self._peer_door.accept(not others_serve)
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
        """Whether the master was told to stop; to reload, too, with hypercorn's own."""
        master = self._worker.master
        return master is not None and master.wants_stop()

    def _try_close(self) -> bool:
        """Close the listeners if it is known already whether another worker will answer. Idempotent."""
        if self._listeners.is_closed:
            return True
        followed: bool | None = False
        if self._listeners.open.is_set() and self._worker.master is not None:
            followed = self._worker.master.worker_follows(self._listeners.sockets)
        if followed is not None:
            self._close(followed=followed)
        return followed is not None

    def _close(self, *, followed: bool) -> None:
        self._beacon.show(WorkerStatus.LEAVING)
        # Another worker that stops, too, may be gone before this one, whose turns replicas still ask for.
        self._peer_door.accept(not followed and not self._beacon.another_is(WorkerStatus.SERVING))
        if self._listeners.open.is_set():
            self._listeners.stop_accepting(refuse_waiting=not followed and not self._others_answer())

    def _others_answer(self) -> bool:
        """Whether another worker on these sockets serves, or is about to."""
        master, beacon = self._worker.master, self._beacon
        if master is None:
            return False
        # In the order in which a worker's status changes: a change between two of these questions hides no worker.
        starts = not self._gives_up_start and (
            master.another_starts(beacon) or beacon.another_is(WorkerStatus.STARTING)
        )
        return starts or beacon.another_is(WorkerStatus.SERVING) or beacon.another_is(WorkerStatus.DRAINING)
