"""Forks: the turns are read in short steps, and one transaction adds the copy.

Ids, inputs and outputs come here and go back, because the items in them get new ids. The server copies the rest of each
row, the events and the terms.
"""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec

from service.errors import (
    EditedMeanwhileError,
    OwnedElsewhereError,
    SessionNotFoundError,
    TurnNotFoundError,
)
from service.ids import new_session_id, scoped
from service.storage import rules
from service.storage.fork_path import ForkPath, copies_of, forked_session
from service.storage.postgres import additions, documents, event_pages, idempotency, owners, paths, sessions
from service.storage.postgres.connections import Db
from service.storage.postgres.rows import Row
from service.storage.postgres.turn_rows import COLUMNS, TURN_COLUMNS, json_of, parts
from service.storage.records import IdempotencyKey, SessionRecord, TurnRecord

STEP_S = 0.01
"""The approximate time of one step of the reading."""
_READ_AT_ONCE = 200
_BYTES_AT_ONCE = 2 * 1024 * 1024
"""Bound on the texts that one statement reads, unless one turn has more."""

_READ = (
    f"SELECT {TURN_COLUMNS}, t.key, t.depth, octet_length(t.output) + coalesce(octet_length(t.runs), "
    "(SELECT sum(octet_length(runs) + octet_length(text)) FROM {s}.event_pages WHERE turn = t.key), 0)::bigint "
    "FROM (SELECT key, sum(text_bytes) OVER (ORDER BY depth DESC) - text_bytes AS before FROM ("
    "SELECT key, depth, text_bytes FROM {s}.turns WHERE chain = %(chain)s AND depth <= %(depth)s "
    "ORDER BY depth DESC LIMIT %(limit)s) AS newest) AS taken JOIN {s}.turns AS t ON t.key = taken.key "
    "WHERE before < %(bytes)s ORDER BY t.depth DESC"
)
_COPIED = (
    "state, created_at, started_at, ended_at, last_seq, message_bytes, message_items, messages, text_bytes, "
    "events_deleted, settings, options, runs"
)
_COPY = (
    "INSERT INTO {s}.turns "
    f"(key, session, ordinal, id, parent, chain, depth, place, ephemeral, input, output, {_COPIED}) "
    "OVERRIDING SYSTEM VALUE "
    f"SELECT copy, %(session)s, at, new_id, new_parent, %(chain)s, at, 1, false, said, replied, {_COPIED} "
    "FROM unnest(%(sources)s::bigint[], %(copies)s::bigint[], %(ordinals)s::int[], %(ids)s::text[], "
    "%(parents)s::text[], %(inputs)s::bytea[], %(outputs)s::bytea[]) "
    "AS given (source, copy, at, new_id, new_parent, said, replied) JOIN {s}.turns ON key = source"
)
_COPY_PAGES = (
    "INSERT INTO {s}.event_pages (turn, after, runs, text) SELECT copy, after, runs, text "
    "FROM unnest(%s::bigint[], %s::bigint[]) AS given (source, copy) JOIN {s}.event_pages ON turn = source"
)


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """A fork to be built.

    Attributes:
        source: The key of the session that is copied.
        turns: The copies of its turns, root first.
        keys: The keys of the turns that are copied.
        in_pages: Those of them whose texts are in pages.
        edits: How often something was deleted from the source when its turns were read.
    """

    source_id: str
    source: int
    edits: int
    session: SessionRecord
    turns: list[TurnRecord]
    keys: list[int]
    in_pages: set[int]
    key: IdempotencyKey | None


class Plan:
    """Reads the turns that a fork copies, in short steps, and makes their copies. The turns have ended, so of the later
    changes of the session only deletions change them.

    Its steps raise RepeatedError, EditedMeanwhileError, SessionNotFoundError,
    TurnNotFoundError, TurnInProgressError, OwnedElsewhereError and InvalidRequestError.

    Attributes:
        is_complete: Whether :attr:`fork` is there.
    """

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
        self.is_complete = False
        self._source_id = source_id
        self._at = at
        self._copy_id = copy_id
        self._fence = fence
        self._now = now
        self._key = key
        self._source: sessions.StoredSession | None = None
        self._path = ForkPath()
        self._segments: list[paths.Segment] = []
        """The parts of the path that are not read yet, the part next to the root first."""
        self._keys: list[int] = []
        self._in_pages: set[int] = set()
        self._copying: Iterator[TurnRecord] | None = None
        self._copies: list[TurnRecord] = []

    def read_some(self, db: Db) -> None:
        """Do one step."""
        deadline = time.monotonic() + STEP_S
        if self._copying is None:
            self._read_until(db, deadline)
        else:
            self._copy_until(self._copying, deadline)

    def _read_until(self, db: Db, deadline: float) -> None:
        if self._source is None:  # no copies are made if an earlier call has made a fork
            idempotency.check(db, self._key, self._now)
        source = sessions.visible(db, self._source_id, self._now)
        rules.check_takes_turns(source.record)
        if self._source is None:
            self._begin(db, source)
        else:
            if source.key != self._source.key:
                raise SessionNotFoundError(self._source_id)
            if source.edits != self._source.edits:
                raise EditedMeanwhileError
        while self._segments:
            self._read(db, source)
            if time.monotonic() >= deadline:
                return
        self._copying = copies_of(self._path, copy_id=self._copy_id)

    def _begin(self, db: Db, source: sessions.StoredSession) -> None:
        self._source = source
        at = source.record.head if self._at is None else self._at
        if at is not None:
            self._segments = paths.segments_of(db, source.key, at)
            if not self._segments:
                raise TurnNotFoundError(at)

    def _read(self, db: Db, source: sessions.StoredSession) -> None:
        """Read the next turns, from the last one towards the root."""
        segment = self._segments.pop()
        values = {
            "chain": segment.chain,
            "depth": segment.last,
            "limit": min(_READ_AT_ONCE, segment.last - segment.first + 1),
            "bytes": _BYTES_AT_ONCE,
        }
        rows: list[Row] = db.execute(_READ, values).fetchall()
        records = event_pages.records_of(db, self._source_id, [row[:-3] for row in rows])
        for turn, (*columns, key, _, events_bytes) in zip(records, rows, strict=True):
            others = rules.others_of(source.owner, besides=self._fence)
            if turn.is_open and others is not None:
                owner = owners.owner_of(db, others)
                raise OwnedElsewhereError(self._source_id, fence=owner.fence, address=owner.address)
            self._path.add(turn, events_bytes=events_bytes)
            self._keys.append(key)
            if columns[COLUMNS - 1] is not None:
                self._in_pages.add(key)
        depth = rows[-1][-2]
        if depth > segment.first:
            self._segments.append(msgspec.structs.replace(segment, last=depth - 1))

    def _copy_until(self, copying: Iterator[TurnRecord], deadline: float) -> None:
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
            source_id=self._source_id,
            source=self._source.key,
            edits=self._source.edits,
            session=forked_session(
                self._source.record,
                self._path,
                head=self._copies[-1].id if self._copies else None,
                copy_id=self._copy_id,
                now=self._now,
            ),
            turns=self._copies,
            keys=self._keys[::-1],
            in_pages=self._in_pages,
            key=self._key,
        )


def build(db: Db, fork: Fork, now: datetime) -> SessionRecord:
    """Add the copy. Returns its record.

    Raises:
        RepeatedError: Another fork with the same key was faster.
        SessionNotFoundError: The source was removed meanwhile.
        SessionExistsError
        EditedMeanwhileError: Something was deleted from the source meanwhile.
    """
    with idempotency.checked(db, fork.key, now):
        _check_source(db, fork, now)
        # Under another id until the end: a step that adds a session of this id does not wait meanwhile.
        hidden = msgspec.structs.replace(fork.session, id=scoped(fork.session.owner, f"+{new_session_id()}"))
        session = sessions.insert(db, hidden, turns=len(fork.turns))
        copies = additions.new_keys(db, len(fork.turns))
        for some in parts(fork.turns):
            with db.pipeline():
                db.execute(_COPY, _values(fork, session, copies, some))
                db.execute(_COPY_PAGES, (fork.keys[some], copies[some]))
                documents.copy_turns(db, session, fork.keys[some], copies[some])
        _check_source(db, fork, now)
        sessions.make_room(db, fork.session.id, now)
        sessions.show(db, session, fork.session.id)
        idempotency.keep(db, fork.key, session=session, session_id=fork.session.id, now=now)
        return fork.session


def _check_source(db: Db, fork: Fork, now: datetime) -> None:
    source = sessions.visible(db, fork.source_id, now)
    if source.key != fork.source:  # another session has taken the id
        raise SessionNotFoundError(fork.source_id)
    if source.edits != fork.edits:
        raise EditedMeanwhileError


def _values(fork: Fork, session: int, copies: Sequence[int], some: slice) -> dict[str, object]:
    turns, sources = fork.turns[some], fork.keys[some]
    outputs = (
        rules.without_texts(turn.output) if source in fork.in_pages else turn.output
        for turn, source in zip(turns, sources, strict=True)
    )
    return {
        "session": session,
        "chain": copies[0],
        "sources": sources,
        "copies": copies[some],
        "ordinals": list(range(some.start, some.stop)),
        "ids": [turn.id for turn in turns],
        "parents": [turn.parent for turn in turns],
        "inputs": [json_of(turn.input) for turn in turns],
        "outputs": list(map(json_of, outputs)),
    }
