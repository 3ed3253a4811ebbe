"""What clients of ``/v1`` see of a model server behind Lastcall: a row of the table for each question.

A row says what the server gives, in few words. Beside that it checks what Lastcall promises in front of any server: a
stream and an answer that say the same, no call and no output lost, a refusal that has a code and names the parameter.
"""

import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import openai
import trio
from openai import AsyncOpenAI
from openai.types.responses import Response

from bench.server_process import Launch, open_server
from service.models.client import Message, ModelRequest
from service.models.continuation import Form
from service.models.openai_compatible import open_openai_compatible
from tests.clients.checking import FailedError, check
from tests.models.replies import ask
from tests.process.lastcall import SERVE
from tests.upstreams.kinds import BEGUN, REST, Kind, Running

CAP_S = 60
"""Bounds each question."""
YES, NONE = "yes", "no"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CHAT_WEATHER: Any = {"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type"}}
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
FORMAT: Any = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
LONG = "A long story. " * 1000
"""More than the context of a model of ours, and less than any bound of Lastcall."""


@dataclass
class Setting:
    """A model server with Lastcall in front of it, and a client."""

    kind: Kind
    upstream: Running
    folder: Path
    client: AsyncOpenAI
    questions: int = 0

    @property
    def question(self) -> str:
        """A question that was not asked before: servers with scripts remember conversations by their first words."""
        self.questions += 1
        return f"What is the weather, for the {self.questions}. time?"

    async def ask(self, input: Any = "Good evening", **asked: Any) -> Response:  # noqa: A002  OpenAI's name
        response: Response = await self.client.responses.create(model=self.kind.model, input=input, **asked)
        return response

    async def stream(self, input: Any = "Good evening", **asked: Any) -> tuple[list[Any], Response]:  # noqa: A002
        """The events of a stream, and the response at its end."""
        stream = await self.client.responses.create(model=self.kind.model, input=input, stream=True, **asked)
        events = [event async for event in stream]
        check([event.sequence_number for event in events] == list(range(len(events))), "the numbers have gaps")
        check(events[-1].type in ("response.completed", "response.incomplete", "response.failed"), events[-1].type)
        return events, events[-1].response


@asynccontextmanager
async def open_setting(kind: Kind, upstream: Running, folder: Path) -> AsyncIterator[Setting]:
    """Run Lastcall with SQLite in a folder in front of a model server."""
    await trio.Path(folder).mkdir(exist_ok=True)
    log = folder / f"server-{uuid4().hex}.log"  # its port is read from a log of its own
    env = {
        "LASTCALL_BIND": "127.0.0.1:0",
        "LASTCALL_STORE_URL": f"sqlite:{folder}/lastcall.db",
        "LASTCALL_MODEL_URL": upstream.url,
        "LASTCALL_MODEL": kind.model,
    }
    async with open_server(Launch(SERVE.argv(), env=env), log_path=log) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        options: Any = {"api_key": "none", "max_retries": 0, "timeout": CAP_S, "_strict_response_validation": True}
        async with AsyncOpenAI(base_url=url, **options) as client:
            yield Setting(kind, upstream, folder, client)
        server.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            await server.wait_gone()


def told(error: openai.APIStatusError) -> str:
    """The words of the table for a refusal."""
    check(error.code not in (None, "", "internal_error"), f"{error.status_code} {error.code}: {error.message}")
    named = f", `param` `{error.param}`" if error.param else ""
    return f"{error.status_code} `{error.code}`{named}"


def calls_of(response: Response) -> list[Any]:
    return [item for item in response.output if item.type == "function_call"]


def outputs_of(calls: list[Any]) -> list[Any]:
    return [{"type": "function_call_output", "call_id": call.call_id, "output": "4 °C"} for call in calls]


def is_weather(text: str, city: str) -> bool:
    """Whether these are the arguments of a call for a city."""
    try:
        return bool(json.loads(text) == {"city": city})
    except ValueError:
        return False


# The rows


async def streaming(it: Setting) -> str:
    events, streamed = await it.stream()
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    check("".join(pieces) == streamed.output_text != "", f"the pieces are not the text: {pieces}")
    check(await it.client.responses.retrieve(streamed.id) == streamed, "it is stored otherwise than it was streamed")
    whole = await it.ask()
    check((whole.status, bool(whole.output_text)) == ("completed", True), f"without a stream: {whole.status}")
    return "piece by piece" if len(pieces) > 1 else "in one piece"


async def usage(it: Setting) -> str:
    response = await it.ask()
    counted = response.usage
    if counted is None:
        return NONE
    check(counted.total_tokens == counted.input_tokens + counted.output_tokens, "the sum is wrong")
    return YES if counted.output_tokens else "zeros"


async def models(it: Setting) -> str:
    """The server's own list is shown, with the model of the settings."""
    listed = {model.id async for model in it.client.models.list()}
    check(it.kind.model in listed, f"{it.kind.model} is not listed: {listed}")
    async with httpx.AsyncClient(timeout=CAP_S) as client:
        answer = await client.get(f"{it.upstream.url}/models")
    if answer.status_code != 200:
        return "it has no list"
    own = {model["id"] for model in answer.json()["data"]}
    check(own <= listed, f"these are not listed: {own - listed}")
    return "its own list"


async def functions(it: Setting) -> str:
    events, response = await it.stream(it.question, tools=[WEATHER])
    calls = calls_of(response)
    if not calls:
        return f"no call: {response.status}, a text"
    for call in calls:
        pieces = [
            event.delta
            for event in events
            if event.type == "response.function_call_arguments.delta" and event.item_id == call.id
        ]
        check("".join(pieces) == call.arguments, f"the pieces are not the arguments: {pieces}")
    return "called"


def choosing(choice: Any, *, calls: bool) -> Callable[[Setting], Awaitable[str]]:
    """The question whether a choice of tools, with which the model must call or must not, is heeded."""

    async def row(it: Setting) -> str:
        response = await it.ask(it.question, tools=[WEATHER], tool_choice=choice)
        has_called = bool(calls_of(response))
        seen = "called" if has_called else "a text"
        return seen if has_called == calls else f"not heeded: {seen}"

    return row


async def parallel(it: Setting) -> str:
    response = await it.ask(it.question, tools=[WEATHER], parallel_tool_calls=True)
    return f"{len(calls_of(response))} in one reply"


async def not_parallel(it: Setting) -> str:
    response = await it.ask(it.question, tools=[WEATHER], parallel_tool_calls=False)
    count = len(calls_of(response))
    return "one call" if count == 1 else f"not heeded: {count} calls"


async def strict(it: Setting) -> str:
    """The schema has another city than the one that the servers with scripts, and the model by itself, call for."""
    schema = WEATHER["parameters"] | {"properties": {"city": {"type": "string", "enum": ["Lima"]}}}
    response = await it.ask(it.question, tools=[WEATHER | {"parameters": schema}], tool_choice="required")
    calls = calls_of(response)
    fits = bool(calls) and all(is_weather(call.arguments, "Lima") for call in calls)
    return "the arguments fit" if fits else "not heeded: other arguments"


async def answer(it: Setting) -> str:
    question = it.question
    called = await it.ask(question, tools=[WEATHER])
    calls = calls_of(called)
    if not calls:
        return "no call"
    answered = await it.ask(outputs_of(calls), previous_response_id=called.id, tools=[WEATHER])
    history = await it.ask(
        [{"role": "user", "content": question}, *(call.to_dict() for call in calls), *outputs_of(calls)],
        tools=[WEATHER],
        store=False,
    )
    for response in answered, history:
        check(response.status == "completed", f"after the output it is {response.status}")
    return "answered" if answered.output_text and history.output_text else "called again"


async def restart(it: Setting) -> str:
    folder = it.folder / "restarted"
    async with open_setting(it.kind, it.upstream, folder) as before:
        called = await before.ask(it.question, tools=[WEATHER])
    calls = calls_of(called)
    if not calls:
        return "no call"
    async with open_setting(it.kind, it.upstream, folder) as after:
        again = await after.client.responses.retrieve(called.id)
        check(again == called, "after a restart it is another response")
        events, answered = await after.stream(outputs_of(calls), previous_response_id=called.id, tools=[WEATHER])
        check(answered.status == "completed", f"after a restart it is {answered.status}: {events[-1]}")
    return "answered" if answered.output_text else "called again"


async def chat(it: Setting) -> str:
    """Chat Completions see the same calls as Responses, streamed and not."""
    messages = [{"role": "user", "content": it.question}]
    asked: Any = {"model": it.kind.model, "messages": messages, "tools": [CHAT_WEATHER]}
    whole = await it.client.chat.completions.create(**asked)
    called = [(call.function.name, call.function.arguments) for call in whole.choices[0].message.tool_calls or ()]
    streamed: dict[int, list[str]] = {}
    async for chunk in await it.client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                name, arguments = call.function.name or "", call.function.arguments or ""
                kept = streamed.setdefault(call.index, ["", ""])
                kept[0], kept[1] = kept[0] + name, kept[1] + arguments
    check([tuple(call) for call in streamed.values()] == called, f"{streamed} is not {called}")
    return f"called, {len(called)} in one reply" if called else "no call: a text"


async def json_schema(it: Setting) -> str:
    response = await it.ask("The weather in Oslo, as JSON?", text=FORMAT)
    try:
        said = json.loads(response.output_text)
    except ValueError:
        return "not heeded: the text is no JSON"
    fits = isinstance(said, dict) and said.keys() == {"city", "degrees"} and said["city"] in ("Oslo", "Rome")
    return "the text fits" if fits and isinstance(said["degrees"], int) else "not heeded: other JSON"


async def json_object(it: Setting) -> str:
    response = await it.ask("Some JSON?", text={"format": {"type": "json_object"}}, max_output_tokens=500)
    try:
        return "an object" if isinstance(json.loads(response.output_text), dict) else "not heeded: other JSON"
    except ValueError:
        return "not heeded: the text is no JSON"


async def broken_schema(it: Setting) -> str:
    unknown = {"type": "object", "properties": {"a": {"type": "no such type"}}, "required": ["a"]}
    form = {"format": {"type": "json_schema", "name": "x", "schema": unknown}}
    await it.ask(text=form, max_output_tokens=500)
    return "taken"


async def broken_parameters(it: Setting) -> str:
    tool = WEATHER | {"parameters": {"type": "object", "properties": {"a": {"type": "no such type"}}}, "strict": False}
    await it.ask(tools=[tool], tool_choice="required", max_output_tokens=500)
    return "taken"


async def reasoning(it: Setting) -> str:
    response = await it.ask()
    thoughts = [item for item in response.output if item.type == "reasoning"]
    return YES if thoughts and all(item.content for item in thoughts) else NONE


async def effort(it: Setting) -> str:
    await it.ask(reasoning={"effort": "low"})
    return "taken"


async def limit(it: Setting) -> str:
    response = await it.ask(max_output_tokens=1)
    details = response.incomplete_details
    return f"{response.status}, `{details.reason}`" if details else f"not heeded: {response.status}"


async def others(it: Setting) -> str:
    """The other parameters, each alone: all are taken, or it is told which are not."""
    refused: dict[str, str] = {}
    asked: tuple[dict[str, Any], ...] = (
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"text": {"verbosity": "low"}},
    )
    for one in asked:
        try:
            await it.ask(extra_body=one)
        except openai.APIStatusError as error:
            refused[next(iter(one))] = told(error)
    message: Any = [{"role": "user", "content": "Good evening"}]
    for more in ({"seed": 1}, {"stop": ["no such word"]}):
        try:
            await it.client.chat.completions.create(model=it.kind.model, messages=message, extra_body=more)
        except openai.APIStatusError as error:
            refused[next(iter(more))] = told(error)
    return "; ".join(f"`{name}`: {how}" for name, how in refused.items()) or "all taken"


async def continuing(it: Setting) -> str:
    """The ways in which the server can be asked to go on with a reply. All others begin anew, or are refused."""
    request = ModelRequest(model=it.kind.model, prompt=(Message("user", "Good evening"),), prefix=BEGUN)
    forms: tuple[Form, ...] = ("trailing", "prefix", "final_message")
    understood = []
    for form in forms:
        async with open_openai_compatible(it.upstream.url, continuation=form) as client:
            if (await ask(client, request)).text == REST:
                understood.append(f"`{form}`")
    return ", ".join(understood) or "no: it begins anew"


async def unknown_model(it: Setting) -> str:
    await it.client.responses.create(model="no-such-model", input="Good evening")
    return "answers all the same"


async def too_long(it: Setting) -> str:
    await it.ask(LONG)
    return "taken"


async def dies(it: Setting) -> str:
    """The server is killed in the middle of a reply."""
    if not it.kind.goes_on:
        return "not tried: its replies are short"
    asked: Any = {"model": it.kind.model, "input": "And then?", "instructions": "Go on.", "stream": True}
    text, last, code = "", None, None
    try:
        async for event in await it.client.responses.create(**asked):
            if event.type == "response.output_text.delta":
                it.upstream.kill()
                text += event.delta
            last = event
    except openai.APIError as error:
        code = error.code
    check(last is not None and code is not None, "the SDK raises nothing, or too early")
    assert last is not None
    check(last.type == "response.failed", f"it ended as {last.type}")
    check(last.response.output_text == text != "", "the text that was sent is not kept")
    check(last.response.model_extra["lastcall"]["code"] == code, f"the response has another cause than {code}")
    return f"`{last.type}`, then the error `{code}`"


async def gone(it: Setting) -> str:
    """The server was killed: the last row, because nothing answers after it."""
    it.upstream.kill()
    await it.ask()
    raise FailedError("it answers without its model server")


ROWS: tuple[tuple[str, Callable[[Setting], Awaitable[str]]], ...] = (
    ("stream", streaming),
    ("usage", usage),
    ("`GET /v1/models`", models),
    ("functions, `tool_choice` auto", functions),
    ("`tool_choice` required", choosing("required", calls=True)),
    ("`tool_choice` of a function", choosing({"type": "function", "name": "get_weather"}, calls=True)),
    ("`tool_choice` none", choosing("none", calls=False)),
    ("parallel calls", parallel),
    ("`parallel_tool_calls` false", not_parallel),
    ("strict parameters of a function", strict),
    ("the outputs of the calls, by `previous_response_id` and as a history", answer),
    ("the same after a restart of Lastcall", restart),
    ("chat completions with functions", chat),
    ("`json_schema`", json_schema),
    ("`json_object`", json_object),
    ("a JSON schema that is none", broken_schema),
    ("parameters of a function that are no JSON schema", broken_parameters),
    ("reasoning in words", reasoning),
    ("`reasoning.effort`", effort),
    ("`max_output_tokens`", limit),
    ("sampling, penalties, `verbosity`, `seed`, `stop`", others),
    ("goes on with a reply, `continuation`", continuing),
    ("a model that it does not have", unknown_model),
    (f"an input of {len(LONG):,} bytes".replace(",", " "), too_long),
    ("the server is killed in mid-reply", dies),
    ("the server is gone", gone),
)


async def _cell(ask: Callable[[Setting], Awaitable[str]], setting: Setting) -> str:
    """The answer to a question, which may be a refusal."""
    try:
        return await ask(setting)
    except openai.APIStatusError as error:
        return told(error)


async def observe(kind: Kind, folder: Path) -> tuple[list[str], list[str]]:
    """Run a model server with Lastcall in front of it, and ask all questions.

    Returns:
        The answers, one for each row, and the promises of Lastcall that were broken.
    """
    cells: list[str] = []
    broken: list[str] = []
    async with kind.open(folder) as upstream, open_setting(kind, upstream, folder / "lastcall") as setting:
        for label, ask in ROWS:
            try:
                with trio.fail_after(CAP_S):
                    cells.append(await _cell(ask, setting))
            except (FailedError, openai.OpenAIError, trio.TooSlowError) as error:
                cells.append("FAILED")
                broken.append(f"{kind.name}: {label}: {error!r}")
    return cells, broken
