"""``python -m bench.hot_path``: counts what a relayed token and a turn's start cost, and warns where that is dearer.

Time on a shared machine says little about a change of some percent. A count of what is executed says the same on every
machine, in every run. There are two, each in a process of its own that runs :mod:`bench.hot_path_load`:

* ``bytecodes``: instructions of Python's own machine, by ``sys.settrace``. It needs no tool, and is the same within a
  thousandth. It does not see work in C (JSON, dictionaries, the event loop's system calls), nor the kernel.
* ``instructions``: of the processor, by callgrind (valgrind, on x86-64), so C counts, too; the kernel still does not.
  Another build of Python takes other numbers: so they are compared as multiples of a fixed piece of work, the
  calibration.

Neither sees what other threads do (a durable store's), nor what waiting costs.

The record, ``hot_path.json``, has the numbers of each Python; ``--record`` renews those of this one. A warning is no
failure: the exit code is 0. With ``GITHUB_ACTIONS`` set it is also an annotation.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.server_process import ROOT

Counts = Mapping[str, int]
"""What ``token``, ``start`` and ``calibration`` cost, each once."""

RECORD = Path(__file__).with_name("hot_path.json")
DEARER_MAX = 1.15
CHEAPER_MIN = 0.85
_TIME_MAX_S = {"bytecodes": 20.0, "instructions": 38.0}
"""Together below a minute. A record may take longer: a number that is missing there is a check less."""
_RECORD_TIMES_LONGER = 10
_MEASURED = ("token", "start")
_TOTALS = re.compile(r"^desc: Trigger: Client Request: (\w+) (\d+)$.*?^totals: (\d+)$", re.MULTILINE | re.DOTALL)


class NotCountedError(Exception):
    """There is no count. The message says why."""


@dataclass(frozen=True)
class Verdict:
    """One figure beside the record."""

    figure: str
    count: int
    ratio: float | None  # None: there is no record of it

    @property
    def is_dearer(self) -> bool:
        return self.ratio is not None and self.ratio > DEARER_MAX

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.figure}: {self.count:,}, of which there is no record for this Python"
        beside = f"{self.figure}: {self.count:,}, {self.ratio:.3f} of the record"
        if self.is_dearer:
            return f"{beside}: more than {DEARER_MAX - 1:.0%} dearer"
        return f"{beside}: record it, or a part of it may be lost unseen" if self.ratio < CHEAPER_MIN else beside


def judge(kind: str, counted: Counts, recorded: Counts | None) -> list[Verdict]:
    """Compare the counts with those of the record, if there are any."""
    return [Verdict(f"{kind} of a {name}", counted[name], _ratio(name, kind, counted, recorded)) for name in _MEASURED]


def _ratio(name: str, kind: str, counted: Counts, recorded: Counts | None) -> float | None:
    if recorded is None or name not in recorded:
        return None
    ratio = counted[name] / recorded[name]
    return ratio * recorded["calibration"] / counted["calibration"] if kind == "instructions" else ratio


def count(
    kind: str, load: Sequence[str] = ("-m", "bench.hot_path_load"), *, time_max_s: float, telemetry: bool = False
) -> Counts:
    """Count in a process of its own.

    Args:
        load: The program of that process.
        telemetry: Whether the server has its access log and its traces on.

    Raises:
        NotCountedError: This machine cannot, or the load has failed.
    """
    if telemetry and find_spec("opentelemetry") is None:
        raise NotCountedError("there are no traces to be counted: the extra otel is not installed")
    command = [sys.executable, *load, kind, *(["telemetry"] if telemetry else [])]
    with TemporaryDirectory() as folder:
        if kind == "instructions":
            command = [*_callgrind(Path(folder)), *command]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("LASTCALL_", "OTEL_"))}
        env |= {"PYTHONHASHSEED": "0"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=time_max_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise NotCountedError(f"the count took more than {time_max_s:.0f} s") from None
        if done.returncode:
            raise NotCountedError(f"the load has failed: {done.stderr.strip()[-1500:]}")
        counts = json.loads(done.stdout.splitlines()[-1]) if kind == "bytecodes" else _read_totals(Path(folder))
    if missing := {*_MEASURED, "calibration"} - set(counts):
        raise NotCountedError(f"there is no count of {', '.join(sorted(missing))}")
    return dict(counts)


def _callgrind(folder: Path) -> Sequence[str]:
    if not shutil.which("valgrind"):
        raise NotCountedError("valgrind is not installed")
    if platform.machine() != "x86_64":
        raise NotCountedError(f"callgrind is told in machine code of x86-64, and this is {platform.machine()}")
    return "valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts"


def _read_totals(folder: Path) -> Counts:
    """Read the dumps of callgrind. Their ``summary`` lines are wrong where the counting was off before."""
    found = (match for path in folder.iterdir() if (match := _TOTALS.search(path.read_text())))
    return {match[1]: int(match[3]) // int(match[2]) for match in found}


def read_record() -> dict[str, dict[str, dict[str, int]]]:
    """Return the counts by the version of Python and the kind of count."""
    try:
        return dict(json.loads(RECORD.read_text()))
    except FileNotFoundError:
        return {}


def run(kinds: Sequence[str], *, record: bool, telemetry: bool = False) -> list[Verdict]:
    """Count, compare and print. Returns all comparisons. With telemetry the record is still that of a count without."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    known = read_record()
    verdicts = []
    for kind in kinds:
        try:
            time_max_s = _TIME_MAX_S[kind] * (_RECORD_TIMES_LONGER if record or telemetry else 1)
            counted = count(kind, time_max_s=time_max_s, telemetry=telemetry)
        except NotCountedError as error:
            print(f"hot path: {kind} were not counted: {error}")
            continue
        verdicts += judge(kind, counted, known.get(version, {}).get(kind))
        if record:
            known.setdefault(version, {})[kind] = dict(counted)
    for verdict in verdicts:
        print(f"hot path: {verdict}")
        if verdict.is_dearer and "GITHUB_ACTIONS" in os.environ and not record:
            print(f"::warning title=The hot path is dearer::{verdict}")
    if record:
        RECORD.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        print(f"hot path: recorded in {RECORD.relative_to(ROOT)}")
    elif any(verdict.is_dearer for verdict in verdicts):
        print("hot path: if that is the price of the change, record it: `uv run just hot-path --record`")
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(prog="just hot-path", description="What do a token and a start cost?")
    parser.add_argument("--record", action="store_true", help="renew the record of this Python")
    parser.add_argument("--telemetry", action="store_true", help="with access log and traces, beside the same record")
    parser.add_argument("--only", choices=tuple(_TIME_MAX_S), help="one kind of count")
    options = parser.parse_args()
    if options.record and options.telemetry:
        parser.error("the record is that of a server without --telemetry")
    kinds = [options.only] if options.only else tuple(_TIME_MAX_S)
    run(kinds, record=options.record, telemetry=options.telemetry)


if __name__ == "__main__":
    main()
