"""The index of titles and turns: its rows change in the transactions that change what they index.

A document has the terms of its texts, not the texts. Its first terms are marks that no text contains: the blocks of its
number, the owner of its session, and the session. A GIN index lists the documents of each term, and finds those that
are in several lists fast; but it gives all of them, in no order. So a query asks for one block at a time, the newest
one first (:mod:`service.storage.postgres.search`), by the mark of the block.
"""

from collections.abc import Collection, Iterable, Sequence

from service.steps import at_once
from service.storage.postgres.connections import Db
from service.storage.terms import document_terms

LEVELS = (12, 15, 18)
"""The sizes of the blocks, as powers of two: a query for rare terms goes from a small block to larger ones."""
# Characters for private use: no word has one.
_SESSION = "\ue000"
_OWNER = "\ue001"
_BLOCKS = ("\ue002", "\ue003", "\ue004")
_MARKS = len(LEVELS) + 2

_BLOCK_MARKS = ", ".join(f"'{mark}' || (number >> {bits})" for mark, bits in zip(_BLOCKS, LEVELS, strict=True))


def _insert(
    rows: str,
    *,
    session: str = "%(session)s",
    number: str = "nextval('{s}.documents_key_seq')",
    each: str = "turn, terms",
) -> str:
    """The statement that adds documents.

    Args:
        rows: A query of their columns ``turn`` and ``terms``, or of those in ``each``.
        session: The key of their session.
        number: The number of each.
    """
    return (
        "INSERT INTO {s}.documents (key, session, turn, terms) OVERRIDING SYSTEM VALUE "
        f"SELECT number, sessions.key, turn, "
        f"ARRAY[{_BLOCK_MARKS}, '{_OWNER}' || owner_name, '{_SESSION}' || sessions.key] || terms "
        f"FROM (SELECT {number} AS number, {each} FROM ({rows}) AS given_rows) AS added, "
        f"{{s}}.sessions WHERE sessions.key = {session}"
    )


ADD_OWN = _insert(
    "SELECT key AS turn, session, string_to_array(terms, ' ') AS terms FROM own",
    session="added.session",
    each="turn, session, terms",
)
"""A part of a statement: indexes the turns of the table ``own``, each with its ``terms`` in one text."""
_ADD = _insert(
    "SELECT turn, string_to_array(joined, ' ') AS terms "  # no term has a space
    "FROM unnest(%(turns)s::bigint[], %(terms)s::text[]) WITH ORDINALITY AS given (turn, joined, place) ORDER BY place"
)
_COPY = _insert(
    f"SELECT copy AS turn, terms[{_MARKS + 1}:] AS terms "
    "FROM unnest(%(turns)s::bigint[], %(copies)s::bigint[]) WITH ORDINALITY AS given (source, copy, place) "
    "JOIN {s}.documents ON documents.turn = source ORDER BY place"
)
_RESTORE = _insert(
    "SELECT given_number, turn, string_to_array(joined, ' ') AS terms FROM unnest(%(numbers)s::bigint[], "
    "%(turns)s::bigint[], %(terms)s::text[]) AS given (given_number, turn, joined)",
    number="given_number",
)
_GO_ON = (
    "SELECT setval('{s}.documents_key_seq', greatest((SELECT max(key) FROM {s}.documents), "
    "nextval('{s}.documents_key_seq')))"
)
_CHANGE = (
    f"UPDATE {{s}}.documents SET terms = terms[:{_MARKS}] || string_to_array(%(terms)s, ' ') WHERE turn = %(turn)s"
)
_FORGET_TITLE = "DELETE FROM {s}.documents WHERE session = %s AND turn IS NULL"
_FORGET_TURNS = "DELETE FROM {s}.documents WHERE turn = ANY(%s)"
_FORGET_SESSIONS = "DELETE FROM {s}.documents WHERE session = ANY(%s)"


def add_turns(db: Db, session: int, turns: Sequence[int | None], terms: Sequence[Collection[str]]) -> None:
    """Index ended turns, in this order. They are not indexed yet.

    Args:
        session: The key of their session.
        turns: The keys of the turns; None stands for the title of the session.
        terms: The terms of each.
    """
    joined = [" ".join(of_turn) for of_turn in terms]
    db.execute(_ADD, {"session": session, "turns": list(turns), "terms": joined})


def restore(db: Db, session: int, found: Sequence[tuple[int, int | None, Iterable[str]]]) -> None:
    """Index documents that had numbers already: the number, the key of the turn or None, and the texts of each."""
    values = {
        "session": session,
        "numbers": [number for number, _, _ in found],
        "turns": [turn for _, turn, _ in found],
        "terms": [" ".join(at_once(document_terms(texts))) for _, _, texts in found],
    }
    db.execute(_RESTORE, values)


def go_on_after_restored(db: Db) -> None:
    """Let further documents have higher numbers than those that were restored."""
    db.execute(_GO_ON)


def copy_turns(db: Db, session: int, turns: Sequence[int], copies: Sequence[int]) -> None:
    """Index copies of turns, in this order; ``session`` is the key of the session of the copies."""
    db.execute(_COPY, {"session": session, "turns": list(turns), "copies": list(copies)})


def change_turn(db: Db, turn: int, terms: Collection[str]) -> None:
    """Index an ended turn whose texts have changed. It keeps its place among the documents."""
    db.execute(_CHANGE, {"turn": turn, "terms": " ".join(terms)})


def forget_turns(db: Db, turns: Sequence[int]) -> None:
    """Remove turns from the index."""
    db.execute(_FORGET_TURNS, (list(turns),))


def set_title(db: Db, session: int, title: str | None) -> None:
    """Index the title of a session in place of the title before."""
    forget_title(db, session)
    if title is not None:
        add_title(db, session, title)


def add_title(db: Db, session: int, title: str) -> None:
    """Index the title of a session that has no title in the index."""
    add_turns(db, session, [None], [at_once(document_terms((title,)))])


def forget_title(db: Db, session: int) -> None:
    """Remove a title from the index, if it is there."""
    db.execute(_FORGET_TITLE, (session,))


def forget_sessions(db: Db, sessions: Sequence[int]) -> None:
    """Remove all that sessions have in the index."""
    db.execute(_FORGET_SESSIONS, (list(sessions),))


def block_mark(number: int, level: int) -> str:
    """The mark of all documents in the block of a document with this number; ``level`` is an index of ``LEVELS``."""
    return f"{_BLOCKS[level]}{number >> LEVELS[level]}"


def session_mark(session: int) -> str:
    return f"{_SESSION}{session}"


def owner_mark(owner: str) -> str:
    """The mark of all documents of an owner; of those without an owner, if the name is empty."""
    return f"{_OWNER}{owner}"
