"""``python -m bench [scenario]``: measures, prints a table, and writes raw rows, a report and a plot."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rich.table
import trio
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.contenders import CONTENDERS, FACES, choose
from bench.machine import Machine, choose_cpus, describe_busyness, describe_machine, look_at_machine
from bench.pairs import Comparison, compare, ratio_table
from bench.relay import MODES
from bench.revisions import RevisionError, open_versions, sides, split
from bench.rows import RowFile
from bench.scenarios import NAMES, PAIRINGS, TABLES, Programme, measure
from bench.server_process import ServerFailedError
from bench.shutdown import CAP_S
from bench.shutdown_report import draw_table, write_markdown
from bench.stage import Place
from bench.table import Table

TELLING = ("relay", "herd")
"""The scenarios that can show what telemetry costs: a token, and a start."""
_RESULTS = Path(__file__).parent / "results"


def parse_arguments(arguments: Sequence[str]) -> tuple[Programme, Path, str | None]:
    """Read from the command line what to measure, where to write it and what to compare.

    Raises SystemExit, as argparse does.
    """
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(prog="just bench", description="What happens to N people streaming on a deploy?")
    parser.add_argument("scenario", nargs="?", default="shutdown", choices=NAMES)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="small and once: two minutes")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="everything, five times: hours")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"servers, by comma: {', '.join(names)}")
    parser.add_argument("--streams", default="", metavar="N", help="numbers of streams, by comma")
    parser.add_argument("--modes", default="", metavar="NAMES", help=f"of relay, by comma: {', '.join(MODES)}")
    parser.add_argument("--faces", default="", metavar="NAMES", help=f"of relay, by comma: {', '.join(FACES)}")
    parser.add_argument(
        "--telemetry",
        action="store_true",
        help=f"of {' and '.join(TELLING)}: Lastcall with access log and traces, too; with --compare the second version",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="how often each is measured")
    parser.add_argument("--cap", type=float, default=CAP_S, metavar="SECONDS", help="then a server is killed")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "--compare",
        metavar="REV",
        help="one Lastcall of this commit and of the working directory; A..B: of two commits",
    )
    options = parser.parse_args(arguments)
    only = _split_names(parser, options.only, names, "server")
    modes = _split_names(parser, options.modes, MODES, "mode")
    if modes and options.scenario != "relay":
        parser.error(f"--modes belongs to relay, and {options.scenario} has none")
    faces = _split_names(parser, options.faces, list(FACES), "face")
    if faces and (options.scenario != "relay" or options.compare is not None):
        parser.error("--faces belongs to relay without --compare")
    if faces and only and not any(contender.faces for contender in choose(only)):
        parser.error(f"--faces: only a Lastcall has them, not {', '.join(only)}")
    if options.telemetry and (faces or options.scenario not in TELLING):
        parser.error(f"--telemetry belongs to {' and '.join(TELLING)} without --faces")
    if options.telemetry and find_spec("opentelemetry") is None:
        parser.error("--telemetry needs the libraries of traces: the extra otel is not installed")
    if options.compare is not None:
        _check_comparison(parser, options.scenario, only, options.compare)
    programme = Programme(
        scenario=options.scenario,
        size=options.size or "usual",
        only=only,
        streams=[int(number) for number in options.streams.split(",") if number],
        modes=modes or MODES,
        faces=faces,
        telemetry=options.telemetry,
        repeats=options.repeats,
        cap_s=options.cap,
    )
    kept_apart = "compare" if options.compare is not None else "quick" if options.size == "quick" else "."
    return programme, options.out or _RESULTS / kept_apart, options.compare


def _split_names(parser: argparse.ArgumentParser, text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(known):
        parser.error(f"no such {what}: {', '.join(sorted(unknown))}")
    return names


def _check_comparison(parser: argparse.ArgumentParser, scenario: str, only: Sequence[str], argument: str) -> None:
    if scenario not in PAIRINGS:
        parser.error(f"--compare has no figures of {scenario}: choose from {', '.join(PAIRINGS)}")
    if len(only) > 1 or not all(name.startswith("lastcall") for name in only):
        parser.error(f"--compare measures one server, and it is a Lastcall: not {', '.join(only)}")
    try:
        split(argument)
    except RevisionError as error:
        parser.error(str(error))


@contextmanager
def _compared(programme: Programme, argument: str | None) -> Iterator[Programme]:
    """Lay out both versions of a comparison, if there is one."""
    if argument is None:
        yield programme
        return
    (contender,) = choose(programme.only or ["lastcall"])
    with open_versions(argument) as versions:
        first, second = sides(contender, versions)
        if programme.telemetry:
            (second,) = second.with_telemetry()
        yield replace(programme, compared=(first, second))


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
    for table, comparisons in _compare(programme, rows):
        console.print(table.draw(comparisons))
    (out / f"{programme.scenario}.md").write_text(_report(programme, machine, rows, out))
    console.print(f"raw rows and report: {out}")


def _draw(programme: Programme, rows: list[Any]) -> rich.table.Table:
    return draw_table(rows) if programme.scenario == "shutdown" else TABLES[programme.scenario].draw(rows)


def _compare(programme: Programme, rows: list[Any]) -> list[tuple[Table, list[Comparison]]]:
    """Return a table of ratios for each pair of servers that have figures to compare."""
    if programme.scenario not in PAIRINGS:
        return []
    tables = []
    for first, second in programme.pairs:
        if comparisons := compare(rows, PAIRINGS[programme.scenario], first.name, second.name):
            tables.append((ratio_table(first.label, second.label), comparisons))
    return tables


def _report(programme: Programme, machine: Machine, rows: list[Any], out: Path) -> str:
    ratios = "\n".join(table.write(comparisons) for table, comparisons in _compare(programme, rows))
    if programme.scenario == "shutdown":
        plotted = _plot(programme, rows, out)
        report = write_markdown(machine, rows, cap_s=programme.cap_s, plotted=plotted)
        return f"{report}\n{ratios}" if ratios else report
    tables = [TABLES[programme.scenario].write(rows), *([ratios] if ratios else [])]
    busy = describe_busyness(rows)
    return "\n".join([*tables, *([f"{busy}\n"] if busy else []), f"{describe_machine(machine)}\n"])


def _plot(programme: Programme, rows: list[Any], out: Path) -> bool:
    try:
        from bench.shutdown_plot import draw_plot  # noqa: PLC0415  matplotlib is in the bench group only
    except ImportError:
        return False
    return draw_plot(rows, out, cap_s=programme.cap_s)


def main() -> None:
    programme, out, compared = parse_arguments(sys.argv[1:])
    try:
        with _compared(programme, compared) as chosen:
            trio.run(run, chosen, out, Console())
    except RevisionError as error:
        sys.exit(str(error))
    except ServerFailedError as error:
        sys.exit(f"a server under test failed: {str(error)[-4000:]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
