"""How the events of a turn, and the texts of a long output, lie in rows: the same for every store that has rows.

An ended turn whose output fits in one row is one row: its events are runs beside the output that has their texts. The
events of a longer turn are in several rows with the texts of their pieces; then the output has no texts.
"""

from collections.abc import Iterable, Sequence

from service.storage import pieces
from service.storage.pieces import Run
from service.storage.records import EventsPage, Item, TurnRecord, text_length

ROW_LENGTH_MAX = 64 * 1024
"""Bound on the cost of one row's runs (:attr:`~service.storage.pieces.Run.cost`), unless a single piece is longer."""


def fits_in_turn(turn: TurnRecord, runs: Sequence[Run], *, length_max: int) -> bool:
    """Whether an ended turn is kept in one row. So is a turn whose events and output do not belong together."""
    return sum(run.cost for run in runs) <= length_max or not pieces.are_of(runs, [it.text for it in turn.output])


def page_in_turn(runs: Sequence[Run], output: Sequence[Item], *, after: int, length_max: int) -> EventsPage:
    """The events after a seq, of an ended turn that is one row."""
    part, _ = next(pieces.split(pieces.skip(runs, after), "", length_max=length_max), ((), ""))
    return EventsPage(
        after=after,
        runs=tuple(part),
        text=pieces.text_of(runs, [item.text for item in output], after=after, events=pieces.count(part)),
        kept=pieces.last_seq(runs),
        ended=True,
        text_length=text_length(output),
    )


def page_of_rows(rows: Iterable[tuple[int, list[Run], str]], *, after: int, length_max: int) -> EventsPage:
    """The events after a seq, from rows of which the first has this seq or the events before it."""
    runs: list[Run] = []
    texts: list[str] = []
    size = 0
    for row_after, row_runs, row_text in rows:
        rest = list(pieces.skip(row_runs, after, begins=row_after))
        length = sum(run.length for run in rest)
        cost = sum(run.cost for run in rest)
        if runs and size + cost > length_max:
            break
        runs += rest
        texts.append(row_text[len(row_text) - length :])
        size += cost
    part, text = next(pieces.split(runs, "".join(texts), length_max=length_max), ((), ""))
    return EventsPage(after=after, runs=tuple(part), text=text)
