"""The calls for operators, as an attacker meets them: from a web page, through a proxy, with the wrong key."""

from typing import Any

import pytest

from service.api.http.callers import CALLER
from service.api.http.proxy import PEER
from tests.api.inprocess import LOOPBACK, Api, open_api

ADMIN, TALKER, READER = "the-key-of-an-operator", "the-key-of-a-talker", "the-key-of-a-reader"
KEYS = (
    {"name": "operator", "key": ADMIN, "may": ("administer",)},
    {"name": "talker", "key": TALKER, "may": ("talk", "read")},
    {"name": "reader", "key": READER, "may": ("read",)},
    "a-plain-key-of-a-caller",
)
JSON = {"Content-Type": "application/json"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def get(api: Api, headers: dict[str, str] | None = None, **scope: Any) -> Any:
    return await api.call("GET", "/admin/tree", headers=headers, scope=scope)


async def test_with_keys_only_a_key_that_administers_is_let_in() -> None:
    async with open_api(api_keys=KEYS) as api:
        assert (await get(api, bearer(ADMIN))).status == 200
        (await get(api)).problem(401, "unauthorized")
        (await get(api, bearer("another-key-of-a-caller"))).problem(401, "unauthorized")
        for key in (TALKER, READER, "a-plain-key-of-a-caller"):
            problem = (await get(api, bearer(key))).problem(403, "not_permitted")
            assert "administer" in problem["detail"]
            assert key not in str(problem)


async def test_with_keys_a_proxy_may_be_in_front() -> None:
    proxied = bearer(ADMIN) | {"X-Forwarded-For": "203.0.113.9", "Host": "chat.example.com"}
    async with open_api(api_keys=KEYS) as api:
        assert (await get(api, proxied, client=("10.0.0.1", 1))).status == 200


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP", "CF-Connecting-IP"])
async def test_without_keys_a_proxy_in_front_opens_nothing(name: str) -> None:
    async with open_api() as api:
        (await get(api, {name: "127.0.0.1"})).problem(403, "proxied_without_keys")


async def test_without_keys_only_this_machine_is_let_in_and_under_its_own_name() -> None:
    async with open_api() as api:
        assert (await get(api)).status == 200
        (await get(api, {"Host": "rebound.example.com"})).problem(403, "loopback_only")
        (await get(api, client=("10.0.0.1", 1))).problem(403, "loopback_only")
        (await get(api, client=None)).problem(403, "loopback_only")


@pytest.mark.parametrize("site", ["cross-site", "same-site", "CROSS-SITE", "", "x"])
async def test_a_page_of_another_origin_is_refused_by_what_the_browser_says_of_it(site: str) -> None:
    """So an <img>, a form, a script and ``fetch`` in the mode no-cors: no page can set or leave out this header."""
    async with open_api() as api:
        (await get(api, {"Sec-Fetch-Site": site})).problem(403, "cross_site")
    async with open_api(api_keys=KEYS) as api:
        (await get(api, bearer(ADMIN) | {"Sec-Fetch-Site": site})).problem(403, "cross_site")


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example.com", "http://localhost:3000", "null", "http://localhost.evil.com", "x", "http://["],
)
async def test_a_page_of_another_origin_is_refused_by_its_origin(origin: str) -> None:
    async with open_api(cors_origins=("*",)) as api:
        reply = await get(api, {"Origin": origin, "Host": "localhost"})
        reply.problem(403, "cross_site")
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost:8000", "Host": "localhost:8000"},
        {"Origin": "https://LocalHost:8000", "Host": "localhost:8000"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://chat.example.com", "Host": "localhost:8000"},
    ],
)
async def test_the_server_s_own_pages_and_programs_are_let_in(headers: dict[str, str]) -> None:
    async with open_api() as api:
        assert (await get(api, headers)).status == 200


async def test_cors_settings_do_not_hold_for_the_calls_of_operators() -> None:
    preflight = {
        "Origin": "https://app.example.com",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    async with open_api(cors_origins=("https://app.example.com",), api_keys=KEYS) as api:
        assert (await api.call("OPTIONS", "/sessions", headers=preflight)).status == 204
        (await api.call("OPTIONS", "/admin/tree", headers=preflight)).problem(403, "cross_site")
        reply = await get(api, bearer(ADMIN))
        assert reply.status == 200
        assert not [name for name in reply.headers if name.startswith("access-control")]
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["cache-control"] == "no-store"


async def test_a_caller_cannot_claim_to_come_from_another_process_of_the_service() -> None:
    claim = {CALLER.decode(): "administer talk read;operator", "Lastcall-Hops": "1"}
    async with open_api(api_keys=KEYS) as api:
        (await get(api, bearer(TALKER) | claim)).problem(403, "not_permitted")
        (await get(api, claim)).problem(401, "unauthorized")


async def test_another_process_of_the_service_passes_on_what_its_caller_may() -> None:
    peer: dict[str, Any] = {PEER: bool}
    async with open_api(api_keys=KEYS) as api:
        assert (await get(api, {CALLER.decode(): "administer;operator"}, **peer)).status == 200
        (await get(api, {CALLER.decode(): "read talk;talker"}, **peer)).problem(403, "not_permitted")
        (await get(api, **peer)).problem(403, "not_permitted")


def test_the_scope_of_these_tests_is_this_machine() -> None:
    assert LOOPBACK["client"][0] == "127.0.0.1"
