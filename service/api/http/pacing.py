"""The pace of requests that begin turns or streams: a few in each round of the event loop, in the order of arrival.

A thousand clients may come at once, as after a deploy. If all their requests began at once, each round of the event
loop would do a part of the work of all of them. A request that comes last, such as a probe, would take as many of these
long rounds as it has steps. So the others wait here. A request waits only for those before it to begin, not for their
work: a store or a client that hangs holds up nothing.
"""

from typing import Any

import trio

AT_ONCE = 16
"""Requests that begin within two rounds of the event loop. Each takes some milliseconds in all, in about ten rounds."""

_PACED = {"POST": ("/chat", "/turns", "/retry", "/responses", "/completions"), "GET": ("/events",)}
"""The ends of the paths of requests that wait, by method. Others are short, or end work."""


def is_paced(scope: dict[str, Any]) -> bool:
    """Whether the request of this ASGI scope may begin a turn or a stream."""
    if scope["type"] != "http":
        return False
    path: str = scope["path"]
    return path.endswith(_PACED.get(scope["method"], ()))


class Pace:
    """Lets waiting tasks pass, oldest first.

    Args:
        at_once: How many pass within two rounds of the event loop.
    """

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._free = at_once
        self._waiting = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Pace: {self._free} free, {len(self._waiting)} wait>"

    async def wait(self) -> None:
        """Wait until the caller may begin, one round of the event loop at least. May be cancelled."""
        if self._free:
            self._free -= 1
        else:
            await self._waiting.park()  # until the place of another task is given to this one
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self._give_on()

    def _give_on(self) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self._free += 1
