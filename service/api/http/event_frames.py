"""The events of a log in the frames of one face: encoded once for all streams that are at the end of the log."""

from collections.abc import Callable

from service.sessions.events.event_log import Events
from service.sessions.events.events import Event

EncodeFrame = Callable[[Event], bytes]
"""A face's frame of an event. All streams of a face use the same function. Empty if the frame is long: a stream reads
such a frame piece by piece (:class:`~service.api.http.long_frames.LongFrames`).
"""

_KEPT_FRAMES_MAX = 128
_KEPT_BYTES_MAX = 16 * 1024


class _NewestFrames:
    """The newest frames of a log in one face, so that many streams of a running turn cost one encoding of each event.

    A stream that is further behind encodes what it reads.

    Attributes:
        frame: The newest frame.
        end: The seq of the newest frame; the events of the frames before it have no gap between their seqs.
    """

    def __init__(self) -> None:
        self.end = 0
        self.frame = b""
        self._frames: list[bytes] = []
        self._bytes = 0

    def read_after(self, seq: int) -> list[bytes]:
        missing = self.end - seq
        return self._frames[-missing:] if 0 < missing <= len(self._frames) else []

    def add(self, frame: bytes, seq: int) -> None:
        """Add the frame of the event after ``end``; the frames before are dropped if it is another event."""
        if self.end != seq - 1:
            self._frames = []
            self._bytes = 0
        self.end = seq
        self.frame = frame
        self._frames.append(frame)
        self._bytes += len(frame)
        if len(self._frames) > _KEPT_FRAMES_MAX:
            self._drop(_KEPT_FRAMES_MAX // 2)
        while self._bytes > _KEPT_BYTES_MAX:
            self._drop(max(len(self._frames) // 2, 1))

    def _drop(self, count: int) -> None:
        self._bytes -= sum(map(len, self._frames[:count]))
        del self._frames[:count]


def read_frames(log: Events, seq: int, *, encode: EncodeFrame, bytes_max: int) -> tuple[bytes, int]:
    """The frames after ``seq`` that fit in ``bytes_max`` (at least one), and the seq of the last of them.

    Empty bytes and the same seq if there are no such events yet, if a replay has not loaded them, or if the next frame
    is long.
    """
    newest = log.beside.get(encode)
    if newest is None:
        newest = log.beside[encode] = _NewestFrames()
    assert isinstance(newest, _NewestFrames)
    if seq + 1 == log.last_seq:  # the usual case: one event is new
        if newest.end == seq + 1:
            return newest.frame, seq + 1
        if len(events := log.read_after(seq)) == 1 and (frame := encode(events[0])):
            newest.add(frame, seq + 1)
            return frame, seq + 1
    frames = newest.read_after(seq)
    size = sum(map(len, frames))
    while size > bytes_max and len(frames) > 1:
        size -= len(frames.pop())
    after = end = seq + len(frames)
    new: list[bytes] = []
    while size <= bytes_max and (events := log.read_after(end)):
        for event in events:
            frame = encode(event)
            size += len(frame)
            if not frame or (size > bytes_max and (frames or new)):
                size = bytes_max + 1
                break
            new.append(frame)
            end = event.seq
    if end == log.last_seq == after + len(new):
        kept = new[-_KEPT_FRAMES_MAX:]
        for frame_seq, frame in enumerate(kept, end - len(kept) + 1):
            newest.add(frame, frame_seq)
    return b"".join(frames + new), end
