"""The events of turns, and the texts of long outputs.

An ended turn whose output fits in one page is one row: its events are runs beside the output that has their texts. The
events of a longer turn, and of an open turn, are rows in ``event_pages`` with the texts of their pieces; then the items
in ``turns`` have no texts. So a text is kept once, and no row is larger than a page, unless a single piece is.
"""

from collections.abc import Iterator, Sequence

import apsw
import msgspec

from service.storage import event_rows, pieces, rules
from service.storage.event_rows import ROW_LENGTH_MAX, page_in_turn, page_of_rows
from service.storage.item_json import items_of
from service.storage.pieces import Run
from service.storage.records import EventsPage, TurnRecord, text_length
from service.storage.sqlite import old_frames
from service.storage.sqlite.rows import STAGED_MARK, Row, as_json, turn_of

_NO_END = 1 << 62
_GET = (
    "SELECT key, state, runs, text_length, events_deleted FROM shown_turns "
    "WHERE id = ? AND session = (SELECT key FROM sessions WHERE id = ?)"
)
_NOTE_DELETED = (
    "INSERT INTO turn_marks (turn, events_deleted) VALUES (?, 1) ON CONFLICT (turn) DO UPDATE SET events_deleted = 1"
)
_OUTPUT = "SELECT output FROM turns WHERE key = ?"
_MARK = "SELECT after FROM outputs WHERE turn = ? AND items LIKE ?"
_FROM = (
    "SELECT after, {column} FROM {table} WHERE turn = :turn AND after < :end AND after >= coalesce("
    "(SELECT max(after) FROM {table} WHERE turn = :turn AND after <= :after AND after < :end), 0) ORDER BY after"
)
_PAGES_FROM = _FROM.format(table="event_pages", column="runs, text")
_FRAMES_FROM = _FROM.format(table="events", column="frames")
_LAST_PAGE = "SELECT after, runs FROM event_pages WHERE turn = ? AND after < ? ORDER BY after DESC LIMIT 1"
_LAST_FRAMES = "SELECT after, frames FROM events WHERE turn = ? AND after < ? ORDER BY after DESC LIMIT 1"


def fits_in_turn(turn: TurnRecord, runs: Sequence[Run]) -> bool:
    """Whether an ended turn is kept in one row."""
    return event_rows.fits_in_turn(turn, runs, length_max=ROW_LENGTH_MAX)


def end_columns(turn: TurnRecord, runs: Sequence[Run]) -> dict[str, object]:
    """The columns of an ended turn that depend on where its texts are."""
    if fits_in_turn(turn, runs):
        return {"runs": pieces.pack(runs), "output": as_json(turn.output), "output_bytes": None, "text_length": None}
    return {
        "runs": b"",
        "output": as_json(rules.without_texts(turn.output)),
        "output_bytes": sum(len(item.text.encode()) for item in turn.output),
        "text_length": text_length(turn.output),
    }


def keep(db: apsw.Connection, turn: int, runs: Sequence[Run], text: str, *, after: int) -> None:
    """Keep events in pages, in place of all that follow ``after``."""
    db.execute("DELETE FROM event_pages WHERE turn = ? AND after >= ?", (turn, after))
    for part, part_text in pieces.split(runs, text, length_max=ROW_LENGTH_MAX):
        db.execute(
            "INSERT INTO event_pages (turn, after, runs, text) VALUES (?, ?, ?, ?)",
            (turn, after, pieces.pack(part), part_text.encode()),
        )
        after = pieces.last_seq(part, after)


def drop_all(db: apsw.Connection, turn: int) -> None:
    """Delete the events of a turn with the texts in them, and note it: a text of the reply was deleted."""
    drop(db, turn)
    note_deleted(db, turn)
    db.execute("DELETE FROM events WHERE turn = ?", (turn,))


def note_deleted(db: apsw.Connection, turn: int) -> None:
    """Note that the events of a turn are deleted: no reader finds them any more."""
    db.execute(_NOTE_DELETED, (turn,))


def has_rows(db: apsw.Connection, turn: int) -> bool:
    """Whether events of a turn have rows of their own."""
    found = (
        db.execute(f"SELECT 1 FROM {table} WHERE turn = ? LIMIT 1", (turn,)) for table in ("event_pages", "events")
    )
    return any(rows.fetchone() is not None for rows in found)


def drop(db: apsw.Connection, turn: int) -> None:
    db.execute("DELETE FROM event_pages WHERE turn = ?", (turn,))


def record_of(db: apsw.Connection, session_id: str, row: Row, *, with_texts: bool = True) -> TurnRecord:
    """The record of a row of :data:`~service.storage.sqlite.rows.TURN_COLUMNS`, with texts that are in pages."""
    turn, paged = turn_of(session_id, row)
    if paged is None or not with_texts:
        return turn
    return msgspec.structs.replace(turn, output=rules.with_texts(turn.output, growth_of(db, paged)))


def growth_of(db: apsw.Connection, turn: int) -> Iterator[tuple[int, str]]:
    """The texts of a turn's pages, each with the index of its item."""
    for runs, text in db.execute("SELECT runs, text FROM event_pages WHERE turn = ? ORDER BY after", (turn,)):
        yield from pieces.texts_by_item(pieces.unpack(runs), text.decode())


def runs_of(db: apsw.Connection, turn: int) -> list[Run]:
    """All events of an ended turn."""
    row: Row = db.execute("SELECT runs, output FROM turns WHERE key = ?", (turn,)).fetchone()  # type: ignore[assignment]
    packed, output = row
    if packed:
        return pieces.unpack(packed)
    if packed is not None:
        return runs_in_pages(db, turn)
    rows = db.execute("SELECT frames FROM events WHERE turn = ? ORDER BY after", (turn,))
    items = items_of(output)
    return pieces.join(run for (frames,) in rows for run, _ in old_frames.read_frames(frames, items))


def runs_in_pages(db: apsw.Connection, turn: int) -> list[Run]:
    rows = db.execute("SELECT runs FROM event_pages WHERE turn = ? ORDER BY after", (turn,))
    return pieces.join(run for (packed,) in rows for run in pieces.unpack(packed))


def read(db: apsw.Connection, session_id: str, turn_id: str, *, after: int, length_max: int) -> EventsPage:
    """The events after a seq, as :meth:`~service.storage.store.Store.read_events` says."""
    row: Row | None = db.execute(_GET, (turn_id, session_id)).fetchone()
    if row is None:
        return EventsPage(after=after)
    turn, state, packed, paged_length, events_deleted = row
    if events_deleted:
        return EventsPage(after=after, ended=True, events_deleted=True)
    if packed:
        output = items_of(db.execute(_OUTPUT, (turn,)).get)
        return page_in_turn(pieces.unpack(packed), output, after=after, length_max=length_max)
    end = _NO_END
    ended = state not in ("queued", "running")
    if not ended:
        marked: int | None = db.execute(_MARK, (turn, f"{STAGED_MARK} %")).get
        end = _NO_END if marked is None else marked
    bounds = {"turn": turn, "after": after, "end": end}
    last: Row | None = db.execute(_LAST_PAGE, (turn, end)).fetchone()
    if last is not None:
        rows = ((row[0], pieces.unpack(row[1]), row[2].decode()) for row in db.execute(_PAGES_FROM, bounds))
        kept = pieces.last_seq(pieces.unpack(last[1]), last[0])
        page = page_of_rows(rows, after=after, length_max=length_max)
        length = paged_length if ended else 0  # a suspended turn has one, too
        return msgspec.structs.replace(page, kept=kept, ended=ended, text_length=length or 0)
    output = items_of(db.execute(_OUTPUT, (turn,)).get)
    last = db.execute(_LAST_FRAMES, (turn, end)).fetchone()
    if last is None:
        return EventsPage(after=after, ended=ended)
    kept = last[0] + sum(1 for _ in old_frames.read_frames(last[1], output))
    rows = ((row[0], *_joined(old_frames.read_frames(row[1], output))) for row in db.execute(_FRAMES_FROM, bounds))
    page = page_of_rows(rows, after=after, length_max=length_max)
    return msgspec.structs.replace(page, kept=kept, ended=ended, text_length=text_length(output))


def _joined(events: Iterator[tuple[Run, str]]) -> tuple[list[Run], str]:
    found = list(events)
    return pieces.join(run for run, _ in found), "".join(text for _, text in found)
