"""The body of a chat completion as a turn: what is taken, what is refused by name, and how messages become items."""

import json
from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from service.api.http.request_body import parse_body
from service.api.openai.chat_requests import CreateChatCompletion, includes_usage, turn_of
from service.api.openai.errors import ParameterError
from service.errors import InvalidRequestError
from service.models.client import FunctionTool, NamedFunction, Options, TextFormat, ToolChoice, Tools
from service.sessions.commands import NewSession, NewTurn
from service.settings import Settings
from service.steps import at_once
from tests.sessions.turns.prompts import build_prompt
from tests.storage.rows import T0

HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"a":1}'}}
FUNCTION = {"name": "get", "description": "Gets.", "parameters": {"type": "object"}, "strict": True}


def parsed(body: dict[str, Any]) -> CreateChatCompletion:
    return parse_body(json.dumps(body).encode(), CreateChatCompletion, text_bytes_max=100_000)


def turn(**body: Any) -> NewTurn:
    return at_once(turn_of(parsed({"model": "m", "messages": HI} | body), request_id=None))


def items(*messages: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The type, role, text and call of each item."""
    return [(it.type, it.role, it.text, it.call_id) for it in turn(messages=list(messages)).items]


def refusal(**body: Any) -> tuple[str | None, str]:
    """The parameter that is refused, and the code."""
    with pytest.raises(InvalidRequestError) as refused:
        turn(**body)
    error = refused.value
    return error.field, error.openai_code if isinstance(error, ParameterError) else error.code


# Messages


def test_messages_of_every_role_become_items_in_order() -> None:
    told = items(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Use tools."},
        {"role": "user", "content": "The weather?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "4 °C"},
    )
    assert told == [
        ("message", "system", "Be brief.", ""),
        ("message", "system", "Use tools.", ""),
        ("message", "user", "The weather?", ""),
        ("message", "assistant", "Let me look.", ""),
        ("function_call", "assistant", '{"a":1}', "call_1"),
        ("function_call_output", "user", "4 °C", "call_1"),
    ]


def test_the_text_parts_of_a_message_are_one_text() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    refused = [{"type": "text", "text": "No. "}, {"type": "refusal", "refusal": "I cannot."}]
    told = items({"role": "user", "content": parts}, {"role": "assistant", "content": refused}, *HI)
    assert [text for _, _, text, _ in told] == ["One\ntwo", "No. I cannot.", "Hi"]


def test_a_message_as_it_was_answered_can_be_sent_back() -> None:
    answered = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [CALL],
        "reasoning_content": "hm",
    }
    told = items(*HI, answered, {"role": "tool", "tool_call_id": "call_1", "content": "", "name": "get"})
    assert [kind for kind, *_ in told] == ["message", "function_call", "function_call_output"]


def test_what_the_server_of_a_call_wants_back_comes_back_with_the_call() -> None:
    extra = {"google": {"thought_signature": "EjQ="}}
    answered = {"role": "assistant", "tool_calls": [CALL | {"extra_content": extra}, CALL | {"index": 1}]}
    _, first, second, _ = turn(messages=[*HI, answered, *HI]).items
    assert (json.loads(first.upstream), second.upstream) == ({"extra_content": extra}, "")
    cut = {"role": "assistant", "tool_calls": [CALL, CALL | {"extra_content": {"a": "\ud800"}}]}
    assert refusal(messages=[*HI, cut, *HI]) == ("messages[1].tool_calls", "invalid_request")


def test_messages_without_a_text_say_nothing_but_those_of_the_user_and_of_tools() -> None:
    told = items({"role": "system", "content": ""}, {"role": "assistant"}, {"role": "user", "content": ""})
    assert told == [("message", "user", "", "")]


def test_the_prompt_of_a_whole_history_is_what_a_model_server_takes() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The weather?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "4 °C"},
        {"role": "assistant", "content": "4 °C."},
        {"role": "user", "content": "And tomorrow?"},
    ]
    new = turn(messages=messages)
    settings = Settings(store_url="memory:")
    record = new.record(NewSession(id="s").record(now=T0, settings=settings), queued=False, now=T0, settings=settings)
    prompt = build_prompt([record], system_message=None, bytes_max=10**6).items
    assert [(item.role, item.text) for item in prompt] == [
        ("system", "Be brief."),
        ("user", "The weather?"),
        ("assistant", "Let me look."),
        ("assistant", '{"a":1}'),
        ("tool", "4 °C"),
        ("assistant", "4 °C."),
        ("user", "And tomorrow?"),
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}],
        [*HI, {"role": "assistant", "content": "Hello"}],
        [*HI, {"role": "assistant", "content": "Hello"}, {"role": "system", "content": "Be brief."}],
        [{"role": "assistant", "content": ""}],
    ],
)
def test_a_conversation_that_waits_for_no_reply_is_refused(messages: list[Any]) -> None:
    assert refusal(messages=messages)[0] == "messages"


def test_a_note_of_the_system_may_come_last() -> None:
    assert len(items(*HI, {"role": "system", "content": "Be brief."})) == 2


def test_a_second_result_of_a_call_is_refused_until_the_model_has_spoken() -> None:
    asked = [*HI, {"role": "assistant", "tool_calls": [CALL]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "4"}
    assert refusal(messages=[*asked, result, result])[0] == "messages[3].tool_call_id"
    assert len(items(*asked, result, {"role": "assistant", "tool_calls": [CALL]}, result)) == 5


def test_messages_are_bounded_in_number_and_not_by_the_bound_of_other_texts() -> None:
    long = {"role": "user", "content": "é" * 60_000}
    assert len(turn(messages=[long, long]).items) == 2
    assert len(turn(messages=HI * 4096).items) == 4096
    assert refusal(messages=[])[0] == "messages"
    assert refusal(messages=HI * 4097)[0] == "messages"


def test_the_texts_and_calls_of_the_messages_are_bounded_in_number() -> None:
    calls = {"role": "assistant", "tool_calls": [CALL] * 1024}
    assert len(turn(messages=[calls] * 7 + HI).items) == 7 * 1024 + 1
    assert refusal(messages=[calls] * 9 + HI)[0] == "messages"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_the_parts_of_a_message_are_bounded_in_number(role: str) -> None:
    parts = [{"type": "text", "text": "a"}]
    assert turn(messages=[{"role": role, "content": parts * 4096}, *HI]).items
    assert refusal(messages=[{"role": role, "content": parts * 4097}, *HI])[0] == "messages[0].content"


def test_a_fault_far_into_a_history_is_told_with_its_place() -> None:
    wrong = {"role": "user", "content": 5}
    assert refusal(messages=HI * 1000 + [wrong] + HI)[0] == "messages[1000].content"
    assert refusal(messages=HI * 1000 + [{"role": "user", "content": "a\x00"}])[0] == "messages[1000].content"


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_texts_that_cannot_be_sent_on_are_refused(text: str) -> None:
    assert refusal(messages=[{"role": "user", "content": text}])[0] == "messages[0].content"
    parts = [{"type": "text", "text": text}]
    assert refusal(messages=[{"role": "user", "content": parts}])[0] == "messages[0].content"
    assert refusal(messages=[*HI, {"role": "tool", "tool_call_id": text, "content": ""}])[0] is not None
    assert refusal(stop=[text])[0] is not None
    if text != "a\0b":
        tool = {"type": "function", "function": {"name": "f", "description": text}}
        assert refusal(tools=[tool])[0] is not None
        schema = {"name": "f", "schema": {"const": text}}
        assert refusal(response_format={"type": "json_schema", "json_schema": schema})[0] is not None


# Parameters


def test_a_bare_request_asks_for_an_ephemeral_turn_with_all_defaults() -> None:
    new = turn()
    assert (new.model, new.ephemeral, new.creates_session, new.session_is_new) == ("m", True, True, True)
    assert (new.temperature, new.max_output_tokens, new.background, new.on_disconnect) == (None, None, False, "cancel")
    assert not new.tools
    assert new.options == Options()


def test_options_pass_to_the_model() -> None:
    new = turn(
        temperature=0,
        top_p=0.5,
        max_completion_tokens=7,
        frequency_penalty=-1,
        presence_penalty=2,
        stop=["a", "b"],
        seed=-5,
        reasoning_effort="low",
        verbosity="high",
    )
    assert (new.temperature, new.max_output_tokens) == (0, 7)
    assert new.options == Options(
        top_p=0.5,
        frequency_penalty=-1,
        presence_penalty=2,
        stop=("a", "b"),
        seed=-5,
        reasoning_effort="low",
        verbosity="high",
    )
    assert turn(stop="x", max_tokens=3).options.stop == ("x",)
    assert turn(max_tokens=3).max_output_tokens == 3
    assert turn(max_tokens=3, max_completion_tokens=3).max_output_tokens == 3
    assert refusal(max_tokens=3, max_completion_tokens=4)[0] == "max_tokens"


def test_the_form_of_the_text_passes_to_the_model() -> None:
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    given = turn(response_format={"type": "json_schema", "json_schema": schema}).options.text_format
    assert given == TextFormat(type="json_schema", name="answer", schema={"type": "object"}, strict=True)
    assert turn(response_format={"type": "json_object"}).options.text_format == TextFormat(type="json_object")
    assert turn(response_format={"type": "text"}).options.text_format is None


def test_functions_and_their_choice_pass_to_the_model() -> None:
    tool = {"type": "function", "function": FUNCTION}
    function = FunctionTool(name="get", description="Gets.", parameters={"type": "object"}, strict=True)
    choices: list[tuple[object, ToolChoice]] = [
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "get"}}, NamedFunction("get")),
    ]
    for choice, kept in choices:
        new = turn(tools=[tool], tool_choice=choice, parallel_tool_calls=False)
        assert new.tools == Tools(functions=(function,), choice=kept, parallel=False)
    assert refusal(tools=[tool, tool])[0] == "tools[1].function.name"
    other = {"type": "function", "function": {"name": "other"}}
    assert refusal(tools=[tool], tool_choice=other)[0] == "tool_choice.function.name"
    assert refusal(tool_choice="required")[0] == "tool_choice"


NEUTRAL: dict[str, list[Any]] = {
    "audio": [None],
    "frequency_penalty": [None, 0],
    "function_call": [None],
    "functions": [None, []],
    "logit_bias": [None, {}],
    "logprobs": [None, False],
    "max_completion_tokens": [None],
    "max_tokens": [None],
    "metadata": [None, {}, {"a": "b"}],
    "modalities": [None, ["text"]],
    "moderation": [None],
    "n": [None, 1],
    "parallel_tool_calls": [None, True, False],
    "prediction": [None],
    "presence_penalty": [None],
    "prompt_cache_key": [None, "k"],
    "prompt_cache_options": [None, {}],
    "prompt_cache_retention": [None, "24h"],
    "reasoning_effort": [None],
    "response_format": [None],
    "safety_identifier": [None, "s"],
    "seed": [None],
    "service_tier": [None, "auto", "default"],
    "stop": [None, []],
    "store": [None, False],
    "stream": [None, False, True],
    "stream_options": [None],
    "temperature": [None],
    "tool_choice": [None, "none", "auto"],
    "tools": [None, []],
    "top_logprobs": [None, 0],
    "top_p": [None],
    "user": [None, "u"],
    "verbosity": [None],
    "web_search_options": [None],
}
"""Values with which a request is as one without the parameter."""


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NEUTRAL.items() for value in values])
def test_null_and_default_values_are_taken(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: value}
    assert not turn(**given).tools


def test_every_parameter_of_the_sdk_is_known() -> None:
    known = get_type_hints(CompletionCreateParamsBase).keys() | {"stream"}
    assert known <= set(CreateChatCompletion.__struct_fields__)
    assert NEUTRAL.keys() == set(CreateChatCompletion.__struct_fields__) - {"model", "messages"}


REFUSED: list[tuple[str, Any, str]] = [
    ("audio", {"voice": "alloy", "format": "wav"}, "audio"),
    ("function_call", "auto", "function_call"),
    ("functions", [{"name": "f"}], "functions"),
    ("logit_bias", {"50256": -100}, "logit_bias"),
    ("logprobs", True, "logprobs"),
    ("modalities", ["text", "audio"], "modalities"),
    ("moderation", {"model": "x"}, "moderation"),
    ("n", 2, "n"),
    ("n", True, "n"),
    ("prediction", {"type": "content", "content": "x"}, "prediction"),
    ("service_tier", "flex", "service_tier"),
    ("store", True, "store"),
    ("top_logprobs", 3, "top_logprobs"),
    ("web_search_options", {}, "web_search_options"),
    ("tools", [{"type": "custom", "custom": {"name": "c"}}], "tools[0].type"),
    ("tool_choice", {"type": "allowed_tools", "allowed_tools": {}}, "tool_choice.type"),
    ("response_format", {"type": "grammar"}, "response_format.type"),
    ("messages", [{"role": "function", "name": "f", "content": "x"}], "messages[0].role"),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "messages[0].content[0].type",
    ),
    ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
    ("messages", [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "messages[0].content[0].type"),
    ("messages", [*HI, {"role": "assistant", "audio": {"id": "a"}}], "messages[1].audio"),
    ("messages", [*HI, {"role": "assistant", "function_call": {}}], "messages[1].function_call"),
    ("messages", [*HI, {"role": "assistant", "tool_calls": [{"type": "custom"}]}], "messages[1].tool_calls[0].type"),
]


@pytest.mark.parametrize(("name", "value", "field"), REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name: str, value: Any, field: str) -> None:
    assert refusal(**{name: value}) == (
        field,
        "unsupported_value" if field.endswith((".type", ".role")) else "unsupported_parameter",
    )


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"foo": 1}, "foo"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "Hi", "foo": 1}]}, "messages[0].foo"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"foo": True}}, "stream_options.foo"),
        ({"model": None}, "model"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(body: dict[str, Any], field: str) -> None:
    assert refusal(**body)[0] == field


def test_usage_is_told_in_a_stream_if_it_is_asked_for() -> None:
    body = {"model": "m", "messages": HI, "stream": True}
    assert not includes_usage(parsed(body))
    assert not includes_usage(parsed(body | {"stream_options": {"include_usage": False}}))
    assert includes_usage(parsed(body | {"stream_options": {"include_usage": True, "include_obfuscation": False}}))
