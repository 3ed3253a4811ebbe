"""A turn's event log: appended by one writer, read by any number of cursors, each at its own pace."""

from collections.abc import Sequence
from math import inf
from typing import cast

import trio

from service.sessions.events.events import Event, encode_frame, escape_line_ends

_TERMINAL_RESERVE_BYTES = 2048
"""Room kept for the terminal event, which must always fit: it may quote 300 characters of up to four bytes."""


class EventLog:
    """An append-only log of encoded events with seqs from 1, without gaps.

    Only the turn's own task appends and closes. Reading is synchronous, so a reader holds a number
    (its cursor: the seq it has seen last, 0 for none) and no memory while it waits or is stalled.

    Args:
        bytes_max: Bound on the encoded events in all. :meth:`append` says when it would be passed;
            the terminal event has room of its own.
    """

    def __init__(self, *, bytes_max: int) -> None:
        self._frames: list[bytes] = []
        self._bytes = 0
        self._bytes_max = bytes_max - _TERMINAL_RESERVE_BYTES
        self._last_seq: int | None = None
        self._closed = False
        self._escapes = False
        self._readers = trio.lowlevel.ParkingLot()
        self._pausing = trio.lowlevel.ParkingLot()

    @classmethod
    def replay(cls, frames: Sequence[bytes], *, last_seq: int | None = None) -> "EventLog":
        """The closed log of an ended turn, from the frames that were kept. They are not copied.

        With ``last_seq`` that is the seq of the last of them: those between it and the one before are lost.
        Frames that were kept before line ends were escaped in them are escaped as they are read.
        """
        log = cls(bytes_max=0)
        log._escapes = True
        log._last_seq = last_seq
        log._frames = cast("list[bytes]", frames)  # a closed log is never written to
        log._closed = True
        return log

    def __repr__(self) -> str:
        return f"<EventLog: {'closed' if self._closed else 'open'}, seq {self.last_seq}>"

    @property
    def last_seq(self) -> int:
        """The seq of the newest event, 0 if there is none."""
        return len(self._frames) if self._last_seq is None else self._last_seq

    @property
    def unbroken_seq(self) -> int:
        """The seq up to which no event is missing: below ``last_seq`` where some before the terminal one are lost."""
        return len(self._frames) if self._last_seq is None else len(self._frames) - 1

    @property
    def closed(self) -> bool:
        """Whether the terminal event is in it: nothing will follow."""
        return self._closed

    def append(self, event: Event) -> bool:
        """Append an event whose ``seq`` is ``last_seq + 1`` and wake the readers.

        False, and nothing is appended, where ``bytes_max`` would be passed.
        """
        frame = encode_frame(event)
        if self._bytes + len(frame) > self._bytes_max:
            return False
        self._append(event, frame)
        return True

    def close(self, terminal: Event) -> None:
        """Append the terminal event. Always succeeds; the log then never changes again."""
        self._append(terminal, encode_frame(terminal))
        self._closed = True
        self._pausing.unpark_all()

    def _append(self, event: Event, frame: bytes) -> None:
        assert not self._closed, "a closed log was written to"
        assert event.seq == len(self._frames) + 1, "an event has the wrong seq"
        self._frames.append(frame)
        self._bytes += len(frame)
        self._readers.unpark_all()

    async def wait_beyond(self, cursor: int, *, until: float = inf) -> None:
        """Return once there is an event after ``cursor``, or the log is closed.

        Args:
            until: Do not wait beyond this time, in seconds of Trio's clock: whoever sets it sees to a call of
                :meth:`wake_readers` then.
        """
        while self.last_seq <= cursor and not self._closed and trio.current_time() < until:
            await self._readers.park()

    def wake_readers(self) -> None:
        """Have those that wait look at the time."""
        self._readers.unpark_all()

    async def wait_closed(self) -> None:
        """Return once the terminal event is there."""
        while not self._closed:
            await self._pausing.park()

    def read_after(self, cursor: int, *, bytes_max: int) -> tuple[bytes, int]:
        """The frames after ``cursor`` that fit in ``bytes_max`` (at least one), and the new cursor.

        Empty bytes and the same cursor where nothing is ready.
        """
        frames, end = join_frames(self._frames, min(cursor, len(self._frames)), bytes_max=bytes_max)
        if self._escapes:
            frames = escape_line_ends(frames)
        return frames, max(self.last_seq, cursor) if end == len(self._frames) else end

    def frames(self, *, after: int = 0) -> list[bytes]:
        """A copy of the frames after a seq, to be kept."""
        return list(self._frames[after:])


def join_frames(frames: Sequence[bytes], cursor: int, *, bytes_max: int) -> tuple[bytes, int]:
    """Join the frames whose seq is above ``cursor``: at least one, and no more than fit in ``bytes_max``."""
    end = cursor
    size = 0
    for index in range(cursor, len(frames)):
        size += len(frames[index])
        if size > bytes_max and index > cursor:
            break
        end = index + 1
    return b"".join(frames[cursor:end]), end
