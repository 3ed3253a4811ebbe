"""Refused requests in the log: a line for each kind, at most one a second of a kind, with how many there were.

A service that refuses does so by the thousand, and a line for each request would be the next fault. The first refusal
of a kind is told at once; those that follow within a second are counted, and told once the second is over.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

import structlog
import trio

logger = structlog.get_logger("lastcall.api")

INTERVAL_S = 1.0


@dataclass
class _Kind:
    """What is counted of one kind since its last line."""

    count: int = 0
    told_at: float = -inf
    level: Literal["info", "warning"] = "info"
    fields: dict[str, object] = field(default_factory=dict)


class RefusalLog:
    """The refusals of one service. A kind is a problem's code, so there are a few dozen at most."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._changes = trio.lowlevel.ParkingLot()

    def note(self, code: str, *, level: Literal["info", "warning"], **fields: object) -> None:
        """A request was refused. Of several that are told in one line the last one's fields are in it."""
        kind = self._kinds.setdefault(code, _Kind())
        kind.count += 1
        kind.level, kind.fields = level, fields
        if trio.current_time() >= kind.told_at + INTERVAL_S:
            self._tell(code, kind)
        else:
            self._changes.unpark_all()

    def flush(self) -> None:
        """Tell what is counted and not told yet: the service ends."""
        self._tell_due(inf)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The refusal loop, a child of the service: tell what was counted once its second is over. Idle, it sleeps.

        Runs until cancelled, and then tells the rest.
        """
        task_status.started()
        try:
            while True:
                due_at = min((kind.told_at + INTERVAL_S for kind in self._kinds.values() if kind.count), default=None)
                if due_at is None:
                    await self._changes.park()
                else:
                    await trio.sleep_until(due_at)
                    self._tell_due(trio.current_time())
        finally:
            self.flush()

    def _tell_due(self, now: float) -> None:
        for code, kind in self._kinds.items():
            if kind.count and now >= kind.told_at + INTERVAL_S:
                self._tell(code, kind)

    def _tell(self, code: str, kind: _Kind) -> None:
        count, kind.count = kind.count, 0
        kind.told_at = trio.current_time()
        log = logger.warning if kind.level == "warning" else logger.info
        log("requests refused", code=code, count=count, **kind.fields)


def causes_of(error: BaseException) -> str | None:
    """What led to an error, the nearest cause first, each with its kind; None where nothing is known."""
    causes = []
    cause = error.__cause__
    while cause is not None:
        causes.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return ", from ".join(causes) or None
