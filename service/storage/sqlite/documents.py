"""The index of titles and turns: its rows change in the transactions that change what they index.

The index has no texts: FTS5 keeps, for each term, the numbers of the documents that have it. Each document has further
terms, marks that no text contains: its session, the owner of the session, and its block.

FTS5 writes a document at once, within the step and the commit that add it. So a step adds few terms only. A turn with
more has its number from its end on, and waits in the table ``unindexed`` until the housekeeping adds its terms.
"""

from collections.abc import Collection, Iterable, Iterator

import apsw

from service.steps import at_once
from service.storage.records import TurnRecord
from service.storage.search import searched_texts
from service.storage.terms import document_terms

STEP_TERMS_MAX = 8 * 1024
"""The terms that one step of a caller adds, which takes some 3 ms with the commit."""
STEP_BYTES_MAX = 12 * 1024
"""The messages whose terms one step cuts and adds, in bytes. They have no more terms than :data:`STEP_TERMS_MAX`."""

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


def within_a_step(terms: Iterable[Collection[str]]) -> Iterator[Collection[str] | None]:
    """The terms of turns that one step adds; None in place of those that are too many for it."""
    left = STEP_TERMS_MAX
    for of_turn in terms:
        fit = len(of_turn) <= left
        left -= len(of_turn) if fit else 0
        yield of_turn if fit else None


def add_turn(db: apsw.Connection, turn: int, session: int, terms: Collection[str] | None) -> None:
    """Index an ended turn, by its key and that of its session. It is not indexed yet.

    Args:
        terms: None if they are to be added later, as those of a turn with very many.
    """
    db.execute("INSERT INTO documents (session, turn) VALUES (?, ?)", (session, turn))
    _add(db, db.last_insert_rowid(), session, turn, terms)


def _add(db: apsw.Connection, number: int, session: int, turn: int, terms: Collection[str] | None) -> None:
    if terms is None or len(terms) > STEP_TERMS_MAX:
        db.execute("INSERT OR IGNORE INTO unindexed (kind, key) VALUES ('turn', ?)", (turn,))
    else:
        _insert(db, number, session, terms)


def add_waiting_turn(db: apsw.Connection, turn: int, session: int, terms: Iterable[str]) -> None:
    """Add the terms of a turn that waits for it."""
    _wait_no_more(db, turn)
    _insert(db, db.execute("SELECT key FROM documents WHERE turn = ?", (turn,)).get, session, terms)


def _wait_no_more(db: apsw.Connection, turn: int) -> None:
    db.execute("DELETE FROM unindexed WHERE kind = 'turn' AND key = ?", (turn,))


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


def change_turn(db: apsw.Connection, turn: int, session: int, terms: Collection[str]) -> None:
    """Index an ended turn whose texts have changed. It keeps its place among the documents, if it has one."""
    number: int | None = db.execute("SELECT key FROM documents WHERE turn = ?", (turn,)).get
    if number is None:
        add_turn(db, turn, session, terms)
    else:
        db.execute("DELETE FROM search WHERE rowid = ?", (number,))
        _wait_no_more(db, turn)
        _add(db, number, session, turn, terms)


def forget_turn(db: apsw.Connection, turn: int) -> None:
    """Remove a turn from the index, if it is there."""
    _wait_no_more(db, turn)
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
