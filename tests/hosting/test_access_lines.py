"""The access log: one line for each request, when it is over, with how its answer ended."""

from collections.abc import Callable
from typing import Any

import pytest
import trio

from service.hosting.hypercorn.connections import Connections
from service.settings import Settings
from tests.kept_log import kept_log, lines_of
from tests.service.serving import Serving, read_to_end, serving

KEY = "open-sesame-open-sesame"
ENDLESS = "scripted:?tokens=100000&rate=50&first_token_s=0"
Read = Callable[[], list[dict[str, Any]]]


@pytest.fixture(params=["ours", "hypercorn's"])
def way(request: pytest.FixtureRequest) -> str:
    """The code that serves HTTP/1: ours writes pieces of streams past ASGI."""
    if request.param == "ours":
        request.getfixturevalue("connections")
    return str(request.param)


def lines(read: Callable[[], str]) -> list[dict[str, Any]]:
    return lines_of(read(), "request")


async def wait_lines(read: Callable[[], str], count: int) -> list[dict[str, Any]]:
    with trio.fail_after(20):
        while len(lines(read)) < count:  # noqa: ASYNC110  a request is over a moment after its client has the answer
            await trio.sleep(0.01)
    assert len(lines(read)) == count
    return lines(read)


def settings(**changes: Any) -> Settings:
    return Settings(**{"store_url": "memory:", "access_log": "on", "model_url": "scripted:?rate=0"} | changes)


async def answer(server: Serving, *asked: Any, **how: Any) -> tuple[bytes, bytes]:
    async with await server.connect(*asked, **how) as stream:
        head, _, body = (await read_to_end(stream)).partition(b"\r\n\r\n")
        return head, body


def body_of(head: bytes, body: bytes) -> bytes:
    """The body without its chunks."""
    if b"chunked" not in head.lower():
        return body
    whole = b""
    while size := int(body.partition(b"\r\n")[0], 16):
        start = body.index(b"\r\n") + 2
        whole, body = whole + body[start : start + size], body[start + size + 2 :]
    return whole


async def test_each_answer_is_a_line_with_its_route_and_what_was_sent(way: str) -> None:
    with kept_log("json") as read:
        async with serving(settings()) as server:
            created = await answer(server, "POST", "/sessions", {"id": "mine"})
            streamed = await answer(server, "POST", "/sessions/mine/turns", {"input": "x"}, accept="text/event-stream")
            listed = await answer(server, "GET", "/sessions?q=x&limit=3")
            head = await answer(server, "HEAD", "/sessions/mine")
            missing = await answer(server, "GET", "/sessions/none")
            nowhere = await answer(server, "GET", "/nobody/knows")
            bad = await answer(server, "GET", "//sessions")
            told = await wait_lines(read, 7)
        assert "nobody" not in read()
    seen = [(it["method"], it["route"], it["status"], it["end"], it.get("session_id")) for it in told]
    assert seen == [
        ("POST", "/sessions", 201, "whole", None),
        ("POST", "/sessions/<session_id>/turns", 200, "whole", "mine"),
        ("GET", "/sessions", 200, "whole", None),
        ("HEAD", "/sessions/<session_id>", 200, "whole", "mine"),
        ("GET", "/sessions/<session_id>", 404, "whole", "none"),
        ("GET", None, 404, "whole", None),
        ("GET", None, 404, "whole", None),
    ]
    sizes = [len(body_of(*it)) for it in (created, streamed, listed, head, missing, nowhere)]
    assert [it["bytes"] for it in told[:6]] == sizes
    assert sizes[3] == 0 < sizes[0] < sizes[1]
    assert bad[0].startswith(b"HTTP/1.1 404")
    assert all(it["request_id"].startswith("req_") and it["client"] == "127.0.0.1" for it in told)
    assert told[1]["turn_id"].startswith("turn_")
    assert not any("caller" in it for it in told)
    assert all(0 <= it["duration_s"] < 60 for it in told)


async def test_a_method_that_is_none_of_http_is_not_written(way: str) -> None:
    with kept_log("json") as read:
        async with serving(settings()) as server:
            await answer(server, "MY-WORDS-ARE-IN-YOUR-LOG", "/sessions")
            [told] = await wait_lines(read, 1)
        assert "WORDS" not in read()
    assert told["method"] == "_OTHER"


async def test_a_stream_whose_client_leaves_is_a_line_that_says_so(way: str) -> None:
    with kept_log("json") as read:
        async with serving(settings(model_url=ENDLESS)) as server:
            stream = await server.connect("POST", "/chat", {"message": "x"}, accept="text/event-stream")
            received = b""
            async with stream:
                while received.count(b"turn.delta") < 3:
                    received += await stream.receive_some()
                assert not lines(read), "it is told at its end"
            (told,) = await wait_lines(read, 1)
        (ended,) = lines_of(read(), "turn ended")
    assert (told["route"], told["status"], told["end"]) == ("/chat", 200, "left")
    assert told["bytes"] >= received.count(b"turn.delta") * 20
    assert (ended["code"], ended["turn_id"], ended["session_id"]) == (
        "disconnected",
        told["turn_id"],
        told["session_id"],
    )


async def test_a_caller_has_a_name_and_its_key_is_nowhere(way: str) -> None:
    keys = ({"name": "alice", "key": KEY},)
    with kept_log("json") as read:
        async with serving(settings(api_keys=keys)) as server, await server.connect("GET", "/sessions") as refused:
            await read_to_end(refused)
            async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                await stream.send_all(
                    b"GET /sessions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Request-ID: a.b\r\n"
                    b"Authorization: Bearer %b\r\n\r\n" % KEY.encode()
                )
                assert b" 200 " in await read_to_end(stream)
            unknown, known = await wait_lines(read, 2)
        assert KEY not in read()
    assert (unknown["status"], "caller" in unknown) == (401, False)
    assert (known["status"], known["caller"], known["request_id"]) == (200, "alice", "a.b")


async def test_without_the_setting_there_is_no_line(connections: Connections) -> None:
    with kept_log("json") as read:
        async with serving(settings(access_log="off")) as server:
            assert (await server.call("GET", "/healthz"))[0] == 200
        assert lines(read) == []
