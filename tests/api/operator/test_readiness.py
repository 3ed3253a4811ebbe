"""Readiness says that the store refuses writes, and stays 200: a balancer would take the reads away too."""

from pathlib import Path

import pytest
import trio

from service.errors import StoreError
from tests.api.inprocess import open_api
from tests.api.operator.locked_database import locked


async def test_readyz_is_503_while_the_file_of_the_store_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "lastcall.db"
    async with open_api(store_url=f"sqlite:{path}") as api:
        await api.new_session(id="before")
        path.rename(tmp_path / "aside.db")
        (await api.call("POST", "/sessions", {"id": "s"})).problem(503, "store_unavailable")
        (await api.call("GET", "/readyz")).problem(503, "store_unavailable")
        assert (await api.call("GET", "/healthz")).status == 200
        assert (await api.call("GET", "/sessions/before")).status == 200
        (tmp_path / "aside.db").rename(path)
        await api.service.sessions.pending_writes.retry()  # as the recovery loop does
        assert (await api.call("GET", "/readyz")).json == {"status": "ready"}


async def test_readyz_tells_that_the_store_refuses_writes_and_reads_go_on(tmp_path: Path) -> None:
    path = tmp_path / "lastcall.db"
    async with open_api(store_url=f"sqlite:{path}") as api:
        await api.new_session(id="before")
        assert (await api.call("GET", "/readyz")).json == {"status": "ready"}
        with locked(path):
            refused = await api.call("POST", "/sessions", {"id": "s"})
            refused.problem(503, "store_unavailable")
            ready = await api.call("GET", "/readyz")
            assert (ready.status, ready.json) == (200, {"status": "ready", "writes": "refused"})
            assert (await api.call("GET", "/healthz")).status == 200
            assert (await api.call("GET", "/sessions/before")).status == 200
            with pytest.raises(StoreError):
                await api.service.sessions.pending_writes.retry()
            assert (await api.call("GET", "/readyz")).json == {"status": "ready", "writes": "refused"}
        await api.service.sessions.pending_writes.retry()  # as the recovery loop does
        assert (await api.call("GET", "/readyz")).json == {"status": "ready"}
        assert {session["id"] for session in (await api.call("GET", "/sessions")).json["data"]} <= {"before", "s"}


async def test_readyz_is_503_from_the_moment_at_which_a_signal_is_seen() -> None:
    async with open_api(lame_duck_timeout_s=30) as api:
        await trio.to_thread.run_sync(api.service.shutdown.expect_notice, lambda: None)
        (await api.call("GET", "/readyz")).problem(503, "shutting_down")
        api.service.shutdown.notice("test")
        (await api.call("GET", "/readyz")).problem(503, "shutting_down")
        assert (await api.call("GET", "/healthz")).status == 200
        assert (await api.call("POST", "/sessions", {})).status == 201, "everything else works in the lame duck"
