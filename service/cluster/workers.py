"""The workers of one server, as their master tells them to each other."""

from datetime import datetime
from typing import Literal

import msgspec

WorkerPhase = Literal["starting", "serving", "draining"]


class KnownWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker process.

    Attributes:
        status: Whether it takes clients yet, or no more.
        address: Where the server's other processes reach it; empty where they do not.
    """

    pid: int
    status: WorkerPhase
    started_at: datetime
    address: str = ""
