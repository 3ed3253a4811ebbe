"""The index of titles and turns: its rows change in the transactions that change what they index.

The index has no texts: FTS5 keeps, for each term, the numbers of the documents that have it. Each document has further
terms, marks that no text contains: its session, the owner of the session, and its block.
"""

from collections.abc import Collection, Iterable

import apsw

from service.steps import at_once
from service.storage.records import TurnRecord
from service.storage.search import searched_texts
from service.storage.terms import document_terms

SEGMENTS_MAX = 16
"""The commits after which the parts of the index that they added are merged, so that a query reads few of them."""
_MERGED_PAGES = 64
"""The pages of the index that are merged in one step, which takes some milliseconds."""

_TITLE = "SELECT key FROM documents WHERE session = ? AND turn IS NULL"

BLOCK_BITS = 18
"""FTS5 cannot be interrupted: a query for several terms asks for a block of documents at a time."""
# Characters for private use: no word has one.
_SESSION = "\ue000"
_OWNER = "\ue001"
_BLOCK = "\ue002"


def terms_of_turn(turn: TurnRecord) -> Collection[str]:
    """The terms of a turn, cut in the thread of the caller."""
    return at_once(document_terms(searched_texts(turn)))


def add_turn(db: apsw.Connection, turn: int, session: int, terms: Iterable[str]) -> None:
    """Index an ended turn, by its key and that of its session. It is not indexed yet."""
    db.execute("INSERT INTO documents (session, turn) VALUES (?, ?)", (session, turn))
    _insert(db, db.last_insert_rowid(), session, terms)


def add_old_turn(db: apsw.Connection, turn: int, session: int, terms: Iterable[str]) -> None:
    """Index a turn of an earlier version: as a document that is older than all others."""
    _insert(db, _number_of_old(db, session, turn), session, terms)


def add_old_title(db: apsw.Connection, session: int, title: str) -> None:
    """Index a title of an earlier version: as a document that is older than all others."""
    _insert(db, _number_of_old(db, session, None), session, at_once(document_terms((title,))))


def _number_of_old(db: apsw.Connection, session: int, turn: int | None) -> int:
    db.execute(
        "INSERT INTO documents (key, session, turn) "
        "VALUES (min(coalesce((SELECT min(key) FROM documents), 0), 0) - 1, ?, ?)",
        (session, turn),
    )
    return db.last_insert_rowid()


def has_turn(db: apsw.Connection, turn: int) -> bool:
    return db.execute("SELECT 1 FROM documents WHERE turn = ?", (turn,)).fetchone() is not None


def has_title(db: apsw.Connection, session: int) -> bool:
    return db.execute(_TITLE, (session,)).fetchone() is not None


def change_turn(db: apsw.Connection, turn: int, session: int, terms: Iterable[str]) -> None:
    """Index an ended turn whose texts have changed. It keeps its place among the documents, if it has one."""
    number: int | None = db.execute("SELECT key FROM documents WHERE turn = ?", (turn,)).get
    if number is None:
        add_turn(db, turn, session, terms)
    else:
        db.execute("DELETE FROM search WHERE rowid = ?", (number,))
        _insert(db, number, session, terms)


def forget_turn(db: apsw.Connection, turn: int) -> None:
    """Remove a turn from the index, if it is there."""
    _forget(db, db.execute("SELECT key FROM documents WHERE turn = ?", (turn,)).get)


def set_title(db: apsw.Connection, session: int, title: str | None) -> None:
    """Index the title of a session in place of the title before."""
    forget_title(db, session)
    if title is not None:
        db.execute("INSERT INTO documents (session) VALUES (?)", (session,))
        _insert(db, db.last_insert_rowid(), session, at_once(document_terms((title,))))


def forget_title(db: apsw.Connection, session: int) -> None:
    """Remove a title from the index, if it is there."""
    _forget(db, db.execute(_TITLE, (session,)).get)


def _forget(db: apsw.Connection, number: int | None) -> None:
    if number is not None:
        db.execute("DELETE FROM search WHERE rowid = ?", (number,))
        db.execute("DELETE FROM documents WHERE key = ?", (number,))


def _insert(db: apsw.Connection, number: int, session: int, terms: Iterable[str]) -> None:
    owner: str = db.execute("SELECT owner_name FROM sessions WHERE key = ?", (session,)).get
    marks = (session_term(session), owner_term(owner), block_term(number >> BLOCK_BITS))
    db.execute("INSERT INTO search (rowid, terms) VALUES (?, ?)", (number, " ".join((*terms, *marks))))


def session_term(session: int) -> str:
    return f"{_SESSION}{session}"


def block_term(block: int) -> str:
    return f"{_BLOCK}{block}".replace("-", "n")  # FTS5 would cut a term at a sign


def owner_term(owner: str) -> str:
    """The mark of all documents of an owner; of those without an owner, if the name is empty."""
    return f"{_OWNER}{owner.encode().hex()}"


def merge_some(db: apsw.Connection) -> bool:
    """Merge some parts of the index, within a transaction. False once there is nothing to merge."""
    before = db.total_changes()
    db.execute("INSERT INTO search (search, rank) VALUES ('merge', ?)", (_MERGED_PAGES,))
    return db.total_changes() - before > 1  # FTS5 says it so
