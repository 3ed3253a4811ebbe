"""Titles that a model writes, as a client sees them."""

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.api.inprocess import open_api

ALL = "scripted:?tokens=3&rate=0&first_token_s=0"


async def test_a_page_sees_the_title_by_updated_at(autojump_clock: MockClock) -> None:
    async with open_api(model_url=ALL, title_model="titles") as api:
        made = await api.call("POST", "/sessions", {"id": "me"})
        created, etag = made.json, made.headers["etag"]
        assert created["updated_at"] == created["last_accessed_at"] == created["created_at"]
        assert (await api.call("POST", "/sessions/me/turns", {"input": "Hi"})).json["state"] == "completed"
        await trio.sleep(1)
        await wait_all_tasks_blocked()
        session = await api.call("GET", "/sessions/me")
        assert session.json["title"]
        assert session.json["updated_at"] > session.json["last_accessed_at"] > created["updated_at"]
        assert session.headers["etag"] != etag, "a title is a change for If-Match"
        turns = (await api.call("GET", "/sessions/me/turns")).json["data"]
        assert session.json["usage"]["output_tokens"] > turns[0]["usage"]["output_tokens"]
        assert len(turns) == 1
        refused = await api.call("PATCH", "/sessions/me", {"title": "Mine"}, headers={"If-Match": etag})
        refused.problem(412, "precondition_failed")
