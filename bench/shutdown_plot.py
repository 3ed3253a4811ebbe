"""The plot of the shutdown rows: latency by number of streams, readable in black and white.

With a filled marker every stream ended properly, with an open marker none did, and with a half-filled marker some did;
their share is beside it. A cross at the top is a server that had to be killed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.shutdown import ShutdownRow
from bench.shutdown_report import Cell, cells_of

_MARKERS = "osD^vP<>h*XpdH8s"
_LINES = ("-", "--", "-.", ":")


def draw_plot(rows: Sequence[ShutdownRow], folder: Path, *, cap_s: float) -> bool:
    """Write ``shutdown.svg`` and ``shutdown.png``; False if no steady load was measured."""
    lines: dict[str, list[tuple[int, Cell]]] = {}
    for case, cells in cells_of(rows).items():
        if case.startswith("steady-"):
            for cell in cells:
                lines.setdefault(cell.label, []).append((cell.rows[0].streams, cell))
    if not lines:
        return False
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    axes.set_xscale("symlog", linthresh=10)
    axes.set_yscale("log")
    for index, (label, points) in enumerate(lines.items()):
        _draw_line(axes, index, label, sorted(points, key=lambda point: point[0]), cap_s)
    ticks = sorted({streams for points in lines.values() for streams, _ in points})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.axhline(cap_s, color="0.7", linewidth=0.8)
    axes.set_xlabel("people streaming, 20 tokens/s each")
    axes.set_ylabel("SIGTERM to the process group gone, s (median)")
    axes.set_title("Filled: all streams ended properly. Half: some did. Open: none did. Cross: killed.", fontsize=10)
    axes.grid(visible=True, which="major", color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    mpl.rcParams["svg.hashsalt"] = "lastcall"  # the same rows give the same file
    figure.savefig(folder / "shutdown.svg", metadata={"Date": None})
    figure.savefig(folder / "shutdown.png", dpi=144, metadata={"Software": None})
    pyplot.close(figure)
    return True


def _draw_line(axes: Axes, index: int, label: str, points: list[tuple[int, Cell]], cap_s: float) -> None:
    ours = label.startswith("Lastcall")
    color = "black" if ours else str(0.25 + 0.45 * (index % 5) / 4)
    style: dict[str, Any] = {
        "color": color,
        "linestyle": _LINES[index % len(_LINES)],
        "linewidth": 2.2 if ours else 1.1,
    }
    heights = [cap_s if cell.killed or cell.gone is None else cell.gone.p50 for _, cell in points]
    axes.plot(
        [], [], label=label, marker=_MARKERS[index], **style
    )  # only for the legend: each point below has a marker of its own
    axes.plot([streams for streams, _ in points], heights, **style)
    for (streams, cell), height in zip(points, heights, strict=True):
        share = cell.proper_share
        fill = "left" if share is not None and 0 < share < 1 else "full"
        marker = "x" if cell.killed else _MARKERS[index]
        axes.plot(
            [streams],
            [height],
            marker=marker,
            color=color,
            fillstyle=fill,
            markersize=8,
            markerfacecolor="white" if share == 0 else color,
            markerfacecoloralt="white",
        )
        if share is not None and 0 < share < 1:
            axes.annotate(f"{share:.0%}", (streams, height), xytext=(5, 5), textcoords="offset points", fontsize=7)
