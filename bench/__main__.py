"""``python -m bench [scenario]``: measures, prints a table, and writes raw rows, a report and a plot."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rich.table
import trio
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.contenders import CONTENDERS
from bench.machine import Machine, choose_cpus, describe_machine, look_at_machine
from bench.rows import RowFile
from bench.scenarios import NAMES, TABLES, Programme, measure
from bench.shutdown import CAP_S
from bench.shutdown_report import draw_table, write_markdown
from bench.stage import Place

_RESULTS = Path(__file__).parent / "results"


def parse_arguments(arguments: Sequence[str]) -> tuple[Programme, Path]:
    """Read from the command line what to measure and where to write it. Raises SystemExit, as argparse does."""
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(prog="just bench", description="What happens to N people streaming on a deploy?")
    parser.add_argument("scenario", nargs="?", default="shutdown", choices=NAMES)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="small and once: two minutes")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="everything, five times: hours")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"servers, by comma: {', '.join(names)}")
    parser.add_argument("--streams", default="", metavar="N", help="numbers of streams, by comma")
    parser.add_argument("--repeats", type=int, metavar="N", help="how often each is measured")
    parser.add_argument("--cap", type=float, default=CAP_S, metavar="SECONDS", help="then a server is killed")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go")
    options = parser.parse_args(arguments)
    only = [name for name in options.only.split(",") if name]
    if unknown := set(only) - set(names):
        parser.error(f"no such server: {', '.join(sorted(unknown))}")
    programme = Programme(
        scenario=options.scenario,
        size=options.size or "usual",
        only=only,
        streams=[int(number) for number in options.streams.split(",") if number],
        repeats=options.repeats,
        cap_s=options.cap,
    )
    return programme, options.out or (_RESULTS / "quick" if options.size == "quick" else _RESULTS)


async def run(programme: Programme, out: Path, console: Console) -> None:
    """Run all measurements. Each row is written to its file at once."""
    server_cpus, client_cpus = choose_cpus()
    machine = look_at_machine(server_cpus=server_cpus, client_cpus=client_cpus)
    for contender in programme.chosen:
        if contender.missing:
            console.print(f"left out: {contender.label} ({contender.missing} is not installed)")
    file = RowFile(out / f"{programme.scenario}.jsonl")
    file.append(machine)
    rows: list[Any] = []
    progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    task = progress.add_task(programme.scenario, total=programme.steps())
    with TemporaryDirectory() as folder, Live(progress, console=console, refresh_per_second=4) as live:
        async with aclosing(measure(programme, Place(Path(folder), server_cpus, client_cpus))) as measured:
            async for row in measured:
                rows.append(row)
                file.append(row)
                progress.advance(task)
                live.update(Group(_draw(programme, rows), progress) if console.is_terminal else progress)
    if not console.is_terminal:
        console.width = 160
        console.print(_draw(programme, rows))
    (out / f"{programme.scenario}.md").write_text(_report(programme, machine, rows, out))
    console.print(f"raw rows and report: {out}")


def _draw(programme: Programme, rows: list[Any]) -> rich.table.Table:
    return draw_table(rows) if programme.scenario == "shutdown" else TABLES[programme.scenario].draw(rows)


def _report(programme: Programme, machine: Machine, rows: list[Any], out: Path) -> str:
    if programme.scenario == "shutdown":
        return write_markdown(machine, rows, cap_s=programme.cap_s, plotted=_plot(programme, rows, out))
    return f"{TABLES[programme.scenario].write(rows)}\n{describe_machine(machine)}\n"


def _plot(programme: Programme, rows: list[Any], out: Path) -> bool:
    try:
        from bench.shutdown_plot import draw_plot  # noqa: PLC0415  matplotlib is in the bench group only
    except ImportError:
        return False
    return draw_plot(rows, out, cap_s=programme.cap_s)


def main() -> None:
    programme, out = parse_arguments(sys.argv[1:])
    trio.run(run, programme, out, Console())


if __name__ == "__main__":
    main()
