"""Replays: the event logs of ended turns, read from the store."""

from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakValueDictionary

import msgspec
import trio

from service.errors import EventsLostError
from service.sessions.events import outcome
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import Event, TurnCall, TurnQueued, TurnStarted
from service.sessions.events.frames import decode_frame
from service.storage.records import TurnRecord
from service.storage.store import Store


class Replays:
    """The logs of ended turns. A log stays in memory while it has readers.

    All readers of one turn share one log, which is read from the store once.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._logs: WeakValueDictionary[tuple[str, str], EventLog] = WeakValueDictionary()
        self._opening: WeakValueDictionary[tuple[str, str], trio.Lock] = WeakValueDictionary()

    async def open(
        self, session_id: str, turn_id: str, *, after: int, read_turn: Callable[[], Awaitable[TurnRecord]]
    ) -> EventLog:
        """The closed log of an ended turn.

        Args:
            after: The seq after which the caller reads.
            read_turn: Reads the turn's record, or raises an error that refuses the caller. Called after the events were
                read, so that a session that is deleted meanwhile is not found.

        Raises:
            EventsLostError: Not all events after ``after`` are in the store, or the turn has not ended.
        """
        key = session_id, turn_id
        async with self._opening.setdefault(key, trio.Lock()):
            log = self._logs.get(key)
            frames = [] if log is not None else await self._store.read_events(session_id, turn_id)
            turn = await read_turn()
            if log is None:
                log = replay_kept(turn, frames)
            if log is None:  # the turn may have ended between the two reads
                frames = await self._store.read_events(session_id, turn_id)
                log = replay_kept(turn, frames)
            if log is not None:
                self._logs[key] = log
        kept = len(frames) if log is None else log.unbroken_seq
        if log is None or kept < after < log.last_seq:
            raise EventsLostError(turn_id, after=kept, state=turn.state, text=turn.text)
        return log


def replay_kept(turn: TurnRecord, frames: Sequence[bytes]) -> EventLog | None:
    """The closed log of stored frames; None if events are missing.

    A crash loses the events after the last checkpoint; the text in the store ends at the same checkpoint. The terminal
    event follows with a seq that is higher than the seq of every lost event.
    """
    if turn.is_open:
        return None
    events = [_naming(turn, decode_frame(frame)) for frame in frames]
    if turn.reason == "crash" and len(frames) < turn.last_seq:
        terminal = outcome.terminal_event(
            outcome.Interrupted("crash"),
            seq=turn.last_seq,
            text_length=len(turn.text),
            left_out=turn.left_out,
            stored=True,
        )
        return EventLog.replay([*events, terminal])
    return EventLog.replay(events) if len(frames) == turn.last_seq else None


def _naming(turn: TurnRecord, event: Event) -> Event:
    """The event, with this turn's ids; in a fork the first events and openings of calls name the copied turn's."""
    if isinstance(event, TurnQueued | TurnStarted):
        return msgspec.structs.replace(event, session_id=turn.session_id, turn_id=turn.id)
    if isinstance(event, TurnCall) and event.item < len(turn.output):
        return msgspec.structs.replace(event, id=turn.output[event.item].id)
    return event
