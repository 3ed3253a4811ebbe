"""The call for the reports of past shutdowns."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trio.testing import MockClock

from service.shutdown import Shutdown
from service.telemetry.shutdown_history import ShutdownHistory
from tests.api.http.test_admin_access import ADMIN, KEYS, TALKER, bearer
from tests.api.inprocess import open_api


async def test_past_shutdowns_are_listed_with_their_reports_and_crashes_without(tmp_path: Path) -> None:
    file = tmp_path / "lastcall.db-shutdowns"
    async with open_api(store_url=f"sqlite:{tmp_path}/lastcall.db") as api:
        assert (await api.call("GET", "/admin/shutdowns")).json == {"data": [], "kept": "file"}
        crashed = ShutdownHistory(file)
        crashed._run = msgspec.structs.replace(crashed._run, ticks="1")
        crashed.note_started()
        report = msgspec.structs.asdict(Shutdown(api.service.settings).report(tasks_left=2))
        stopped = ShutdownHistory(file)
        stopped.note_stopped(report | {"phases_ms": {"total": 1500.0}}, exit_code=75, bounds_ms={"total": 5000.0})
        stop, crash = (await api.call("GET", "/admin/shutdowns")).json["data"]
        assert crash == {"kind": "crash", "at": None} | {key: crash[key] for key in ("started_at", "pid", "version")}
        assert (stop["kind"], stop["exit_code"], stop["tasks_left"]) == ("stop", 75, 2)
        assert stop["faults"] == ["2 tasks were left"]
        assert datetime.fromisoformat(stop["at"]) - datetime.fromisoformat(stop["began_at"]) == timedelta(seconds=1.5)
        assert stop.keys() >= report.keys() | {"bounds_ms"}
        assert len((await api.call("GET", "/admin/shutdowns?limit=1")).json["data"]) == 1
        (await api.call("GET", "/admin/shutdowns?limit=51")).problem(422, "invalid_request", "limit")


async def test_without_a_file_nothing_is_kept_and_the_answer_says_so() -> None:
    async with open_api(store_url="memory:", api_keys=KEYS) as api:
        assert (await api.call("GET", "/admin/shutdowns", headers=bearer(ADMIN))).json == {"data": [], "kept": "none"}
        (await api.call("GET", "/admin/shutdowns", headers=bearer(TALKER))).problem(403, "not_permitted")


async def test_a_line_of_another_version_is_shown_as_far_as_it_is_known(tmp_path: Path, mock_clock: MockClock) -> None:
    file = tmp_path / "shutdowns"
    ShutdownHistory(file).note_stopped({"reason": "x", "news": 1}, exit_code=0, bounds_ms={})
    async with open_api(shutdowns_file=str(file)) as api:
        (stop,) = (await api.call("GET", "/admin/shutdowns")).json["data"]
        assert stop["reason"] == "x"
        assert "news" not in stop


RUN = {"run": "a", "pid": 1, "started_at": "2026-01-31T09:00:00Z", "version": "9", "boot": "b", "ticks": "1"}
STOP: dict[str, Any] = {"of": RUN, "at": "2026-01-31T09:05:00Z", "report": {"reason": "x"}}


@pytest.mark.parametrize(
    ("other", "left_out"),
    [
        ({"report": {"reason": "x", "phases_ms": None}}, "phases_ms"),
        ({"report": {"reason": "x", "phases_ms": {"total": 1e300}}}, "began_at"),
        ({"report": {"reason": "x", "faults": [{"what": "y"}]}}, "faults"),
        ({"report": {"reason": "x", "turns_finished": 1.5}}, "turns_finished"),
        ({"report": {"reason": "x", "turns_finished": 2**70}}, "turns_finished"),
        ({"report": [1]}, "reason"),
        ({"exit_code": None}, "exit_code"),
        ({"bounds_ms": ["x"]}, "bounds_ms"),
    ],
)
async def test_a_stop_that_another_version_tells_otherwise_is_shown_without_that_part(
    other: dict[str, Any], left_out: str, tmp_path: Path
) -> None:
    file = tmp_path / "shutdowns"
    file.write_bytes(b"\n".join(msgspec.json.encode(line) for line in ({"of": RUN}, STOP | other)))
    ShutdownHistory(file).note_stopped({"reason": "y"}, exit_code=0, bounds_ms={})
    async with open_api(shutdowns_file=str(file)) as api:
        reply = await api.call("GET", "/admin/shutdowns")
    assert reply.status == 200
    whole, part = reply.json["data"]
    assert whole["reason"] == "y"
    assert (part["kind"], part["at"]) == ("stop", STOP["at"])
    assert left_out not in part


@pytest.mark.parametrize(
    "line",
    [
        msgspec.json.encode({"of": RUN | {"started_at": "2026-01-31T09:00:00"}}),
        msgspec.json.encode(STOP | {"at": "2026-01-31T09:05:00"}),
        msgspec.json.encode(STOP).replace(b'"pid":1', b'"pid":1' + b"0" * 30),
        b'{"report":' + b"[" * 50_000,
    ],
)
async def test_a_line_that_cannot_be_shown_is_passed_over(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    file.write_bytes(line)
    ShutdownHistory(file).note_stopped({"reason": "y"}, exit_code=0, bounds_ms={})
    async with open_api(shutdowns_file=str(file)) as api:
        (shown,) = (await api.call("GET", "/admin/shutdowns")).json["data"]
    assert shown["reason"] == "y"


async def test_a_process_of_another_machine_is_unknown(tmp_path: Path) -> None:
    file = tmp_path / "shutdowns"
    file.write_bytes(msgspec.json.encode({"of": RUN}))
    async with open_api(shutdowns_file=str(file)) as api:
        (shown,) = (await api.call("GET", "/admin/shutdowns")).json["data"]
    assert shown == {
        "kind": "unknown",
        "at": None,
        "started_at": RUN["started_at"],
        "pid": 1,
        "version": "9",
    }
