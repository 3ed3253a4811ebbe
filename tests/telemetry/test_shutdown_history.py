"""The history of shutdowns: what is written is read, whatever a crash, other processes or the disk do to the file."""

import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.settings import Settings
from service.telemetry import shutdown_history
from service.telemetry.shutdown_history import BYTES_MAX, ShutdownHistory, history_file, read_history

REPORT: dict[str, Any] = {"reason": "SIGTERM", "phases_ms": {"total": 12.5}, "faults": ()}
BOUNDS = {"total": 5000.0}


def stop(history: ShutdownHistory, **report: Any) -> None:
    history.note_stopped(REPORT | report, exit_code=0, bounds_ms=BOUNDS)


def dead(history: ShutdownHistory) -> ShutdownHistory:
    """As after a kill: the process id is another process's, or none's."""
    history._run = msgspec.structs.replace(history._run, ticks="1")
    return history


def test_stops_come_newest_first_with_their_reports(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    for number in range(3):
        history = ShutdownHistory(file)
        history.note_started()
        stop(history, reason=f"reason {number}")
    read = read_history(file, limit=50)
    assert [(it.report or {})["reason"] for it in read] == ["reason 2", "reason 1", "reason 0"]
    assert read[0].at is not None
    assert read[0].bounds_ms == BOUNDS
    assert len(read_history(file, limit=2)) == 2
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_start_without_a_stop_is_a_crash_once_its_process_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    ShutdownHistory(file).note_started()
    assert read_history(file, limit=50) == [], "this process lives"
    crashed = dead(ShutdownHistory(file))
    crashed.note_started()
    rebooted = ShutdownHistory(file)
    rebooted._run = msgspec.structs.replace(rebooted._run, boot="another boot")
    rebooted.note_started()
    assert {line.of.run for line in read_history(file, limit=50)} == {crashed._run.run, rebooted._run.run}
    assert all(line.at is None for line in read_history(file, limit=50))


def test_a_start_that_is_written_after_its_stop_is_no_crash(tmp_path: Path) -> None:
    history = dead(ShutdownHistory(tmp_path / "shutdowns"))
    stop(history)
    history.note_started()
    (line,) = read_history(tmp_path / "shutdowns", limit=50)
    assert line.at is not None


def test_a_torn_line_and_bytes_of_no_sense_spoil_no_other(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    first = ShutdownHistory(file)
    stop(first)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    second = ShutdownHistory(file)
    stop(second)
    with file.open("ab") as opened:
        opened.write(b"\xff\x00{}\n[1]\n" + whole[1:20])
    assert [line.of.run for line in read_history(file, limit=50)] == [second._run.run, first._run.run]


def test_a_file_that_has_grown_becomes_the_one_before_and_no_line_is_lost_to_that(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    old = ShutdownHistory(file)
    stop(old, filling="x" * BYTES_MAX)
    new = ShutdownHistory(file)
    new.note_started()
    stop(new)
    assert [line.of.run for line in read_history(file, limit=50)] == [new._run.run, old._run.run]
    assert file.stat().st_size < BYTES_MAX
    assert sorted(it.name for it in tmp_path.iterdir()) == ["shutdowns", "shutdowns.1"]


def test_only_one_of_several_processes_moves_a_file_away(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    stop(ShutdownHistory(file), filling="x" * BYTES_MAX)
    with file.open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)  # as the other one does meanwhile
        history = ShutdownHistory(file)
        history.note_started()
        assert not file.with_name("shutdowns.1").exists()
    stop(history)
    assert len(read_history(file, limit=50)) == 2


def test_processes_that_write_at_once_lose_no_line(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    histories = [ShutdownHistory(file) for _ in range(8)]
    threads = [threading.Thread(target=stop, args=(history,)) for history in histories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {line.of.run for line in read_history(file, limit=50)} == {history._run.run for history in histories}


def test_a_file_that_cannot_be_written_or_read_fails_nothing(tmp_path: Path) -> None:
    history = ShutdownHistory(tmp_path / "missing" / "shutdowns")
    history.note_started()
    stop(history)
    assert read_history(tmp_path / "missing" / "shutdowns", limit=50) == []
    (tmp_path / "link").symlink_to(tmp_path / "target")
    ShutdownHistory(tmp_path / "link").note_started()
    assert not (tmp_path / "target").exists(), "a link is not followed"


def test_a_disk_that_hangs_holds_no_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    writing: list[threading.Thread] = []

    def hang(*_: object) -> None:
        writing.append(threading.current_thread())
        may_write.wait()

    monkeypatch.setattr(shutdown_history, "_append", hang)
    stop(ShutdownHistory(tmp_path / "shutdowns"))  # returns
    may_write.set()
    for thread in writing:
        thread.join()


def test_long_faults_are_shortened(tmp_path: Path) -> None:
    stop(ShutdownHistory(tmp_path / "shutdowns"), faults=("x" * 10_000,) * 1000)
    (line,) = read_history(tmp_path / "shutdowns", limit=50)
    assert line.report is not None
    assert len(line.report["faults"]) == shutdown_history.FAULTS_MAX
    assert (tmp_path / "shutdowns").stat().st_size < 10_000


def test_the_file_is_beside_a_sqlite_database_or_where_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    assert history_file(Settings(store_url=f"sqlite:{tmp_path}/link.db")) == tmp_path / "real.db-shutdowns"
    assert history_file(Settings(store_url="memory:")) is None
    assert history_file(Settings(store_url="memory:", shutdowns_file="/var/x")) == Path("/var/x")
    assert history_file(Settings(store_url="postgresql://localhost/x")) is None
    assert os.getpid() == ShutdownHistory(tmp_path / "x")._run.pid
