"""A table of rows, the same on a terminal and in Markdown."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import rich.table


@dataclass(frozen=True)
class Table:
    """The table of a scenario. A column is its head and a function that makes a row's cell."""

    title: str
    note: str
    columns: tuple[tuple[str, Callable[[Any], str]], ...]

    def draw(self, rows: Iterable[Any]) -> rich.table.Table:
        table = rich.table.Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for head, _ in self.columns:
            table.add_column(head, overflow="fold")
        for row in rows:
            table.add_row(*self._cells(row))
        return table

    def write(self, rows: Iterable[Any]) -> str:
        """Return the table in Markdown."""
        heads = [head for head, _ in self.columns]
        lines = [heads, ["---"] * len(heads), *(self._cells(row) for row in rows)]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"# {self.title}\n\n{self.note}\n\n{body}\n"

    def _cells(self, row: Any) -> list[str]:
        return [cell(row) for _, cell in self.columns]


def number(figure: float | None, digits: int = 1) -> str:
    """Return a figure, or a dash without one."""
    return "-" if figure is None else f"{figure:,.{digits}f}"


def triple(figures: tuple[float, float, float] | None, digits: int = 1) -> str:
    """Return the figures as ``p50 / p99 / max``."""
    return "-" if figures is None else " / ".join(f"{figure:,.{digits}f}" for figure in figures)
