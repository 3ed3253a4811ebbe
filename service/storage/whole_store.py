"""All that a store keeps, as values that every kind of store that outlives its process gives and takes: for a copy.

No other process uses the store. Turns of processes that are gone are recovered before, so only suspended ones are open.
"""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Protocol

import msgspec

from service.storage import rules
from service.storage.pieces import Run, join
from service.storage.records import SessionRecord, TurnRecord

_DIGEST_BYTES = 16


class WholeTurn(msgspec.Struct, frozen=True):
    """A turn, its events, and its number among the documents of searches: a suspended turn has none."""

    record: TurnRecord
    runs: tuple[Run, ...]
    document: int | None


class WholeSession(msgspec.Struct, frozen=True):
    """A session and its turns, in the order of their acceptance; ``document`` is the number of its title."""

    record: SessionRecord
    document: int | None
    turns: tuple[WholeTurn, ...]


class WholeKey(msgspec.Struct, frozen=True):
    """An idempotency key.

    Attributes:
        exists: Whether the session exists to which it belongs.
        gone_at: When it was found that what was made is gone, in microseconds.
    """

    caller: str
    key: str
    fingerprint: bytes
    session_id: str
    exists: bool
    turn: str | None
    first_turn: str | None
    gone_at: int | None


class WholeStore(Protocol):
    """A store that is read as a whole, or filled. All methods block."""

    name: str

    def all_sessions(self) -> Iterator[WholeSession]:
        """All sessions, by their ids."""
        ...

    def all_keys(self) -> Iterator[WholeKey]:
        """All idempotency keys, by caller and key."""
        ...

    def is_empty(self) -> bool: ...

    def add_session(self, session: WholeSession) -> None: ...

    def add_key(self, key: WholeKey) -> None: ...

    def finish(self) -> None:
        """Complete what was added, before it is read."""
        ...


class Contents(msgspec.Struct, frozen=True):
    """How much a store has, and a digest of all of it."""

    sessions: int
    turns: int
    events: int
    keys: int
    digest: str


def contents_of(store: WholeStore) -> Contents:
    """Read a whole store. Equal contents of two stores are the same sessions, turns, events, searches and keys."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    sessions = turns = events = keys = 0
    for session in store.all_sessions():
        digest.update(msgspec.json.encode(session))
        sessions += 1
        turns += len(session.turns)
        events += sum(run.events for turn in session.turns for run in turn.runs)
    for key in store.all_keys():
        digest.update(msgspec.json.encode(key))
        keys += 1
    return Contents(sessions, turns, events, keys, digest.hexdigest())


def copy_all(source: WholeStore, target: WholeStore, *, on_session: Callable[[int], None] = lambda _: None) -> None:
    """Fill an empty store with all that another one has. ``on_session`` gets the number of sessions so far."""
    for number, session in enumerate(source.all_sessions(), 1):
        target.add_session(session)
        on_session(number)
    for key in source.all_keys():
        target.add_key(key)
    target.finish()


def told_runs(turn: TurnRecord, runs: list[Run]) -> tuple[Run, ...]:
    """The events of a turn as readers see them: none if they are deleted."""
    return () if turn.events_deleted else tuple(join(runs))


def kept_runs(turn: WholeTurn) -> tuple[Run, ...]:
    """The events of a turn as a store keeps them: those of a turn that has lost them hold its texts together."""
    return tuple(rules.events_at_once(turn.record.output)) if turn.record.events_deleted else turn.runs
