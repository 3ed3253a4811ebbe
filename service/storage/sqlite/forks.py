"""Forks: a hidden copy is built in steps that hold the write lock for a short time; the last step shows the copy.

A hidden copy is a session that is marked as deleted, under an id that no client can choose. Readers do not see it. If
its process dies or gives up, the copy is removed like any deleted session.
"""

import time
from collections.abc import Collection, Iterator
from datetime import datetime

import apsw
import msgspec

from service.errors import EditedMeanwhileError, OwnedElsewhereError, SessionNotFoundError
from service.storage import rules
from service.storage.fork_path import ForkPath, copies_of, forked_session
from service.storage.records import IdempotencyKey, SessionRecord, TurnRecord
from service.storage.sqlite import event_pages, idempotency, removals, sessions, turns
from service.storage.sqlite.ownership import owner_of
from service.storage.sqlite.rows import TURN_COLUMNS, Row

STEP_S = 0.005
"""The approximate time of one step: it ends after the row in which this time is over."""
_TURNS_AT_ONCE = 32
_BYTES_AT_ONCE = 128 * 1024
"""The turns, and the bytes of their messages, whose terms are cut before one step."""

_COPIED = {"events": "frames", "event_pages": "runs, text"}
"""The tables with events, and what they have of them. A turn has rows in one of these tables, or in none. An emptied
turn may have some until they are reclaimed, which no fork copies or counts."""


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """A fork to be built.

    Attributes:
        at: The last turn to copy; None if there are no turns to copy.
        sources: The keys of the turns whose copies are in ``turns``.
        hidden_id: The id of the copy while it is hidden.
        terms: The terms of the turns that come next, by their places in ``turns``. They are cut between the steps, so
            that no step holds the write lock meanwhile, and dropped after the turns are copied.
        edits: How often something was deleted from the source when its turns were read.
    """

    source_id: str
    at: str | None
    session: SessionRecord
    turns: list[TurnRecord]
    sources: list[int]
    hidden_id: str
    edits: int
    key: IdempotencyKey | None
    terms: dict[int, Collection[str]]


class Progress(msgspec.Struct, frozen=True):
    """The progress of a copy: its key, the turn that is being copied, and the last events copied of this turn."""

    session: int
    turn: int = 0
    after: int = -1


class Plan(turns.PathWalk):
    """Reads the turns that a fork copies, and makes their copies. The turns have ended, so of the later changes of the
    session only deletions change them.

    Its steps raise RepeatedError, EditedMeanwhileError, SessionNotFoundError,
    TurnNotFoundError, TurnInProgressError, OwnedElsewhereError and InvalidRequestError.
    """

    columns = f"{TURN_COLUMNS}, key"

    def __init__(
        self,
        source_id: str,
        at: str | None,
        *,
        copy_id: str,
        fence: int,
        now: datetime,
        key: IdempotencyKey | None = None,
    ) -> None:
        super().__init__(source_id, at or "")
        self._at = at
        self._copy_id = copy_id
        self._fence = fence
        self._now = now
        self._key = key
        self._source: sessions.StoredSession | None = None
        self._path = ForkPath()
        self._keys: list[int] = []
        self._copying: Iterator[TurnRecord] | None = None
        self._copies: list[TurnRecord] = []

    def read_some(self, db: apsw.Connection) -> None:
        if self._copying is None:
            self._read_some(db)
        else:
            self._copy_some(self._copying)

    def _read_some(self, db: apsw.Connection) -> None:
        if self._source is None:  # no copies are made if an earlier call has made a fork
            idempotency.check(db, self._key, self._now)
        source = sessions.visible(db, self._session_id, self._now)
        rules.check_takes_turns(source.record)
        if self._source is None:  # the first step
            self._source = source
            if self._at is None:
                self._at = source.record.head
            if self._at is None:
                self.is_complete = True
                return
            turns.key_of(db, self._at, source.key)
            self.begin_at(self._at)
        _check_unchanged(source, self._source.edits)
        super().read_some(db)
        if self.is_complete:
            self.is_complete = False
            self._copying = copies_of(self._path, copy_id=self._copy_id)

    def _takes(self, db: apsw.Connection, row: Row) -> bool:
        assert self._source is not None
        turn = event_pages.record_of(db, self._session_id, row)
        others = rules.others_of(self._source.owner, besides=self._fence)
        if turn.is_open and others is not None:
            owner = owner_of(db, others)
            raise OwnedElsewhereError(self._session_id, fence=owner.fence, address=owner.address)
        key = row[-3]
        self._keys.append(key)
        self._path.add(turn, events_bytes=_events_bytes(db, key, in_rows=not turn.is_emptied))
        return True

    def _drop(self) -> None:
        raise SessionNotFoundError(self._session_id)

    def _copy_some(self, copying: Iterator[TurnRecord]) -> None:
        deadline = time.monotonic() + turns.STEP_S
        for copied in copying:
            self._copies.append(copied)
            if time.monotonic() >= deadline:
                return
        self.is_complete = True

    @property
    def fork(self) -> Fork:
        """The fork, once the plan is complete."""
        assert self._source is not None
        return Fork(
            source_id=self._session_id,
            at=self._at,
            session=forked_session(
                self._source.record,
                self._path,
                head=self._copies[-1].id if self._copies else None,
                copy_id=self._copy_id,
                now=self._now,
            ),
            turns=self._copies,
            sources=self._keys[::-1],
            edits=self._source.edits,
            hidden_id=sessions.hidden_id_for(self._copy_id),
            key=self._key,
            terms={},
        )


def places_to_cut(fork: Fork, progress: Progress | None) -> Iterator[int]:
    """The places of the turns whose terms the next step needs. Terms of turns that are copied are dropped."""
    first = 0 if progress is None else progress.turn
    for index in [index for index in fork.terms if index < first]:
        del fork.terms[index]
    size = 0
    for index in range(first, min(first + _TURNS_AT_ONCE, len(fork.turns))):
        size += fork.turns[index].message_bytes
        if index > first and size > _BYTES_AT_ONCE:
            return
        if index not in fork.terms:
            yield index


def build(db: apsw.Connection, fork: Fork, progress: Progress | None, *, fence: int, now: datetime) -> Progress | None:
    """Do one step of a fork. None once the copy is shown.

    Raises:
        RepeatedError: Another fork with the same key was faster.
        SessionNotFoundError: The source was removed meanwhile.
        SessionExistsError
        EditedMeanwhileError: Something was deleted from the source meanwhile.
    """
    idempotency.check(db, fork.key, now)
    source = sessions.visible(db, fork.source_id, now)
    if fork.at is not None:
        turns.key_of(db, fork.at, source.key)  # raises if another session has taken the source's id
    _check_unchanged(source, fork.edits)
    in_the_way = sessions.find_expired(db, fork.session.id, now)
    if progress is None:
        begun = sessions.insert_hidden(db, fork.session, fork.hidden_id, turns_begun=len(fork.turns), fence=fence)
        progress = Progress(begun)
    unfinished = _copy_some(db, fork, progress)
    if unfinished is None:
        if in_the_way is not None:
            removals.hide(db, in_the_way)
        sessions.show(db, progress.session, fork.session.id)
        idempotency.keep(db, fork.key, session=progress.session, session_id=fork.session.id)
    return unfinished


def _check_unchanged(source: sessions.StoredSession, edits: int) -> None:
    if source.edits != edits:
        raise EditedMeanwhileError


def _copy_some(db: apsw.Connection, fork: Fork, progress: Progress) -> Progress | None:
    deadline = time.monotonic() + STEP_S
    copied = progress.after
    for index in range(progress.turn, len(fork.turns)):
        turn, source = fork.turns[index], fork.sources[index]
        if copied == -1:
            if index not in fork.terms:
                return Progress(progress.session, index)
            turns.insert_copy(db, progress.session, index, turn, source=source, terms=fork.terms[index])
        copy = turns.key_of(db, turn.id, progress.session)
        for table, columns in () if turn.is_emptied else _COPIED.items():
            rows: list[Row] = db.execute(
                f"SELECT after FROM {table} WHERE turn = ? AND after > ? ORDER BY after", (source, copied)
            ).fetchall()
            for (after,) in rows:
                db.execute(
                    f"INSERT INTO {table} (turn, after, {columns}) "
                    f"SELECT ?, after, {columns} FROM {table} WHERE turn = ? AND after = ?",
                    (copy, source, after),
                )
                if time.monotonic() >= deadline:
                    return Progress(progress.session, index, after)
        copied = -1
        if time.monotonic() >= deadline:
            return Progress(progress.session, index + 1)
    return None


def _events_bytes(db: apsw.Connection, turn: int, *, in_rows: bool) -> int:
    """The size of the events of a turn, with or without those that have rows of their own."""
    in_turn: int = db.execute(
        "SELECT octet_length(output) + coalesce(output_bytes, 0) + coalesce(octet_length(runs), 0) "
        "FROM turns WHERE key = ?",
        (turn,),
    ).get
    sizes = (
        db.execute(f"SELECT coalesce(sum(octet_length({column})), 0) FROM {table} WHERE turn = ?", (turn,)).get
        for table, column in (("events", "frames"), ("event_pages", "runs"))
    )
    return in_turn + (int(sum(sizes)) if in_rows else 0)
