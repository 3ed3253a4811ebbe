"""Under /v1 every answer is an error that OpenAI's clients can read, as long as there are no calls."""

from typing import Any

import pytest

from tests.api.inprocess import Reply, open_api

KEY = "a-key-of-sixteen-or-more"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY")


def error(reply: Reply, status: int, code: str) -> dict[str, Any]:
    """The error member of an answer that must be one, in OpenAI's shape."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply
    assert reply.json.keys() == {"error"}
    member: dict[str, Any] = reply.json["error"]
    assert member.keys() == {"message", "type", "param", "code"}
    assert member["code"] == code
    return member


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat/completions", "/v1/models?limit=3", "/v1/%C3%BC/x"])
@pytest.mark.parametrize("method", METHODS)
async def test_the_answer_to_each_call_says_that_the_api_is_not_there_yet(method: str, path: str) -> None:
    async with open_api() as api:
        body = {"model": "x", "messages": []} if method == "POST" else None
        member = error(await api.call(method, path, body), 404, "not_found")
    assert member["message"] == (
        "This server does not speak OpenAI's API yet: it has no call under /v1. Its own API is at /docs."
    )
    assert (member["type"], member["param"]) == ("invalid_request_error", None)


async def test_below_a_prefix_the_answer_is_the_same_and_names_the_page_there() -> None:
    async with open_api() as api:
        for path in ("/v1/models", "/ai/v1/models"):
            member = error(await api.call("GET", path, scope={"root_path": "/ai"}), 404, "not_found")
            assert "/ai/docs" in member["message"]


async def test_a_call_without_a_key_gets_401_in_the_same_shape() -> None:
    async with open_api(api_keys=(KEY,)) as api:
        reply = await api.call("POST", "/v1/chat/completions", {})
        assert error(reply, 401, "unauthorized")["type"] == "invalid_request_error"
        assert reply.headers["www-authenticate"] == "Bearer"
        error(await api.call("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"}), 404, "not_found")


async def test_another_host_is_403_in_the_same_shape() -> None:
    async with open_api() as api:
        error(await api.call("GET", "/v1/models", headers={"Host": "app.example.org"}), 403, "loopback_only")


async def test_a_path_that_only_begins_alike_is_a_problem() -> None:
    async with open_api() as api:
        for path in ("/v10", "/v1x/models", "/x/v1/models"):
            (await api.call("GET", path)).problem(404, "not_found")
