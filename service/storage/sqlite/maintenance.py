"""The maintenance commands of an operator, which work while a service uses the file.

All functions block: they are for a command line, not for an event loop.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from shlex import quote

import apsw

from service.errors import SessionNotFoundError, StartupError
from service.storage.pieces import Run
from service.storage.records import SessionRecord, TurnRecord
from service.storage.search import terms_at_once
from service.storage.sqlite import database, documents, sessions, trees, turns
from service.storage.sqlite.database import BackupProgress
from service.storage.sqlite.faults import fault_of
from service.storage.sqlite.open_files import OpenFiles
from service.storage.sqlite.ownership import Ownership
from service.storage.sqlite.reclaim import reclaim_some, shrink
from service.storage.sqlite.schema import SCRIPTS

_MB = 1_000_000
_PAGES_A_STEP = 256
_TURNS_AT_ONCE = 50
_BYTES_AT_ONCE = 128 * 1024
"""The turns, and the bytes of their texts, that one step of an import adds."""
_PAUSE_S = 0.002
"""The pause after a step of an import: longer than a process waits until it looks at a lock again."""
_INCREMENTAL = 2
"""The value of ``PRAGMA auto_vacuum`` for a file that can give pages back step by step."""

_LOST_HEADS = (
    "SELECT sessions.id, head FROM sessions WHERE deletion = 0 AND head IS NOT NULL "
    "AND NOT EXISTS (SELECT 1 FROM shown_turns WHERE shown_turns.id = head AND session = sessions.key)"
)
_LOST_PARENTS = (
    "SELECT sessions.id, it.id, parent FROM sessions JOIN shown_turns AS it ON session = sessions.key "
    "WHERE deletion = 0 AND parent IS NOT NULL AND NOT EXISTS (SELECT 1 FROM shown_turns AS before "
    "WHERE before.id = it.parent AND before.session = it.session AND before.ordinal < it.ordinal)"
)
_PLACES = (
    "SELECT session, coalesce(parent, '') AS parent, ordinal, "
    "row_number() OVER (PARTITION BY session, coalesce(parent, '') ORDER BY ordinal) AS place, "
    "count(*) OVER (PARTITION BY session, coalesce(parent, '')) AS count FROM shown_turns"
)
_WRONG_PLACES = (
    "SELECT DISTINCT sessions.id, parent FROM ("
    f"SELECT session, parent FROM ({_PLACES}) AS found LEFT JOIN siblings USING (session, parent, ordinal) "
    "WHERE siblings.place IS NOT found.place AND (count > 1 OR siblings.place IS NOT NULL) "
    "UNION ALL SELECT session, parent FROM siblings WHERE NOT EXISTS (SELECT 1 FROM turns "
    "WHERE turns.session = siblings.session AND turns.ordinal = siblings.ordinal)"
    ") JOIN sessions ON session = sessions.key WHERE deletion = 0"
)
_IS_INDEXED = "NOT EXISTS (SELECT 1 FROM unindexed WHERE kind = '{kind}')"
_NOT_SEARCHED = (
    "SELECT sessions.id, it.id FROM shown_turns AS it JOIN sessions ON sessions.key = session WHERE deletion = 0 "
    "AND it.owner IS NULL AND NOT EXISTS (SELECT 1 FROM documents WHERE turn = it.key) "
    f"AND {_IS_INDEXED.format(kind='turns')}"
)
_TITLES_NOT_SEARCHED = (
    "SELECT id FROM sessions JOIN session_settings ON session = sessions.key WHERE deletion = 0 AND title IS NOT NULL "
    "AND NOT EXISTS (SELECT 1 FROM documents WHERE documents.session = sessions.key AND turn IS NULL) "
    f"AND {_IS_INDEXED.format(kind='sessions')}"
)
_LOST_DOCUMENTS = (
    "SELECT key FROM documents WHERE NOT EXISTS (SELECT 1 FROM search_docsize WHERE id = documents.key) "
    "AND NOT EXISTS (SELECT 1 FROM unindexed WHERE kind = 'document' AND unindexed.key = documents.key)"
)


def vacuum(path: Path) -> int:
    """Reclaim removed rows and give all free pages back, in short steps. Returns the bytes that the disk has back.

    Raises:
        StartupError: The file is not a store's, cannot give pages back, or the disk refuses.
    """
    given_back = 0
    with opened(path) as db:
        for step in (reclaim_some, documents.merge_some, partial(shrink, pages=_PAGES_A_STEP)):
            more = True
            while more:
                with database.transaction(db):
                    before = db.pragma("page_count")
                    more = step(db)
                    given_back += before - db.pragma("page_count")
                db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        if db.pragma("freelist_count") and db.pragma("auto_vacuum") != _INCREMENTAL:
            raise StartupError(
                f"{path} keeps its free space for later writes: it was rebuilt without auto_vacuum. To give it "
                f"back, stop the service and run: sqlite3 {quote(str(path))} 'PRAGMA auto_vacuum = INCREMENTAL; VACUUM'"
            )
        return max(given_back, 0) * int(db.pragma("page_size"))


def backup(path: Path, copy: Path, *, on_progress: Callable[[BackupProgress], None] | None = None) -> None:
    """Write a consistent copy; a service may write to the original meanwhile.

    Until the copy is whole, the store's log grows with every write. So that this never fills the disk of a service, the
    backup gives up when the log has taken half of the space that its disk had left.

    Args:
        on_progress: Called after each step of about a MiB.

    Raises:
        StartupError: The file is not a store's, the copy exists already, there is no space, or the disk refuses.
    """
    exists_already = StartupError(f"{copy} exists already; name another file for the copy.")

    if os.path.lexists(copy):
        raise exists_already
    with opened(path) as db:
        try:
            _check_space(copy, db.pragma("page_count") * db.pragma("page_size"))
            database.back_up(path, copy, on_progress=_giving_up(path, on_progress))
        except FileExistsError:
            raise exists_already from None
        except apsw.FullError as error:
            raise StartupError(f"{copy} cannot be written: its disk is full. No part of it is kept.") from error
        except apsw.Error as error:
            raise StartupError(f"{path} cannot be copied to {copy}: {fault_of(error)[0]}.") from error
        except OSError as error:
            raise StartupError(f"{copy} cannot be written: {error.strerror}.") from error


def _giving_up(path: Path, on_progress: Callable[[BackupProgress], None] | None) -> Callable[[BackupProgress], None]:
    """Return ``on_progress`` with a check before it. Raises: StartupError, if the log takes too much of its disk."""
    log_bytes: int | None = None

    def check(progress: BackupProgress) -> None:
        nonlocal log_bytes
        log_bytes = progress.log_bytes if log_bytes is None else log_bytes
        grown, free = progress.log_bytes - log_bytes, _free_bytes(path.parent)
        if grown > free:
            raise StartupError(
                f"{path.name}-wal has grown by {grown // _MB} MB since the backup began, and the disk of {path} has "
                f"{free // _MB} MB left: no copy is made, so that the disk does not get full. Free some space, or try "
                "again when less is written."
            )
        if on_progress is not None:
            on_progress(progress)

    return check


def _check_space(copy: Path, size: int) -> None:
    """Raises: StartupError: The disk has no space for a copy of this size."""
    free = _free_bytes(copy.parent)
    if free < size:
        raise StartupError(
            f"{copy} cannot be written: the copy needs {size // _MB + 1} MB, and its disk has {free // _MB} MB left."
        )


def _free_bytes(folder: Path) -> int:
    """The space that the disk of a folder has for files of this user. Raises: OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def check(path: Path) -> list[str]:
    """Check the whole file. Returns the faults; none if the file is whole.

    Raises:
        StartupError: The file is not a store's.
    """
    with opened(path) as db:
        problems = [str(row[0]) for row in db.execute("PRAGMA integrity_check")]
        problems += [f"{row[0]} row {row[1]} has lost its {row[2]}" for row in db.execute("PRAGMA foreign_key_check")]
        problems += [
            f"session {row[0]!r}: the head {row[1]!r} is not one of its turns" for row in db.execute(_LOST_HEADS)
        ]
        problems += [
            f"session {row[0]!r}: the parent {row[2]!r} of turn {row[1]!r} is not a turn before it"
            for row in db.execute(_LOST_PARENTS)
        ]
        problems += [
            f"session {row[0]!r}: the places of the turns with the parent {row[1]!r} are wrong"
            for row in db.execute(_WRONG_PLACES)
        ]
        problems += [f"session {row[0]!r}: turn {row[1]!r} is not searched" for row in db.execute(_NOT_SEARCHED)]
        problems += [f"session {row[0]!r}: the title is not searched" for row in db.execute(_TITLES_NOT_SEARCHED)]
        problems += [f"document {row[0]} has no terms in the search index" for row in db.execute(_LOST_DOCUMENTS)]
    return [problem for problem in problems if problem != "ok"]


def export_session(path: Path, session_id: str) -> tuple[SessionRecord, list[tuple[TurnRecord, list[Run]]]]:
    """A session with its turns and their events.

    Raises:
        StartupError: The file is not a store's.
        SessionNotFoundError: The session does not exist. (An expired session exists until its rows are removed.)
    """
    with opened(path) as db:
        db.execute("BEGIN")  # one moment
        kept = sessions.find(db, session_id)
        if kept is None or kept.deletion or kept.record.ephemeral:
            raise SessionNotFoundError(session_id)
        exported = turns.all_of(db, session_id, kept.key)
        db.execute("COMMIT")
    return kept.record, exported


def import_session(
    path: Path, session: SessionRecord, ended: Sequence[tuple[TurnRecord, Sequence[Run]]], *, now: datetime
) -> None:
    """Add an exported session under its own id. An expired session of this id is replaced.

    The session is built hidden, in short steps between the writes of a service, and shown by the last step. If this
    process dies before that, the service removes the session. Makes the store if it does not exist.

    Args:
        ended: The turns, all of which have ended, with their events.

    Raises:
        StartupError: The file is not a store's; or it was deleted or replaced, and a service still serves it.
        SessionExistsError
    """
    make_store(path)
    with opened(path) as db, _owner(db, path) as fence:
        hidden_id = sessions.hidden_id_for(session.id)
        with database.transaction(db):
            sessions.find_expired(db, session.id, now)
            key = sessions.insert_hidden(db, session, hidden_id, turns_begun=len(ended), fence=fence)
        try:
            ordinal = 0
            for some in _imported_at_once(ended):
                cut = documents.within_a_step([terms_at_once(turn) for turn, _ in some])
                with database.transaction(db):
                    for (turn, runs), terms in zip(some, cut, strict=True):
                        trees.add_sibling(db, key, turn.parent, ordinal)
                        turns.insert_ended(db, key, ordinal, turn, runs, terms=terms)
                        ordinal += 1
                _let_others_write()
            with database.transaction(db):
                sessions.make_room(db, session.id, now)
                sessions.show(db, key, session.id)
        except BaseException:
            with database.transaction(db):
                sessions.remove_deleted(db, hidden_id)
            raise


def _let_others_write() -> None:
    """Pause, so that a service that waits for the lock gets it."""
    time.sleep(_PAUSE_S)


def _imported_at_once(
    ended: Sequence[tuple[TurnRecord, Sequence[Run]]],
) -> Iterator[Sequence[tuple[TurnRecord, Sequence[Run]]]]:
    """The turns, parted so that each part is added in milliseconds, unless a single turn is large."""
    some: list[tuple[TurnRecord, Sequence[Run]]] = []
    size = 0
    for turn, runs in ended:
        size += turn.text_bytes
        if some and (len(some) == _TURNS_AT_ONCE or size > _BYTES_AT_ONCE):
            yield some
            some, size = [], turn.text_bytes
        some.append((turn, runs))
    if some:
        yield some


@contextmanager
def _owner(db: apsw.Connection, path: Path) -> Iterator[int]:
    """Own what is built hidden: services leave it alone while this process lives. Gives the owner's fence."""
    ownership = Ownership(path.with_name(f"{path.name}-owners"))
    try:
        try:
            ownership.open()
            with database.transaction(db):
                ownership.begin(db, address=None, opened_at=time.time_ns() // 1000)
        except OSError as error:
            raise database.startup_error(path, error) from error
        yield ownership.fence
        with database.transaction(db):  # if not, a recovery looks for what is left, and removes the row, too
            db.execute("DELETE FROM owners WHERE fence = ?", (ownership.fence,))
    finally:
        ownership.close()


def make_store(path: Path) -> None:
    """Make a store if there is none. Raises: StartupError."""
    files = OpenFiles(path)
    try:
        files.refuse_others()
        if path.exists() and path.stat().st_size > 0:
            return
        database.create_file(path)
        with closing(database.connect(path)) as db:
            database.prepare(db, path, ownership=Ownership(path.with_name(f"{path.name}-owners")))
    except (apsw.Error, OSError) as error:
        raise database.startup_error(path, error) from error
    finally:
        files.close()


def bring_up(path: Path) -> tuple[int, int]:
    """Bring the schema of a store up, and make a store if there is none. Returns its version before and now.

    Raises:
        StartupError: The file is not a store's, or a service of an older version uses it.
    """
    is_there = path.exists() and path.stat().st_size > 0
    make_store(path)
    files = OpenFiles(path)
    ownership = Ownership(path.with_name(f"{path.name}-owners"))
    try:
        files.refuse_others()
        ownership.open()  # which tells whether another process uses the file
        with closing(database.connect(path)) as db:
            before = database.version_of(db, path) if is_there else 0
            database.prepare(db, path, ownership=ownership)
            return before, database.version_of(db, path)
    except (apsw.Error, OSError) as error:
        raise database.startup_error(path, error) from error
    finally:
        ownership.close()
        files.close()


@contextmanager
def opened(path: Path) -> Iterator[apsw.Connection]:
    """A connection to an existing store file with the newest schema."""
    if not path.is_file():
        raise StartupError(f"{path} is not there.")
    if path.stat().st_size == 0:
        raise StartupError(f"{path} is empty: it is not a store.")
    try:
        db = database.connect(path)
        try:
            if database.version_of(db, path) < len(SCRIPTS):
                raise StartupError(
                    f"{path} was written by an older version; starting the service brings it up to date."
                )
            yield db
        finally:
            db.close()
    except apsw.Error as error:
        raise database.startup_error(path, error) from error
