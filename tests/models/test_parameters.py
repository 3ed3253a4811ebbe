"""Options of a request on their way to the server, and what becomes of a server's refusal of one."""

import json
from typing import Any

import msgspec
import pytest

from service.errors import ModelError
from service.models.chat_completions import Dialect, encode_request
from service.models.client import (
    FunctionTool,
    Message,
    ModelRequest,
    NamedFunction,
    Options,
    TextFormat,
    ToolChoice,
    Tools,
)
from service.models.parameters import parameters_of, refused_parameter, without_effect
from service.models.upstream_errors import ErrorReply, error_from_reply, error_from_status
from tests.models.replies import ask
from tests.models.upstream import open_upstream
from tests.upstreams.raw_server import DONE, Connection, Request, delta, finish

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}, "required": ["b", "a"]}
FORMAT = TextFormat(type="json_schema", name="weather", schema=SCHEMA, description="The weather.", strict=True)
ALL = Options(
    top_p=0.5,
    text_format=FORMAT,
    reasoning_effort="low",
    verbosity="high",
    presence_penalty=-2,
    frequency_penalty=2,
    stop=("\n", "END"),
    seed=-1,
)
A_FUNCTION = (FunctionTool(name="f"),)


def asking(
    *,
    options: Options = Options(),  # noqa: B008  immutable
    temperature: float | None = None,
    choice: ToolChoice | None = None,
    parallel: bool | None = None,
    max_output_tokens: int | None = None,
    functions: tuple[FunctionTool, ...] = A_FUNCTION,
) -> ModelRequest:
    tools = Tools(functions=functions, choice=choice, parallel=parallel)
    return ModelRequest(
        model="m",
        prompt=(Message("user", "hi"),),
        temperature=temperature,
        max_output_tokens=max_output_tokens,
        tools=tools,
        options=options,
    )


def body(request: ModelRequest, dialect: Dialect = Dialect()) -> dict[str, Any]:  # noqa: B008  immutable
    decoded: dict[str, Any] = json.loads(encode_request(request, dialect))
    return decoded


def said(message: str, **more: object) -> ErrorReply:
    return ErrorReply.from_decoded({"error": {"message": message, **more}})


def test_options_go_to_the_server_in_its_own_form() -> None:
    sent = body(asking(options=ALL, functions=()))
    described = {"name": "weather", "description": "The weather.", "schema": SCHEMA, "strict": True}
    assert sent.keys() - {"model", "messages", "stream", "stream_options"} == {
        *("top_p", "response_format", "reasoning_effort", "verbosity", "presence_penalty", "frequency_penalty"),
        *("stop", "seed"),
    }
    assert sent["response_format"] == {"type": "json_schema", "json_schema": described}
    assert list(sent["response_format"]["json_schema"]["schema"]["properties"]) == ["b", "a"], "the order has a meaning"
    assert (sent["top_p"], sent["reasoning_effort"], sent["verbosity"]) == (0.5, "low", "high")
    assert (sent["presence_penalty"], sent["frequency_penalty"]) == (-2, 2)
    assert (sent["stop"], sent["seed"]) == (["\n", "END"], -1)


def test_what_nothing_names_is_not_sent() -> None:
    assert body(asking(functions=())).keys() == {"model", "messages", "stream", "stream_options"}
    plain = TextFormat(type="json_schema", name="x", schema={})
    assert body(asking(options=Options(text_format=plain)))["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {}},
    }
    as_object = Options(text_format=TextFormat(type="json_object"), seed=0, presence_penalty=0)
    sent = body(asking(options=as_object))
    assert (sent["response_format"], sent["seed"], sent["presence_penalty"]) == ({"type": "json_object"}, 0, 0)


# The words of OpenAI, Groq, DeepSeek, Mistral, vLLM, Ollama, LiteLLM, OpenRouter and llama.cpp.
REFUSALS: list[tuple[int, ErrorReply, str | None]] = [
    (
        400,
        said("Unsupported parameter: 'top_p' is not supported with this model.", param="top_p"),
        "top_p",
    ),
    (
        400,
        said("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model."),
        "text_format",
    ),
    (400, said("This model does not support response format `json_schema`."), "text_format"),
    (400, said("This response_format type is unavailable now", type="invalid_request_error"), "text_format"),
    (
        400,
        said("Invalid schema for response_format 'x'", param="response_format", code=None),
        "text_format",
    ),
    (400, said("Unsupported value: 'minimal'", param="reasoning.effort"), "reasoning_effort"),
    (400, said('"llama3" does not support thinking', type="invalid_request_error"), "reasoning_effort"),
    (400, said("registry.ollama.ai/library/x:latest does not support tools"), "tools"),
    (404, said("No endpoints found that support tool use.", code=404), "tools"),
    (
        400,
        said('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
        "tool_choice",
    ),
    (
        422,
        ErrorReply.from_decoded(
            {
                "detail": [
                    {"type": "extra_forbidden", "loc": ["body", "verbosity"], "msg": "Extra inputs are not permitted"}
                ]
            }
        ),
        "verbosity",
    ),
    (400, said("litellm.UnsupportedParamsError: m does not support parameters: ['seed'], for model=m"), "seed"),
    (400, said("Unknown parameter: 'tools[0].strict'.", param="tools[0].strict"), "tools"),
    (400, said("'parallel_tool_calls' is only allowed when 'tools' are specified."), "parallel_tool_calls"),
    (400, said("Field 'max_tokens': Value must be between -1 <= value <= 2147483647, but got 9"), "max_output_tokens"),
    (
        400,
        said(
            "max_tokens is too large: 100000. This model supports at most 16384 completion tokens.", param="max_tokens"
        ),
        "max_output_tokens",
    ),
    (400, said("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]"), "max_output_tokens"),
    # About something else: none of these says that the server does not take a parameter.
    (400, said("messages with role 'tool' must follow 'tool_calls'", param="messages.[3].role"), None),
    (400, said("The conversation must end with a user message."), None),
    (400, said("please stop"), None),
    (500, said("Unsupported parameter: 'top_p'"), None),
    (429, said("top_p is not supported"), None),
]


@pytest.mark.parametrize(("status", "reply", "parameter"), REFUSALS)
def test_a_refused_parameter_is_named(status: int, reply: ErrorReply, parameter: str | None) -> None:
    request = asking(options=ALL, choice="required", parallel=False, max_output_tokens=9)
    error = error_from_status(status, reply, redact=str, sent=parameters_of(request))
    assert (error.code == "parameter_refused") == (parameter is not None)
    assert error.parameter == parameter
    if parameter is not None:
        assert error.message == f"The model server does not take {parameter}, or not this value of it (HTTP {status})."
        assert not error.retryable


@pytest.mark.parametrize(("status", "reply", "parameter"), REFUSALS)
def test_a_refusal_says_nothing_about_a_parameter_that_was_not_sent(
    status: int, reply: ErrorReply, parameter: str | None
) -> None:
    error = error_from_status(status, reply, redact=str, sent=parameters_of(asking(functions=())))
    assert (error.code, error.parameter) != ("parameter_refused", parameter)
    assert error.parameter is None


@pytest.mark.parametrize(
    ("status", "words", "expected"),
    [
        (400, "Assistant messages cannot be continued.", True),
        (422, "Prefill is not supported.", True),
        (400, "Unsupported parameter: 'continue_final_message'", True),
        (400, "Unsupported parameter: 'top_p'", False),
        (404, "Not found", False),
        (409, "busy", False),
        (302, "", False),
        (400, "Invalid API key", False),
        (500, "continue_final_message", False),
    ],
)
def test_only_a_refusal_of_what_a_request_says_may_be_one_to_go_on(status: int, words: str, expected: bool) -> None:
    error = error_from_status(status, said(words), redact=str, sent={"continue_final_message", "top_p"})
    assert error.may_be_continuation is expected


BROKEN_SCHEMA = said(  # the words of llama.cpp
    "Unable to generate parser for this template. Automatic parser generation failed: JSON schema error at "
    "#/properties/a: unrecognized type x",
    code=400,
    type="invalid_request_error",
)


@pytest.mark.parametrize(
    ("request_", "parameter"),
    [
        (asking(), "tools"),
        (asking(options=Options(text_format=FORMAT)), "text_format"),
        (asking(options=Options(text_format=FORMAT), functions=()), "text_format"),
        (asking(functions=()), None),
    ],
)
def test_a_json_schema_that_is_refused_is_the_functions_own_where_no_other_was_sent(
    request_: ModelRequest, parameter: str | None
) -> None:
    assert error_from_status(400, BROKEN_SCHEMA, redact=str, sent=parameters_of(request_)).parameter == parameter


def test_another_cause_counts_more_than_the_name_of_a_parameter() -> None:
    sent = parameters_of(asking(options=ALL))
    for words, code in (
        ("This model's maximum context length is 8192 tokens, with the tools", "context_too_long"),
        ("The model `x` does not exist, tools are not supported", "model_not_found"),
        ("The tools are not allowed by our content management policy", "content_filter"),
    ):
        assert error_from_status(400, said(words), redact=str, sent=sent).code == code


def test_a_refusal_within_a_reply_names_the_parameter_as_well() -> None:
    reply = said("response_format is not supported", code=400)
    assert error_from_reply(reply, redact=str, sent=["text_format"]).parameter == "text_format"


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (asking(options=Options(top_p=1)), "top_p"),
        (asking(options=Options(presence_penalty=0)), "presence_penalty"),
        (asking(options=Options(frequency_penalty=0.0)), "frequency_penalty"),
        (asking(temperature=1), "temperature"),
        (asking(choice="auto"), "tool_choice"),
        (asking(parallel=True), "parallel_tool_calls"),
    ],
)
def test_a_refused_parameter_that_asks_for_nothing_is_left_out(request_: ModelRequest, name: str) -> None:
    learned = Dialect().learn(request_, 400, said(f"Unsupported parameter: '{name}'", param=name))
    assert learned == Dialect(left_out=frozenset({name}))
    assert name in body(request_)
    assert name not in body(request_, learned)
    assert body(request_, learned).keys() == body(request_).keys() - {name}
    assert learned.learn(request_, 400, said(f"Unsupported parameter: '{name}'", param=name)) == learned


def test_a_refused_parameter_that_asks_for_something_is_sent_again() -> None:
    request = asking(
        options=ALL, temperature=0.5, choice=NamedFunction("f"), parallel=False, max_output_tokens=1_000_000
    )
    for name in parameters_of(request):
        assert Dialect().learn(request, 400, said(f"Unsupported parameter: '{name}'", param=name)) == Dialect()
    refusing = Dialect(left_out=frozenset(parameters_of(request)))
    assert body(request, refusing) == body(request)
    assert without_effect(parameters_of(request)) == frozenset()


def test_a_parameter_that_the_server_names_is_the_one_whatever_its_words_are() -> None:
    assert refused_parameter("tools and top_p are not supported", "top_p", ["tools", "top_p"]) == "top_p"
    assert refused_parameter("top_p is not supported", "messages", ["top_p"]) is None
    assert refused_parameter("top_p is not supported", "", ["tools", "top_p"]) == "top_p"
    assert refused_parameter("top_p is not supported", "[0]", ["top_p"]) == "top_p"


async def test_the_client_leaves_out_what_the_server_refuses_and_tells_what_it_cannot_leave_out() -> None:
    requests: list[Request] = []

    async def behave(connection: Connection) -> None:
        while True:
            request = await connection.receive_request()
            requests.append(request)
            if "top_p" in request.json:
                said_no = {"error": {"message": "Unsupported parameter: 'top_p'", "param": "top_p"}}
                await connection.send_response(400, said_no)
                continue
            await connection.send_head()
            for payload in (delta("ok"), finish(), DONE):
                await connection.send_event(payload)
            await connection.end_body()

    neutral, lower = asking(options=Options(top_p=1)), asking(options=Options(top_p=0.1))
    async with open_upstream(behave) as upstream:
        for _ in range(2):
            assert (await ask(upstream.client, neutral)).text == "ok"
        with pytest.raises(ModelError) as refused:
            await ask(upstream.client, lower)
    assert (refused.value.code, refused.value.parameter) == ("parameter_refused", "top_p")
    assert ["top_p" in request.json for request in requests] == [True, False, False, True]
    assert msgspec.json.decode(requests[1].body)["messages"] == [{"role": "user", "content": "hi"}]
