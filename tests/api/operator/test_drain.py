"""The call that begins the shutdown, and who may not make it: no web page can stop a local server."""

from typing import Any

import pytest
import trio.lowlevel
from trio.testing import MockClock

from service.api.operator.workers import ASK_STOP
from service.stop_state import Phase
from tests.api.http.test_admin_access import ADMIN, KEYS, READER, TALKER, bearer
from tests.api.inprocess import Api, open_api

JSON = {"Content-Type": "application/json"}


async def post(api: Api, headers: dict[str, str], raw: bytes = b"{}", **scope: Any) -> Any:
    return await api.call("POST", "/admin/drain", raw=raw, headers=headers, scope=scope)


async def test_a_drain_begins_the_shutdown_and_says_what_will_happen(autojump_clock: MockClock) -> None:
    async with open_api(drain_timeout_s=20, model_url="scripted:?tokens=1000&rate=10") as api:
        await api.new_session(id="s")
        await api.call("POST", "/sessions/s/turns", {"input": "Hi", "background": True})
        reply = await post(api, JSON)
        assert reply.status == 202
        assert reply.json == {
            "phase": "draining",
            "reason": "admin drain",
            "workers": 1,
            "bounds_s": {"lame_duck": 0, "draining": 20, "interrupting": 1, "releasing": 1, "total": 23},
        }
        again = await post(api, JSON)
        assert (again.status, again.json) == (202, reply.json)
        (await api.call("POST", "/sessions", {})).problem(503, "shutting_down")
        await api.service.shutdown.reached(Phase.RELEASING)
        assert api.service.shutdown.report(tasks_left=0).reason == "admin drain"


async def test_the_reason_is_that_of_the_first_notice(autojump_clock: MockClock) -> None:
    async with open_api(lame_duck_timeout_s=20) as api:
        api.service.shutdown.notice("SIGTERM")
        assert (await post(api, JSON)).json["reason"] == "SIGTERM"


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_a_worker_that_stops_already_asks_for_the_stop_of_the_whole_server(
    is_replaced: bool, autojump_clock: MockClock
) -> None:
    """It may stop alone, by a signal: then the master would start another one."""
    async with open_api(lame_duck_timeout_s=20) as api:
        asked: list[str] = []
        api.app.extensions[ASK_STOP] = asked.append
        try:
            api.service.shutdown.notice("SIGTERM", is_replaced=is_replaced)
            assert (await post(api, JSON)).json["reason"] == "SIGTERM"
        finally:
            del api.app.extensions[ASK_STOP]
        assert asked == ["admin drain"]


FORMS = (
    *("application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
    *("text/plain", "text/plain;application/json"),
)


@pytest.mark.parametrize("media_type", [*FORMS, "application/jsonx", ""])
async def test_what_a_page_can_send_without_a_preflight_stops_nothing(media_type: str) -> None:
    """A form, and ``fetch`` in the mode no-cors, also of a browser that tells neither origin nor site."""
    async with open_api() as api:
        (await post(api, {"Content-Type": media_type})).problem(415, "unsupported_media_type")
        (await post(api, {})).problem(415, "unsupported_media_type")
        (await post(api, {}, b"")).problem(415, "unsupported_media_type")
        (await post(api, JSON, b"")).problem(400, "malformed_body")
        (await post(api, JSON, b"[]")).problem(422, "invalid_request")
        (await post(api, JSON, b'{"now": true}')).problem(422, "invalid_request", "now")
        assert api.service.shutdown.phase is Phase.SERVING


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "https://evil.example.com"}, "cross_site"),
        ({"Origin": "null"}, "cross_site"),
        ({"Sec-Fetch-Site": "cross-site"}, "cross_site"),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, "cross_site"),
        ({"Host": "rebound.example.com", "Sec-Fetch-Site": "same-origin"}, "loopback_only"),
        ({"Host": "rebound.example.com", "Origin": "http://rebound.example.com"}, "loopback_only"),
        ({"X-Forwarded-For": "127.0.0.1"}, "proxied_without_keys"),
    ],
)
async def test_no_page_and_no_proxy_stops_a_server_without_keys(headers: dict[str, str], code: str) -> None:
    async with open_api(cors_origins=("*",)) as api:
        (await post(api, JSON | headers)).problem(403, code)
        assert api.service.shutdown.phase is Phase.SERVING


async def test_a_page_that_asks_first_is_refused_then() -> None:
    preflight = {"Origin": "https://evil.example.com", "Access-Control-Request-Method": "POST"}
    async with open_api(cors_origins=("*",)) as api:
        (await api.call("OPTIONS", "/admin/drain", headers=preflight)).problem(403, "cross_site")


async def test_with_keys_only_one_that_administers_stops_the_server(autojump_clock: MockClock) -> None:
    async with open_api(api_keys=KEYS, lame_duck_timeout_s=5) as api:
        (await post(api, JSON)).problem(401, "unauthorized")
        for key in (TALKER, READER):
            (await post(api, JSON | bearer(key))).problem(403, "not_permitted")
        assert str(api.service.shutdown.phase) == "serving"
        assert (await post(api, JSON | bearer(ADMIN))).status == 202
        assert api.service.shutdown.phase is Phase.LAME_DUCK
        await trio.lowlevel.checkpoint()
