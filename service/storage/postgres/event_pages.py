"""The events of ended turns, and the texts of long outputs: in the turn's row, or in pages (storage/event_rows.py)."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import msgspec

from service.storage import event_rows, pieces, rules
from service.storage.event_rows import ROW_LENGTH_MAX, page_in_turn, page_of_rows
from service.storage.item_json import items_of
from service.storage.pieces import Run
from service.storage.postgres import segments
from service.storage.postgres.connections import Cursor, Db
from service.storage.postgres.rows import Row
from service.storage.postgres.turn_rows import json_of, settings_json, settings_of, turn_of
from service.storage.records import EventsPage, TurnRecord, text_length

_ROWS_AT_ONCE = 32
"""The pages that one statement adds."""

_GET = (
    "SELECT t.key, t.owner, t.segment, t.events_deleted, t.settings, t.runs, "
    "CASE WHEN t.runs IS NOT NULL THEN t.output END "
    "FROM {s}.turns AS t JOIN {s}.sessions AS s ON s.key = t.session WHERE t.id = %s AND s.id = %s"
)
_FROM = (
    "SELECT after, runs, text FROM {s}.event_pages WHERE turn = %(turn)s AND after >= coalesce((SELECT max(after) "
    "FROM {s}.event_pages WHERE turn = %(turn)s AND after <= %(after)s), 0) ORDER BY after LIMIT %(pages_max)s"
)
_TEXTS = "SELECT turn, runs, text FROM {s}.event_pages WHERE turn = ANY(%s::bigint[]) ORDER BY turn, after"
_RUNS = "SELECT runs FROM {s}.event_pages WHERE turn = %s ORDER BY after"
PAGES_OF = "SELECT turn, runs, text FROM {s}.event_pages WHERE turn = ANY(ARRAY({keys})) ORDER BY turn, after"
"""The pages of turns, of a query of their keys, for :func:`kept_in`."""
_DROP = "DELETE FROM {s}.event_pages WHERE turn = ANY(%s)"
_ADD = (
    "INSERT INTO {s}.event_pages (turn, after, runs, text) "
    "SELECT * FROM unnest(%s::bigint[], %s::bigint[], %s::bytea[], %s::bytea[])"
)


def values_of_events(turn: TurnRecord, runs: Sequence[Run] | None) -> dict[str, object]:
    """The columns of a turn that depend on where its texts are.

    Args:
        runs: The events of an ended turn; None if the turn is open.
    """
    if runs is None or event_rows.fits_in_turn(turn, runs, length_max=ROW_LENGTH_MAX):
        return {
            "settings": settings_json(turn),
            "output": json_of(turn.output),
            "runs": None if runs is None else pieces.pack(runs),
        }
    return values_in_pages(turn, runs)


def values_in_pages(turn: TurnRecord, runs: Sequence[Run]) -> dict[str, object]:
    """:func:`values_of_events` of a turn whose texts are in pages."""
    return {
        "settings": settings_json(turn, text_length=text_length(turn.output), kept=pieces.last_seq(runs)),
        "output": json_of(rules.without_texts(turn.output)),
        "runs": None,
    }


def add(db: Db, turns: Iterable[tuple[int, TurnRecord, Sequence[Run]]]) -> None:
    """Add the pages of turns, each with its key and its events."""
    rows = (row for key, turn, runs in turns for row in _rows_of(key, turn, runs))
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        db.execute(_ADD, tuple(map(list, zip(*some, strict=True))))


def _rows_of(key: int, turn: TurnRecord, runs: Sequence[Run]) -> Iterator[tuple[int, int, bytes, bytes]]:
    after = 0
    text = pieces.text_of(runs, [item.text for item in turn.output])
    for part, part_text in pieces.split(runs, text, length_max=ROW_LENGTH_MAX):
        yield key, after, pieces.pack(part), part_text.encode()
        after = pieces.last_seq(part, after)


def runs_of(db: Db, key: int) -> list[Run]:
    """All events of a turn whose texts are in pages."""
    return pieces.join(run for (packed,) in db.execute(_RUNS, (key,)) for run in pieces.unpack(packed))


class Kept(msgspec.Struct):
    """The events and the texts of a turn whose texts are in pages.

    Attributes:
        texts: The texts, each with the index of its output item.
    """

    runs: list[Run] = msgspec.field(default_factory=list)
    texts: list[tuple[int, str]] = msgspec.field(default_factory=list)

    def told_of(self, turn: TurnRecord) -> TurnRecord:
        """The turn with its texts."""
        return msgspec.structs.replace(turn, output=rules.with_texts(turn.output, self.texts))


def kept_in(sent: Cursor) -> dict[int, Kept]:
    """What is kept of turns, by their keys, from the result of :data:`PAGES_OF`."""
    found: dict[int, Kept] = {}
    for key, packed, text in sent:
        kept = found.setdefault(key, Kept())
        runs = pieces.unpack(packed)
        kept.runs += runs
        kept.texts += pieces.texts_by_item(runs, text.decode())
    for kept in found.values():
        kept.runs = pieces.join(kept.runs)
    return found


def drop(db: Db, keys: Sequence[int]) -> None:
    """Remove the pages of turns, by their keys, if there are any."""
    db.execute(_DROP, (list(keys),))


def record_of(db: Db, session_id: str, row: Row, *, with_texts: bool = True) -> TurnRecord:
    """The record of a row of :data:`~service.storage.postgres.turn_rows.TURN_COLUMNS`, with texts that are in pages."""
    turn, paged = turn_of(session_id, row)
    return turn if paged is None or not with_texts else _with_texts(db, [(turn, paged)])[0]


def records_of(db: Db, session_id: str, rows: Sequence[Row], *, with_options: bool = True) -> list[TurnRecord]:
    """The records of rows, with the texts of all of them."""
    return _with_texts(db, [turn_of(session_id, row, with_options=with_options) for row in rows])


def _with_texts(db: Db, found: Sequence[tuple[TurnRecord, int | None]]) -> list[TurnRecord]:
    paged = [key for _, key in found if key is not None]
    growth: dict[int, list[tuple[int, str]]] = {key: [] for key in paged}
    if paged:
        for key, runs, text in db.execute(_TEXTS, (paged,)):
            growth[key] += pieces.texts_by_item(pieces.unpack(runs), text.decode())
    return [
        turn if key is None else msgspec.structs.replace(turn, output=rules.with_texts(turn.output, growth[key]))
        for turn, key in found
    ]


def read(db: Db, session_id: str, turn_id: str, *, after: int, length_max: int) -> EventsPage:
    """The events after a seq, as :meth:`~service.storage.store.Store.read_events` says."""
    row: Row | None = db.execute(_GET, (turn_id, session_id)).fetchone()
    if row is None:
        return EventsPage(after=after)
    key, owner, segment, events_deleted, settings, packed, output = row
    if events_deleted:
        return EventsPage(after=after, ended=True, events_deleted=True)
    if owner:
        return segments.read(db, key, owner=owner, segment=segment, after=after, length_max=length_max)
    if packed is not None:
        return page_in_turn(pieces.unpack(packed), items_of(output), after=after, length_max=length_max)
    # Nearly all rows are as long as they may be. Further short ones are on the next page.
    values = {"turn": key, "after": after, "pages_max": -(-length_max // ROW_LENGTH_MAX) + 1}
    rows = ((row[0], pieces.unpack(row[1]), row[2].decode()) for row in db.execute(_FROM, values))
    page = page_of_rows(rows, after=after, length_max=length_max)
    kept = settings_of(settings)
    if owner == rules.NOBODY:
        return msgspec.structs.replace(page, kept=kept.kept)
    return msgspec.structs.replace(page, kept=kept.kept, ended=True, text_length=kept.text_length)
