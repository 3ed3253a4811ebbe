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
from service.telemetry.shutdown_history import BYTES_MAX, Line, ShutdownHistory, history_file, read_history

REPORT: dict[str, Any] = {"reason": "SIGTERM", "phases_ms": {"total": 12.5}, "faults": ()}
BOUNDS = {"total": 5000.0}


def lines_of(file: Path, *, limit: int = 50) -> list[Line]:
    return [it.line for it in read_history(file, limit=limit)]


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
    read = lines_of(file)
    assert [(it.report or {})["reason"] for it in read] == ["reason 2", "reason 1", "reason 0"]
    assert read[0].at is not None
    assert read[0].bounds_ms == BOUNDS
    assert len(lines_of(file, limit=2)) == 2
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_start_without_a_stop_is_a_crash_once_its_process_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    ShutdownHistory(file).note_started()
    assert lines_of(file) == [], "this process lives"
    crashed = dead(ShutdownHistory(file))
    crashed.note_started()
    assert [(it.line.of, it.fate) for it in read_history(file, limit=50)] == [(crashed._run, "gone")]


def test_a_process_whose_name_is_no_utf8_is_seen_to_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"7 (\xff) S " + b" ".join(b"%d" % n for n in range(1, 40)))
    assert shutdown_history._start_ticks(7) == "19"


FIRST = shutdown_history._FIRST_NAMESPACE
HERE = {"boot": "this boot", "namespace": FIRST, "host": os.uname().nodename}


@pytest.mark.parametrize(
    ("namespace", "changes", "fate"),
    [
        (FIRST, {"boot": "before"}, "gone"),  # this machine has started anew
        (FIRST, {"boot": "other", "host": "other"}, "unknown"),
        (FIRST, {"namespace": "pid:[1]"}, "unknown"),
        (FIRST, {"namespace": "pid:[1]", "boot": "other"}, "unknown"),
        ("pid:[2]", {"namespace": "pid:[2]", "boot": "other"}, "unknown"),  # a container of the same name elsewhere
        ("pid:[2]", {"namespace": "pid:[2]", "ticks": "1"}, "gone"),
        (FIRST, {"namespace": ""}, "unknown"),
        (FIRST, {"ticks": ""}, "unknown"),
    ],
)
def test_a_process_that_cannot_be_seen_from_here_is_told_neither_as_a_crash_nor_as_alive(
    namespace: str, changes: dict[str, str], fate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown_history, "_boot", lambda: "this boot")
    monkeypatch.setattr(shutdown_history, "_namespace", lambda: namespace)
    other = ShutdownHistory(tmp_path / "shutdowns")
    other._run = msgspec.structs.replace(other._run, **(HERE | changes))
    other.note_started()
    assert [(it.line.at, it.fate) for it in read_history(tmp_path / "shutdowns", limit=50)] == [(None, fate)]
    stop(other)
    (told,) = lines_of(tmp_path / "shutdowns")
    assert told.at is not None, "its report says that it has stopped"


def test_a_start_that_is_written_after_its_stop_is_no_crash(tmp_path: Path) -> None:
    history = dead(ShutdownHistory(tmp_path / "shutdowns"))
    stop(history)
    history.note_started()
    (line,) = lines_of(tmp_path / "shutdowns")
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
        opened.write(b"\xff\x00{}\n[1]\n" + whole.replace(b"SIGTERM", b"SIG\xffERM") + whole[1:20])
    assert [line.of.run for line in lines_of(file)] == [second._run.run, first._run.run]


def test_a_file_that_has_grown_becomes_the_one_before_and_no_line_is_lost_to_that(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    old = ShutdownHistory(file)
    stop(old, filling="x" * BYTES_MAX)
    new = ShutdownHistory(file)
    new.note_started()
    stop(new)
    assert [line.of.run for line in lines_of(file)] == [new._run.run, old._run.run]
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
        assert history._run.run.encode() in file.read_bytes(), "the start is noted all the same"
    stop(history)
    assert len(lines_of(file)) == 2


def test_processes_that_write_at_once_lose_no_line(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    histories = [ShutdownHistory(file) for _ in range(8)]
    threads = [threading.Thread(target=stop, args=(history,)) for history in histories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {line.of.run for line in lines_of(file)} == {history._run.run for history in histories}


def test_a_stop_that_cannot_be_written_fails_nothing_and_a_start_says_so(tmp_path: Path) -> None:
    history = ShutdownHistory(tmp_path / "missing" / "shutdowns")
    with pytest.raises(FileNotFoundError):
        history.note_started()
    stop(history)
    assert lines_of(tmp_path / "missing" / "shutdowns") == []


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening a pipe waits for its other end
    for name in ("link", "folder", "pipe"):
        history = ShutdownHistory(tmp_path / name)
        with pytest.raises(OSError, match=r"symbolic links|directory|No such device"):
            history.note_started()
        stop(history)
        with pytest.raises(OSError, match=r"symbolic links|regular file"):
            lines_of(tmp_path / name)
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="regular file"):
            ShutdownHistory(tmp_path / "pipe").note_started()
    finally:
        os.close(reader)
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
    (line,) = lines_of(tmp_path / "shutdowns")
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
