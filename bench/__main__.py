"""``python -m bench [scenario]``: measure, print a table, leave raw rows, a report and a plot."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import trio
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.contenders import CONTENDERS, Contender, choose
from bench.machine import choose_cpus, look_at_machine
from bench.rows import RowFile
from bench.shutdown import CAP_S, Case, ShutdownRow, run_case, special, steady
from bench.shutdown_report import draw_table, write_markdown

_MAIN = ("lastcall", "lastcall-drain", "cooperative", "sse-starlette", "fastapi-2s", "quart-trio", "node", "trio")
_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Programme:
    """What is to be measured."""

    contenders: Sequence[Contender]
    cases: Sequence[Case]
    repeats: int
    cap_s: float
    folder: Path

    def runs(self) -> list[tuple[int, Case, Contender]]:
        """Interleaved: each repeat has all, and begins with another contender."""
        order = []
        for repeat in range(self.repeats):
            start = repeat % len(self.contenders)
            turned = [*self.contenders[start:], *self.contenders[:start]]
            order += [(repeat, case, contender) for case in self.cases for contender in turned]
        return order


def parse_arguments(arguments: Sequence[str]) -> Programme:
    """Raises SystemExit, as argparse does."""
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(prog="just bench", description=__doc__)
    parser.add_argument("scenario", nargs="?", default="shutdown", choices=["shutdown"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="some two minutes: the main servers, up to 200 streams, once"
    )
    size.add_argument("--full", action="store_true", help="everything, five times: more than an hour")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"servers, by comma: {', '.join(names)}")
    parser.add_argument("--streams", default="", metavar="N", help="numbers of streams, by comma")
    parser.add_argument("--repeats", type=int, help="how often each is measured")
    parser.add_argument("--cap", type=float, default=CAP_S, metavar="SECONDS", help="then a server is killed")
    parser.add_argument("--out", type=Path, help="where the results go")
    options = parser.parse_args(arguments)

    counts = [int(number) for number in options.streams.split(",") if number]
    if not counts:
        counts = [0, 50, 200] if options.quick else [0, 10, 100, 500, 1000] if options.full else [0, 100, 500, 1000]
    only = [name for name in options.only.split(",") if name]
    if unknown := set(only) - set(names):
        parser.error(f"no such server: {', '.join(sorted(unknown))}")
    contenders = choose(only or ([] if options.full else _MAIN))
    cases = [steady(count) for count in counts]
    if options.full and not options.streams:
        cases += special(200)
    return Programme(
        contenders=contenders,
        cases=cases,
        repeats=options.repeats or (1 if options.quick else 5 if options.full else 3),
        cap_s=options.cap,
        folder=options.out or (_RESULTS / "quick" if options.quick else _RESULTS),
    )


async def run(programme: Programme, console: Console) -> list[ShutdownRow]:
    """Measure it all; rows are in the file as soon as they are there."""
    server_cpus, client_cpus = choose_cpus()
    machine = look_at_machine(server_cpus=server_cpus, client_cpus=client_cpus)
    present = [contender for contender in programme.contenders if contender.missing is None]
    for contender in programme.contenders:
        if contender.missing:
            console.print(f"left out: {contender.label} ({contender.missing} is not installed)")
    runs = [step for step in programme.runs() if step[2] in present]
    file = RowFile(programme.folder / "shutdown.jsonl")
    file.append(machine)
    rows: list[ShutdownRow] = []
    progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    task = progress.add_task("warming up", total=len(runs))
    with TemporaryDirectory() as folder, Live(progress, console=console, refresh_per_second=4) as live:

        async def measure(contender: Contender, case: Case, repeat: int) -> ShutdownRow:
            return await run_case(
                contender,
                case,
                repeat=repeat,
                folder=Path(folder),
                server_cpus=server_cpus,
                client_cpus=client_cpus,
                cap_s=programme.cap_s,
            )

        for contender in present:  # byte code, page cache: the first start is no measurement
            await measure(contender, steady(0), -1)
        for repeat, case, contender in runs:
            progress.update(task, description=f"{case.label}: {contender.label}")
            row = await measure(contender, case, repeat)
            rows.append(row)
            file.append(row)
            progress.advance(task)
            live.update(Group(draw_table(rows), progress) if console.is_terminal else progress)
    plotted = _draw(rows, programme)
    report = write_markdown(machine, rows, cap_s=programme.cap_s, plotted=plotted)
    (programme.folder / "shutdown.md").write_text(report)
    return rows


def _draw(rows: Sequence[ShutdownRow], programme: Programme) -> bool:
    try:
        from bench.shutdown_plot import draw_plot  # noqa: PLC0415  matplotlib is in the bench group only
    except ImportError:
        return False
    return draw_plot(rows, programme.folder, cap_s=programme.cap_s)


def main() -> None:
    programme = parse_arguments(sys.argv[1:])
    console = Console()
    rows = trio.run(run, programme, console)
    if not console.is_terminal:
        console.width = 160
    console.print(draw_table(rows))
    console.print(f"raw rows, report and plot: {programme.folder}")


if __name__ == "__main__":
    main()
