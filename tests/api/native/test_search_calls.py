"""``GET /sessions`` with ``q`` and with pairs of metadata."""

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.storage import search
from tests.api.inprocess import Api, open_api

MODEL = "scripted:?tokens=2&rate=0&first_token_s=0"


async def listed(api: Api, query: str) -> dict[str, Any]:
    reply = await api.call("GET", f"/sessions?{query}")
    assert reply.status == 200, reply
    page: dict[str, Any] = reply.json
    return page


async def ids(api: Api, query: str) -> list[str]:
    return [session["id"] for session in (await listed(api, query))["data"]]


async def test_sessions_are_searched_by_title_and_messages() -> None:
    async with open_api(model_url=MODEL) as api:
        await api.new_session(id="a", title="Trip to Lisbon")
        await api.new_session(id="b")
        items = [
            {"type": "message", "role": "user", "text": "Which flight goes to LISBON?"},
            {"type": "message", "role": "assistant", "text": "The one at noon."},
        ]
        added = await api.call("POST", "/sessions/b/messages", {"items": items})
        assert added.status == 201
        page = await listed(api, "q=lisbon")
        head = (await api.call("GET", "/sessions/b")).json["head"]
        assert [(it["id"], it["match"]) for it in page["data"]] == [
            ("b", {"turn_id": head, "snippet": "Which flight goes to LISBON?"}),
            ("a", {"turn_id": None, "snippet": "Trip to Lisbon"}),
        ]
        assert page["partial"] is False
        assert await ids(api, "q=noon+flight") == ["b"]
        assert await ids(api, "q=noon+trip") == await ids(api, "q=!") == []
        plain = await listed(api, "q=")
        assert [it["id"] for it in plain["data"]] == ["b", "a"]
        assert "partial" not in plain
        assert "match" not in plain["data"][0]
        await api.call("DELETE", "/sessions/b")
        assert await ids(api, "q=lisbon") == ["a"]


async def test_a_search_goes_on_page_by_page() -> None:
    async with open_api() as api:
        for n in range(5):
            await api.new_session(id=f"s{n}", title="word")
        first = await listed(api, "q=word&limit=3")
        second = await listed(api, f"q=word&limit=3&after={first['next']}")
        assert [it["id"] for it in first["data"] + second["data"]] == ["s4", "s3", "s2", "s1", "s0"]
        assert second["next"] is None
        (await api.call("GET", f"/sessions?after={first['next']}")).problem(422, "invalid_request", "after")
        (await api.call("GET", "/sessions?q=word&after=x")).problem(422, "invalid_request", "after")


async def test_a_search_out_of_time_answers_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SEARCH_S", 0)
    async with open_api() as api:
        for n, title in enumerate(("one two", "one", "two")):
            await api.new_session(id=f"s{n}", title=title)
        page = await listed(api, "q=two+one")
        assert (page["data"], page["partial"]) == ([], True), "not one request for all of it"
        rest = await listed(api, f"q=two+one&after={page['next']}")
        assert [it["id"] for it in rest["data"]] == ["s0"]


async def test_sessions_are_listed_by_metadata() -> None:
    async with open_api() as api:
        await api.new_session(id="a", title="word", metadata={"team": "blue", "a.b": "x=&y"})
        await api.new_session(id="b", title="word", metadata={"team": "red"})
        await api.new_session(id="c", metadata={"team": "blue"})
        assert await ids(api, "metadata.team=blue") == ["c", "a"]
        assert await ids(api, "metadata[team]=blue") == ["c", "a"], "as generated clients write it"
        assert await ids(api, f"metadata.team=blue&metadata.a.b={quote('x=&y')}") == ["a"]
        assert await ids(api, "metadata.team=blue&q=word") == ["a"]
        assert await ids(api, "metadata.team=blue&status=running") == []
        assert (await listed(api, "metadata.team=blue"))["partial"] is False
        first = await listed(api, "metadata.team=blue&limit=1")
        assert await ids(api, f"metadata.team=blue&limit=1&after={first['next']}") == ["a"]
        await api.call("PATCH", "/sessions/a", {"metadata": {"team": "red"}})
        assert await ids(api, "metadata.team=red") == ["b", "a"]
        assert await ids(api, "metadata.team=blue") == ["c"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("q=a&count=true", "count"),
        ("metadata.a=b&count=true", "count"),
        ("metadata=a", "metadata"),
        ("metadata.a=b&metadata.a=c", "metadata.a"),
        ("metadata.a=b&metadata[a]=b", "metadata[a]"),
        ("q=a&q=b", "q"),
        ("meta.a=b", "meta.a"),
    ],
)
async def test_filters_that_make_no_sense_are_refused_by_name(query: str, field: str) -> None:
    async with open_api() as api:
        (await api.call("GET", f"/sessions?{query}")).problem(422, "invalid_request", field)


async def test_a_key_or_value_that_no_session_can_have_is_refused() -> None:
    async with open_api() as api:
        for query in (
            "metadata.=x",
            f"metadata.{'k' * 65}=x",
            f"metadata.a={'v' * 513}",
            "metadata.a=%00",
            "metadata.%00=a",
        ):
            assert (await api.call("GET", f"/sessions?{query}")).json["code"] == "invalid_request", query
        assert (await api.call("GET", f"/sessions?q={'%20a' * 2000}")).status == 422, "a query string is bounded"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.text(max_size=200), st.text(max_size=64), st.text(max_size=200))
async def test_any_query_and_any_pair_are_safe(query: str, key: str, value: str) -> None:
    async with open_api() as api:
        for filters in (f"q={quote(query, errors='ignore')}", f"metadata.{quote(key)}={quote(value)}"):
            reply = await api.call("GET", f"/sessions?{filters}")
            assert reply.status in (200, 422), reply
        raw = await api.call("GET", "/sessions?q=%ff%00%22*&metadata.%27--=%ed%a0%80")
        assert raw.status in (200, 422)
