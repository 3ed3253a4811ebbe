"""Calls about one response or conversation at the same time: each gets an answer of the documented kind."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import permutations
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from service.api.openai.ids import response_id
from tests.api.inprocess import Api, Reply, open_api
from tests.api.openai.test_responses_calls import PATH, SLOW, create, get

Call = tuple[str, str] | tuple[str, str, Any]


async def at_once(api: Api, *calls: Call) -> list[Reply]:
    """The answers of calls that begin in the same moment, in this order."""
    replies: dict[int, Reply] = {}

    async def send(index: int, call: Call) -> None:
        replies[index] = await api.call(*call)

    async with trio.open_nursery() as nursery:
        for index, call in enumerate(calls):
            nursery.start_soon(send, index, call)
    return [replies[index] for index in range(len(calls))]


def told(replies: Sequence[Reply]) -> Counter[tuple[int, str | None]]:
    """How often each status came, with the code of an error."""
    codes = [reply.json["error"]["code"] if reply.status >= 400 else None for reply in replies]
    return Counter(zip([reply.status for reply in replies], codes, strict=True))


GONE = (404, "response_not_found")
"""Of all calls about a response that is gone."""


@asynccontextmanager
async def a_live_response(api: Api, **body: object) -> AsyncIterator[tuple[str, list[Reply]]]:
    """The id of a response on its way, and the answer of the stream that shows it, once it has ended."""
    streamed: list[Reply] = []

    async def stream() -> None:
        streamed.append(await create(api, stream=True, **body))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream)
        await trio.sleep(3)
        [turn] = api.service.sessions.open_turns()
        yield response_id(turn.id), streamed


@pytest.mark.parametrize("store", [True, False])
async def test_many_cancels_of_a_live_response_get_its_one_end(store: bool, autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        async with a_live_response(api, store=store) as (name, streamed):
            cancel: Call = ("POST", f"{PATH}/{name}/cancel")
            replies = await at_once(api, *[cancel] * 10)
        assert told(replies) == {(200, None): 10}
        assert len({reply.body for reply in replies}) == 1
        assert replies[0].json["status"] == "incomplete"
        assert streamed[0].body.count(b"event: response.incomplete\n") == 1
        assert told([await api.call(*cancel)]) == {((200, None) if store else GONE): 1}


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("order", list(permutations(range(5), 2)), ids=str)
async def test_a_deletion_among_other_calls_about_a_live_response(
    order: tuple[int, int], store: bool, autojump_clock: MockClock
) -> None:
    """Each call sees the response as it was before or after the deletion, and nothing is left in the end."""
    async with open_api(model_url=SLOW) as api:
        async with a_live_response(api, store=store) as (name, streamed):
            calls: list[Call] = [
                ("POST", f"{PATH}/{name}/cancel"),
                ("GET", f"{PATH}/{name}"),
                ("GET", f"{PATH}/{name}?stream=true"),
                ("GET", f"{PATH}/{name}/input_items"),
                ("DELETE", f"{PATH}/{name}"),
            ]
            first, second = (calls[index] for index in order)
            replies = await at_once(api, first, calls[-1], second)
        assert set(told(replies)) <= {(200, None), GONE}
        assert replies[1].status == 200
        assert streamed[0].status == 200
        assert told([await get(api, name)]) == {GONE: 1}
        assert (await api.call("GET", "/sessions")).json["data"] == []


async def test_what_follows_a_response_while_it_is_deleted(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=5&rate=10") as api:
        for place in range(3):
            first = (await create(api)).json["id"]
            calls: list[Call] = [("POST", PATH, {"input": "And?", "previous_response_id": first})] * 2
            calls.insert(place, ("DELETE", f"{PATH}/{first}"))
            replies = await at_once(api, *calls)
            assert replies.pop(place).status == 200
            assert set(told(replies)) <= {(200, None), (400, "previous_response_not_found")}
            for reply in replies:
                if reply.status == 200:
                    assert (await get(api, reply.json["id"])).json == reply.json
            assert told([await get(api, first)]) == {GONE: 1}


async def test_items_and_a_conversation_are_deleted_by_several_calls(autojump_clock: MockClock) -> None:
    missing = {(404, "item_not_found"), (404, "conversation_not_found")}
    async with open_api() as api:
        body = {"items": [{"role": "user", "content": str(number)} for number in range(5)]}
        path = f"/v1/conversations/{(await api.call('POST', '/v1/conversations', body)).json['id']}"
        names = [item["id"] for item in (await api.call("GET", f"{path}/items")).json["data"]]
        twice: list[Call] = [("DELETE", f"{path}/items/{name}") for name in names[:3] * 2]
        replies = await at_once(api, *twice, ("GET", f"{path}/items?after={names[1]}"), ("GET", f"{path}/items"))
        assert set(told(replies[:6])) <= {(200, None), *missing}
        assert set(told(replies[6:])) <= {(200, None), (400, "invalid_value")}
        left = [item["id"] for item in (await api.call("GET", f"{path}/items")).json["data"]]
        assert left == names[3:]
        error = await api.call("GET", f"{path}/items?after={names[0]}")
        assert told([error]) == {(400, "invalid_value"): 1}
        replies = await at_once(
            api,
            ("DELETE", f"{path}/items/{names[3]}"),
            ("DELETE", path),
            ("DELETE", path),
            ("POST", f"{path}/items", {"items": [{"role": "user", "content": "x"}]}),
            ("POST", PATH, {"input": "Hi", "conversation": path.rpartition("/")[2]}),
            ("GET", f"{path}/items"),
        )
        assert set(told(replies)) <= {(200, None), (400, "conversation_locked"), *missing}
        assert replies[1].status == 200
        assert told([await api.call("GET", path)]) == {(404, "conversation_not_found"): 1}
