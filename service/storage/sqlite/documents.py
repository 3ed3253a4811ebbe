"""The index of titles and turns: its rows change in the transactions that change what they index.

The index has no texts: FTS5 keeps, for each term, the numbers of the documents that have it. Each document has further
terms, marks that no text contains: its session, the owner of the session, and its block.

FTS5 writes a part of the index with each commit that adds terms, and merges the parts later: one document alone costs
several times as much as one of many. So the end of a turn gives a number only, and the document waits in the table
``unindexed`` until the housekeeping adds the terms of all that wait. Searches look into these documents themselves. No
step adds very many terms: a longer turn waits, too.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import apsw
import msgspec

from service.steps import at_once
from service.storage.terms import document_terms

WAITING_MAX = 64
"""So many documents that wait are indexed at once; fewer ones some time later. A search looks into each of them."""
LOOKED_AT_BYTES_MAX = 128 * 1024
"""The longest turn that waits and that searches look into, in bytes of its row: searches are partial while a longer one
waits. No turn whose end leaves it to the housekeeping is as long."""

STEP_TERMS_MAX = 8 * 1024
"""The terms that one step of a caller adds, which takes some 3 ms with the commit."""
STEP_BYTES_MAX = 12 * 1024
"""The messages whose terms one step cuts and adds, in bytes. They have no more terms than :data:`STEP_TERMS_MAX`."""

SEGMENTS_MAX = 16
"""The commits after which the parts of the index that they added are merged, so that a query reads few of them."""
_MERGED_PAGES = 64
"""The pages of the index that are merged in one step, which takes some milliseconds."""

_TITLE = "SELECT key FROM documents WHERE session = ? AND turn IS NULL"

BLOCK_BITS = 17
"""FTS5 cannot be interrupted: a query for several terms asks for a block of documents at a time. So many documents take
up to some 14 ms, as the beginning of a query for 16 terms does; a further block costs a query about 1 to 3 ms."""
# Characters for private use: no word has one.
_SESSION = "\ue000"
_OWNER = "\ue001"
_BLOCK = "\ue002"


def within_a_step(terms: Iterable[Collection[str]]) -> Iterator[Collection[str] | None]:
    """The terms of turns that one step adds; None in place of those that are too many for it."""
    left = STEP_TERMS_MAX
    for of_turn in terms:
        fit = len(of_turn) <= left
        left -= len(of_turn) if fit else 0
        yield of_turn if fit else None


def add_turn(
    db: apsw.Connection, turn: int, session: int, terms: Collection[str] | None, *, number: int | None = None
) -> None:
    """Index an ended turn, by its key and that of its session. It is not indexed yet.

    Args:
        terms: None if they are to be added later.
        number: The number of the document in another store from which it comes; None for a new one.
    """
    db.execute("INSERT INTO documents (key, session, turn) VALUES (?, ?, ?)", (number, session, turn))
    _add(db, db.last_insert_rowid(), session, terms)


def _add(db: apsw.Connection, number: int, session: int, terms: Collection[str] | None) -> None:
    if terms is None or len(terms) > STEP_TERMS_MAX:
        db.execute("INSERT INTO unindexed (kind, key) VALUES ('document', ?)", (number,))
    else:
        _insert(db, number, session, terms)


def add_waiting(db: apsw.Connection, number: int, session: int, terms: Iterable[str]) -> None:
    """Add the terms of a document that waits for it. Those of higher numbers come later: so FTS5 writes one part."""
    db.execute("DELETE FROM unindexed WHERE kind = 'document' AND key = ?", (number,))
    _insert(db, number, session, terms)


class OldDocument(msgspec.Struct, frozen=True):
    """A title (``turn`` is None) or an ended turn of an earlier version, by the keys."""

    session: int
    turn: int | None
    terms: Collection[str]


def add_old(db: apsw.Connection, found: Sequence[OldDocument]) -> None:
    """Index documents of an earlier version, the newest first: as documents that are older than all others."""
    lowest: int = db.execute("SELECT min(coalesce((SELECT min(key) FROM documents), 0), 0)").get
    # In the order of their numbers: FTS5 writes a part of the index for each number that is lower than the one before.
    for number, it in zip(range(lowest - len(found), lowest), reversed(found), strict=True):
        db.execute("INSERT INTO documents (key, session, turn) VALUES (?, ?, ?)", (number, it.session, it.turn))
        _insert(db, number, it.session, it.terms)


def has_turn(db: apsw.Connection, turn: int) -> bool:
    return _number_of(db, turn) is not None


def has_title(db: apsw.Connection, session: int) -> bool:
    return db.execute(_TITLE, (session,)).fetchone() is not None


def change_turn(db: apsw.Connection, turn: int, session: int, terms: Collection[str]) -> None:
    """Index an ended turn whose texts have changed. It keeps its place among the documents, if it has one."""
    number = _number_of(db, turn)
    if number is None:
        add_turn(db, turn, session, terms)
    else:
        _take_out(db, number)
        _add(db, number, session, terms)


def forget_turn(db: apsw.Connection, turn: int) -> None:
    """Remove a turn from the index, if it is there."""
    _forget(db, _number_of(db, turn))


def set_title(db: apsw.Connection, session: int, title: str | None) -> None:
    """Index the title of a session in place of the title before."""
    forget_title(db, session)
    if title is not None:
        add_title(db, session, title)


def add_title(db: apsw.Connection, session: int, title: str, *, number: int | None = None) -> None:
    """Index the title of a session that has no title in the index; ``number`` as in :func:`add_turn`."""
    db.execute("INSERT INTO documents (key, session) VALUES (?, ?)", (number, session))
    _insert(db, db.last_insert_rowid(), session, at_once(document_terms((title,))))


def forget_title(db: apsw.Connection, session: int) -> None:
    """Remove a title from the index, if it is there."""
    _forget(db, db.execute(_TITLE, (session,)).get)


def _forget(db: apsw.Connection, number: int | None) -> None:
    if number is not None:
        _take_out(db, number)
        db.execute("DELETE FROM documents WHERE key = ?", (number,))


def _take_out(db: apsw.Connection, number: int) -> None:
    """Remove the terms of a document, or let it wait for them no more."""
    db.execute("DELETE FROM search WHERE rowid = ?", (number,))
    db.execute("DELETE FROM unindexed WHERE kind = 'document' AND key = ?", (number,))


def _number_of(db: apsw.Connection, turn: int) -> int | None:
    number: int | None = db.execute("SELECT key FROM documents WHERE turn = ?", (turn,)).get
    return number


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
