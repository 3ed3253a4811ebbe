"""The shutdown rows as a table for the terminal and a report in Markdown.

Both show the same cells: :class:`Cell` is the one place where rows become words.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.table import Table

from bench.machine import Machine, describe_busyness, describe_machine
from bench.rows import Summary, summarize
from bench.shutdown import ShutdownRow

_HEAD = (
    "How long from SIGTERM until the whole process group is gone, and what became of the streams. After {cap_s:g} s a "
    "server is killed, and that is what is recorded. Times are seconds from the signal, as p50 / p99 / max over n runs."
)
_LEGEND = (
    "A stream ends properly (`terminal`) when a terminal event and the last chunk arrived. `clean`: the last chunk "
    "without a terminal event; `truncated`: the connection closed in mid-body; `reset`: reset in mid-body. Streams not "
    "yet begun are those that the server had not got round to within a minute: it was full. Tokens lost were sent by "
    "the model and never received by the client. The floors make their own tokens, have no model server and keep "
    "nothing: they do less than every other row. Other log lines are those that belong to no "
    "single request or turn: an access log's do, and a line for each turn's end."
)


@dataclass(frozen=True)
class Cell:
    """The cell of one contender under one load: all its repeats."""

    label: str
    rows: tuple[ShutdownRow, ...]

    @property
    def measured(self) -> list[ShutdownRow]:
        return [row for row in self.rows if row.failed is None]

    @property
    def gone(self) -> Summary | None:
        return summarize(row.gone_s for row in self.measured)

    @property
    def killed(self) -> int:
        return sum(row.killed for row in self.measured)

    @property
    def ends(self) -> Counter[str]:
        return _total(row.ends for row in self.measured)

    @property
    def proper_share(self) -> float | None:
        """The share of well-behaved streams that had a terminal event and their last chunk."""
        ends = self.ends
        return ends["terminal"] / ends.total() if ends.total() else None

    def gone_text(self) -> str:
        killed = f"killed {self.killed}/{len(self.measured)}" if self.killed else ""
        return ", ".join(filter(None, [str(self.gone or ""), killed])) or "failed to start"

    def ends_text(self) -> str:
        late = sum(sum(row.too_late.values()) for row in self.measured)
        texts = [f"{count} {end}" for end, count in self.ends.most_common()]
        return ", ".join([*texts, f"({late} not yet begun)"] if late else texts) or "-"

    def exits_text(self) -> str:
        return ", ".join(sorted({str(row.exit_code) for row in self.measured}))

    def log_text(self) -> str:
        rows = self.measured
        if not rows:
            return ""
        most = [max(getattr(row, f"log_{what}") for row in rows) for what in ("tracebacks", "cancelled", "lines")]
        return "/".join(map(str, most))


def cells_of(rows: Sequence[ShutdownRow]) -> dict[str, list[Cell]]:
    """Return the cells by case, both in the order of their first row."""
    cases = dict.fromkeys(row.case for row in rows)
    contenders = dict.fromkeys(row.contender for row in rows)
    cells: dict[str, list[Cell]] = {}
    for case in cases:
        of_case = {name: tuple(r for r in rows if r.case == case and r.contender == name) for name in contenders}
        cells[case] = [Cell(found[0].label, found) for found in of_case.values() if found]
    return cells


def draw_table(rows: Sequence[ShutdownRow]) -> Table:
    """Return the table of all measurements so far, for the terminal."""
    table = Table(title="SIGTERM to the whole process group gone, seconds: p50 / p99 / max", title_justify="left")
    for column in ("load", "server", "n", "gone", "streams ended", "exit", "log"):
        table.add_column(column, justify="right" if column == "n" else "left", overflow="fold")
    for case, cells in cells_of(rows).items():
        for index, cell in enumerate(cells):
            style = "bold" if cell.label.startswith("Lastcall") else None
            texts = (cell.gone_text(), cell.ends_text(), cell.exits_text(), cell.log_text())
            table.add_row("" if index else case, cell.label, str(len(cell.measured)), *texts, style=style)
        table.add_section()
    table.caption = "log: tracebacks / lines with Cancelled / lines but those of single requests, the most of one run"
    return table


def write_markdown(machine: Machine, rows: Sequence[ShutdownRow], *, cap_s: float, plotted: bool) -> str:
    """Return the report in Markdown."""
    parts = [
        "# Shutdown under load",
        _HEAD.format(cap_s=cap_s),
        describe_machine(machine),
        describe_busyness(rows),
        "![Shutdown latency by number of streams](shutdown.svg)" if plotted else "",
        *(_describe_case(case, cells) for case, cells in cells_of(rows).items()),
        _LEGEND,
        _describe_settings(rows),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _describe_case(case: str, cells: Sequence[Cell]) -> str:
    head = (
        f"## {case}\n\n"
        "| server | n | gone | last stream's end | streams ended | exit | tracebacks / Cancelled / other log lines "
        "| model connections closed | tokens lost | replies kept | MiB idle → loaded |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(_describe_cell(cell) for cell in cells)


def _describe_cell(cell: Cell) -> str:
    rows = cell.measured
    columns = [
        cell.label,
        str(len(rows)),
        cell.gone_text(),
        str(summarize(row.last_stream_s for row in rows) or "-"),
        cell.ends_text(),
        cell.exits_text(),
        cell.log_text(),
        str(summarize(row.upstream_closed_s for row in rows) or "-"),
        _sum_text(row.tokens_lost for row in rows),
        _sum_text(row.replies_kept for row in rows),
        " → ".join(
            f"{max((getattr(row, f'rss_{when}_mib') for row in rows), default=0):.0f}" for when in ("idle", "loaded")
        ),
    ]
    return f"| {' | '.join(columns)} |"


def _describe_settings(rows: Sequence[ShutdownRow]) -> str:
    lines = ["## How each was started", "", "| server | command | settings |", "|---|---|---|"]
    for _, group in groupby(sorted(rows, key=lambda row: row.contender), key=lambda row: row.contender):
        row = next(group)
        settings = " ".join(f"{name}={value}" for name, value in row.settings.items())
        lines.append(f"| {row.label} | `{' '.join(row.command)}` | {f'`{settings}`' if settings else ''} |")
    return "\n".join(lines)


def _sum_text(figures: Iterable[int | None]) -> str:
    known = [figure for figure in figures if figure is not None]
    return str(sum(known)) if known else "-"


def _total(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total
