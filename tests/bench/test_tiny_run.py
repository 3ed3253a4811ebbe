"""The bench runs as its README says, with tiny loads: so it stays usable."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.contenders import CONTENDERS, choose
from bench.database import binaries
from bench.rows import read_rows
from bench.server_process import ROOT

PRESENT = [contender.name for contender in CONTENDERS if contender.missing is None]


def run_bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_a_tiny_run_measures_reports_and_draws(tmp_path: Path) -> None:
    known = ("lastcall", "fastapi-2s", "fastapi-plain", "tuned", "node")
    names = [name for name in known if name in PRESENT]
    sizes = ("--streams", "3", "--repeats", "1", "--cap", "8")
    done = run_bench("--only", ",".join(names), *sizes, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    machine, *rows = read_rows(tmp_path / "shutdown.jsonl")
    assert machine["versions"]["trio"]
    assert {(row["contender"], row["case"]) for row in rows} == {(name, "steady-3") for name in names}
    assert [row["failed"] for row in rows] == [None] * len(rows)
    kept = {row["contender"]: row["replies_kept"] for row in rows}
    assert {kept[name] for name in ("lastcall", "fastapi-plain", "tuned") if name in PRESENT} == {3}
    ours = next(row for row in rows if row["contender"] == "lastcall")
    assert ours["ends"] == {"terminal": 3}
    assert (ours["exit_code"], ours["log_tracebacks"], ours["log_cancelled"], ours["gaps"]) == (0, 0, 0, 0)
    report = (tmp_path / "shutdown.md").read_text()
    assert all(contender.label in report for contender in choose(names))


SIZES = {
    "relay": ("--streams", "2", "--modes", "flood,half"),
    "capacity": ("--streams", "4"),
    "herd": ("--streams", "5"),
    "first-token": ("--streams", "2"),
    "store": ("--streams", "2"),
    "tree": ("--streams", "20"),
}


@pytest.mark.parametrize("scenario", [*SIZES, "end", "idle", "expiry"])
def test_each_scenario_runs_and_reports(tmp_path: Path, scenario: str) -> None:
    done = run_bench(scenario, "--quick", "--only", "lastcall", *SIZES.get(scenario, ()), "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    _, *rows = read_rows(tmp_path / f"{scenario}.jsonl")
    assert rows
    if scenario == "relay":
        assert {(row["contender"], row["mode"]) for row in rows} == {
            *(("direct", mode) for mode in ("paced", "flood")),
            *(("lastcall", mode) for mode in ("paced", "flood", "half")),
        }
        assert all(row["cpu_us"] > 0 for row in rows if row["contender"] == "lastcall")
    if scenario == "capacity":
        assert [row["contender"] for row in rows] == ["direct", "lastcall"]
        for row in rows:  # a machine that stands still twice carries fewer
            carried, failed = ((row[it] or {"streams": None})["streams"] for it in ("carried", "failed"))
            assert (carried, failed) == (4, None) or 1 <= failed <= 4
    if scenario == "herd":
        assert [(row["began"], row["errors"]) for row in rows] == [(5, {}), (5, {})]
        assert rows[1]["start_us"] > 0
    if scenario == "end":
        assert {(row["cause"], row["closed"]) for row in rows} == {
            ("client gone", 20),
            ("cancel", 20),
            ("deadline", 20),
        }
    if scenario == "tree":
        by_window = {row["what"]: row for row in rows}
        looked = ("the first look", "one viewer", "one viewer, cancels", "four viewers")
        assert by_window.keys() == {"nobody looks", "nobody looks again", *looked}
        assert by_window["nobody looks"]["steps"] == 0
        assert by_window["nobody looks again"]["steps"] <= 1, "once in half a minute a task asks whether anybody looks"
        # A window is a second long: a server that stands still for a second has no step in it.
        assert sum(by_window[what]["steps"] for what in looked) > 0
        assert all((by_window[what]["tree_share"] > 0) == (by_window[what]["steps"] > 0) for what in looked)
        assert all(by_window[what]["tasks"] > 20 for what in looked[:2])
        cancels = by_window["one viewer, cancels"]
        assert cancels["cancelled"] > 0
        assert cancels["gone_ms"][2] > 0
    if scenario == "store":
        assert [row["lost"] for row in rows] == [0] * len(rows)
        kinds = ("memory", "sqlite", "postgresql") if binaries() is not None else ("memory", "sqlite")
        by_kind = {kind: {row["what"]: row for row in rows if row["store"] == kind} for kind in kinds}
        for kind in kinds[1:]:
            missing = by_kind["memory"].keys() - by_kind[kind].keys()
            assert not missing
            assert all(
                by_kind[kind][what]["of_memory"] or by_kind[kind][what]["added_ms"] for what in by_kind["memory"]
            )
            stop = by_kind[kind]["shutdown"]
            assert (stop["n"], stop["kept"]) == (2, 2)
            assert stop["phases_ms"]["interrupting"] > 0
            checkpoints = by_kind[kind]["checkpoints, 20 turns"]
            assert checkpoints["log_bytes"] > 0
            assert (checkpoints["commits_per_s"] is None) == (kind == "sqlite")
        if "postgresql" in kinds:
            assert sum("keyed" in what or "forwarded" in what for what in by_kind["postgresql"]) == 2
    assert (tmp_path / f"{scenario}.md").read_text().count("\n|") == len(rows) + 2


def test_a_relayed_token_is_measured_through_each_face_beside_the_native_api(tmp_path: Path) -> None:
    done = run_bench(
        *("relay", "--quick", "--only", "lastcall", "--faces", "responses,chat-completions"),
        *("--modes", "live", "--streams", "3", "--out", str(tmp_path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, *rows = read_rows(tmp_path / "relay.jsonl")
    faces = ("lastcall", "lastcall-responses", "lastcall-chat-completions")
    assert [(row["contender"], row["path"]) for row in rows if row["contender"] != "direct"] == list(
        zip(faces, ("/chat", "/v1/responses", "/v1/chat/completions"), strict=True)
    )
    assert all(row["received_per_s"] > 0 for row in rows)
    assert all(row["cpu_us"] > 0 for row in rows if row["contender"] in faces)


def test_requests_are_measured_on_each_server_that_keeps_sessions(tmp_path: Path) -> None:
    names = [name for name in ("lastcall", "tuned", "fastapi-plain") if name in PRESENT]
    done = run_bench("requests", "--quick", "--only", ",".join(names), "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    _, *rows = read_rows(tmp_path / "requests.jsonl")
    assert {(row["contender"], row["what"]) for row in rows} == {
        (name, what) for name in names for what in ("GET /sessions/{id}", "GET /healthz")
    }
    assert [row["lost"] for row in rows] == [0] * len(rows)
    assert sum(row["n"] for row in rows) > 0, "in each window of a second, unless the machine stands still"


def test_a_name_that_is_no_contender_is_refused() -> None:
    done = run_bench("--only", "lastcal")
    assert done.returncode == 2
    assert "no such server: lastcal" in done.stderr
