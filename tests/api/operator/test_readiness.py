"""Readiness follows the store: a server that cannot keep anything is to be sent nothing."""

from contextlib import closing
from pathlib import Path

import pytest

from service.errors import StoreError
from service.storage.sqlite import database
from tests.api.inprocess import open_api


async def test_it_is_not_ready_while_the_store_refuses_to_write(tmp_path: Path) -> None:
    path = tmp_path / "lastcall.db"
    async with open_api(store_url=f"sqlite:{path}", store_timeout_s=0.3) as api:
        await api.new_session(id="before")
        assert (await api.call("GET", "/readyz")).json == {"status": "ready"}
        with closing(database.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            refused = await api.call("POST", "/sessions", {"id": "s"})
            refused.problem(503, "store_unavailable")
            problem = (await api.call("GET", "/readyz")).problem(503, "store_unavailable")
            assert problem["retry_after_s"] > 0
            assert str(path) not in problem["detail"]
            assert (await api.call("GET", "/healthz")).status == 200
            assert (await api.call("GET", "/sessions/before")).status == 200
            with pytest.raises(StoreError):
                await api.service.sessions.pending_writes.settle()
            assert (await api.call("GET", "/readyz")).status == 503
            other.execute("ROLLBACK")
        await api.service.sessions.pending_writes.settle()  # what the mending loop does
        assert (await api.call("GET", "/readyz")).json == {"status": "ready"}
        assert {session["id"] for session in (await api.call("GET", "/sessions")).json["data"]} <= {"before", "s"}
