"""The request's id: taken or made, in each answer and in each line of the request's work."""

import re
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from service.api.app import create_app
from service.api.http.request_id import name_request
from service.ids import REQUEST_ID, is_request_id
from tests.api.inprocess import SSE, Api, open_api
from tests.kept_log import kept_log, lines_of

MADE = re.compile(r"req_[0-9a-f]{32}")
ID = "X-Request-ID"


@given(st.lists(st.binary(max_size=140), max_size=3))
def test_the_id_is_safe_for_any_header_of_a_caller(values: list[bytes]) -> None:
    scope: dict[str, Any] = {"headers": [(b"x-request-id", value) for value in values]}
    request_id = name_request(scope)
    assert is_request_id(request_id)
    assert MADE.fullmatch(request_id) or [request_id.encode()] == values


@given(st.from_regex(REQUEST_ID, fullmatch=True))
def test_an_id_of_safe_characters_is_taken(request_id: str) -> None:
    assert name_request({"headers": [(b"X-Request-Id", request_id.encode())]}) == request_id


@pytest.mark.parametrize("sent", ["", " ", "a b", "a" * 129, 'a"', "a\\", "ä", "a\x1b[2J", "a,b", "{}", "a;b"])
def test_an_id_with_other_characters_is_replaced(sent: str) -> None:
    assert MADE.fullmatch(name_request({"headers": [(b"x-request-id", sent.encode())]}))


async def test_each_kind_of_answer_has_the_id() -> None:
    async with open_api(model_url="scripted:?tokens=1&rate=0&first_token_s=0") as api:
        await api.call("POST", "/sessions", {"id": "s"})
        calls: list[tuple[str, str, object, dict[str, str]]] = [
            ("GET", "/healthz", None, {}),
            ("GET", "/docs", None, {}),
            ("HEAD", "/sessions", None, {}),
            ("OPTIONS", "/sessions", None, {}),
            ("GET", "/nowhere", None, {}),
            ("BREW", "/docs", None, {}),
            ("POST", "/sessions", {"id": "s"}, {}),
            ("POST", "/sessions/s/turns", {"input": "x"}, {}),
            ("POST", "/sessions/s/turns", {"input": "x"}, SSE),
            ("GET", "//sessions", None, {}),
            ("DELETE", "/sessions/s", None, {}),
        ]
        for method, path, body, headers in calls:
            reply = await api.call(method, path, body, headers={ID: "from/a=gateway", **headers})
            assert reply.headers["x-request-id"] == "from/a=gateway", (method, path)
            reply = await api.call(method, path, body, headers=headers)
            assert MADE.fullmatch(reply.headers["x-request-id"]), (method, path)


async def test_an_answer_without_a_service_and_an_answer_to_a_crash_have_the_id_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reply = await Api(create_app(), None).call("GET", "/sessions", headers={ID: "a"})  # type: ignore[arg-type]
    assert (reply.status, reply.headers["x-request-id"]) == (503, "a")
    with kept_log("json") as read:
        async with open_api() as api:

            async def crash(*_: object, **__: object) -> None:
                await trio.lowlevel.checkpoint()
                raise RuntimeError("broken")

            monkeypatch.setattr(api.service.sessions, "list_sessions", crash)
            reply = await api.call("GET", "/sessions", headers={ID: "b"})
        (line,) = lines_of(read(), "request failed")
    assert (reply.status, reply.headers["x-request-id"], line["request_id"]) == (500, "b", "b")


async def test_a_page_of_another_origin_may_send_and_read_it() -> None:
    async with open_api(cors_origins=("https://app.example",)) as api:
        origin = {"Origin": "https://app.example"}
        asked = await api.call("OPTIONS", "/chat", headers={**origin, "Access-Control-Request-Method": "POST"})
        assert "X-Request-ID" in asked.headers["access-control-allow-headers"].split(", ")
        read = await api.call("GET", "/nowhere", headers=origin)
        assert "X-Request-ID" in read.headers["access-control-expose-headers"].split(", ")


async def test_the_line_of_a_turn_s_end_names_the_request_that_started_it() -> None:
    with kept_log("json") as read:
        async with open_api(model_url="scripted:?tokens=1&rate=0&first_token_s=0") as api:
            for number in range(2):
                body = {"session_id": "s", "message": "x"}
                await api.call("POST", "/chat", body, headers={ID: f"chat-{number}"})
            await api.call("POST", "/sessions/s/turns", {"input": "x"}, headers={ID: "turn"})
        assert [line["request_id"] for line in lines_of(read(), "turn ended")] == ["chat-0", "chat-1", "turn"]
