"""Calls about sessions, as a client sees them."""

from datetime import datetime

from trio.testing import MockClock

from tests.api.inprocess import SSE, Api, open_api


async def test_a_session_is_created_read_changed_and_deleted() -> None:
    async with open_api(idle_timeout_s=1800) as api:
        created = await api.call("POST", "/sessions", {"id": "me", "metadata": {"team": "blue"}, "title": "T"})
        assert created.status == 201
        assert created.headers["location"] == "/sessions/me"
        session = created.json
        assert list(session) == [
            "id", "created_at", "last_accessed_at", "updated_at", "expires_at", "idle_timeout_s", "title", "model",
            "system_message", "temperature", "max_output_tokens", "metadata",
            "status", "head", "message_count", "usage",
        ]  # fmt: skip
        assert session["created_at"].endswith("Z")
        lifetime = datetime.fromisoformat(session["expires_at"]) - datetime.fromisoformat(session["created_at"])
        assert lifetime.total_seconds() == session["idle_timeout_s"] == 1800
        assert repr(session["idle_timeout_s"]) == "1800", "a whole number has no fraction"
        assert (await api.call("GET", created.headers["location"])).json == session

        patched = await api.call("PATCH", "/sessions/me", {"title": None, "metadata": {}, "idle_timeout_s": 60})
        assert patched.status == 200
        assert (patched.json["title"], patched.json["metadata"], patched.json["idle_timeout_s"]) == (None, {}, 60)

        deleted = await api.call("DELETE", "/sessions/me")
        assert (deleted.status, deleted.body) == (204, b"")
        assert "content-type" not in deleted.headers
        for method, body in (("GET", None), ("PATCH", {}), ("DELETE", None)):
            (await api.call(method, "/sessions/me", body)).problem(404, "session_not_found")


async def test_a_taken_id_is_a_conflict() -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        (await api.call("POST", "/sessions", {"id": "me"})).problem(409, "session_exists")


async def test_sessions_are_listed_in_pages_with_an_exact_count() -> None:
    async with open_api() as api:
        ids = [await api.new_session() for _ in range(5)]
        first = (await api.call("GET", "/sessions?limit=3&count=true")).json
        assert first["count"] == 5
        second = (await api.call("GET", f"/sessions?limit=3&after={first['next']}")).json
        assert second["next"] is None
        assert "count" not in second
        assert [session["id"] for session in first["data"] + second["data"]] == ids[::-1]
        assert (await api.call("GET", "/sessions?status=running")).json["data"] == []


async def test_wrong_parameters_are_refused_by_name(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        for query, field in [
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("limit=x", "limit"),
            ("limit=", "limit"),
            ("limit=1.5", "limit"),
            ("limit=1.0", "limit"),
            ("limit=1e1", "limit"),
            ("limit=1&limit=2", "limit"),
            ("after=nonsense", "after"),
            ("after=%00", "after"),
            ("after=%FF", "after"),
            ("after=" + "x" * 600, "after"),
            ("status=dead", "status"),
            ("count=maybe", "count"),
            ("query=x", "query"),
            ("%FF=x", "%FF"),
        ]:
            (await api.call("GET", f"/sessions?{query}")).problem(422, "invalid_request", field)
        (await api.call("GET", "/sessions/me?expand=head")).problem(422, "invalid_request", "expand")
        assert (await api.call("POST", "/sessions/me/turns", {"input": "Hi"})).status == 200
        (await api.call("GET", "/sessions/me/messages?after=msg_0")).problem(422, "invalid_request", "after")
        (await api.call("GET", "/sessions/me/turns?after=!")).problem(422, "invalid_request", "after")


async def test_ids_of_an_impossible_form_are_not_found() -> None:
    async with open_api() as api:
        session_id = await api.new_session()
        for bad in ("%00", "%FF", "a%20b", "x" * 5000, "%F0%9F%98%80", "a%0A", "%2E%2E", "a:b"):
            (await api.call("GET", f"/sessions/{bad}")).problem(404, "session_not_found")
            (await api.call("GET", f"/sessions/{session_id}/turns/{bad}")).problem(404, "turn_not_found")
        (await api.call("GET", "/sessions/a%2Fb")).problem(404, "not_found")


async def test_messages_are_the_path_to_the_head_oldest_first(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        session_id = await api.new_session()
        for text in ("one", "two"):
            assert (await api.call("POST", f"/sessions/{session_id}/turns", {"input": text})).status == 200
        messages = await _messages(api, session_id)
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        assert [message["text"] for message in messages][::2] == ["one", "two"]
        session = (await api.call("GET", f"/sessions/{session_id}")).json
        assert session["message_count"] == 4
        assert session["usage"]["output_tokens"] > 0
        assert session["head"] == messages[-1]["turn_id"]


async def test_a_fork_is_a_session_with_a_copy_of_the_conversation(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        settings = {"title": "T", "system_message": "Be brief.", "metadata": {"team": "blue"}, "idle_timeout_s": 60}
        await api.new_session(id="me", **settings)
        for text in ("one", "two"):
            assert (await api.call("POST", "/sessions/me/turns", {"input": text})).status == 200
        first, _ = (await api.call("GET", "/sessions/me/turns")).json["data"]

        forked = await api.call("POST", "/sessions/me/fork", {})
        assert forked.status == 201
        assert forked.headers["location"] == f"/sessions/{forked.json['id']}"
        assert (await api.call("GET", forked.headers["location"])).json == forked.json
        source = (await api.call("GET", "/sessions/me")).json
        assert {name: forked.json[name] for name in settings} == settings
        assert (forked.json["message_count"], forked.json["usage"]) == (4, source["usage"])
        copies = await _messages(api, forked.json["id"])
        originals = await _messages(api, "me")
        assert [message["text"] for message in copies] == [message["text"] for message in originals]
        assert {message["id"] for message in copies}.isdisjoint(message["id"] for message in originals)

        early = (await api.call("POST", "/sessions/me/fork", {"at": first["id"], "id": "early"})).json
        assert (early["id"], early["message_count"]) == ("early", 2)
        events = (await api.call("GET", f"/sessions/early/turns/{early['head']}/events", headers=SSE)).events
        assert (events[0]["session_id"], events[0]["turn_id"]) == ("early", early["head"])
        assert events[-1]["type"] == "turn.completed"
        assert (await api.call("DELETE", "/sessions/me")).status == 204
        assert len(await _messages(api, forked.json["id"])) == 4


async def test_an_invalid_fork_is_refused(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=100&rate=1") as api:
        (await api.call("POST", "/sessions/me/fork", {})).problem(404, "session_not_found")
        (await api.call("POST", "/sessions/%20/fork", {})).problem(404, "session_not_found")
        await api.new_session(id="me")
        (await api.call("POST", "/sessions/me/fork", {"id": "me"})).problem(409, "session_exists")
        unknown = {"at": "turn_" + 32 * "0"}
        (await api.call("POST", "/sessions/me/fork", unknown)).problem(422, "invalid_request", "at")
        (await api.call("POST", "/sessions/me/fork", {"at": "x"})).problem(422, "invalid_request", "at")
        (await api.call("POST", "/sessions/me/fork", {"id": ".."})).problem(422, "invalid_request", "id")
        (await api.call("POST", "/sessions/me/fork", {"title": "x"})).problem(422, "invalid_request", "title")
        turn = (await api.call("POST", "/sessions/me/turns", {"input": "Hi", "background": True})).json["id"]
        problem = (await api.call("POST", "/sessions/me/fork", {})).problem(409, "turn_in_progress")
        assert problem["turn_id"] == turn
        assert "on_conflict" not in problem["detail"]
        api.service.shutdown.notice("test")
        (await api.call("POST", "/sessions/me/fork", {})).problem(503, "shutting_down")


async def _messages(api: Api, session_id: str) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    after = ""
    while True:
        page = (await api.call("GET", f"/sessions/{session_id}/messages?limit=1{after}")).json
        messages += page["data"]
        if page["next"] is None:
            return messages
        after = f"&after={page['next']}"


async def test_at_the_bound_on_sessions_the_answer_is_503(autojump_clock: MockClock) -> None:
    async with open_api(memory_sessions_max=1) as api:
        session_id = await api.new_session()
        calls: list[tuple[str, dict[str, str]]] = [
            ("/sessions", {}),
            (f"/sessions/{session_id}/fork", {}),
            ("/chat", {"message": "Hi"}),
        ]
        for path, body in calls:
            refused = await api.call("POST", path, body)
            refused.problem(503, "session_limit")
            assert int(refused.headers["retry-after"]) >= 1
        assert api.service.sessions.statistics().ends_not_stored == 0
        more = await api.call("POST", "/chat", {"message": "Hi", "session_id": session_id})
        assert more.events[-1]["type"] == "turn.completed"
        assert (await api.call("DELETE", f"/sessions/{session_id}")).status == 204
        await api.new_session()


async def test_a_session_has_options_for_turns_that_name_none(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?rate=0&first_token_s=0") as api:
        created = await api.call("POST", "/sessions", {"temperature": 1, "max_output_tokens": 3})
        assert (created.json["temperature"], created.json["max_output_tokens"]) == (1, 3)
        session = created.headers["location"]
        cut = await api.call("POST", f"{session}/turns", {"input": "a b c d e f g h"})
        assert (cut.json["finish_reason"], cut.json["usage"]["output_tokens"]) == ("length", 3)
        whole = await api.call("POST", f"{session}/turns", {"input": "a b c", "max_output_tokens": 100})
        assert whole.json["finish_reason"] == "stop"
        own = await api.call("POST", f"{session}/turns", {"input": "a", "system_message": "x" * 100})
        assert own.status == 200
        patched = await api.call("PATCH", session, {"temperature": 0.25, "max_output_tokens": None})
        assert (patched.json["temperature"], patched.json["max_output_tokens"]) == (0.25, None)
        for wrong in ({"temperature": 2.1}, {"temperature": -0.1}, {"max_output_tokens": 0}):
            (await api.call("PATCH", session, wrong)).problem(422, "invalid_request", *wrong)
        long = {"input": "a", "system_message": "x" * 300_000}
        (await api.call("POST", f"{session}/turns", long)).problem(413, "input_too_large", "system_message")


async def test_the_head_moves_to_another_branch_that_the_next_turn_follows(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        session_id = await api.new_session()
        url = f"/sessions/{session_id}"
        first, second = [
            (await api.call("POST", f"{url}/turns", {"input": text})).json["id"] for text in ("one", "two")
        ]
        moved = await api.call("PATCH", url, {"head": first, "seen_head": second, "title": "T"})
        assert (moved.status, moved.json["head"], moved.json["title"]) == (200, first, "T")
        assert [message["text"] for message in await _messages(api, session_id)][::2] == ["one"]
        third = (await api.call("POST", f"{url}/turns", {"input": "three"})).json
        assert third["parent"] == first

        stale = await api.call("PATCH", url, {"head": second, "seen_head": first, "title": "U"})
        assert stale.problem(409, "head_moved")["turn_id"] == third["id"]
        assert (await api.call("GET", url)).json["title"] == "T", "nothing changes"
        assert (await api.call("PATCH", url, {"head": None})).json["head"] is None
        assert await _messages(api, session_id) == []
        root = (await api.call("POST", f"{url}/turns", {"input": "anew"})).json
        assert root["parent"] is None

        unknown = {"head": "turn_" + 32 * "0"}
        (await api.call("PATCH", url, unknown)).problem(422, "invalid_request", "head")
        (await api.call("PATCH", url, {"head": "x"})).problem(422, "invalid_request", "head")
        (await api.call("PATCH", "/sessions/nowhere", unknown)).problem(404, "session_not_found")


async def test_the_head_stays_while_a_turn_runs_on_the_path(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        session_id = await api.new_session()
        url = f"/sessions/{session_id}"
        first = (await api.call("POST", f"{url}/turns", {"input": "one"})).json["id"]
        model = "scripted:?delay_s=5"
        running = (await api.call("POST", f"{url}/turns", {"input": "two", "background": True, "model": model})).json[
            "id"
        ]
        assert (await api.call("PATCH", url, {"head": first})).problem(409, "turn_in_progress")["turn_id"] == running
        await api.call("POST", f"{url}/turns/{running}/cancel")
        assert (await api.call("PATCH", url, {"head": first})).json["head"] == first
