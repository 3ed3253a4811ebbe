"""The bench as a stranger runs it, made tiny: it cannot rot."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.contenders import CONTENDERS, choose
from bench.rows import read_rows
from bench.server_process import ROOT

PRESENT = [contender.name for contender in CONTENDERS if contender.missing is None]


def test_a_tiny_run_measures_reports_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    names = [name for name in ("lastcall", "fastapi-2s", "node") if name in PRESENT]
    command = [sys.executable, "-m", "bench", "--only", ",".join(names), "--streams", "3"]
    command += ["--repeats", "1", "--cap", "8", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    machine, *rows = read_rows(tmp_path / "shutdown.jsonl")
    assert machine["versions"]["trio"]
    assert {(row["contender"], row["case"]) for row in rows} == {(name, "steady-3") for name in names}
    assert [row["failed"] for row in rows] == [None] * len(rows)
    ours = next(row for row in rows if row["contender"] == "lastcall")
    assert ours["ends"] == {"terminal": 3}
    assert (ours["exit_code"], ours["log_tracebacks"], ours["log_cancelled"], ours["gaps"]) == (0, 0, 0, 0)
    report = (tmp_path / "shutdown.md").read_text()
    assert all(contender.label in report for contender in choose(names))


def test_a_name_that_is_no_contender_is_refused() -> None:
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "bench", "--only", "lastcal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no such server: lastcal" in done.stderr
