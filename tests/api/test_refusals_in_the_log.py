"""The log of refused requests: each kind, and the store's reason; no text of callers."""

from pathlib import Path
from typing import Any, cast

import apsw
import pytest
import trio
from trio.testing import MockClock

from service.api.app import create_app
from service.errors import StoreError
from tests.api.inprocess import Api, open_api
from tests.kept_log import kept_log, lines_of

SECRET = "what-only-the-caller-knows"


def refused(log: str) -> list[dict[str, Any]]:
    return lines_of(log, "requests refused")


async def test_fifty_refusals_are_counted_by_code_and_route(autojump_clock: MockClock) -> None:
    with kept_log("json") as read:
        async with open_api(model_url="scripted:?tokens=1&first_token_s=100") as api:
            session = await api.new_session()
            path = f"/sessions/{session}/turns"
            await api.call("POST", path, {"input": SECRET, "background": True})
            for number in range(50):
                headers = {"X-Request-ID": f"r{number}", "X-Other": SECRET}
                (await api.call("POST", path, {"input": SECRET}, headers=headers)).problem(409, "turn_in_progress")
            (await api.call("GET", f"/{SECRET}")).problem(404, "not_found")
            (await api.call("GET", f"//{SECRET}")).problem(404, "not_found")
            await trio.sleep(2)
        lines = refused(read())
        assert SECRET not in read()
    kinds = [(it["code"], it["status"], it["level"], it.get("route")) for it in lines]
    route = "POST /sessions/<session_id>/turns"
    assert set(kinds) == {("turn_in_progress", 409, "info", route), ("not_found", 404, "info", None)}
    assert sum(it["count"] for it in lines if it["code"] == "turn_in_progress") == 50
    assert sum(it["count"] for it in lines if it["code"] == "not_found") == 2
    assert (lines[0]["count"], lines[0]["request_id"]) == (1, "r0")
    assert len(lines) < 10


async def test_a_request_before_the_service_has_started_is_counted_too() -> None:
    with kept_log("json") as read:
        await Api(create_app(), None).call("GET", "/sessions")  # type: ignore[arg-type]
        assert [(it["code"], it["level"]) for it in refused(read())] == [("not_ready", "info")]


async def test_a_refusing_store_is_logged_with_its_words(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreError("The store failed: the disk is full; free some space.") from apsw.FullError("disk is full")

    with kept_log("json") as read:
        async with open_api() as api:
            monkeypatch.setattr(api.service.store, "create_session", refuse)
            (await api.call("POST", "/sessions", {})).problem(503, "store_unavailable")
        (first,) = refused(read())
    assert (first["level"], first["cause"], first["store"]) == (
        "warning",
        "FullError: disk is full",
        api.service.store.name,
    )
    assert "the disk is full" in first["error"]


async def test_a_full_disk_is_in_the_log_with_the_path_of_the_database(tmp_path: Path) -> None:
    path = tmp_path / "lastcall.db"
    with kept_log("json") as read, trio.fail_after(60):
        async with open_api(store_url=f"sqlite:{path}") as api:
            await cast("Any", api.service.store)._writing.call(lambda db: db.pragma("max_page_count", 1))
            body = {"system_message": "x" * 200_000}
            (await api.call("POST", "/sessions", body)).problem(503, "store_unavailable")
        (line,) = refused(read())
    assert line["store"] == f"sqlite:{path}"
    assert line["cause"].startswith("FullError: ")
