"""``DELETE`` of turns and messages over HTTP."""

from trio.testing import MockClock

from tests.api.inprocess import SSE, Api, open_api
from tests.api.native.test_adding_messages import CONVERSATION, message

NO_TURN = f"turn_{'0' * 32}"
NO_ITEM = f"msg_{'0' * 32}"
QUICK = "scripted:?rate=0&first_token_s=0"


async def roles(api: Api, session: str) -> list[str]:
    return [it["role"] for it in (await api.call("GET", f"{session}/messages?limit=100")).json["data"]]


async def test_a_turn_is_deleted_with_all_that_follows_it(autojump_clock: MockClock) -> None:
    async with open_api(model_url=QUICK) as api:
        session = f"/sessions/{await api.new_session()}"
        first, second, third = (await api.call("POST", f"{session}/messages", {"items": CONVERSATION})).json["turns"]
        deleted = await api.call("DELETE", f"{session}/turns/{second}")
        assert (deleted.status, deleted.body) == (204, b"")
        assert await roles(api, session) == ["system", "user", "assistant"]
        kept = (await api.call("GET", session)).json
        assert (kept["head"], kept["message_count"]) == (first, 3)
        for gone in (second, third, NO_TURN, "x"):
            for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
                (await api.call(method, f"{session}/turns/{gone}{path}")).problem(404, "turn_not_found")
        (await api.call("DELETE", f"/sessions/none/turns/{first}")).problem(404, "session_not_found")


async def test_a_message_is_deleted_with_the_events_that_tell_it(autojump_clock: MockClock) -> None:
    async with open_api(model_url=QUICK) as api:
        session = f"/sessions/{await api.new_session()}"
        asked = await api.call("POST", f"{session}/turns", {"input": "Hi"})
        turn = asked.headers["location"]
        question, answer = (await api.call("GET", f"{session}/messages")).json["data"]
        assert (await api.call("DELETE", f"{session}/messages/{answer['id']}")).status == 204
        assert (await api.call("GET", f"{session}/messages")).json["data"] == [question]
        left = (await api.call("GET", turn)).json
        assert (left["state"], left["input"], left["text"], left["events_deleted"]) == ("completed", "Hi", "", True)
        assert left["usage"] == asked.json["usage"]
        for after in ("", "?after=1", "?after=999"):
            problem = (await api.call("GET", f"{turn}/events{after}")).problem(410, "events_deleted")
            assert problem["turn_id"] == left["id"]
        back = SSE | {"Last-Event-ID": "1"}
        again = await api.call("POST", f"{session}/turns", {"input": "Hi"}, headers=back)
        again.problem(410, "events_deleted")
        for gone in (answer["id"], NO_ITEM, "msg_1", "x" * 300):
            (await api.call("DELETE", f"{session}/messages/{gone}")).problem(404, "item_not_found")
        assert "events_deleted" not in (await api.call("POST", f"{session}/turns", {"input": "Hi"})).json


async def test_a_deleted_call_takes_its_result_along(autojump_clock: MockClock) -> None:
    async with open_api(model_url=QUICK) as api:
        session = f"/sessions/{await api.new_session()}"
        added = (await api.call("POST", f"{session}/messages", {"items": CONVERSATION})).json
        call = next(it["id"] for it in added["messages"] if it.get("type") == "function_call")
        assert (await api.call("DELETE", f"{session}/messages/{call}")).status == 204
        assert await roles(api, session) == ["system", "user", "assistant", "user"]
        assert (await api.call("GET", session)).json["message_count"] == 4


async def test_what_an_open_turn_follows_is_not_deleted() -> None:
    async with open_api(model_url="scripted:?silent_after=0") as api:
        session = f"/sessions/{await api.new_session()}"
        added = (await api.call("POST", f"{session}/messages", {"items": [message("user", "x")]})).json
        running = await api.call("POST", f"{session}/turns", {"input": "Hi", "background": True})
        for path in (f"turns/{added['turns'][0]}", f"messages/{added['messages'][0]['id']}"):
            problem = (await api.call("DELETE", f"{session}/{path}")).problem(409, "turn_in_progress")
            assert problem["turn_id"] == running.json["id"]
        assert (await api.call("POST", f"{running.headers['location']}/cancel")).status == 200
        assert (await api.call("DELETE", f"{session}/turns/{added['turns'][0]}")).status == 204
        assert (await api.call("GET", session)).json["head"] is None


async def test_a_turn_is_deleted_with_very_many_that_follow_it(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        session = f"/sessions/{await api.new_session()}"
        turns: list[str] = []
        for _ in range(3):
            items = {"items": [message("assistant", "x")] * 200}
            turns += (await api.call("POST", f"{session}/messages", items)).json["turns"]
        assert (await api.call("DELETE", f"{session}/turns/{turns[1]}")).status == 204
        (await api.call("DELETE", f"{session}/turns/{turns[300]}")).problem(404, "turn_not_found")
        assert (await api.call("GET", session)).json["message_count"] == 1
        assert (await api.call("GET", session)).json["head"] == turns[0]
