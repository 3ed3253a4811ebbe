"""Whether this process still owns its turns, as far as its store knows.

An owner in a shared database lives on a lease: another one takes it for dead that has seen no beat of it for a whole
lease. So an owner without an answer of the database may have lost its turns and not know it yet. It then tells no end
that the store has not taken, because another process may tell another one.
"""

import time
from collections.abc import Callable

import trio


class Bell:
    """Wakes the one task that waits for it; at once, if it has rung since that task was last woken."""

    def __init__(self) -> None:
        self._rung = trio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self) -> None:
        await self._rung.wait()
        self._rung = trio.Event()


class Standing:
    """The standing of an owner. An owner without a lease keeps its turns for as long as its process lives.

    Args:
        lease_s: How long the beats of an owner stand still before another one takes it for dead; None without a lease.
        monotonic: The time that passes for the store.

    Attributes:
        is_lost: Whether another owner has taken this one for dead. Any thread may read it.
        lost: Set when that is known.
        taken_over: Rung each time this owner has taken another one for dead: its turns are to be recovered.
    """

    def __init__(self, *, lease_s: float | None = None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.is_lost = False
        self.lost = trio.Event()
        self.taken_over = Bell()
        self._lease_s = lease_s
        self._monotonic = monotonic
        self._beat_at = monotonic()
        self._beats = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Standing: {'lost' if self.is_lost else 'certain' if self.is_certain else 'uncertain'}>"

    @property
    def has_lease(self) -> bool:
        return self._lease_s is not None

    @property
    def is_certain(self) -> bool:
        """Whether no other owner has taken this one for dead: its last beat is not older than half a lease."""
        if self.is_lost or self._lease_s is None:
            return not self.is_lost
        return self._monotonic() - self._beat_at < self._lease_s / 2

    async def wait_beat(self) -> None:
        """Wait until the store has answered a beat, or the turns are known to be lost."""
        if not self.is_lost:
            await self._beats.park()

    # For the store, in the event loop

    def note_beat(self, at: float) -> None:
        """Note a beat that the store has answered.

        Args:
            at: When it was sent.
        """
        self._beat_at = max(at, self._beat_at)
        self._beats.unpark_all()

    def lose(self) -> None:
        """Note that another owner has taken this one for dead."""
        self.is_lost = True
        self.lost.set()
        self._beats.unpark_all()
