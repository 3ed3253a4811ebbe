"""A turn's event log: one writer appends, any number of readers read, each at its own pace."""

from collections.abc import Sequence
from math import inf
from typing import cast

import trio

from service.sessions.events.events import Event, encode_frame, escape_line_ends

_TERMINAL_RESERVE_BYTES = 2048
"""Room kept for the terminal event, which must always fit: it may quote 300 characters of up to four bytes."""


class EventLog:
    """An append-only log of encoded events with seqs from 1, without gaps.

    Only the turn's own task appends and closes. Reading is synchronous, so a reader holds only a number
    (the last seq that the reader has seen, 0 for none) while it waits or is stalled.

    Args:
        bytes_max: Bound on the encoded events in all. :meth:`append` refuses an event beyond it;
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
        self._waiting_for_end = trio.lowlevel.ParkingLot()

    @classmethod
    def replay(cls, frames: Sequence[bytes], *, last_seq: int | None = None) -> "EventLog":
        """The closed log of an ended turn, from stored frames. The frames are not copied.

        ``last_seq`` is the seq of the last frame if events before this frame are lost. Readers get frames of earlier
        versions, which have unescaped line ends, with these line ends escaped.
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
        """The seq up to which no event is missing; below ``last_seq`` if events before the terminal event are lost."""
        return len(self._frames) if self._last_seq is None else len(self._frames) - 1

    @property
    def closed(self) -> bool:
        """Whether the log has its terminal event, after which no event follows."""
        return self._closed

    def append(self, event: Event) -> bool:
        """Append an event whose ``seq`` is ``last_seq + 1`` and wake the readers.

        Returns False, and appends nothing, if the log would be larger than ``bytes_max``.
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
        self._waiting_for_end.unpark_all()

    def _append(self, event: Event, frame: bytes) -> None:
        assert not self._closed, "a closed log was written to"
        assert event.seq == len(self._frames) + 1, "an event has the wrong seq"
        self._frames.append(frame)
        self._bytes += len(frame)
        self._readers.unpark_all()

    async def wait_beyond(self, seq: int, *, until: float = inf) -> None:
        """Wait for an event after ``seq``, or for the close of the log.

        Args:
            until: The end of the wait, in seconds of Trio's clock. The caller must see to a call of
                :meth:`wake_readers` at this time.
        """
        while self.last_seq <= seq and not self._closed and trio.current_time() < until:
            await self._readers.park()

    def wake_readers(self) -> None:
        """Wake all waiting readers, so that they check their ``until``."""
        self._readers.unpark_all()

    async def wait_closed(self) -> None:
        """Wait until the log has its terminal event."""
        while not self._closed:
            await self._waiting_for_end.park()

    def read_after(self, seq: int, *, bytes_max: int) -> tuple[bytes, int]:
        """The frames after ``seq`` that fit in ``bytes_max`` (at least one), and the seq of the last of them.

        Empty bytes and the same seq if there are no such frames yet.
        """
        frames, end = join_frames(self._frames, min(seq, len(self._frames)), bytes_max=bytes_max)
        if self._escapes:
            frames = escape_line_ends(frames)
        return frames, max(self.last_seq, seq) if end == len(self._frames) else end

    def frames(self, *, after: int = 0) -> list[bytes]:
        """A copy of the frames after a seq, to be kept."""
        return list(self._frames[after:])


def join_frames(frames: Sequence[bytes], seq: int, *, bytes_max: int) -> tuple[bytes, int]:
    """Join the frames after ``seq``: at least one, and no more than fit in ``bytes_max``; and the last seq of them."""
    end = seq
    size = 0
    for index in range(seq, len(frames)):
        size += len(frames[index])
        if size > bytes_max and index > seq:
            break
        end = index + 1
    return b"".join(frames[seq:end]), end
