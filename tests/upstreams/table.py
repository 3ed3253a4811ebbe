"""The table of docs/openai.md about model servers: written from a run, and read again. Pure."""

from pathlib import Path

from tests.upstreams.kinds import KINDS
from tests.upstreams.observations import ROWS

DOCUMENT = Path(__file__).parents[2] / "docs/openai.md"
BEGIN, END = "<!-- upstreams -->\n", "<!-- /upstreams -->\n"
WHAT = "what it does"
LABELS = (WHAT, *(label for label, _ in ROWS))

Columns = dict[str, list[str]]
"""The cells of each server, by the head of its column, in the order of the rows."""


def render(columns: Columns) -> str:
    """The table in Markdown."""
    what = {kind.head: kind.what for kind in KINDS}
    cells = [[what[head], *column] for head, column in columns.items()]
    lines = [
        ["", *columns],
        ["---"] * (len(columns) + 1),
        *([label, *row] for label, row in zip(LABELS, zip(*cells, strict=True), strict=True)),
    ]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def columns_in(document: str) -> Columns:
    """The cells of the table in a document. Raises ValueError if its rows are others than the questions."""
    _, _, rest = document.partition(BEGIN)
    table, found, _ = rest.partition(END)
    if not found:
        raise ValueError(f"there is no table between {BEGIN.strip()} and {END.strip()}")
    rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in table.splitlines()]
    if not rows:
        return {}
    heads, rows = [cell for cell in rows[0] if cell], rows[2:]
    labels = [row[0] for row in rows]
    if labels != list(LABELS):
        raise ValueError(f"the rows are {labels}")
    return {head: [row[at] for row in rows[1:]] for at, head in enumerate(heads, start=1)}


def with_table(document: str, columns: Columns) -> str:
    """The document with another table."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{render(columns)}{END}{after}"
