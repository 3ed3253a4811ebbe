"""The steps that read and write turns, each within a transaction. A step refuses before its first write."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from itertools import islice

import apsw
import msgspec

from service.errors import SessionNotFoundError, TurnInProgressError, TurnNotFoundError, TurnsSuspendedError
from service.storage import rules
from service.storage.moments import moment
from service.storage.page_cursor import TurnPosition, encode_cursor
from service.storage.page_size import fitting
from service.storage.pieces import Run, last_seq, skip, text_of
from service.storage.records import (
    BegunTurn,
    Checkpoint,
    EndResult,
    IdempotencyKey,
    LeftOut,
    Page,
    SessionRecord,
    Siblings,
    SuspendedTurn,
    TreeNode,
    TurnRecord,
)
from service.storage.sqlite import (
    documents,
    event_pages,
    idempotency,
    recovery,
    sessions,
    suspensions,
    tree_changes,
    trees,
)
from service.storage.sqlite.ends import keep_end
from service.storage.sqlite.event_pages import record_of
from service.storage.sqlite.ownership import Ownership
from service.storage.sqlite.rows import PATH_COLUMNS, TURN_COLUMNS, Row, as_json, has_lost_items, values_of

_NEWEST = 1 << 62
"""Above every ordinal."""
SHORT_PATH_S = 0.002
"""The approximate time for which the acceptance of a turn reads its path, while other writes wait: of the processor, so
that a busy machine changes nothing."""
SHORT_PATH_ROW_LENGTH = 128 * 1024
"""The longest row, in characters of its texts, that the acceptance of a turn decodes. Reasoning may be long."""
STEP_S = 0.003
"""The approximate time of one step of a long read, in which the other steps of the same thread wait."""

_VISIBLE = "SELECT key FROM sessions WHERE id = ? AND deletion = 0 AND (open_turns > 0 OR expires_at > ?)"
# The key of a removed session may be used again.
_IDENTITY = "SELECT key, created_at, edits FROM sessions WHERE id = ?"
_GET = f"SELECT {TURN_COLUMNS} FROM shown_turns WHERE id = ? AND session = ?"
_GET_WITHOUT_INPUT = _GET.replace(" input,", " '[]',")
_DOWN_FROM = (
    "SELECT {columns}, ordinal, message_bytes FROM edited_turns "
    "WHERE session = ? AND ordinal <= ? ORDER BY ordinal DESC"
)
# SQLite finds the length of a text without reading the text.
_TURN_BYTES = (
    "octet_length(input) + octet_length(output) + coalesce(output_bytes, 0) + coalesce(octet_length(options), 0)"
)
_SIZES = (
    f"SELECT ordinal, {_TURN_BYTES} + coalesce(octet_length(options), 0) FROM shown_turns "
    "WHERE {which} AND ordinal > ? ORDER BY ordinal LIMIT ?"
)
_AT = f"SELECT {TURN_COLUMNS} FROM edited_turns WHERE session = ? AND ordinal = ?"
# One table in each statement: several simple statements are several times as fast as one join.
_OWN = "SELECT key, session FROM turns WHERE id = ? AND +owner = ?"  # ``+`` makes SQLite search by id, not by owner
_IS_OWN = "id = :turn AND +owner = :owner AND (SELECT id FROM sessions WHERE key = session) IS NOT NULL"
_INSERT_COLUMNS = (
    "id, parent, state, model, created_at, started_at, ended_at, temperature, max_output_tokens, background, reason, "
    "error, finish_reason, usage, last_seq, left_out, options, message_items, message_bytes, input, "
    "output, runs, output_bytes, text_length"
)
_INSERT = (
    f"INSERT INTO turns (session, ordinal, owner, {_INSERT_COLUMNS}) "
    f"VALUES (:session, :ordinal, :owner, {', '.join(':' + name for name in _INSERT_COLUMNS.split(', '))})"
)
_ORDINAL_TO_FOLLOW = "SELECT ordinal FROM shown_turns WHERE id = ? AND session = ? AND ephemeral = 0"
_MARK = "INSERT INTO turn_marks (turn, events_deleted, ephemeral) VALUES (?, ?, ?)"
_KEEP_LEFT_OUT = "UPDATE turns SET left_out = :left_out WHERE key = :key AND left_out IS NOT :left_out"
_KEEP_USAGE = "UPDATE turns SET usage = :usage WHERE key = :key AND usage IS NOT :usage"


def begin(
    db: apsw.Connection,
    turn: TurnRecord,
    owners: Ownership,
    now: datetime,
    *,
    head: str | None | msgspec.UnsetType = msgspec.UNSET,
    creates: SessionRecord | None = None,
    path_bytes_max: int | None | msgspec.UnsetType = msgspec.UNSET,
    key: IdempotencyKey | None = None,
    branches: bool = False,
) -> BegunTurn:
    idempotency.check(db, key, now)
    parent_ordinal = None
    if creates is not None:
        rules.check_first_turn(creates, turn, head)
        kept = sessions.create(db, creates, now)
    else:
        kept, parent_ordinal = _session_for(db, turn, owners, now, head, branches=branches, begins=True)
    path = None if path_bytes_max is msgspec.UNSET else _short_path(db, kept, turn, path_bytes_max)
    siblings = Siblings()
    if kept.turns_begun and parent_ordinal != kept.turns_begun - 1:  # nothing follows the newest turn yet
        siblings = trees.add_sibling(db, kept.key, turn.parent, kept.turns_begun)
    _insert(db, turn, values_of(turn) | {"session": kept.key, "ordinal": kept.turns_begun, "owner": owners.fence})
    session = rules.begun(kept.record, turn, now)
    db.execute(
        "UPDATE sessions SET head = ?, open_turns = ?, owner = ?, turns_begun = ?, message_count = ?, "
        "last_accessed_at = ?, expires_at = ? WHERE key = ?",
        (
            session.head,
            session.open_turns,
            owners.fence,
            kept.turns_begun + 1,
            session.message_count,
            moment(session.last_accessed_at),
            moment(session.expires_at),
            kept.key,
        ),
    )
    idempotency.keep(db, key, session=kept.key, session_id=turn.session_id, turn=turn.id)
    return BegunTurn(session, path, siblings)


class Addition(tree_changes.Progress, frozen=True):
    """The progress of turns that are added.

    Attributes:
        first: The ordinal of the first one. The first step takes the ordinals of all.
        session: The session, once all turns are added.
    """

    first: int = 0
    session: SessionRecord | None = None


def add_some(
    db: apsw.Connection,
    added: Sequence[TurnRecord],
    terms: Sequence[Collection[str]],
    owners: Ownership,
    now: datetime,
    *,
    change: int,
    progress: Addition,
    head: str | None | msgspec.UnsetType = msgspec.UNSET,
    key: IdempotencyKey | None = None,
) -> Addition:
    """Do one step of an addition of turns. Few turns are added by one step; more are hidden until the last step."""
    idempotency.check(db, key, now)
    kept, _ = _session_for(db, added[0], owners, now, head, branches=True, instead=rules.INSTEAD_OF_ADDING)
    first = progress.first if progress.noted else kept.turns_begun
    keys = insert_some(db, kept.key, first, added, terms, done=progress.noted)
    noted = progress.noted + len(keys)
    if progress.noted or noted < len(added):
        tree_changes.note_added(db, change, keys, owner=owners.fence)
    if noted < len(added):
        if not progress.noted:
            db.execute("UPDATE sessions SET turns_begun = ? WHERE key = ?", (first + len(added), kept.key))
        return Addition(noted, first=first)
    if progress.noted:
        tree_changes.set_added(db, change)
    session = rules.with_added(kept.record, added, now)
    trees.add_sibling(db, kept.key, added[0].parent, first)
    db.execute(
        "UPDATE sessions SET head = ?, turns_begun = ?, message_count = ?, last_accessed_at = ?, expires_at = ? "
        "WHERE key = ?",
        (
            session.head,
            # One ordinal is left free if the others are taken already: so a deletion sees that there are new turns.
            kept.turns_begun + 1 if progress.noted else first + len(added),
            session.message_count,
            moment(session.last_accessed_at),
            moment(session.expires_at),
            kept.key,
        ),
    )
    idempotency.keep(db, key, session=kept.key, session_id=session.id, turn=added[-1].id, first_turn=added[0].id)
    return Addition(noted, is_done=True, session=session)


def insert_some(
    db: apsw.Connection,
    session: int,
    first: int,
    added: Sequence[TurnRecord],
    terms: Sequence[Collection[str]],
    *,
    done: int,
) -> list[int]:
    """Insert turns until the time of a step is over. Returns their keys."""
    deadline = time.monotonic() + tree_changes.STEP_S
    keys: list[int] = []
    for index, of_turn in enumerate(documents.within_a_step(islice(terms, done, None)), done):
        turn = added[index]
        keys.append(insert_ended(db, session, first + index, turn, rules.events_at_once(turn.output), terms=of_turn))
        if time.monotonic() >= deadline:
            break
    return keys


def _session_for(
    db: apsw.Connection,
    turn: TurnRecord,
    owners: Ownership,
    now: datetime,
    head: str | None | msgspec.UnsetType,
    *,
    branches: bool,
    begins: bool = False,
    **instead: str,
) -> tuple[sessions.StoredSession, int | None]:
    """The session of a turn that may begin, and its parent's ordinal. Turns of an owner that is gone are recovered.

    Args:
        branches: Whether the path to the parent must have ended.
        begins: Whether the session becomes this owner's: no turn may wait for an owner.
        instead: What the caller may do if it has not.
    """
    kept = sessions.visible(db, turn.session_id, now)
    rules.check_takes_turns(kept.record)
    ordinal: int | None = None
    if turn.parent is not None:
        ordinal = db.execute(_ORDINAL_TO_FOLLOW, (turn.parent, kept.key)).get
        if ordinal is None:
            raise TurnNotFoundError(turn.parent)
    others = rules.others_of(kept.owner, besides=owners.fence)
    if others is not None:
        recovery.refuse_if_alive(db, others, owners, turn.session_id)
    rules.check_head(kept.record, head)
    if begins and (others is not None or kept.owner == rules.NOBODY):
        waiting = suspensions.first_waiting(db, kept.key, others=others)
        if waiting is not None:
            raise TurnsSuspendedError(waiting)
    if others is not None:
        recovery.recover_turns_of(db, others, now, session=kept.key)
        kept = sessions.visible(db, turn.session_id, now)
    if branches and turn.parent is not None and kept.record.open_turns:
        still_open = trees.find_open(db, kept.key, turn.parent)
        if still_open is not None:
            raise TurnInProgressError(still_open, **instead)
    return kept, ordinal


def _short_path(
    db: apsw.Connection, session: sessions.StoredSession, turn: TurnRecord, bytes_max: int | None
) -> Sequence[TurnRecord] | None:
    """The path to a turn that is about to begin; None if it is too long to be read while other writes wait."""
    if session.turns_begun >= rules.SHORT_PATH_TURNS:
        return None
    bound, down, read = rules.PathBound(bytes_max), [turn], 0
    bound.takes(turn.message_bytes)
    deadline = time.thread_time() + SHORT_PATH_S
    for row in () if turn.parent is None else path_down(db, session.key, turn.parent):
        size = _bytes_in_prompts(db, turn.session_id, row)
        if not bound.takes(size):
            break
        read += size
        is_long = _is_in_pages(row) or sum([len(it) for it in row if isinstance(it, str)]) > SHORT_PATH_ROW_LENGTH
        if is_long or read > rules.SHORT_PATH_BYTES or time.thread_time() >= deadline:
            return None
        down.append(record_of(db, turn.session_id, row))
    return down[::-1]


def _bytes_in_prompts(db: apsw.Connection, session_id: str, row: Row) -> int:
    """The size of the turn of a row of :func:`path_down` in prompts."""
    if has_lost_items(row):
        return record_of(db, session_id, row).message_bytes
    size: int = row[-1]
    return size


def _is_in_pages(row: Row) -> bool:
    """Whether the texts of a turn's output are in pages: ``PATH_COLUMNS`` end with the key of such a turn."""
    return row[-3] is not None


def start(db: apsw.Connection, turn_id: str, fence: int, now: datetime) -> bool:
    """Start a queued turn. Returns whether the turn is this owner's, and so open."""
    values = {"now": moment(now), "turn": turn_id, "owner": fence}
    db.execute(f"UPDATE turns SET state = 'running', started_at = :now WHERE {_IS_OWN} AND state = 'queued'", values)
    return bool(db.changes()) or db.execute(f"SELECT 1 FROM turns WHERE {_IS_OWN}", values).fetchone() is not None


class StagedEvents(msgspec.Struct, frozen=True):
    """Staged events: those of a checkpoint or an end that is too large for one step, written by earlier steps.

    Staged events count when the last step is written. Until then a row in ``outputs`` marks the seq after which events
    are staged: readers ignore them, recovery removes them, and a later write in their place replaces them and the mark.
    """

    mark: str
    seq: int
    """The seq of the last one."""


def stage_events(
    db: apsw.Connection,
    session_id: str,
    turn_id: str,
    runs: Sequence[Run],
    text: str,
    *,
    staged: StagedEvents,
    after: int,
    fence: int,
) -> StagedEvents | None:
    """Stage the next events after those of ``staged``; None if the turn does not take them any more."""
    own = _own(db, session_id, turn_id, fence)
    if own is None:
        return None
    if staged.seq == after:
        db.execute("DELETE FROM outputs WHERE turn = ? AND after >= ?", (own.key, after))
        db.execute("INSERT INTO outputs (turn, after, items) VALUES (?, ?, ?)", (own.key, after, staged.mark))
    elif not _is_marked(db, own.key, after, staged):
        return None
    event_pages.keep(db, own.key, runs, text, after=staged.seq)
    return msgspec.structs.replace(staged, seq=last_seq(runs, staged.seq))


def checkpoint(
    db: apsw.Connection, checkpoints: Sequence[Checkpoint], staged: Sequence[StagedEvents | None], fence: int
) -> list[str]:
    """Keep checkpoints. Returns the turns that are not this owner's open turns."""
    lost: list[str] = []
    for it, part in zip(checkpoints, staged, strict=True):
        own = _own(db, it.session_id, it.turn_id, fence)
        if own is None:
            lost.append(it.turn_id)
            continue
        _keep_rest(db, own.key, it.runs, it.text, part, after=it.after)
        db.execute("DELETE FROM outputs WHERE turn = ? AND after >= ?", (own.key, it.after))
        if it.items:
            db.execute(
                "INSERT INTO outputs (turn, after, items) VALUES (?, ?, ?)", (own.key, it.after, as_json(it.items))
            )
        if it.left_out is not None:
            db.execute(_KEEP_LEFT_OUT, {"key": own.key, "left_out": as_json(it.left_out)})
        if it.usage is not None:
            db.execute(_KEEP_USAGE, {"key": own.key, "usage": as_json(it.usage)})
    return lost


def end(
    db: apsw.Connection,
    turn: TurnRecord,
    runs: Sequence[Run],
    staged: StagedEvents | None,
    *,
    terms: Collection[str] | None,
    after: int,
    fence: int,
    now: datetime,
) -> EndResult:
    own = _own(db, turn.session_id, turn.id, fence)
    if own is None:
        return rules.result_of_late_end(_find(db, turn.session_id, turn.id), turn)
    if not (turn.ephemeral or event_pages.fits_in_turn(turn, runs)):
        text = text_of(runs, [item.text for item in turn.output], after=after)
        _keep_rest(db, own.key, list(skip(runs, after)), text, staged, after=after)
    keep_end(db, own.key, turn, now, runs=runs, session=own.session, idle_timeout_s=own.idle_timeout_s, terms=terms)
    return EndResult.KEPT


def suspend(
    db: apsw.Connection,
    suspended: Sequence[SuspendedTurn],
    staged: Sequence[StagedEvents | None],
    *,
    fence: int,
    now: datetime,
) -> list[str]:
    """Suspend turns. Returns those that are neither this owner's open turns nor suspended already."""
    lost: list[str] = []
    released: dict[int, float] = {}
    for it, part in zip(suspended, staged, strict=True):
        turn = it.turn
        own = _own(db, turn.session_id, turn.id, fence)
        if own is None:
            if not suspensions.is_suspended(db, turn.id):
                lost.append(turn.id)
            continue
        text = text_of(it.runs, [item.text for item in turn.output], after=it.after)
        _keep_rest(db, own.key, list(skip(it.runs, it.after)), text, part, after=it.after)
        suspensions.keep(db, own.key, turn)
        released[own.session] = own.idle_timeout_s
    for session, idle_timeout_s in released.items():
        suspensions.release(db, session, now, idle_timeout_s=idle_timeout_s)
    return lost


def _find(db: apsw.Connection, session_id: str, turn_id: str) -> TurnRecord | None:
    """The turn, also if its session is marked as deleted or has expired."""
    row: Row | None = db.execute(_GET, (turn_id, _key(db, session_id))).fetchone()
    return None if row is None else record_of(db, session_id, row)


def get(
    db: apsw.Connection,
    session_id: str,
    turn_id: str,
    now: datetime,
    *,
    with_texts: bool = True,
    with_input: bool = True,
) -> TurnRecord:
    session = _visible(db, session_id, now)
    row = db.execute(_GET if with_input else _GET_WITHOUT_INPUT, (turn_id, session)).fetchone()
    if row is None:
        raise TurnNotFoundError(turn_id)
    return record_of(db, session_id, row, with_texts=with_texts)


def find_session_of(db: apsw.Connection, turn_id: str) -> str | None:
    """The id of a turn's session; None if there is no such turn, or its session is removed."""
    for (session,) in db.execute("SELECT session FROM shown_turns WHERE id = ?", (turn_id,)).fetchall():
        session_id: str | None = db.execute("SELECT id FROM sessions WHERE key = ?", (session,)).get
        if session_id is not None:
            return session_id
    return None


def list_page(
    db: apsw.Connection,
    session_id: str,
    *,
    limit: int,
    after: TurnPosition | None,
    now: datetime,
    bytes_max: int | None,
    parent: str | None | msgspec.UnsetType,
) -> Page[TurnRecord]:
    session = _visible(db, session_id, now)
    if isinstance(parent, str):
        key_of(db, parent, session)
    which = ("session = ?", session) if parent is msgspec.UNSET else (trees.CHILDREN, session, parent or "")
    found: list[Row] = db.execute(
        _SIZES.format(which=which[0]), (*which[1:], -1 if after is None else after.ordinal, limit + 1)
    ).fetchall()
    shown = [ordinal for ordinal, _ in found[: fitting((size for _, size in found[:limit]), bytes_max=bytes_max)]]
    rows = (row for ordinal in shown for row in db.execute(_AT, (session, ordinal)))
    cursors = tuple(encode_cursor(TurnPosition(ordinal)) for ordinal in shown)
    return Page(
        data=tuple(record_of(db, session_id, row) for row in rows),
        next=cursors[-1] if len(shown) < len(found) else None,
        cursors=cursors,
    )


def list_tree(
    db: apsw.Connection, session_id: str, *, limit: int, after: TurnPosition | None, now: datetime
) -> Page[TreeNode]:
    return trees.list_page(db, _visible(db, session_id, now), limit=limit, after=after)


def all_of(db: apsw.Connection, session_id: str, session: int) -> list[tuple[TurnRecord, list[Run]]]:
    """All turns of a session with their events, in the order of their acceptance."""
    rows: list[Row] = db.execute(
        f"SELECT {TURN_COLUMNS}, key FROM shown_turns WHERE session = ? ORDER BY ordinal", (session,)
    ).fetchall()
    return [(record_of(db, session_id, row), event_pages.runs_of(db, row[-1])) for row in rows]


def insert_ended(
    db: apsw.Connection,
    session: int,
    ordinal: int,
    turn: TurnRecord,
    runs: Sequence[Run],
    *,
    terms: Collection[str] | None,
    document: int | None = None,
) -> int:
    """Add a turn that has ended already. The caller updates the session's counters, and the places of siblings.

    Args:
        terms: The terms of the turn; None if they are to be cut and added later.
        document: The number of the turn among the documents of searches, if it had one in another store.

    Returns:
        The key of the turn.
    """
    values = values_of(turn) | event_pages.end_columns(turn, runs)
    key = _insert_ended(db, session, ordinal, turn, values)
    if not values["runs"]:
        text = text_of(runs, [item.text for item in turn.output])
        event_pages.keep(db, key, runs, text, after=0)
    documents.add_turn(db, key, session, terms, number=document)
    return key


def insert_suspended(db: apsw.Connection, session: int, ordinal: int, turn: TurnRecord, runs: Sequence[Run]) -> None:
    """Add a turn that is suspended already. The caller updates the session's counters, and the places of siblings."""
    values = values_of(turn) | {"session": session, "ordinal": ordinal, "owner": rules.NOBODY}
    key = _insert(db, turn, values)
    event_pages.keep(db, key, runs, text_of(runs, [item.text for item in turn.output]), after=0)
    suspensions.keep(db, key, turn)


def insert_copy(
    db: apsw.Connection, session: int, ordinal: int, turn: TurnRecord, *, source: int, terms: Collection[str]
) -> None:
    """Add a copy of an ended turn; ``source`` is the key of this turn, whose rows in other tables are not copied."""
    names = ("runs", "output_bytes", "text_length")
    row: Row = db.execute(f"SELECT {', '.join(names)} FROM turns WHERE key = ?", (source,)).fetchone()  # type: ignore[assignment]
    values = values_of(turn) | dict(zip(names, row, strict=True))
    if values["output_bytes"] is not None:
        values["output"] = as_json(rules.without_texts(turn.output))
    key = _insert_ended(db, session, ordinal, turn, values)
    documents.add_turn(db, key, session, terms)


def _insert_ended(db: apsw.Connection, session: int, ordinal: int, turn: TurnRecord, values: dict[str, object]) -> int:
    return _insert(db, turn, values | {"session": session, "ordinal": ordinal, "owner": None})


def _insert(db: apsw.Connection, turn: TurnRecord, values: dict[str, object]) -> int:
    """Insert the row of a turn. Returns its key."""
    db.execute(_INSERT, values)
    key = db.last_insert_rowid()
    if turn.events_deleted or turn.ephemeral:
        db.execute(_MARK, (key, turn.events_deleted, turn.ephemeral))
    return key


class PathWalk(ABC):
    """A path that is walked in short steps, from its last turn to the root: a session may have many thousands of turns.

    Each step sees its own snapshot. The turns of a path stay as they are unless turns or items of the session are
    deleted: then the walk begins anew. If the session is removed meanwhile, the path is empty.

    Attributes:
        is_complete: Whether the walk is over.
    """

    columns = PATH_COLUMNS

    def __init__(self, session_id: str, turn_id: str) -> None:
        self.is_complete = False
        self._session_id = session_id
        self._session: tuple[int, int, int] | None = None
        self.begin_at(turn_id)

    def begin_at(self, turn_id: str) -> None:
        """Set the last turn of the path, before the first step."""
        self._turn_id = turn_id
        self._next: tuple[str, int] = turn_id, _NEWEST

    def read_some(self, db: apsw.Connection) -> None:
        """Do one step. It ends after the row in which its time is over."""
        session: tuple[int, int, int] | None = db.execute(_IDENTITY, (self._session_id,)).fetchone()
        if session is None or (self._session is not None and self._session[:2] != session[:2]):
            self.is_complete = True
            self._drop()
            return
        if self._session not in (None, session):
            self._drop()
            self.begin_at(self._turn_id)
        self._session = session
        next_id, below = self._next
        deadline = time.monotonic() + STEP_S
        for row in path_down(db, session[0], next_id, self.columns, below=below):
            if not self._takes(db, row):
                break
            if row[1] is not None and time.monotonic() >= deadline:
                self._next = row[1], row[-2]
                return
        self.is_complete = True

    @abstractmethod
    def _takes(self, db: apsw.Connection, row: Row) -> bool:
        """Take the next row: ``columns``, then ordinal and message_bytes. Returns whether the walk goes on."""

    @abstractmethod
    def _drop(self) -> None:
        """Drop what was taken: the session was removed meanwhile, never existed, or has lost turns or items."""


class PathRead(PathWalk):
    """Reads the newest turns of a path. Thousands of turns may fit into a prompt."""

    def __init__(self, session_id: str, turn_id: str, bytes_max: int | None) -> None:
        super().__init__(session_id, turn_id)
        self._bytes_max = bytes_max
        self._bound = rules.PathBound(bytes_max)
        self._down: list[TurnRecord] = []

    @property
    def turns(self) -> list[TurnRecord]:
        """The turns so far, root first."""
        return self._down[::-1]

    def _takes(self, db: apsw.Connection, row: Row) -> bool:
        if not self._bound.takes(_bytes_in_prompts(db, self._session_id, row)):
            return False
        self._down.append(record_of(db, self._session_id, row))
        return True

    def _drop(self) -> None:
        self._bound = rules.PathBound(self._bytes_max)
        self._down.clear()


class PathMeasure(PathWalk):
    """Measures a path.

    Attributes:
        measured: The size of the turns so far in a prompt.
    """

    columns = "id, parent, iif(deleted_items IS NULL, message_items, NULL)"

    def __init__(self, session_id: str, turn_id: str) -> None:
        super().__init__(session_id, turn_id)
        self.measured = LeftOut()

    def _takes(self, db: apsw.Connection, row: Row) -> bool:
        this_id, _, message_items, _, message_bytes = row
        if message_items is None:  # an item was deleted, or the row is of schema 1, which had no counts
            assert self._session is not None
            read: Row = db.execute(_GET, (this_id, self._session[0])).fetchone()  # type: ignore[assignment]
            self.measured += record_of(db, self._session_id, read).in_prompts
        else:
            self.measured += LeftOut(message_items, message_bytes)
        return True

    def _drop(self) -> None:
        self.measured = LeftOut()


class PathSearch(PathWalk):
    """Finds turns on a path.

    Attributes:
        found: The ids of those that are found so far.
    """

    columns = "id, parent"

    def __init__(self, session_id: str, turn_id: str, among: Collection[str]) -> None:
        super().__init__(session_id, turn_id)
        self._among = frozenset(among)
        self.found: set[str] = set()

    def _takes(self, db: apsw.Connection, row: Row) -> bool:  # noqa: ARG002
        if row[0] in self._among:
            self.found.add(row[0])
        return len(self.found) < len(self._among)

    def _drop(self) -> None:
        self.found.clear()


class PathPage(PathWalk):
    """Reads the turns of a path from ``first`` on, as :meth:`~service.storage.store.Store.list_path` says.

    Attributes:
        turns: The turns, root first, once the walk is complete.
    """

    columns = "id, parent, key"

    def __init__(self, session_id: str, turn_id: str, *, limit: int, first: str | None, bytes_max: int | None) -> None:
        super().__init__(session_id, turn_id)
        self.turns: list[TurnRecord] = []
        self._first = first
        self._bytes_max = bytes_max
        self._has_first = first is None
        self._keys: deque[int] = deque(maxlen=limit)  # from the last turn to the first

    def read_some(self, db: apsw.Connection) -> None:
        super().read_some(db)
        if self.is_complete and self._has_first:
            self._keys.reverse()
            sizes = (db.execute(f"SELECT {_TURN_BYTES} FROM turns WHERE key = ?", (key,)).get for key in self._keys)
            shown = islice(self._keys, fitting(sizes, bytes_max=self._bytes_max, rows_min=2))
            query = f"SELECT {PATH_COLUMNS} FROM edited_turns WHERE key = ?"
            self.turns = [record_of(db, self._session_id, row) for key in shown for row in db.execute(query, (key,))]

    def _takes(self, db: apsw.Connection, row: Row) -> bool:  # noqa: ARG002
        self._keys.append(row[2])
        is_first: bool = row[0] == self._first
        self._has_first = self._has_first or is_first
        return not is_first

    def _drop(self) -> None:
        self._has_first = self._first is None
        self._keys.clear()


def path_down(
    db: apsw.Connection, session: int, turn_id: str, columns: str = PATH_COLUMNS, *, below: int = _NEWEST
) -> Iterator[Row]:
    """The rows of a path, from its last turn to the root: ``columns``, then ordinal and message_bytes.

    A turn's parent is usually the turn accepted before it, so one statement reads a whole run of turns; another
    statement continues at each jump. A parent that is not older than its child is ignored, because it could be a cycle.
    """
    next_id: str | None = turn_id
    while next_id is not None:
        ordinal: int | None = db.execute(
            "SELECT ordinal FROM shown_turns WHERE id = ? AND session = ?", (next_id, session)
        ).get
        if ordinal is None or ordinal >= below:
            return
        for row in db.execute(_DOWN_FROM.format(columns=columns), (session, ordinal)):
            if row[0] != next_id:
                break
            yield row
            next_id, below = row[1], row[-2]


def key_of(db: apsw.Connection, turn_id: str, session: int) -> int:
    """Raises: TurnNotFoundError: The session has no such turn."""
    key: int | None = db.execute("SELECT key FROM shown_turns WHERE id = ? AND session = ?", (turn_id, session)).get
    if key is None:
        raise TurnNotFoundError(turn_id)
    return key


class _Own(msgspec.Struct, frozen=True):
    """An open turn of this owner, and the fields of its session that the turn's end needs."""

    key: int
    session: int
    idle_timeout_s: float


def _own(db: apsw.Connection, session_id: str, turn_id: str, fence: int) -> _Own | None:
    turn: Row | None = db.execute(_OWN, (turn_id, fence)).fetchone()
    if turn is None:
        return None
    session: Row | None = db.execute(
        "SELECT idle_timeout_s FROM sessions WHERE key = ? AND id = ?", (turn[1], session_id)
    ).fetchone()
    return None if session is None else _Own(*turn, *session)


def _is_marked(db: apsw.Connection, turn: int, after: int, staged: StagedEvents) -> bool:
    query = "SELECT 1 FROM outputs WHERE turn = ? AND after = ? AND items = ?"
    return db.execute(query, (turn, after, staged.mark)).fetchone() is not None


def _keep_rest(
    db: apsw.Connection, turn: int, runs: Sequence[Run], text: str, staged: StagedEvents | None, *, after: int
) -> None:
    """Keep the events after ``after``, but not again those that are staged."""
    if staged is not None and _is_marked(db, turn, after, staged):
        runs = list(skip(runs, staged.seq, begins=after))
        text = text[len(text) - sum(run.length for run in runs) :]
        after = staged.seq
    event_pages.keep(db, turn, runs, text, after=after)


def _key(db: apsw.Connection, session_id: str) -> int | None:
    """The session of this id, also if it is marked as deleted or expired."""
    key: int | None = db.execute("SELECT key FROM sessions WHERE id = ?", (session_id,)).get
    return key


def _visible(db: apsw.Connection, session_id: str, now: datetime) -> int:
    key: int | None = db.execute(_VISIBLE, (session_id, moment(now))).get
    if key is None:
        raise SessionNotFoundError(session_id)
    return key
