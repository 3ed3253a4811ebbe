"""The event log of a turn that is over, from what the store kept of it."""

from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakValueDictionary

import msgspec
import trio

from service.errors import EventsLostError
from service.sessions.events import outcome
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import TurnQueued, TurnStarted, decode_frame, encode_frame
from service.storage.records import TurnRecord
from service.storage.store import Store


class Replays:
    """The logs of turns that are over, each for as long as anybody reads it.

    One for all who read the same turn: they share the memory, and the store reads it once.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._logs: WeakValueDictionary[tuple[str, str], EventLog] = WeakValueDictionary()
        self._opening: WeakValueDictionary[tuple[str, str], trio.Lock] = WeakValueDictionary()

    async def open(
        self, session_id: str, turn_id: str, *, after: int, read_turn: Callable[[], Awaitable[TurnRecord]]
    ) -> EventLog:
        """The log of a turn, which is closed.

        Args:
            after: The seq from which on it is to be read.
            read_turn: Reads the turn's record, and refuses where it may not be read. Asked last, so that a session
                that goes away meanwhile is not found.

        Raises:
            EventsLostError: Not all events that follow ``after`` are in the store, or it is not over.
        """
        key = session_id, turn_id
        async with self._opening.setdefault(key, trio.Lock()):
            log = self._logs.get(key)
            frames = [] if log is not None else await self._store.read_events(session_id, turn_id)
            turn = await read_turn()
            if log is None:
                log = replay_kept(turn, frames)
            if log is None:  # it may have ended between the two
                frames = await self._store.read_events(session_id, turn_id)
                log = replay_kept(turn, frames)
            if log is not None:
                self._logs[key] = log
        kept = len(frames) if log is None else log.unbroken_seq
        if log is None or kept < after < log.last_seq:
            raise EventsLostError(turn_id, after=kept, state=turn.state, text=turn.text)
        return log


def replay_kept(turn: TurnRecord, frames: Sequence[bytes]) -> EventLog | None:
    """A closed log; None if events are missing in it.

    A crash loses events whose seqs only the readers of that moment know. What is left, and the text, are those up to
    the last checkpoint; the terminal event follows on them with a seq above all that are lost.
    """
    if turn.is_open:
        return None
    frames = _naming(turn, frames)
    if turn.reason == "crash" and len(frames) < turn.last_seq:
        terminal = outcome.terminal_event(
            outcome.Interrupted("crash"),
            seq=turn.last_seq,
            text_length=len(turn.text),
            left_out=turn.left_out,
            stored=True,
        )
        return EventLog.replay([*frames, encode_frame(terminal)], last_seq=turn.last_seq)
    return EventLog.replay(frames) if len(frames) == turn.last_seq else None


def _naming(turn: TurnRecord, frames: Sequence[bytes]) -> Sequence[bytes]:
    """The frames, the first of which say whose they are: in those of a fork it is the turn that was copied."""
    told: list[bytes] = []
    for frame in frames[:2]:
        # Of no other event: quotes in a text are escaped.
        if b'"turn_id":"' not in frame or turn.id.encode() in frame:
            break
        event = decode_frame(frame)
        assert isinstance(event, TurnQueued | TurnStarted)
        told.append(encode_frame(msgspec.structs.replace(event, session_id=turn.session_id, turn_id=turn.id)))
    return [*told, *frames[len(told) :]] if told else frames
