"""The file of past shutdowns behind the event loop: a disk that hangs holds up nothing else."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from structlog.testing import capture_logs

from service.errors import StartupError
from service.settings import Settings
from service.steps import at_once
from service.telemetry import shutdown_reports
from service.telemetry.metrics.exposition import exposed
from service.telemetry.metrics.metrics import Metrics
from service.telemetry.shutdown_history import Past, ShutdownHistory, read_history
from service.telemetry.shutdown_reports import ShutdownReports, open_shutdown_reports
from tests.api.inprocess import open_api
from tests.telemetry.scrape import samples_of


class Disk:
    """Hangs until it is released; counts the threads that wait for it."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.threads = 0
        self._may_answer = threading.Event()
        self._has_answered = threading.Semaphore(0)

    def read(self, _file: Path, *, limit: int) -> list[Past]:
        self.threads += 1
        self.begun.set()
        self._may_answer.wait()
        self._has_answered.release()
        return []

    def release(self) -> None:
        self._may_answer.set()
        for _ in range(self.threads):
            self._has_answered.acquire()


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(shutdown_reports, "read_history", disk.read)
    yield disk
    disk.release()


async def test_many_looks_at_a_disk_that_hangs_take_one_thread_and_none_of_the_others(
    tmp_path: Path, hanging: Disk
) -> None:
    file = tmp_path / "shutdowns"
    async with open_api(shutdowns_file=str(file)) as api:
        assert api.service.shutdown_reports is not None
        api.service.shutdown_reports._timeout_s = 0.01  # of the reports alone: the store may be slower
        others = trio.to_thread.current_default_thread_limiter()
        for _ in range(3):
            problem = (await api.call("GET", "/admin/shutdowns")).problem(503, "reports_unavailable")
            assert problem["detail"] == (
                "The reports of past shutdowns cannot be read: the disk has not answered within 0.01 s."
            )
            assert problem["retry_after_s"] == 10
        await trio.to_thread.run_sync(hanging.begun.wait)  # a thread may begin late
        assert hanging.threads == 1
        assert others.borrowed_tokens == 0
        with capture_logs() as logged, trio.fail_after(60):
            await api.service.shutdown_reports.note_started()
            await api.service.shutdown_reports.measure_last(Metrics())  # says nothing, and returns
        assert [it["log_level"] for it in logged] == ["warning"]


async def test_a_caller_that_leaves_waits_for_no_disk(tmp_path: Path, hanging: Disk) -> None:
    reports = ShutdownReports(tmp_path / "shutdowns", timeout_s=600)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                await reports.read(limit=1)

            nursery.start_soon(look)
            nursery.start_soon(look)
            await trio.to_thread.run_sync(hanging.begun.wait)
            nursery.cancel_scope.cancel()
    assert hanging.threads == 1


async def test_a_look_at_the_reports_touches_no_disk_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_api(store_url=f"sqlite:{tmp_path}/lastcall.db") as api:
        (tmp_path / "lastcall.db-shutdowns").touch()
        here = threading.get_ident()
        real: Callable[..., os.stat_result] = os.lstat
        looks = []

        def lstat(path: str, **more: Any) -> os.stat_result:
            looks.append(threading.get_ident() == here and str(path).startswith(str(tmp_path)))
            return real(path, **more)

        monkeypatch.setattr("os.lstat", lstat)
        assert (await api.call("GET", "/admin/shutdowns")).json == {"data": [], "kept": "file"}
        assert not any(looks)


async def test_a_file_that_cannot_be_read_is_not_told_as_no_shutdowns(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    async with open_api(shutdowns_file=str(file)) as api:
        assert (await api.call("GET", "/admin/shutdowns")).json == {"data": [], "kept": "file"}
        file.mkdir()
        problem = (await api.call("GET", "/admin/shutdowns")).problem(503, "reports_unavailable")
        assert problem["detail"].endswith(": not a regular file.")


async def test_the_metrics_tell_the_last_stops_of_each_result_and_no_crash(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    stops = [(75, 1000.0), (75, 2500.0), (0, 80.0), (0, "a while"), (None, None)]
    for number, (exit_code, total) in enumerate(stops):
        history = ShutdownHistory(file)
        history._run = msgspec.structs.replace(history._run, run=str(number), ticks="1")
        history.note_started()
        if exit_code is not None:
            history.note_stopped({"phases_ms": {"total": total}}, exit_code=exit_code, bounds_ms={})
    at = {str(past.line.of.run): past.line.at for past in read_history(file, limit=9)}
    metrics = Metrics()
    await ShutdownReports(file, timeout_s=60).measure_last(metrics)
    text = at_once(exposed(metrics.memory)).decode()
    told = {key: value for key, value in samples_of(text).items() if key[0].startswith("lastcall_last_shutdown_")}
    faults, clean = at["1"], at["3"]
    assert faults is not None
    assert clean is not None
    assert told == {
        ("lastcall_last_shutdown_timestamp_seconds", "result=faults"): faults.timestamp(),
        ("lastcall_last_shutdown_timestamp_seconds", "result=clean"): clean.timestamp(),
        ("lastcall_last_shutdown_seconds", "result=faults"): 2.5,
        ("lastcall_last_shutdown_seconds", "result=clean"): 0.08,  # another version has told the last one otherwise
    }


async def test_a_start_that_cannot_be_noted_has_one_warning(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    file.mkdir()
    reports = ShutdownReports(file, timeout_s=60)
    with capture_logs() as logged:
        await reports.note_started()
        await ShutdownReports(tmp_path / "other", timeout_s=60).note_started()
    assert logged == [
        {
            "log_level": "warning",
            "event": "this start is not noted for GET /admin/shutdowns",
            "file": str(file),
            "reason": "Is a directory",
        }
    ]


async def test_no_fault_of_the_reports_ends_the_service_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both calls are tasks of the nursery that holds the service."""
    file = tmp_path / "shutdowns"
    reports = ShutdownReports(file, timeout_s=60)
    reports.history.note_stopped({"reason": "SIGTERM"}, exit_code=0, bounds_ms={})
    file.write_bytes(file.read_bytes().replace(b"SIGTERM", b"SIG\xffERM"))
    with capture_logs() as logged:
        await reports.measure_last(Metrics())
    assert logged == [], "the line is passed over"

    def fail(*_: object, **__: object) -> None:
        raise ValueError("of no sense")

    monkeypatch.setattr(shutdown_reports, "read_history", fail)
    with capture_logs() as logged:
        await reports.measure_last(Metrics())
    assert [(it["log_level"], it["reason"]) for it in logged] == [("warning", "ValueError('of no sense')")]


async def test_where_no_thread_can_be_started_the_reports_are_unavailable_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run_sync(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    async with open_api(shutdowns_file=str(tmp_path / "shutdowns")) as api:
        monkeypatch.setattr("trio.to_thread.run_sync", run_sync)
        (await api.call("GET", "/admin/shutdowns")).problem(503, "reports_unavailable")
        reports = api.service.shutdown_reports
        assert reports is not None
        with capture_logs() as logged:
            await reports.note_started()
            await reports.measure_last(Metrics())
        assert [it["reason"] for it in logged] == ["can't start new thread"]
        monkeypatch.undo()


async def test_a_start_is_refused_where_the_file_can_never_be(tmp_path: Path) -> None:
    async def opened(file: Path) -> ShutdownReports | None:
        return await open_shutdown_reports(Settings(store_url="memory:", shutdowns_file=str(file)))

    with pytest.raises(StartupError, match=f"there is no folder {tmp_path}/none: make it"):
        await opened(tmp_path / "none" / "shutdowns")
    with pytest.raises(StartupError, match="not a regular file"):
        await opened(tmp_path)
    (tmp_path / "there").touch()
    for name in ("there", "new"):
        assert await opened(tmp_path / name) is not None
    assert await open_shutdown_reports(Settings(store_url="memory:")) is None
