"""What callers and models say is in no line of the log, at no level, unless the settings ask for it."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio
from pydantic import SecretStr

from service.settings import Settings
from tests.kept_log import kept_log, lines_of
from tests.service.serving import Serving, read_to_end, serving
from tests.upstreams.raw_server import Connection, open_raw_server

MARK = "zyzzyva"
KEY = f"{MARK}-open-sesame"
MODEL_KEY = f"{MARK}-of-the-model-server"
HEADERS = {"Authorization": f"Bearer {KEY}"}
CAP_S = 60


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


async def converse(connection: Connection) -> None:
    """Reply with all kinds of output, then refuse twice with a quotation, and break off in the middle."""
    call = {"index": 0, "id": "call_1", "function": {"name": f"{MARK}_tool", "arguments": f'{{"a": "{MARK}"}}'}}
    while True:
        said = (await connection.receive_request()).body
        if b"refuse" in said:
            error = {"error": {"message": f"Invalid prompt: {MARK} is not allowed", "type": "invalid_request_error"}}
            await connection.send_response(500 if b"often" in said else 400, error, {"x-request-id": "up-1"})
            continue
        await connection.send_head(headers={"x-request-id": "up-2"})
        await connection.send_event(chunk({"role": "assistant", "reasoning_content": f"thinks of {MARK}"}))
        await connection.send_event(f'{{"{MARK}": no JSON}}'.encode())
        await connection.send_event(chunk({"content": f"says {MARK}"}))
        if b"break" in said:
            return
        await connection.send_event(chunk({"tool_calls": [call]}))
        await connection.send_event(chunk({}, "tool_calls"))
        await connection.send_event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
        await connection.send_event(b"[DONE]")
        await connection.end_body()


async def call(server: Serving, method: str, path: str, body: object = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    lines = {"Host": "a", "Connection": "close", "Content-Length": str(len(data)), **HEADERS}
    if data:
        lines["Content-Type"] = "application/json"
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        await stream.send_all(head.encode() + b"\r\n" + data)
        return await read_to_end(stream)


async def talk(**changes: Any) -> str:
    """Hold a whole conversation, with good and bad ends, at the most talkative level. Returns the log."""
    with kept_log("json", log_level="debug") as read, every_logger(), trio.fail_after(CAP_S):
        async with open_raw_server(converse) as upstream:
            settings = Settings(
                store_url="memory:",
                access_log="on",
                model_url=f"{upstream.url}/v1?key={MODEL_KEY}",
                model="m",
                title_model="m",
                model_api_key=SecretStr(MODEL_KEY),
                model_retries_max=1,
                api_keys=(SecretStr(KEY),),
                **changes,
            )
            async with serving(settings) as server:
                session = {"id": "s", "system_message": MARK, "title": MARK, "metadata": {MARK: MARK}}
                turns = [
                    {"input": f"hello {MARK}", "tools": [{"type": "function", "name": f"{MARK}_tool"}]},
                    {"input": [{"type": "function_call_output", "call_id": "call_1", "output": MARK}]},
                    {"input": f"refuse {MARK}"},
                    {"input": f"refuse often {MARK}"},
                    {"input": f"break {MARK}", "parent": None},
                ]
                await call(server, "POST", "/sessions", session)
                for turn in turns:
                    assert b'"state"' in await call(server, "POST", "/sessions/s/turns", turn)
                response = {"model": "m", "input": f"hello {MARK}", "instructions": MARK, "metadata": {"a": MARK}}
                await call(server, "POST", "/v1/responses", response)
                await call(server, "GET", f"/sessions?q={MARK}")
                await call(server, "GET", f"/{MARK}")
                await call(server, "POST", "/sessions/s/turns", {"input": 5, MARK: MARK})
                await call(server, "PATCH", "/sessions/s", {"title": MARK * 2000})
                await call(server, "DELETE", "/sessions/s")
        return read()


@contextmanager
def every_logger() -> Iterator[None]:
    """Let all libraries log, too."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.setLevel(level)


async def test_a_whole_conversation_leaves_no_word_of_it_and_no_secret_in_the_log() -> None:
    log = await talk()
    ended = [(it["outcome"], it["code"]) for it in lines_of(log, "turn ended")]
    assert ended == [
        ("completed", "tool_calls"),
        ("completed", "tool_calls"),
        ("failed", "upstream_rejected"),
        ("failed", "upstream_error"),
        ("failed", "upstream_truncated"),
        ("completed", "tool_calls"),
    ]
    assert len(lines_of(log, "request")) == 12
    assert lines_of(log, "model call will be repeated")
    assert [line for line in log.splitlines() if MARK in line.lower()] == []
    assert [it["upstream_request_id"] for it in lines_of(log, "turn ended")] == [
        "up-2",
        "up-2",
        "up-1",
        "up-1",
        "up-2",
        "up-2",
    ]


async def test_the_words_of_a_model_server_are_logged_where_the_settings_ask_for_them() -> None:
    log = await talk(upstream_words="both")
    quoting = {json.loads(line)["message"] for line in log.splitlines() if MARK in line}
    assert quoting == {
        "the upstream's own words",
        "The model server sent data that is no chunk of a reply; the data is skipped.",
    }
