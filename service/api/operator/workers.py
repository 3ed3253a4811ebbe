"""The workers of this server, and how this one asks for the stop of all of them: the host puts both in place."""

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from quart import current_app

from service.api.http.app_state import current_service
from service.cluster.workers import KnownWorker
from service.errors import WorkerNotFoundError
from service.stop_state import Phase
from service.supervisor import Service

WORKERS = "lastcall.workers"
"""Key of a function that returns all workers of this server, as far as this process knows them."""
ASK_STOP = "lastcall.ask_stop"
"""Key of a function that begins the stop of the whole server, as a signal would; it gets the reason. Never waits."""
_STARTED_AT = datetime.now(UTC)


class Workers:
    """The workers of this server. Made within a request, and used also when the request's answer is sent.

    Args:
        told: Returns all of them, as far as this process knows them.
    """

    def __init__(self, service: Service, told: Callable[[], Sequence[KnownWorker]]) -> None:
        self._service = service
        self._told = told

    def this(self) -> KnownWorker:
        """This process."""
        known = next((worker for worker in self._told() if worker.pid == os.getpid()), None)
        return KnownWorker(
            pid=os.getpid(),
            status="draining" if self._service.shutdown.phase >= Phase.DRAINING else "serving",
            started_at=_STARTED_AT if known is None else known.started_at,
        )

    def known(self) -> Sequence[KnownWorker]:
        """All workers, oldest first; only this one if the master does not tell of others."""
        this = self.this()
        return [this if worker.pid == this.pid else worker for worker in self._told()] or [this]

    def find(self, pid: int) -> KnownWorker | None:
        """The worker with this process id; None if that is this process itself.

        Raises:
            WorkerNotFoundError: There is none, or none that this process can reach.
        """
        if pid == os.getpid():
            return None
        worker = next((it for it in self._told() if it.pid == pid), None)
        if worker is None or not worker.address:
            raise WorkerNotFoundError
        return worker


def current_workers() -> Workers:
    """The workers, for the current request."""
    told: Callable[[], Any] = current_app.extensions.get(WORKERS, tuple)
    return Workers(current_service(), told)


def ask_stop(service: Service, reason: str) -> None:
    """Begin the stop of the whole server: this process alone where no host has put another way in place."""
    ask = cast("Callable[[str], None]", current_app.extensions.get(ASK_STOP, service.shutdown.notice))
    ask(reason)
