"""What an operator does with the file, beside a service that may be running on it.

Everything here blocks: it is for a command line, not for an event loop.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import msgspec

from service.errors import SessionExistsError, SessionNotFoundError, StartupError
from service.storage.records import SessionRecord, TurnRecord
from service.storage.sqlite import database, sessions, turns
from service.storage.sqlite.reclaim import reclaim_some, shrink
from service.storage.sqlite.schema import SCRIPTS

FORMAT = 1
"""Of an exported session."""

_PAGES_A_STEP = 256


class ExportedTurn(msgspec.Struct, frozen=True):
    """A turn and its encoded events, each the text of an SSE frame."""

    turn: TurnRecord
    events: tuple[str, ...]


class ExportedSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session whole: ``{"format": 1, "session": {"id": …}, "turns": [{"turn": {…}, "events": ["id: 1…"]}]}``."""

    format: int = FORMAT
    session: SessionRecord
    turns: tuple[ExportedTurn, ...]


def vacuum(path: Path) -> int:
    """Reclaim what is removed and give all free pages back, in short steps; how many bytes the file got smaller.

    Raises:
        StartupError: The file is not a store's, or the disk refuses.
    """
    with _opened(path) as db:
        before = path.stat().st_size
        more = True
        while more:
            with _transaction(db):
                more = reclaim_some(db)
        while db.pragma("freelist_count"):
            shrink(db, _PAGES_A_STEP)
            db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        return before - path.stat().st_size


def backup(path: Path, copy: Path) -> None:
    """Write a consistent copy; a service may write to the original meanwhile.

    Raises:
        StartupError: The file is not a store's, the copy is there already, or the disk refuses.
    """
    if copy.exists():
        raise StartupError(f"{copy} is there already; name another file for the copy.")
    with _opened(path):
        try:
            database.back_up(path, copy)
        except OSError as error:
            raise StartupError(f"{copy} cannot be written: {error.strerror}.") from error


def check(path: Path) -> list[str]:
    """Look through the whole file; what is wrong with it, nothing if it is whole.

    Raises:
        StartupError: The file is not a store's.
    """
    with _opened(path) as db:
        problems = [str(row[0]) for row in db.execute("PRAGMA integrity_check")]
        problems += [f"{row[0]} row {row[1]} has lost its {row[2]}" for row in db.execute("PRAGMA foreign_key_check")]
    return [problem for problem in problems if problem != "ok"]


def export_session(path: Path, session_id: str) -> bytes:
    """A session with its turns and events, as JSON.

    Raises:
        StartupError: The file is not a store's.
        SessionNotFoundError: It is not there. One that has expired is, until its rows are removed.
    """
    with _opened(path) as db:
        db.execute("BEGIN")  # one moment
        kept = sessions.find(db, session_id)
        if kept is None or kept.deletion:
            raise SessionNotFoundError(session_id)
        exported = tuple(
            ExportedTurn(turn, tuple(event.decode() for event in turns.read_events(db, session_id, turn.id)))
            for turn in turns.all_of(db, session_id, kept.key)
        )
        db.execute("COMMIT")
    return msgspec.json.encode(ExportedSession(session=kept.record, turns=exported))


def import_session(path: Path, exported: bytes) -> str:
    """Add an exported session under its own id, which it returns. Turns that were open are left out.

    Raises:
        StartupError: The file is not a store's, or ``exported`` is not of a format that is known here.
        SessionExistsError
    """
    try:
        whole = msgspec.json.decode(exported, type=ExportedSession)
    except msgspec.MsgspecError as error:
        raise StartupError(f"This is not an exported session: {error}.") from None
    if whole.format != FORMAT:
        raise StartupError(f"This session was exported in format {whole.format}; this version knows {FORMAT}.")
    ended = [it for it in whole.turns if not it.turn.is_open]
    ids = [it.turn.id for it in ended]
    session = whole.session
    if session.head not in ids:
        session = msgspec.structs.replace(session, head=ids[-1] if ids else None)
    with _opened(path) as db, _transaction(db):
        if sessions.find(db, session.id) is not None:
            raise SessionExistsError(session.id)
        key = sessions.insert(db, session, turns_begun=len(ended))
        for ordinal, it in enumerate(ended):
            turns.insert_ended(db, key, ordinal, it.turn, [event.encode() for event in it.events])
    return whole.session.id


@contextmanager
def _opened(path: Path) -> Iterator[apsw.Connection]:
    """A connection to a store's file that is there and has the newest schema."""
    if not path.is_file():
        raise StartupError(f"{path} is not there.")
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


@contextmanager
def _transaction(db: apsw.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
