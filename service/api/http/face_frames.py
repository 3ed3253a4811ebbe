"""Faces whose frames depend on the events before: their frames are numbered, and the same for every way of reading.

A face of this kind is a :class:`Face`: it begins with a :class:`FaceState`, which makes a :class:`Step` of an event:
the frames, and the state for the events that follow. A state is a value that never changes, and most events, the pieces
of a text, leave it as it is (:meth:`FaceState.piece`). So the states of a log are few and are kept beside it, one list
for all streams of the face: a stream is only a seq here, too, and each event at the end of the log is encoded once.

The frames of a log are numbered from 0. A number depends on the log alone: the same live, in one piece, replayed, after
a restart and in another process. A client that comes back says how many frames it has seen; a stream of another process
that goes on here has counted them.

A turn that outlives its process goes on without a frame: where nothing was lost the numbers go on, too. Where events
before ``turn.resumed`` are no more part of the log, because a crash lost them or the reply begins anew, the numbers go
on above all that were ever sent (:data:`NUMBERS_PER_ATTEMPT`). So no number stands for two frames, and a client that
has seen frames which do not count any more is told so: :attr:`Place.is_lost`.

To answer with such a stream::

    opened = await open_turn(service.sessions, session_id, turn_id)  # or the turn, log and watch of a new turn
    release_later(opened.watch)
    face = ResponseFace(opened.turn)
    place = await find_place(opened.log, face, seen=starting_after + 1)  # left out for a stream from the beginning
    return stream_face(opened.log, slot, face=face, place=place)

and before the step that may find another process as the turn's owner::

    continue_streams_with(FaceStream(ResponseFace, find_turn, seen=starting_after + 1, end=…))
"""

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec
import trio

from service.api.http.held_bytes import RequestBytes
from service.api.http.long_frames import LongFrames, are_long, texts_of
from service.long_texts import pieces_of
from service.sessions.events.event_log import Events
from service.sessions.events.events import Event, Piece, TerminalEvent, TurnResumed
from service.sessions.sessions import Sessions
from service.sessions.turns.turn import Watch
from service.storage.records import Item, TurnRecord

NUMBERS_PER_ATTEMPT = 1 << 28
"""More frames than an attempt of a turn sends: the bounds of ``log_bytes_max`` keep its log below. The numbers of
all attempts fit in 32 bits with a sign all the same."""
_RESUMED = b": resumed\n\n"
"""What a stream says where a turn goes on: a comment, because clients know no event for it."""
_HELD_PER_BYTE = 5
"""A character takes up to four bytes; JSON in Python's objects, and the copies of texts in a last frame, as much."""


class TurnSource(Protocol):
    """The turn of a log, for what its events do not say. A live turn is one, and :class:`EndedTurn`.

    What a face takes from it must not depend on when the face looks: of the record what was decided with the turn's
    acceptance, of an item what it began with, and all of it once the turn has ended.
    """

    def record(self) -> TurnRecord:
        """The turn's record, with the reply so far. Of a live turn whose reply is long, this takes milliseconds."""
        ...

    def record_at_first(self) -> TurnRecord:
        """The turn's record without the reply."""
        ...

    def text_pieces(self, item: int) -> Iterator[str]:
        """The text of an output item that does not grow any more, in pieces."""
        ...

    @property
    def text_bytes_max(self) -> int:
        """No less than the size of the reply's texts so far."""
        ...

    def begun_items(self) -> Sequence[Item]:
        """The items of the reply so far, perhaps without texts. An event's item, and all before it, are among them."""
        ...


class EndedTurn:
    """An ended turn, from its record with all texts. It is of one stream, and lives as long; the input is left out."""

    def __init__(self, record: TurnRecord) -> None:
        self._record = msgspec.structs.replace(record, input=())

    def __repr__(self) -> str:
        return f"<EndedTurn {self._record.id}: {self._record.state}>"

    @property
    def held_bytes(self) -> int:
        """About how many bytes a stream of this turn holds: the record, and a last frame that repeats its texts."""
        record = self._record
        texts = sum([len(item.text) + len(item.encrypted) + len(item.upstream) for item in record.output])
        asked = [
            it for it in (record.tools, record.options, record.system_message, record.face) if it is not msgspec.UNSET
        ]
        return _HELD_PER_BYTE * (texts + len(msgspec.json.encode(asked)))

    def record(self) -> TurnRecord:
        return self._record

    def record_at_first(self) -> TurnRecord:
        return self._record

    def text_pieces(self, item: int) -> Iterator[str]:
        return pieces_of(self._record.output[item].text)

    @property
    def text_bytes_max(self) -> int:
        return sum([4 * len(item.text) for item in self._record.output])

    def begun_items(self) -> Sequence[Item]:
        return self._record.output


class Step(NamedTuple):
    """What an event becomes: its frames, at least one, and the state for the events that follow.

    A frame that repeats long texts has marks in their places (:func:`~service.api.http.long_frames.whole_text`).
    ``before_gap`` counts those of the frames that stand before a gap; see :meth:`FaceState.step`.
    """

    frames: Sequence[bytes]
    state: "FaceState"
    before_gap: int = 0


class FaceState(Protocol):
    """What a face knows at a place of a log. It never changes, and does not hold texts of the reply."""

    def piece(self, event: Piece, number: int) -> bytes | None:
        """The one frame of a piece that leaves the state as it is; None if :meth:`step` has to look at the piece.

        Which of both depends on the piece's item alone. This is the way of nearly all events, which takes a microsecond
        if the frame is a template for ``number`` and the text.
        """
        ...

    def step(self, event: Event, number: int, gap: int) -> Step:
        """The frames of an event, and the next state.

        Args:
            number: The number of the event's first frame; the others follow.
            gap: How many events before the terminal event a crash has lost; they are counted in ``number``. The first
                ``before_gap`` frames of the step have numbers from ``number - gap`` on: what comes first in every log.
        """
        ...


class Face(Protocol):
    """A way to show a turn to a client, made for one turn."""

    @property
    def turn(self) -> TurnSource:
        """The turn. Its whole texts go into long frames."""
        ...

    @property
    def key(self) -> Hashable:
        """Equal for the faces that make the same frames of a log, so that their streams share these."""
        ...

    @property
    def end(self) -> bytes:
        """What follows the last frame, without a number of its own; may be empty."""
        ...

    def begin(self) -> FaceState:
        """The state before the first event."""
        ...


class FaceEncoder:
    """The frames of one log in one face, for all streams of this face.

    Attributes:
        seq: The seq of the newest event that was encoded.
    """

    def __init__(self, face: Face) -> None:
        self.seq = 0
        self._face = face
        self._long: dict[int, Step] = {}  # the steps with long frames, by seq
        self._end = face.end
        self._state = face.begin()
        self._extra = 0
        self._changed_at = 0
        self._ended_at = 0
        self._gap = 0
        self._jumps: dict[int, int] = {}  # by the seq of turn.resumed the last seq before it, where seqs are missing
        # The places at which the state has changed: the state after this seq, and how many more frames than events the
        # log has up to there. The last place is also in the attributes above.
        self._seqs = [0]
        self._states = [self._state]
        self._extras = [0]

    def __repr__(self) -> str:
        return f"<FaceEncoder: {self.frames} frames of {self.seq} events>"

    @property
    def frames(self) -> int:
        """The number of the next frame: the count of all frames so far, if there is no gap."""
        return self.seq + self._extra

    def encode(self, event: Event) -> bytes:
        """The frames of an event, which was encoded before, or is the first that was not. Empty if they are long."""
        seq = event.seq
        if seq > self._changed_at and isinstance(event, Piece):
            frame = self._state.piece(event, seq - 1 + self._extra)
            if frame is not None:
                if seq > self.seq:  # noqa: PLR1730  max() is a call, and this is the path of each token
                    self.seq = seq
                return frame
        elif isinstance(event, Piece):
            index = bisect_left(self._seqs, seq) - 1
            frame = self._states[index].piece(event, seq - 1 + self._extras[index])
            if frame is not None:
                return frame
        if isinstance(event, TurnResumed):
            self._go_on(event)
            return _RESUMED
        step = self._step(event)
        if seq in self._long:
            return b""
        frames = b"".join(step.frames)
        return frames + self._end if seq == self._ended_at else frames

    def open_long(self, log: Events, seq: int, *, seen: int, held: RequestBytes) -> LongFrames | None:
        """Those frames of the event after ``seq`` whose numbers are not below ``seen``, if they are long.

        None if they are not, or if there is no such event yet.
        """
        events = log.read_after(seq)
        if not events or events[0].seq not in self._long:
            return None
        texts = texts_of(log, self._face.turn.text_pieces, held)
        return LongFrames(self._unseen_of(events[0], seen), texts)

    def skip_some(self, log: Events) -> None:
        """Go over some of the next events, which nobody reads now."""
        alike = log.alike_after(self.seq)
        for event in log.read_after(self.seq):
            self.encode(event)
            has_changed = self._changed_at == event.seq
            if alike > 1 and not has_changed:
                self.seq += alike - 1  # one frame for each
                return
            if has_changed and log.alike_after(event.seq) > 1:
                return
            alike = 0

    def find(self, seen: int) -> tuple[int, bool]:
        """The last event before the frame with the number ``seen``, by its seq; and whether this frame is not its next
        event's first one, so that :meth:`unseen_of` has to tell the frames of that event.
        """
        index = bisect_right(range(len(self._seqs)), seen, key=lambda at: self._seqs[at] + self._extras[at]) - 1
        seq = seen - self._extras[index]
        if index + 1 == len(self._seqs):
            return min(seq, self.seq), False
        change = self._seqs[index + 1]
        last = self._jumps.get(change, change - 1) - (self._gap if change == self._ended_at else 0)
        return min(seq, last), seq > last

    def unseen_of(self, event: Event, seen: int) -> bytes:
        """Those frames of an event, which has changed the state, whose numbers are not below ``seen``.

        Empty if they are long.
        """
        unseen = self._unseen_of(event, seen)
        return b"" if event.seq in self._long else b"".join(unseen)

    def _unseen_of(self, event: Event, seen: int) -> Sequence[bytes]:
        number = event.seq - 1 + self._extras[bisect_left(self._seqs, event.seq) - 1]
        frames, _, before_gap = self._step(event)
        gap = self._gap if event.seq == self._ended_at else 0
        unseen = [
            frame
            for place, frame in enumerate(frames, number)
            if (place if place >= number + before_gap else place - gap) >= seen
        ]
        return [*unseen, self._end] if event.seq == self._ended_at else unseen

    def _go_on(self, event: TurnResumed) -> None:
        """Number the frames after ``turn.resumed``. The state stays: what is dropped of the reply is not in the log."""
        seq = event.seq
        if seq <= self.seq:
            return
        number = self.frames
        if seq > self.seq + 1:
            self._jumps[seq] = self.seq
            number = (event.attempt - 1) * NUMBERS_PER_ATTEMPT
        self.seq = self._changed_at = seq
        self._extra = number - seq
        self._seqs.append(seq)
        self._states.append(self._state)
        self._extras.append(self._extra)

    def _step(self, event: Event) -> Step:
        seq = event.seq
        if seq in self._long:
            return self._long[seq]
        if seq > self.seq and isinstance(event, TerminalEvent):
            self._ended_at, self._gap = seq, seq - 1 - self.seq
        gap = self._gap if seq == self._ended_at else 0
        assert seq <= self.seq + 1 + gap, "an event was left out"
        index = bisect_left(self._seqs, seq) - 1
        step = self._states[index].step(event, seq - 1 + self._extras[index], gap)
        if are_long(step.frames):
            self._long[seq] = step
        if seq > self.seq:
            self.seq = self._changed_at = seq
            self._state = step.state
            self._extra += len(step.frames) - 1
            self._seqs.append(seq)
            self._states.append(self._state)
            self._extras.append(self._extra)
        return step


def encoder_of(log: Events, face: Face) -> FaceEncoder:
    """The encoder of a log in a face: the one that other streams use, if there is one."""
    encoder = log.beside.get(face.key)
    if encoder is None:
        encoder = log.beside[face.key] = FaceEncoder(face)
    assert isinstance(encoder, FaceEncoder)
    return encoder


class Place(NamedTuple):
    """Where a stream begins: after the event with this seq, and first with the ``rest`` of this event's frames.

    If the frames after it are long, it begins with those whose numbers are not below ``seen``. ``is_beyond`` tells that
    the log has not so many frames yet as were said to have been seen. ``is_lost`` tells that some frames that were
    seen are not part of the log any more.
    """

    seq: int = 0
    rest: bytes = b""
    is_beyond: bool = False
    seen: int = 0
    is_lost: bool = False


BEGINNING = Place()


async def find_place(log: Events, face: Face, *, seen: int) -> Place:
    """The place after the first ``seen`` frames. Reads the log from the beginning, in steps, if no other stream has.

    Raises:
        StoreError, SessionNotFoundError, EventsDeletedError: A replay cannot load its events.
    """
    if seen <= 0:
        return BEGINNING
    encoder = encoder_of(log, face)
    while encoder.frames <= seen and encoder.seq < log.last_seq:
        await log.load_after(encoder.seq)
        encoder.skip_some(log)
        await trio.lowlevel.checkpoint()
    seq, is_within = encoder.find(seen)
    if is_within:
        await log.load_after(seq)
        event = log.read_after(seq)[0]
        if isinstance(event, TurnResumed):
            return Place(seq, is_lost=True)
        rest = encoder.unseen_of(event, seen)
        return Place(event.seq, rest) if rest else Place(seq, seen=seen)
    is_over = log.has_ended and seq == log.last_seq
    return Place(seq, face.end if is_over else b"", is_beyond=seen > encoder.frames)


class OpenedTurn(NamedTuple):
    """A turn for a stream of a face: what its events do not say, its events, and a watch that has to be released."""

    turn: TurnSource
    log: Events
    watch: Watch


async def open_turn(sessions: Sessions, session_id: str, turn_id: str, *, watches: bool = True) -> OpenedTurn:
    """Open a turn, live or ended, for a stream of a face. There is no checkpoint after a live turn's watch is taken.

    Raises:
        SessionNotFoundError, TurnNotFoundError, OwnedElsewhereError, EventsLostError, EventsDeletedError, StoreError
    """
    log, watch = await sessions.open_events(session_id, turn_id, watches=watches)
    live = sessions.find_live_turn(session_id, turn_id)
    if live is not None and live.log is log:
        return OpenedTurn(live, log, watch)
    return OpenedTurn(EndedTurn(await sessions.get_turn(session_id, turn_id)), log, watch)
