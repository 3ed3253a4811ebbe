"""Conversations and their items over the whole application, beside the native API."""

import json
from functools import partial
from math import inf
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from service.errors import StoreError
from service.sessions.commands import NewItems, NewSession
from service.storage.records import Item
from tests.api.inprocess import Api, Reply, open_api
from tests.storage.test_store_cancellation import CancelAtWait

PATH = "/v1/conversations"
MODEL = "scripted:?tokens=2&rate=0&first_token_s=0"
HEX = "0" * 31 + "1"


def message(text: str, role: str = "user") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text}


def error_of(reply: Reply, status: int, code: str) -> dict[str, Any]:
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply
    assert reply.json.keys() == {"error"}
    error: dict[str, Any] = reply.json["error"]
    assert error["code"] == code, error
    return error


async def new(api: Api, *items: dict[str, Any]) -> str:
    reply = await api.call("POST", PATH, {"items": list(items)} if items else {})
    assert reply.status == 200, reply
    conversation_id: str = reply.json["id"]
    return conversation_id


def session_path(conversation_id: str) -> str:
    return f"/sessions/sess_{conversation_id.removeprefix('conv_')}"


async def texts(api: Api, conversation_id: str, query: str = "order=asc&limit=100") -> list[str]:
    reply = await api.call("GET", f"{PATH}/{conversation_id}/items?{query}")
    assert reply.status == 200, reply
    return [text_of(item) for item in reply.json["data"]]


def text_of(item: dict[str, Any]) -> str:
    if item["type"] == "message":
        return "".join(part["text"] for part in item["content"])
    return str(item.get("arguments") or item.get("output") or item["type"])


# Conversations


async def test_a_conversation_is_a_session_under_another_name(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        made = (await api.call("POST", PATH, {"metadata": {"topic": "demo"}})).json
        assert made.keys() == {"id", "object", "created_at", "metadata"}
        assert (made["object"], made["metadata"], type(made["created_at"])) == ("conversation", {"topic": "demo"}, int)
        session = (await api.call("GET", session_path(made["id"]))).json
        assert session["metadata"] == {"topic": "demo"}
        assert (await api.call("GET", f"{PATH}/{made['id']}")).json == made
        updated = (await api.call("POST", f"{PATH}/{made['id']}", {"metadata": {"a": "b"}})).json
        assert updated == made | {"metadata": {"a": "b"}}
        assert (await api.call("GET", session_path(made["id"]))).json["metadata"] == {"a": "b"}
        assert (await api.call("POST", f"{PATH}/{made['id']}", {"metadata": None})).json["metadata"] == {}
        gone = await api.call("DELETE", f"{PATH}/{made['id']}")
        assert gone.json == {"id": made["id"], "object": "conversation.deleted", "deleted": True}
        (await api.call("GET", session_path(made["id"]))).problem(404, "session_not_found")
        for method in ("GET", "DELETE"):
            error = error_of(await api.call(method, f"{PATH}/{made['id']}"), 404, "conversation_not_found")
            assert made["id"] in error["message"]


async def test_a_session_with_an_id_of_the_callers_is_a_conversation_too(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        await api.new_session(id="support-4711", metadata={"team": "blue"})
        shown = (await api.call("GET", f"{PATH}/conv_-support-4711")).json
        assert (shown["id"], shown["metadata"]) == ("conv_-support-4711", {"team": "blue"})
        await api.call("POST", f"{PATH}/{shown['id']}/items", {"items": [message("Hi")]})
        messages = (await api.call("GET", "/sessions/support-4711/messages")).json["data"]
        assert [it["text"] for it in messages] == ["Hi"]


@pytest.mark.parametrize("name", ["conv_none", f"sess_{HEX}", f"conv_{HEX}", "conv_-", f"conv_-sess_{HEX}", "x", "%00"])
async def test_what_is_no_conversation_is_404_for_every_call(name: str, autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        calls: list[tuple[str, str, Any]] = [
            ("GET", "", None),
            ("POST", "", {"metadata": {}}),
            ("DELETE", "", None),
            ("GET", "/items", None),
            ("POST", "/items", {"items": [message("Hi")]}),
            ("GET", f"/items/msg_{HEX}", None),
            ("DELETE", f"/items/msg_{HEX}", None),
        ]
        for method, rest, body in calls:
            reply = await api.call(method, f"{PATH}/{name}{rest}", body)
            error = error_of(reply, 404, "conversation_not_found" if name != "%00" else reply.json["error"]["code"])
            assert error["type"] == "invalid_request_error"


async def test_a_conversation_can_be_made_without_a_body(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        bodies: list[Any] = [None, {}, {"items": None, "metadata": None}, {"items": [], "metadata": {}}]
        for body in bodies:
            reply = await api.call("POST", PATH, body)
            assert (reply.status, reply.json["metadata"]) == (200, {})


async def test_metadata_is_bounded_and_parameters_are_known(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api)
        for path in (PATH, f"{PATH}/{conversation_id}"):
            wrong: list[Any] = [{"a": "x" * 513}, {"a" * 65: "x"}, {str(n): "x" for n in range(17)}, {"a": 1}, []]
            for metadata in wrong:
                reply = await api.call("POST", path, {"metadata": metadata})
                assert (reply.status, reply.json["error"]["param"].partition(".")[0]) == (400, "metadata")
            error_of(await api.call("POST", path, {"metadata": {}, "foo": 1}), 400, "unknown_parameter")
        error_of(await api.call("POST", f"{PATH}/{conversation_id}", {}), 400, "missing_required_parameter")


# Items


async def test_items_of_every_type_are_added_listed_found_and_deleted(autojump_clock: MockClock) -> None:
    items = [
        message("Be brief.", "system"),
        message("The weather?"),
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}],
         "encrypted_content": "sealed"},
        {"type": "function_call", "call_id": "call_1", "name": "get", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "4"},
        message("4 °C.", "assistant"),
    ]  # fmt: skip
    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api)
        added = (await api.call("POST", f"{PATH}/{conversation_id}/items", {"items": items})).json
        assert (added["object"], added["has_more"]) == ("list", False)
        assert [it["type"] for it in added["data"]] == [it["type"] for it in items]
        assert all(it["status"] == "completed" for it in added["data"])
        assert (added["first_id"], added["last_id"]) == (added["data"][0]["id"], added["data"][-1]["id"])
        listed = (await api.call("GET", f"{PATH}/{conversation_id}/items?order=asc")).json
        assert listed == added
        for item in added["data"]:
            assert (await api.call("GET", f"{PATH}/{conversation_id}/items/{item['id']}")).json == item
        reasoning = added["data"][2]
        assert (reasoning["id"].startswith("rs_"), "encrypted_content" in reasoning) == (True, False)
        for query in ("include=reasoning.encrypted_content", "include[]=reasoning.encrypted_content"):
            shown = (await api.call("GET", f"{PATH}/{conversation_id}/items/{reasoning['id']}?{query}")).json
            assert shown["encrypted_content"] == "sealed"
            listing = (await api.call("GET", f"{PATH}/{conversation_id}/items?order=asc&{query}")).json
            assert listing["data"][2] == shown
        call = added["data"][3]["id"]
        reply = await api.call("DELETE", f"{PATH}/{conversation_id}/items/{call}")
        assert (reply.status, reply.json["object"], reply.json["id"]) == (200, "conversation", conversation_id)
        assert await texts(api, conversation_id) == ["Be brief.", "The weather?", "reasoning", "4 °C."]
        error_of(await api.call("GET", f"{PATH}/{conversation_id}/items/{call}"), 404, "item_not_found")
        error_of(await api.call("DELETE", f"{PATH}/{conversation_id}/items/{call}"), 404, "item_not_found")


async def test_a_message_and_reasoning_with_the_same_digits_are_not_mixed_up(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api, message("Hi"))
        (item,) = (await api.call("GET", f"{PATH}/{conversation_id}/items")).json["data"]
        other = item["id"].replace("msg_", "rs_")
        for method in ("GET", "DELETE"):
            error = error_of(await api.call(method, f"{PATH}/{conversation_id}/items/{other}"), 404, "item_not_found")
            assert other in error["message"]
        for name in ("none", "msg_1", "%C3%BC", "x" * 300):
            error_of(await api.call("GET", f"{PATH}/{conversation_id}/items/{name}"), 404, "item_not_found")
        assert await texts(api, conversation_id) == ["Hi"]


async def test_a_new_conversation_has_its_items_or_is_not_made(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api, message("Hi"), message("Hello", "assistant"))
        assert await texts(api, conversation_id) == ["Hi", "Hello"]
        for items, field in (
            ([message("Hi")] * 21, "items"),
            ([message("Hi", "tool")], "items[0].role"),
            ([message("Hi"), {"type": "web_search_call"}], "items[1].type"),
            ([message("")], "items"),
            ([{"type": "message", "role": "user", "content": [{"type": "input_image"}]}], "items[0].content[0].type"),
            ([{"type": "function_call_output", "call_id": "a", "output": "1"}] * 2, "items"),
        ):
            reply = await api.call("POST", PATH, {"items": items})
            assert (reply.status, reply.json["error"]["param"]) == (400, field)
            path = f"{PATH}/{conversation_id}/items"
            reply = await api.call("POST", path, {"items": items})
            assert (reply.status, reply.json["error"]["param"]) == (400, field)
        large = {"items": [message("x" * (256 * 1024 + 1))]}
        assert error_of(await api.call("POST", PATH, large), 413, "input_too_large")["param"] == "items"
        assert (await api.call("GET", "/sessions?count=true")).json["count"] == 1
        assert await texts(api, conversation_id) == ["Hi", "Hello"]


async def test_a_conversation_whose_items_the_store_refuses_is_not_left_behind(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither if the store takes the conversation but not its items."""

    async def refuse(*_: object, **__: object) -> None:
        raise StoreError("The disk is full.")

    async with open_api(model_url=MODEL) as api:
        for name in ("add_turns", "delete_turns", "mark_deleted"):
            monkeypatch.setattr(api.service.store, name, refuse)
        conversation_id = await new(api, message("Hi"))
        assert await texts(api, conversation_id) == ["Hi"]
        monkeypatch.setattr(api.service.store, "create_session", refuse)
        error_of(await api.call("POST", PATH, {"items": [message("Hi")]}), 503, "store_unavailable")
        assert (await api.call("GET", "/sessions?count=true")).json["count"] == 1


async def test_a_client_that_leaves_at_any_moment_leaves_a_conversation_with_its_items_or_none(
    autojump_clock: MockClock,
) -> None:
    items = tuple(Item(id=f"msg_{n}", role="user", text=f"text {n}") for n in range(20))
    counts: list[int] = []
    async with open_api(model_url=MODEL) as api:
        for nth in range(1, 100):
            with trio.CancelScope() as scope:
                instrument = CancelAtWait(nth, scope)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await api.service.sessions.create_session(NewSession(), beginning=NewItems(items=items))
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            counts = [session["message_count"] for session in (await api.call("GET", "/sessions")).json["data"]]
            if not scope.cancelled_caught:
                break
            assert counts in ([], [20] * len(counts))
        assert nth > 1
        assert counts == [20] * len(counts) != []


async def test_calls_of_namespaces_are_shown_as_they_were_brought(autojump_clock: MockClock) -> None:
    call = {"type": "function_call", "namespace": "files", "name": "read", "call_id": "c1", "arguments": "{}"}
    plain = {"type": "function_call", "name": "write", "call_id": "c2", "arguments": "{}"}
    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api, message("Hi"), call, plain)
        added = (await api.call("POST", f"{PATH}/{conversation_id}/items", {"items": [call]})).json["data"]
        listed = (await api.call("GET", f"{PATH}/{conversation_id}/items?order=asc")).json["data"]
        assert listed[-1:] == added
        names = [(item.get("namespace"), item["name"]) for item in listed if item["type"] == "function_call"]
        assert names == [("files", "read"), (None, "write"), ("files", "read")]
        one = (await api.call("GET", f"{PATH}/{conversation_id}/items/{added[0]['id']}")).json
        assert one == added[0]
        turns = (await api.call("GET", f"{session_path(conversation_id)}/turns")).json["data"]
        assert turns[-1]["items"][-1]["name"] == "files__read"
        response = (await api.call("GET", f"/v1/responses/resp_{turns[-1]['id'].removeprefix('turn_')}")).json
        assert response["conversation"] == {"id": conversation_id}
        assert response["output"] == added


async def test_pages_go_through_all_items_in_both_orders(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api, *(message(str(n)) for n in range(7)))
        for order, whole in (("asc", "0123456"), ("desc", "6543210")):
            for limit in (1, 3, 7):
                seen = ""
                after = ""
                while True:
                    query = f"order={order}&limit={limit}" + (f"&after={after}" if after else "")
                    page = (await api.call("GET", f"{PATH}/{conversation_id}/items?{query}")).json
                    seen += "".join(map(text_of, page["data"]))
                    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
                    if not page["has_more"]:
                        break
                    after = page["last_id"]
                assert seen == whole
        assert await texts(api, conversation_id, "") == list("6543210"), "20 at most, newest first"
        empty = (await api.call("GET", f"{PATH}/{await new(api)}/items")).json
        assert empty == {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False}
        for query, field in (
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("order=up", "order"),
            (f"after=msg_{HEX}", "after"),
            ("after=none", "after"),
            ("before=x", "before"),
            ("include=foo", "include[0]"),
        ):
            reply = await api.call("GET", f"{PATH}/{conversation_id}/items?{query}")
            assert (reply.status, reply.json["error"]["param"]) == (400, field), query


async def test_a_page_ends_at_a_mebibyte_and_the_next_one_goes_on(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api, *(message(str(n) * 250_000) for n in range(6)))
        for order in ("asc", "desc"):
            first = await api.call("GET", f"{PATH}/{conversation_id}/items?order={order}")
            assert len(first.body) < 1024 * 1024 + 1000
            assert (len(first.json["data"]), first.json["has_more"]) == (4, True)
            query = f"order={order}&after={first.json['last_id']}"
            rest = (await api.call("GET", f"{PATH}/{conversation_id}/items?{query}")).json
            assert (len(rest["data"]), rest["has_more"]) == (2, False)


async def test_native_turns_are_items_and_items_are_what_the_next_turn_follows(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?reasoning=1&rate=0&first_token_s=0") as api:
        conversation_id = await new(api, message("Hi"), message("Hello", "assistant"))
        turn = (await api.call("POST", f"{session_path(conversation_id)}/turns", {"input": "And now?"})).json
        items = (await api.call("GET", f"{PATH}/{conversation_id}/items?order=asc")).json["data"]
        assert [it["type"] for it in items] == ["message", "message", "message", "reasoning", "message"]
        assert [text_of(it) for it in items[:3]] == ["Hi", "Hello", "And now?"]
        assert text_of(items[4]) == turn["text"]
        native = (await api.call("GET", f"{session_path(conversation_id)}/messages")).json["data"]
        assert [it["id"] for it in native] == [it["id"] for it in items if it["type"] == "message"]


async def test_while_a_response_is_in_progress_the_conversation_is_locked(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=100&rate=10") as api:
        conversation_id = await new(api, message("Hi"))
        await api.call("POST", f"{session_path(conversation_id)}/turns", {"input": "Go", "background": True})
        await trio.sleep(1)
        newest, first = (await api.call("GET", f"{PATH}/{conversation_id}/items")).json["data"]
        assert (text_of(newest), newest["status"]) == ("Go", "completed")
        for method, path, body in (
            ("POST", "/items", {"items": [message("x")]}),
            ("DELETE", f"/items/{newest['id']}", None),
            ("DELETE", f"/items/{first['id']}", None),
        ):
            error = error_of(
                await api.call(method, f"{PATH}/{conversation_id}{path}", body), 400, "conversation_locked"
            )
            assert error["param"] == "conversation"
        assert (await api.call("DELETE", f"{PATH}/{conversation_id}")).status == 200
        assert not api.service.sessions.open_turns()


async def test_a_reply_that_was_cut_off_is_an_incomplete_item(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=100&rate=10") as api:
        conversation_id = await new(api)
        path = f"{session_path(conversation_id)}/turns"
        turn = (await api.call("POST", path, {"input": "Go", "background": True})).json
        await trio.sleep(2)
        await api.call("POST", f"{path}/{turn['id']}/cancel")
        reply, _ = (await api.call("GET", f"{PATH}/{conversation_id}/items")).json["data"]
        assert (reply["role"], reply["status"]) == ("assistant", "incomplete")


async def test_added_items_may_be_repeated_with_a_key(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api)
        body = {"items": [message("Hi")]}
        headers = {"Idempotency-Key": "one"}
        replies = [await api.call("POST", f"{PATH}/{conversation_id}/items", body, headers=headers) for _ in range(2)]
        assert replies[0].json == replies[1].json
        assert await texts(api, conversation_id) == ["Hi"]


async def test_a_new_conversation_is_made_once_for_its_idempotency_key(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        body = {"items": [message("Hi")], "metadata": {"topic": "demo"}}
        headers = {"Idempotency-Key": "k" * 255}
        replies = [await api.call("POST", PATH, body, headers=headers) for _ in range(2)]
        assert replies[0].json == replies[1].json
        conversation_id = replies[0].json["id"]
        assert await texts(api, conversation_id) == ["Hi"]
        error_of(await api.call("POST", PATH, {}, headers=headers), 422, "idempotency_key_reused")
        (item,) = (await api.call("GET", f"{PATH}/{conversation_id}/items")).json["data"]
        assert (await api.call("DELETE", f"{PATH}/{conversation_id}/items/{item['id']}")).status == 200
        assert (await api.call("POST", PATH, body, headers=headers)).json["id"] == conversation_id
        assert await texts(api, conversation_id) == []
        assert (await api.call("DELETE", f"{PATH}/{conversation_id}")).status == 200
        assert (await api.call("POST", PATH, body, headers=headers)).status == 410


async def test_a_repeated_call_makes_the_conversation_that_the_first_one_could_not(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise StoreError("The store is down.")

    async with open_api(model_url=MODEL) as api:
        body, headers = {"items": [message("Hi")]}, {"Idempotency-Key": "one"}
        with monkeypatch.context() as patch:
            patch.setattr(api.service.store, "create_session", refuse)
            failed = await api.call("POST", PATH, body, headers=headers)
            assert (failed.status, failed.headers.get("x-should-retry")) == (503, None)
        conversation_id = (await api.call("POST", PATH, body, headers=headers)).json["id"]
        assert await texts(api, conversation_id) == ["Hi"]
        (session,) = (await api.call("GET", "/sessions")).json["data"]
        assert session_path(conversation_id) == f"/sessions/{session['id']}"


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "one"}], ids=["without a key", "with a key"])
async def test_what_the_store_may_have_taken_is_not_repeated_without_a_key(
    headers: dict[str, str], autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation would have the input twice."""
    told = None if headers else "false"
    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api)
        answer_late = partial(trio.sleep, inf)
        monkeypatch.setattr(api.service.store, "begin_turn", lambda *_, **__: answer_late())
        monkeypatch.setattr(api.service.store, "add_turns", lambda *_, **__: answer_late())
        items = {"items": [message("Hi")]}
        reply = await api.call("POST", f"{PATH}/{conversation_id}/items", items, headers=headers)
        error_of(reply, 503, "store_unavailable")
        assert reply.headers.get("x-should-retry") == told
        body = {"input": "Hi", "conversation": conversation_id}
        for stream in (False, True):
            reply = await api.call("POST", "/v1/responses", body | {"stream": stream}, headers=headers)
            error_of(reply, 503, "store_unavailable")
            assert reply.headers.get("x-should-retry") == told
            headers = {name: f"{key} more" for name, key in headers.items()}
        reply = await api.call("POST", "/v1/responses", {"input": "Hi"}, headers=headers)
        error_of(reply, 503, "store_unavailable")
        assert reply.headers.get("x-should-retry") is None, "another first response, which harms none"


async def test_what_the_store_has_not_begun_is_repeated(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise StoreError("The store is closed.")

    async with open_api(model_url=MODEL) as api:
        conversation_id = await new(api)
        monkeypatch.setattr(api.service.store, "get_session", refuse)
        reply = await api.call("POST", "/v1/responses", {"input": "Hi", "conversation": conversation_id})
        error_of(reply, 503, "store_unavailable")
        assert reply.headers.get("x-should-retry") is None


# Owners


async def test_conversations_belong_to_the_owner_of_the_key(autojump_clock: MockClock) -> None:
    keys = [
        {"name": "ann", "key": "the-key-of-ann-is-long", "may": ["talk"]},
        {"name": "bob", "key": "the-key-of-bob-is-long", "may": ["talk"]},
        {"name": "eve", "key": "the-key-of-eve-is-long", "may": ["read"]},
    ]

    async with open_api(model_url=MODEL, api_keys=keys) as api:

        async def ask(who: str, method: str, path: str, body: Any = None) -> Reply:
            headers = {"Authorization": f"Bearer the-key-of-{who}-is-long"}
            return await api.call(method, path, body, headers=headers)

        made = (await ask("ann", "POST", PATH, {"items": [message("Hi")]})).json
        path = f"{PATH}/{made['id']}"
        (item,) = (await ask("ann", "GET", f"{path}/items")).json["data"]
        for method, rest, body in (
            ("GET", "", None),
            ("POST", "", {"metadata": {}}),
            ("DELETE", "", None),
            ("GET", "/items", None),
            ("POST", "/items", {"items": [message("x")]}),
            ("GET", f"/items/{item['id']}", None),
            ("DELETE", f"/items/{item['id']}", None),
        ):
            error_of(await ask("bob", method, path + rest, body), 404, "conversation_not_found")
        error_of(await ask("eve", "POST", PATH, {}), 403, "not_permitted")
        assert (await ask("ann", "GET", path)).json == made
        assert "ann" not in json.dumps(made)
