"""Retries, edits, siblings and the tree, as a client sees them."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import TurnNotFoundError
from service.models.client import Tools
from service.storage.memory import MemoryStore
from service.storage.records import TurnRecord
from tests.api.inprocess import SSE, Api, Reply, open_api

FAST = "scripted:?rate=0&first_token_s=0"
SLOW = "scripted:?tokens=10&rate=1&first_token_s=0"
TURNS = "/sessions/s/turns"


async def _ask(api: Api, text: str, **more: Any) -> Any:
    reply = await api.call("POST", TURNS, {"input": text, **more})
    assert reply.status in (200, 202), reply
    return reply.json


async def _retry(api: Api, turn: Any, **body: Any) -> Reply:
    return await api.call("POST", f"{TURNS}/{turn['id']}/retry", body)


async def test_a_retry_is_a_sibling_with_the_same_input_and_becomes_the_head(autojump_clock: MockClock) -> None:
    async with open_api(model_url=FAST) as api:
        await api.new_session(id="s")
        first = await _ask(api, "one")
        second = await _ask(api, "two")
        assert (second["siblings"], second["is_head"]) == ({"place": 1, "count": 1}, True)
        reply = await _retry(api, second)
        retried = reply.json
        assert reply.status == 200
        assert reply.headers["location"] == f"{TURNS}/{retried['id']}"
        assert (retried["parent"], retried["input"], retried["state"]) == (first["id"], "two", "completed")
        assert (retried["siblings"], retried["is_head"]) == ({"place": 2, "count": 2}, True)
        again = (await api.call("GET", f"{TURNS}/{second['id']}")).json
        assert (again["siblings"], again["is_head"]) == ({"place": 1, "count": 2}, False)
        edited = await _ask(api, "two!", parent=first["id"], background=True)
        assert (edited["siblings"], edited["is_head"]) == ({"place": 3, "count": 3}, True)

        listed = (await api.call("GET", f"{TURNS}?parent={first['id']}&limit=2")).json
        assert [turn["id"] for turn in listed["data"]] == [second["id"], retried["id"]]
        assert [turn["siblings"]["count"] for turn in listed["data"]] == [3, 3]
        rest = (await api.call("GET", f"{TURNS}?parent={first['id']}&after={listed['next']}")).json
        assert ([turn["id"] for turn in rest["data"]], rest["next"]) == ([edited["id"]], None)
        roots = (await api.call("GET", f"{TURNS}?parent=null")).json["data"]
        assert [turn["id"] for turn in roots] == [first["id"]]
        assert sum(turn["is_head"] for turn in (await api.call("GET", TURNS)).json["data"]) == 1


async def test_a_retry_keeps_the_options_of_the_turn_unless_the_body_has_others(autojump_clock: MockClock) -> None:
    tool = {"type": "function", "name": "f"}
    options = {"model": f"{FAST}&tokens=9", "temperature": 0.5, "max_output_tokens": 3, "system_message": "Be brief."}
    async with open_api(model_url=FAST) as api:
        await api.new_session(id="s")

        async def kept(**body: Any) -> tuple[Any, ...]:
            record = await api.service.sessions.get_turn("s", (await _retry(api, turn, **body)).json["id"])
            return record.model, record.temperature, record.max_output_tokens, record.system_message, record.tools

        api_turn = await _ask(api, "x", tools=[tool], tool_choice="none", **{k: options[k] for k in list(options)[1:]})
        turn = api_turn
        old = await api.service.sessions.get_turn("s", turn["id"])
        before = old.model, old.temperature, old.max_output_tokens, old.system_message, old.tools
        assert await kept() == before
        changed = await kept(temperature=1, max_output_tokens=None, system_message=None, tools=[])
        assert changed[1:4] == (1, None, None)
        assert changed[4] != old.tools
        assert isinstance(old.tools, Tools)
        choice = await kept(tool_choice="auto", parallel_tool_calls=False)
        assert (choice[4].functions, choice[4].choice, choice[4].parallel) == (old.tools.functions, "auto", False)
        other = {"type": "function", "name": "g"}
        assert [it.name for it in (await kept(tools=[other]))[4].functions] == ["g"]
        (await _retry(api, turn, tool_choice={"type": "function", "name": "g"})).problem(
            422, "invalid_request", "tool_choice.name"
        )
        (await _retry(api, turn, temperature=3)).problem(422, "invalid_request", "temperature")
        (await _retry(api, turn, input="y")).problem(422, "invalid_request", "input")


async def test_a_retry_needs_no_body(autojump_clock: MockClock) -> None:
    async with open_api(model_url=FAST) as api:
        await api.new_session(id="s")
        path = f"{TURNS}/{(await _ask(api, 'one'))['id']}/retry"
        assert (await api.call("POST", path)).json["siblings"] == {"place": 2, "count": 2}
        typed = {"Content-Type": "application/json"}
        assert (await api.call("POST", path, headers=typed)).json["siblings"] == {"place": 3, "count": 3}
        (await api.call("POST", f"{TURNS}", headers=typed)).problem(400, "malformed_body")
        (await api.call("POST", path, raw=b"{}")).problem(415, "unsupported_media_type")
        (await api.call("POST", path, headers={"Content-Type": "text/plain"})).problem(415, "unsupported_media_type")
        (await api.call("POST", f"{TURNS}", raw=b"")).problem(415, "unsupported_media_type")


async def test_a_turn_without_a_question_is_not_retried(autojump_clock: MockClock) -> None:
    """The model would be asked with a prompt that ends with its own reply."""
    async with open_api() as api:
        await api.new_session(id="s")
        items = [
            {"type": "message", "role": "user", "text": "Hi"},
            {"type": "message", "role": "assistant", "text": "Hello"},
            {"type": "message", "role": "system", "text": "The user has paid."},
            {"type": "message", "role": "assistant", "text": "Thank you"},
            {"type": "message", "role": "assistant", "text": "Goodbye"},
        ]
        added = (await api.call("POST", "/sessions/s/messages", {"items": items})).json["turns"]
        for turn_id in added[1:]:
            (await _retry(api, {"id": turn_id})).problem(422, "invalid_request", "turn_id")


async def test_a_retry_streams_and_runs_beside_the_turn_that_still_runs(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        running = await _ask(api, "x", background=True)
        await trio.sleep(0.5)
        reply = await api.call("POST", f"{TURNS}/{running['id']}/retry", {}, headers=SSE)
        assert [event["type"] for event in reply.events][:: len(reply.events) - 1] == ["turn.started", "turn.completed"]
        assert reply.events[0]["turn_id"] != running["id"]
        assert (await api.call("GET", f"{TURNS}/{running['id']}")).json["state"] == "completed"
        accepted = await _retry(api, running, background=True)
        assert (accepted.status, accepted.json["siblings"]) == (202, {"place": 3, "count": 3})


async def test_a_retry_of_no_turn_and_beyond_the_bound_is_refused(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, branches_max=1) as api:
        await api.new_session(id="s")
        running = await _ask(api, "x", background=True)
        limited = await _retry(api, running)
        limited.problem(429, "branch_limit")
        assert limited.headers["retry-after"] == "1"
        (await _retry(api, {"id": "turn_" + 32 * "0"})).problem(404, "turn_not_found")
        (await _retry(api, {"id": "x"})).problem(404, "turn_not_found")
        (await api.call("POST", f"/sessions/none/turns/{running['id']}/retry", {})).problem(404, "session_not_found")
        await api.call(
            "POST",
            "/sessions/s/messages",
            {"items": [{"type": "message", "role": "assistant", "text": "Hi"}], "parent": None},
        )
        (added,) = [turn for turn in (await api.call("GET", TURNS)).json["data"] if not turn["input"]]
        (await _retry(api, added)).problem(422, "invalid_request", "turn_id")


async def test_a_tree_is_listed_in_pages(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        first = await _ask(api, "one")
        turns = [
            first,
            await _ask(api, "two"),
            await _ask(api, "2", parent=first["id"]),
            await _ask(api, "0", parent=None),
        ]
        page = (await api.call("GET", "/sessions/s/tree?limit=3")).json
        rest = (await api.call("GET", f"/sessions/s/tree?after={page['next']}")).json
        names = ("id", "parent", "state", "created_at", "ended_at")
        assert page["data"] + rest["data"] == [{name: turn[name] for name in names} for turn in turns]
        assert rest["next"] is None
        running = await _ask(api, "three", background=True)
        last = (await api.call("GET", "/sessions/s/tree")).json["data"][-1]
        assert (last["id"], last["state"], last["ended_at"]) == (running["id"], "running", None)
        for query, field in (
            ("limit=1001", "limit"),
            ("limit=0", "limit"),
            ("after=x", "after"),
            ("parent=null", "parent"),
        ):
            (await api.call("GET", f"/sessions/s/tree?{query}")).problem(422, "invalid_request", field)
        (await api.call("GET", "/sessions/none/tree")).problem(404, "session_not_found")
        for parent in ("", "x", "turn_" + 32 * "0", "NULL"):
            (await api.call("GET", f"{TURNS}?parent={parent}")).problem(422, "invalid_request", "parent")


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_comes_back_to_its_retry(autojump_clock: MockClock, streams: bool) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        old = await _ask(api, "x")
        back = {"Last-Event-ID": "2"} | (SSE if streams else {})
        refused = await api.call("POST", f"{TURNS}/{old['id']}/retry", {}, headers=back)
        refused.problem(409, "resume_conflict", "input")
        retried = (await _retry(api, old, background=True)).json
        await trio.sleep(5)
        branch = await _ask(api, "y", parent=None, background=True)
        again = await api.call("POST", f"{TURNS}/{old['id']}/retry", {}, headers=back)
        assert again.headers["location"].endswith(retried["id"])
        if streams:
            assert again.events[0]["seq"] == 3
        else:
            assert (again.json["id"], again.json["state"]) == (retried["id"], "completed")
        assert branch["is_head"]
        assert len((await api.call("GET", f"{TURNS}?parent=null")).json["data"]) == 3, "no turn was started"


async def test_of_equal_inputs_the_one_with_the_parent_is_resumed(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        first = await _ask(api, "x")
        follower = await _ask(api, "y", background=True)
        root = await _ask(api, "y", parent=None, background=True)
        back = {"Last-Event-ID": "1"}
        for parent, turn in ((first["id"], follower), (None, root)):
            body = {"input": "y", "parent": parent, "background": True}
            assert (await api.call("POST", TURNS, body, headers=back)).json["id"] == turn["id"]


async def test_a_turn_is_shown_without_its_place_while_the_store_hangs(autojump_clock: MockClock) -> None:
    class Hangs(MemoryStore):
        async def find_places(self, *_: Any, **__: Any) -> Any:
            await trio.sleep_forever()

    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        running = await _ask(api, "x", background=True)
        assert "siblings" in running
        api.service.sessions._store = Hangs()
        began = trio.current_time()
        turn = (await api.call("GET", f"{TURNS}/{running['id']}")).json
        assert ("siblings" in turn, "is_head" in turn, turn["state"]) == (False, False, "running")
        assert trio.current_time() - began == pytest.approx(1)
        await wait_all_tasks_blocked()


async def test_a_keyed_retry_is_done_once_and_not_taken_for_another_one(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        old = await _ask(api, "x")
        path = f"{TURNS}/{old['id']}/retry"
        one, other = [
            await api.call("POST", path, {"background": True}, headers={"Idempotency-Key": key}) for key in "ab"
        ]
        again = await api.call("POST", path, {"background": True}, headers={"Idempotency-Key": "a"})
        assert (one.json["id"], other.json["siblings"]["place"]) == (again.json["id"], 3)
        back = {"Idempotency-Key": "a", "Last-Event-ID": "3"} | SSE
        resumed = await api.call("POST", path, {"background": False}, headers=back)
        resumed.problem(422, "idempotency_key_reused", "Idempotency-Key")

        get_turn = api.service.sessions.get_turn

        async def gone(session_id: str, turn_id: str, **named: bool) -> TurnRecord:
            if turn_id == old["id"]:
                raise TurnNotFoundError(turn_id)
            return await get_turn(session_id, turn_id, **named)

        monkeypatch.setattr(api.service.sessions, "get_turn", gone)
        (await api.call("POST", path, {"background": True})).problem(404, "turn_not_found")
        once_more = await api.call("POST", path, {"background": True}, headers={"Idempotency-Key": "a"})
        assert once_more.json["id"] == one.json["id"]
