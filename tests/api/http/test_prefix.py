"""Behind a proxy with a prefix for this service (hypercorn's ``--root-path``) every URL in an answer has the prefix."""

import re
from typing import Any

import pytest
from trio.testing import MockClock

from tests.api.inprocess import SSE, open_api

PREFIX = "/behind/a proxy"
QUOTED = "/behind/a%20proxy"
SCOPE: dict[str, Any] = {"root_path": PREFIX}


@pytest.mark.parametrize("passed_on", ["", PREFIX])
async def test_locations_problems_and_links_have_the_prefix(passed_on: str, autojump_clock: MockClock) -> None:
    """Some proxies pass the prefix on, others take it off."""
    async with open_api() as api:

        async def call(method: str, path: str, body: object = None, **headers: str) -> Any:
            return await api.call(method, passed_on + path, body, headers=headers, scope=SCOPE)

        created = await call("POST", "/sessions", {"id": "s"})
        assert (created.status, created.headers["location"]) == (201, f"{QUOTED}/sessions/s")
        forked = await call("POST", "/sessions/s/fork", {"id": "copy"})
        assert forked.headers["location"] == f"{QUOTED}/sessions/copy"
        locations = [
            (await call("POST", path, body, **headers)).headers["location"]
            for path, body, headers in (
                ("/chat", {"session_id": "s", "message": "Hi"}, {}),
                ("/sessions/s/turns", {"input": "Hi"}, {}),
                ("/sessions/s/turns", {"input": "Hi"}, SSE),
                ("/sessions/s/turns", {"input": "Hi", "background": True}, {}),
                ("/chat", {"session_id": "s", "message": "Hi"}, {"Last-Event-ID": "1"}),
                ("/chat", {"session_id": "s", "message": "?"}, {"Last-Event-ID": "1"}),
            )
        ]
        assert all(re.fullmatch(rf"{QUOTED}/sessions/s/turns/turn_\w{{32}}", location) for location in locations)

        assert (await call("GET", "/sessions/none")).json["type"] == f"{QUOTED}/docs#session_not_found"
        assert (await call("GET", "/nowhere")).json["type"] == f"{QUOTED}/docs#not_found"
        assert (await call("PUT", "/sessions")).json["type"] == f"{QUOTED}/docs#method_not_allowed"
        assert (await call("GET", "/openapi.json")).json["servers"] == [{"url": QUOTED}]
        page = (await call("GET", "/docs")).body.decode()
        assert re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", page) == ["openapi.json", "./"], "relative to the page"
        assert (await call("GET", "/healthz")).status == 200


async def test_a_path_that_only_begins_like_the_prefix_is_below_it() -> None:
    async with open_api() as api:
        for path in ("/behind/a proxysessions", "/behind/a proxy/behind/a proxy/sessions"):
            assert (await api.call("GET", path, scope=SCOPE)).status == 404
        for path in ("//sessions", "/behind/a proxy//sessions"):
            reply = await api.call("GET", path, scope=SCOPE)
            assert (reply.status, reply.json["type"]) == (404, f"{QUOTED}/docs#not_found")


async def test_without_a_prefix_nothing_is_put_before_our_paths() -> None:
    async with open_api() as api:
        for root_path in ("", "/"):
            created = await api.call("POST", "/sessions", {}, scope={"root_path": root_path})
            assert created.headers["location"] == f"/sessions/{created.json['id']}"
        assert (await api.call("GET", "/openapi.json")).json["servers"] == [{"url": "/"}]
