"""The heartbeat loop: wakes streams that have been silent for a while, so that they send a heartbeat.

One task serves all streams, because a deadline for each wait of each stream would cost a tenth of a token.
"""

import trio

from service.sessions.events.streams import Streams
from service.sessions.upkeep.run_every import run_every


async def run_heartbeats(streams: Streams, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Wake each stream when it has been silent for the interval. Runs until cancelled."""

    async def wake_silent() -> float:
        return streams.wake_silent()

    task_status.started()
    await run_every(streams.heartbeat_interval_s, wake_silent, name="heartbeats")
