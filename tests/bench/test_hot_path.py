"""The guard of the hot path warns about what became dearer, says what it did not count, and never fails."""

import json
from pathlib import Path

import pytest

from bench import hot_path
from bench.hot_path import NotCountedError, Verdict, count, judge, run

RECORDED = {"token": 1000, "start": 20000, "calibration": 100}

# Each append to a turn's log does more work in Python: some 2 000 bytecodes more for each token.
_DEARER = """
import runpy
from service.sessions.events.event_log import EventLog
append = EventLog.append
def slow(self, *args, **kwargs):
    for _ in range(400):
        pass
    return append(self, *args, **kwargs)
EventLog.append = slow
runpy.run_module("bench.hot_path_load", run_name="__main__")
"""


def by_figure(verdicts: list[Verdict]) -> dict[str, float | None]:
    return {verdict.figure: verdict.ratio for verdict in verdicts}


def test_bytecodes_are_compared_as_they_are() -> None:
    verdicts = judge("bytecodes", {"token": 1150, "start": 23001, "calibration": 999}, RECORDED)
    assert by_figure(verdicts) == {"bytecodes of a token": 1.15, "bytecodes of a start": pytest.approx(1.15005)}
    assert [verdict.is_dearer for verdict in verdicts] == [False, True]
    assert "more than 15% dearer" in str(verdicts[1])


def test_instructions_of_another_build_of_python_are_compared_by_the_fixed_work() -> None:
    """This build takes twice as many for everything, and a start became dearer by a fifth."""
    verdicts = judge("instructions", {"token": 2000, "start": 48000, "calibration": 200}, RECORDED)
    assert by_figure(verdicts) == {"instructions of a token": 1.0, "instructions of a start": pytest.approx(1.2)}
    assert [verdict.is_dearer for verdict in verdicts] == [False, True]


def test_what_became_much_cheaper_asks_for_a_record_and_is_no_warning() -> None:
    cheaper, same = judge("bytecodes", {"token": 800, "start": 20000, "calibration": 100}, RECORDED)
    assert (cheaper.is_dearer, same.is_dearer) == (False, False)
    assert "record it" in str(cheaper)
    assert "record it" not in str(same)


def test_a_python_without_a_record_has_no_verdict() -> None:
    verdict, _ = judge("bytecodes", RECORDED, None)
    assert (verdict.ratio, verdict.is_dearer) == (None, False)
    assert "no record" in str(verdict)


def test_the_totals_of_callgrind_are_read_and_its_summaries_are_not(tmp_path: Path) -> None:
    dump = "version: 1\ndesc: Trigger: {}\n\nevents: Ir\nsummary: 18446744073515575147\n\nfn=(1)\n1 2\n\ntotals: {}\n"
    (tmp_path / "counts.1").write_text(dump.format("Client Request: token 200", 80_000_100))
    (tmp_path / "counts.2").write_text(dump.format("Client Request: start 20", 226_000_019))
    (tmp_path / "counts").write_text(dump.format("Program termination", 9000))
    assert hot_path._read_totals(tmp_path) == {"token": 400_000, "start": 11_300_000}


def test_a_machine_without_valgrind_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["instructions"], record=False) == []
    assert "instructions were not counted: valgrind is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('no such module')", "the load has failed: no such module"),
        ("import json; print(json.dumps({'token': 1}))", "there is no count of calibration, start"),
    ],
)
def test_a_load_that_fails_gives_no_count(program: str, said: str) -> None:
    with pytest.raises(NotCountedError, match=said):
        count("bytecodes", ("-c", program), time_max_s=60)


def test_a_load_that_hangs_is_given_up() -> None:
    with pytest.raises(NotCountedError, match="the count took more than 0 s"):
        count("bytecodes", ("-c", "import time; time.sleep(60)"), time_max_s=0.2)


def test_counts_are_steady_and_what_became_dearer_is_a_warning_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    monkeypatch.setattr(hot_path, "RECORD", record)
    monkeypatch.setattr(hot_path, "ROOT", tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setitem(hot_path._TIME_MAX_S, "bytecodes", 200)  # other tests run beside this one

    run(["bytecodes"], record=True)
    assert "::warning" not in capsys.readouterr().out
    ((version, kinds),) = json.loads(record.read_text()).items()
    now = kinds["bytecodes"]

    record.write_text(json.dumps({version: {"bytecodes": now | {"start": int(now["start"] / 1.2)}}}))
    token, start = run(["bytecodes"], record=False)
    assert token.ratio == pytest.approx(1, abs=0.01)
    assert start.ratio == pytest.approx(1.2, abs=0.01)
    said = capsys.readouterr().out
    assert said.count("::warning title=The hot path is dearer::bytecodes of a start") == 1
    assert "hot-path --record" in said

    dearer = count("bytecodes", ("-c", _DEARER), time_max_s=100)
    assert dearer["calibration"] == now["calibration"]
    assert [verdict.is_dearer for verdict in judge("bytecodes", dearer, now)] == [True, False]
