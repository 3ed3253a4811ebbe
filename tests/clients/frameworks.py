"""Agent frameworks against a real server: turns with tools through restarts, and replies that are cut."""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import trio

from bench.server_process import ROOT, ServerProcess
from tests.clients.checking import check
from tests.clients.surroundings import HERE, free_port
from tests.clients.tool_model import ToolModel
from tests.process.cut_replies import delete_responses, open_cut_server, wait_begun
from tests.process.lastcall import SERVE, assert_clean, open_lastcall, wait_gone
from tests.upstreams.raw_server import open_raw_server

ANSWERS = ["The tools said 4 degrees and noon"] * 3
CALLS = sorted(["get_weather Oslo", "get_time Oslo"] * 3)
BOTH = ("assistant", "tool", "tool", "assistant")
ONE_BY_ONE = ("assistant", "tool", "assistant", "tool", "assistant")
ROLES = ["system", "user", *BOTH, "user", *ONE_BY_ONE, "user", *BOTH[:-1]]
"""The messages of the last request: each call, output and answer of all turns."""
Answer = Callable[[str], Awaitable[None]]


Command = Callable[..., Sequence[str]]
"""Makes the command of a script, for its arguments."""


def framework(script: str, requirement: str) -> Command:
    """The command of a script in an environment of its own, with one package and what that needs."""

    def command(*arguments: str) -> Sequence[str]:
        environment = ["uv", "run", "--no-project", "--quiet", "--with", requirement]
        return [*environment, "python", str(HERE / script), *arguments]

    return command


async def talk(command: Sequence[str], hear: Callable[[str, Answer], Awaitable[None]]) -> dict[str, Any]:
    """Run a script, let each line that it prints be heard, and return the JSON of its last line."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryFile() as errors:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        stdin = process.stdin

        async def answer(line: str) -> None:
            await stdin.send_all(f"{line}\n".encode())

        try:
            async with aclosing(lines_of(process.stdout)) as lines:
                async for line in lines:
                    if line.startswith("{"):
                        result = json.loads(line)
                    else:
                        await hear(line, answer)
            code = await process.wait()
        finally:
            process.kill()  # without an effect on one that has ended
        errors.seek(0)
        check(code == 0 and bool(result), f"the script ended with {code}: {errors.read()[-800:].decode()}")
    return result


async def lines_of(stream: trio.abc.ReceiveStream) -> AsyncGenerator[str]:
    rest = b""
    async for data in stream:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode()


async def talk_through_restarts(make: Callable[[str], Sequence[str]], **settings: Any) -> tuple[dict[str, Any], int]:
    """Run a script against a server that is restarted whenever the script prints ``restart``.

    Args:
        make: Makes the script's command for the URL of the API.

    Returns:
        What the script saw, and how often the server was stopped.
    """
    port, stops = free_port(), 0
    server: ServerProcess
    with tempfile.TemporaryDirectory() as name:
        settings = {"bind": f"127.0.0.1:{port}", "store_url": f"sqlite:{name}/lastcall.db"} | settings
        async with AsyncExitStack() as running:

            async def start() -> ServerProcess:
                logs = Path(tempfile.mkdtemp(dir=name))
                return await running.enter_async_context(open_lastcall(SERVE, logs, **settings))

            async def hear(line: str, answer: Answer) -> None:
                nonlocal server, stops
                check(line == "restart", f"it printed {line!r}")
                server.signal_main(signal.SIGTERM)
                assert_clean(SERVE, server, await wait_gone(server))
                stops += 1
                await running.aclose()
                server = await start()
                await answer("go on")

            server = await start()
            return await talk(make(f"http://127.0.0.1:{port}/v1"), hear), stops


async def turns(command: Command, face: str) -> str:
    """Three turns with two tools each. The server is restarted in each, between a call and its output."""
    model = ToolModel()
    async with open_raw_server(model.reply) as upstream:
        seen, stops = await talk_through_restarts(lambda url: command("turns", url, face), model_url=upstream.url)
    check(seen["seen"] == ANSWERS, f"the answers are {seen['seen']}")
    check(sorted(seen["ran"]) == CALLS, f"it ran {seen['ran']}")
    last = model.requests[-1]
    check([it["role"] for it in last] == ROLES, f"the last request has {[it['role'] for it in last]}")
    check_calls(last)
    check(stops == 3, f"there were {stops} restarts")
    return f"{seen['version']}: 3 turns, 6 calls, {stops} restarts, all {len(ROLES)} messages in the last request"


def check_calls(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that each call is followed by its output, and is whole."""
    open_calls: dict[str, str] = {}
    outputs = {"get_weather": "4 degrees", "get_time": "noon"}
    for message in messages:
        for call in message.get("tool_calls") or ():
            open_calls[call["id"]] = call["function"]["name"]
            check(json.loads(call["function"]["arguments"]) == {"city": "Oslo"}, f"a call is {call}")
        if message["role"] == "tool":
            name = open_calls.pop(message["tool_call_id"], "")
            check(outputs.get(name) == message["content"], f"the output of {name!r} is {message['content']!r}")
    check(not open_calls, f"these calls have no output: {open_calls}")


Ends = Mapping[str, Mapping[str, str]]
"""By the ending and by the face and way: how that begins what the client has at the end."""


async def cuts(command: Command, ends: Ends, *, streams: int = 1) -> str:
    """No reply that is cut is taken for a success, and no call of it is made.

    Args:
        streams: In how many ways the script reads a stream.
    """
    told = []
    for ending, expected in ends.items():
        seen = await cut(command, ending, streams=streams)
        wrong = []
        for ask, end in seen.items():
            face_and_way, _, model = ask.rpartition(" ")
            begins = expected.get(face_and_way, "an entry in the table")
            if not end.startswith(begins):
                wrong.append(f"{ending}, {face_and_way}, {model}: {end!r}, and not {begins!r}")
        check(not wrong, "\n".join(wrong))
        told.append(f"{ending} {', '.join(sorted({end.partition(':')[0] for end in seen.values()}))}")
    return "; ".join(told)


async def cut(command: Command, ending: str, *, streams: int) -> dict[str, str]:
    """What the client saw of each reply."""
    models = ("silent",) if ending == "no-token" else ("text", "call")
    asks = 2 * (1 + streams) * len(models)
    not_begun = 0 if ending == "no-token" else 2 * streams * len(models)

    async def hear(line: str, _: Answer) -> None:
        nonlocal not_begun
        check(line == "begun", f"it printed {line!r}")
        not_begun -= 1
        if not_begun == 0:
            await end()

    async def end() -> None:
        await model.wait_asked(asks)
        match ending:
            case "stop" | "kill":
                await wait_begun(server, folder)
                server.signal_main(signal.SIGTERM if ending == "stop" else signal.SIGKILL)
            case "deletion":
                await delete_responses(server, await wait_begun(server, folder))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with open_cut_server(folder, ending) as (model, server):
            seen = await talk(command("cut", f"http://127.0.0.1:{server.port}/v1", *models), hear)
    check(len(seen["seen"]) == asks, f"it made {len(seen['seen'])} runs")
    check(not seen["ran"], f"it made calls of a reply that was cut: {seen['ran']}")
    found: dict[str, str] = seen["seen"]
    return found


def _by_face(chat: Mapping[str, str], responses: Mapping[str, str]) -> Mapping[str, str]:
    return {f"{face} {way}": end for face, it in (("chat", chat), ("responses", responses)) for way, end in it.items()}


def _ends_of(
    status: Callable[[int], str], cut: str, *, lost: Mapping[str, str], terminal: Callable[[str], str] | None = None
) -> Ends:
    """What a client raises at each ending.

    Args:
        status: For an error with a status.
        cut: For an error in a stream.
        lost: For a connection that was cut, by the way.
        terminal: For the last event of a stream of a response, if the client raises it and not the error after it.
    """

    def ends(number: int, event: str, *, streams: bool = True) -> Mapping[str, str]:
        whole = status(number)
        chat = {way: whole if way in ("run", "whole") or not streams else cut for way in lost}
        responses = {way: terminal(event) if terminal else cut for way in lost}
        return _by_face(chat, responses | {way: whole for way in lost if way in ("run", "whole")})

    return {
        "stop": ends(503, "incomplete"),
        "kill": _by_face(lost, lost),
        "deadline": ends(504, "failed"),
        "no-token": ends(504, "failed", streams=False),  # there was no chunk yet
        "deletion": ends(500, "incomplete"),
    }


AGENTS_ENDS = _ends_of(
    lambda status: f"InternalServerError {status}: ",
    "APIError: ",
    lost=dict.fromkeys(("run", "stream"), "APIConnectionError: "),
    terminal=lambda event: f"ModelBehaviorError: Responses stream ended with terminal event `response.{event}`",
)
PYDANTIC_ENDS = _ends_of(
    lambda status: f"ModelHTTPError {status}: ",
    "ModelHTTPError 500: ",
    lost=dict.fromkeys(("run", "stream"), "ModelAPIError: "),
)
NPM_ENDS = _ends_of(
    lambda status: f"InternalServerError {status} ",
    "APIError ",
    lost={"whole": "APIConnectionError: ", "stream": "TypeError: terminated", "helper": "OpenAIError: terminated"},
)
