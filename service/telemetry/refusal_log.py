"""Refused requests in the log: at most one line a second for each kind of refusal, with the number of requests.

A service may refuse thousands of requests, and a line for each would be a fault of its own. The first refusal of a kind
is logged at once. Further refusals within a second are counted, and logged when the second is over.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

import structlog
import trio

from service.errors import EventsLostError
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics

logger = structlog.get_logger("lastcall.api")

INTERVAL_S = 1.0


@dataclass
class _Kind:
    """The refusals of one kind since its last line."""

    count: int = 0
    logged_at: float = -inf
    level: Literal["info", "warning"] = "info"
    fields: dict[str, object] = field(default_factory=dict)


class RefusalLog:
    """The refusals of one service. A kind is a problem's code, so there are a few dozen at most.

    Args:
        metrics: Counts them, too.
    """

    def __init__(self, metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self._kinds: dict[str, _Kind] = {}
        self._changes = trio.lowlevel.ParkingLot()

    def count(self, code: str) -> None:
        """Count an answered problem for the metrics."""
        self._metrics.add(families.REFUSALS, code)
        if code == EventsLostError.code:
            self._metrics.add(families.RESUME_GAPS)

    def note(self, code: str, *, level: Literal["info", "warning"], **fields: object) -> None:
        """Note a refused request. A line about several requests has the fields of the last one."""
        kind = self._kinds.setdefault(code, _Kind())
        kind.count += 1
        kind.level, kind.fields = level, fields
        if trio.current_time() >= kind.logged_at + INTERVAL_S:
            self._log(code, kind)
        else:
            self._changes.unpark_all()

    def flush(self) -> None:
        """Log all refusals that are counted and not logged yet, at the end of the service."""
        self._log_due(inf)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Log the counted refusals of a kind when its second is over. A child task of the service.

        Runs until cancelled, and then logs the rest. Sleeps while no refusal is counted.
        """
        task_status.started()
        try:
            while True:
                due_at = min((kind.logged_at + INTERVAL_S for kind in self._kinds.values() if kind.count), default=None)
                if due_at is None:
                    await self._changes.park()
                else:
                    await trio.sleep_until(due_at)
                    self._log_due(trio.current_time())
        finally:
            self.flush()

    def _log_due(self, now: float) -> None:
        for code, kind in self._kinds.items():
            if kind.count and now >= kind.logged_at + INTERVAL_S:
                self._log(code, kind)

    def _log(self, code: str, kind: _Kind) -> None:
        count, kind.count = kind.count, 0
        kind.logged_at = trio.current_time()
        log = logger.warning if kind.level == "warning" else logger.info
        log("requests refused", code=code, count=count, **kind.fields)


def causes_of(error: BaseException) -> str | None:
    """Return the causes of an error, the nearest first, each with its type; None without a cause."""
    causes = []
    cause = error.__cause__
    while cause is not None:
        causes.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return ", from ".join(causes) or None
