"""Preconditions on sessions, as a client sees them: ``ETag`` and ``If-Match``."""

import pytest
import trio
from trio.testing import MockClock

from tests.api.inprocess import Api, open_api

ALL = ["*", " * "]
OTHERS = ['"0f"', '""', '"a,b", "c"', '"a" , , "b",', ',"a"', 'W/"x"', '"\xe9"']
MALFORMED = [
    "",
    " ",
    ",",
    "0f",
    '"',
    '"a',
    'a"',
    '"a" "b"',
    '*, "a"',
    '"a", *',
    "**",
    'w/"a"',
    'W/ "a"',
    '"a b"',
    "W/*",
]


async def _etag(api: Api) -> str:
    return (await api.call("GET", "/sessions/me")).headers["etag"]


async def test_the_etag_of_a_session_changes_with_what_patch_changes_alone(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        created = await api.call("POST", "/sessions", {"id": "me", "metadata": {"a": "b"}})
        etag = created.headers["etag"]
        assert etag.startswith('"')
        assert etag.endswith('"')
        assert await _etag(api) == etag
        assert (await api.call("PATCH", "/sessions/me", {"metadata": {"a": "b"}})).headers["etag"] == etag
        head = await api.call("HEAD", "/sessions/me")
        assert (head.headers["etag"], head.headers["cache-control"]) == (etag, "no-store")
        patched = await api.call("PATCH", "/sessions/me", {"title": "New"})
        assert patched.headers["etag"] == await _etag(api) != etag
        forked = await api.call("POST", "/sessions/me/fork", {"id": "copy"})
        assert forked.headers["etag"] == (await api.call("GET", "/sessions/copy")).headers["etag"]


async def test_a_change_is_made_only_to_the_session_that_was_seen() -> None:
    async with open_api() as api:
        etag = (await api.call("POST", "/sessions", {"id": "me"})).headers["etag"]
        first = await api.call("PATCH", "/sessions/me", {"title": "First"}, headers={"If-Match": f'"x", {etag}'})
        assert (first.status, first.json["title"]) == (200, "First")
        for method, body in (("PATCH", {"title": "Second"}), ("DELETE", None)):
            refused = await api.call(method, "/sessions/me", body, headers={"If-Match": etag})
            refused.problem(412, "precondition_failed")
            assert refused.headers["etag"] == first.headers["etag"]
        assert (await api.call("GET", "/sessions/me")).json["title"] == "First"
        deleted = await api.call("DELETE", "/sessions/me", headers={"If-Match": first.headers["etag"]})
        assert deleted.status == 204
        for method, body in (("PATCH", {}), ("DELETE", None)):
            gone = await api.call(method, "/sessions/me", body, headers={"If-Match": "*"})
            gone.problem(404, "session_not_found")


@pytest.mark.parametrize("value", [*ALL, *OTHERS])
async def test_every_form_of_if_match_is_read(value: str) -> None:
    async with open_api() as api:
        etag = (await api.call("POST", "/sessions", {"id": "me"})).headers["etag"]
        reply = await api.call("PATCH", "/sessions/me", {}, headers={"If-Match": value})
        assert reply.status == (200 if value in ALL else 412)
        if value not in ALL:
            assert (await api.call("PATCH", "/sessions/me", {}, headers={"If-Match": f"{value}, {etag}"})).status == 200


async def test_a_weak_etag_never_matches_a_change() -> None:
    async with open_api() as api:
        etag = (await api.call("POST", "/sessions", {"id": "me"})).headers["etag"]
        changed = await api.call("PATCH", "/sessions/me", {}, headers={"If-Match": f"W/{etag}"})
        changed.problem(412, "precondition_failed")


@pytest.mark.parametrize("value", MALFORMED)
async def test_a_malformed_list_of_etags_is_refused_by_name(value: str) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        for method, body in (("PATCH", {}), ("DELETE", None)):
            reply = await api.call(method, "/sessions/me", body, headers={"If-Match": value})
            reply.problem(400, "malformed_header", "If-Match")
        assert (await api.call("GET", "/sessions/me")).status == 200


async def test_a_long_list_of_etags_is_read_in_one_pass() -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        for value in (" " * 20_000 + "x", '"a",' * 10_000, "," * 20_000, '"' * 20_001, 'W/"' * 9_000):
            with trio.fail_after(5):
                reply = await api.call("PATCH", "/sessions/me", {}, headers={"If-Match": value})
            assert reply.status in (400, 412)


async def test_a_look_shows_the_session_as_it_is_whatever_etag_the_client_has(autojump_clock: MockClock) -> None:
    """The ETag does not stand for the head, the state and the counts, so it cannot say that they are as before."""
    async with open_api(model_url="scripted:?tokens=10&rate=1") as api:
        etag = (await api.call("POST", "/sessions", {"id": "me"})).headers["etag"]
        turn = await api.call("POST", "/sessions/me/turns", {"input": "Hi", "background": True})
        running = await api.call("GET", "/sessions/me", headers={"If-None-Match": etag})
        assert (running.status, running.json["status"]) == (200, "running")
        await api.call("GET", f"{turn.headers['location']}?wait=60")
        for value in (etag, f"W/{etag}", f'"x", {etag}', "*", "0f"):
            ended = await api.call("GET", "/sessions/me", headers={"If-None-Match": value})
            assert (ended.status, ended.headers["etag"]) == (200, etag)
            assert (ended.json["status"], ended.json["head"]) == ("idle", turn.json["id"])


async def test_a_title_that_a_model_writes_changes_the_etag(autojump_clock: MockClock) -> None:
    async with open_api(title_model="scripted") as api:
        etag = (await api.call("POST", "/sessions", {"id": "me"})).headers["etag"]
        await api.call("POST", "/sessions/me/turns", {"input": "Hi"})
        await trio.sleep(5)
        titled = await api.call("GET", "/sessions/me")
        assert titled.json["title"]
        assert titled.headers["etag"] != etag


async def test_a_wrong_body_is_told_before_a_wrong_etag() -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        reply = await api.call("PATCH", "/sessions/me", {"title": 1}, headers={"If-Match": '"x"'})
        reply.problem(422, "invalid_request", "title")
