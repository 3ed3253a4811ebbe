"""Items in the form of OpenAI's API: what is shown comes back as it was, and what is not supported is named."""

from base64 import urlsafe_b64encode
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.openai.errors import ParameterError
from service.api.openai.ids import flat_name
from service.api.openai.items import read_items, reasoning_before, shown_item
from service.storage.records import Item
from tests.api.openai.validation import check_item

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
UPSTREAM = st.sampled_from(["", '{"format":"anthropic-claude-v1","index":0}', '{"id":"rs_1"}'])
MESSAGES = st.builds(
    Item, id=st.just("msg_" + "1" * 32), role=st.sampled_from(["user", "assistant", "system"]), text=TEXTS
)
REASONING = st.builds(
    Item,
    id=st.just("msg_" + "2" * 32),
    type=st.just("reasoning"),
    role=st.just("assistant"),
    text=TEXTS | st.just(""),
    encrypted=TEXTS,
    upstream=UPSTREAM,
)
CALLS = st.builds(
    Item,
    id=st.just("fc_" + "3" * 32),
    type=st.just("function_call"),
    role=st.just("assistant"),
    text=TEXTS | st.just(""),
    call_id=TEXTS,
    name=st.sampled_from(["get", "tools__get"]),
    upstream=st.sampled_from(["", '{"extra_content":{"google":{"thought_signature":"EjQ="},"n":[1,2.5]}}']),
)
OUTPUTS = st.builds(
    Item,
    id=st.just("fco_" + "4" * 32),
    type=st.just("function_call_output"),
    role=st.just("user"),
    text=TEXTS | st.just(""),
    call_id=TEXTS,
)
NAMESPACES = {"tools__get": ("tools", "get")}


CALL = {"type": "function_call", "call_id": "c", "name": "a", "arguments": "{}"}
SEALED_OTHERWISE = "lc1." + urlsafe_b64encode(b'["", {}, {"c": {"function": {"name": "f"}}}]').decode()
"""A field of a call that is not the server's own."""
NOT_UTF_8 = [
    "lc1." + urlsafe_b64encode(sealed).decode()
    for sealed in (b'["",{"a":"\xff"},{}]', b'["",{},{"c":{"extra_content":{"a":"\xff"}}}]')
]
"""Fields of reasoning, and of a call."""


def read(*items: object) -> tuple[Item, ...]:
    return read_items(items, field="input")


def refused(*items: object) -> tuple[str | None, str]:
    with pytest.raises(ParameterError) as caught:
        read(*items)
    return caught.value.field, caught.value.openai_code


@given(MESSAGES | REASONING | CALLS | OUTPUTS)
def test_an_item_that_a_client_sends_back_is_what_it_was(item: Item) -> None:
    encoded = msgspec.json.encode(shown_item(item, namespaces=NAMESPACES, encrypted=True))
    (back,) = read(check_item(encoded))
    assert msgspec.structs.replace(back, id=item.id) == item
    assert back.id != item.id, "a history may come many times, so its items are new ones"


def test_encrypted_reasoning_is_shown_as_its_server_sent_it_unless_there_is_more() -> None:
    item = Item(id="msg_" + "2" * 32, type="reasoning", role="assistant", text="", encrypted="gAAA")
    assert msgspec.to_builtins(shown_item(item, encrypted=True))["encrypted_content"] == "gAAA"
    assert "encrypted_content" not in msgspec.to_builtins(shown_item(item))
    seeming = msgspec.structs.replace(item, encrypted="lc1.not-ours")
    (back,) = read(msgspec.to_builtins(shown_item(seeming, encrypted=True)))
    assert back.encrypted == "lc1.not-ours"


@given(CALLS)
def test_reasoning_before_a_call_brings_back_what_clients_do_not_keep_of_the_call(call: Item) -> None:
    reasoning = reasoning_before(call)
    assert (reasoning is None) == (not call.upstream)
    told = [] if reasoning is None else [check_item(msgspec.json.encode(reasoning))]
    known = msgspec.to_builtins(shown_item(msgspec.structs.replace(call, upstream=""), namespaces=NAMESPACES))
    other = known | {"call_id": f"{call.call_id}x"}
    back = read(*told, other, known, known)
    assert [it.upstream for it in back] == ["", call.upstream, ""], "for the one call that follows, and no other"
    (own, *_) = read(*told, known | {"extra_content": {"own": 1}})
    assert own.upstream == '{"extra_content":{"own":1}}'


@pytest.mark.parametrize(
    "content",
    [SEALED_OTHERWISE, *NOT_UTF_8, "lc1.", "lc1.!", "lc1.WzFd", "lc1.WyJhIiwgWzFdXQ==", "lc1.é"],
)
def test_encrypted_reasoning_that_was_changed_is_refused(content: str) -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": content}
    assert refused(item) == ("input[0].encrypted_content", "invalid_encrypted_content")


def test_messages_are_taken_in_every_form_in_which_clients_send_them() -> None:
    items = read(
        {"role": "user", "content": "a"},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "b"}], "id": None},
        {"role": "system", "content": "c", "status": None},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "phase": "final_answer",
            "content": [
                {"type": "output_text", "text": "d", "annotations": [], "logprobs": []},
                {"type": "output_text", "text": "e", "annotations": []},
                {"type": "refusal", "refusal": "f"},
            ],
        },
        {"role": "user", "content": [{"type": "input_text", "text": "g"}, {"type": "input_text", "text": "h"}]},
        {"role": "user", "content": ""},
        {"role": "user", "content": []},
    )
    assert [(item.role, item.text) for item in items] == [
        ("user", "a"),
        ("system", "b"),
        ("system", "c"),
        ("assistant", "def"),
        ("user", "g\nh"),
    ]


def test_a_call_in_a_namespace_gets_the_name_that_the_model_knows() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "get", "namespace": "tools", "arguments": "{}"}
    assert read(call)[0].name == flat_name("tools", "get")


def test_an_id_of_a_call_may_be_as_long_as_those_that_servers_send() -> None:
    """Some gateways put a signature of several thousand characters into the id."""
    (call, output) = read(
        CALL | {"call_id": "x" * 16_384}, {"type": "function_call_output", "call_id": "x" * 16_384, "output": "1"}
    )
    assert call.call_id == output.call_id == "x" * 16_384


def test_an_output_may_be_an_array_of_texts() -> None:
    output = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    (item,) = read({"type": "function_call_output", "call_id": "c", "output": output, "status": "completed"})
    assert (item.call_id, item.text, item.role) == ("c", "a\nb", "user")


def test_reasoning_in_words_and_summaries_is_taken_and_empty_reasoning_is_left_out() -> None:
    items = read(
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "a"}], "content": None},
        {"type": "reasoning", "id": "rs_2", "summary": [], "content": [{"type": "reasoning_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_3", "summary": [], "encrypted_content": None},
    )
    assert [(item.type, item.text) for item in items] == [("reasoning", "a"), ("reasoning", "b")]


@pytest.mark.parametrize("kind", ["input_image", "input_audio", "input_file", "input_video"])
def test_a_part_that_is_no_text_is_refused_by_its_place(kind: str) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": kind}]
    assert refused({"role": "user", "content": parts}) == ("input[0].content[1].type", "unsupported_value")
    output = {"type": "function_call_output", "call_id": "c", "output": parts}
    assert refused(output) == ("input[0].output[1].type", "unsupported_value")


@pytest.mark.parametrize(
    "kind",
    ["web_search_call", "computer_call", "custom_tool_call", "compaction", "mcp_call", "shell_call", "new"],
)
def test_an_item_of_another_type_is_refused_by_its_name(kind: str) -> None:
    with pytest.raises(ParameterError, match=repr(kind)):
        read({"role": "user", "content": "a"}, {"type": kind, "id": "x"})
    assert refused({"type": kind}) == ("input[0].type", "unsupported_value")


@pytest.mark.parametrize(
    ("item", "field", "code"),
    [
        ("text", "input[0]", "invalid_type"),
        ({"content": "a"}, "input[0].type", "invalid_value"),
        ({"type": ["message"], "role": "user", "content": "a"}, "input[0].type", "invalid_value"),
        ({"type": {}, "role": "user", "content": "a"}, "input[0].type", "invalid_value"),
        ({"type": 1, "role": "user", "content": "a"}, "input[0].type", "invalid_value"),
        ({"type": "item_reference", "id": "msg_1"}, "input[0]", "unsupported_value"),
        ({"role": "tool", "content": "a"}, "input[0].role", "invalid_value"),
        ({"role": "user"}, "input[0].content", "invalid_type"),
        ({"role": "user", "content": [{"text": "a"}]}, "input[0].content[0].type", "invalid_value"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text", "invalid_type"),
        ({"role": "user", "content": "a\0"}, "input[0].content", "invalid_value"),
        ({"role": "user", "content": "\ud800"}, "input[0].content", "invalid_value"),
        ({"role": "user", "content": "a", "colour": "red"}, "input[0].colour", "unknown_parameter"),
        ({"type": "function_call", "call_id": "c", "name": "a b", "arguments": ""}, "input[0].name", "invalid_value"),
        ({"type": "function_call", "call_id": "c", "name": "a"}, "input[0].arguments", "invalid_type"),
        ({"type": "function_call", "call_id": "", "name": "a", "arguments": ""}, "input[0].call_id", "invalid_value"),
        ({"type": "function_call_output", "call_id": "c"}, "input[0].output", "invalid_type"),
        ({"type": "reasoning", "summary": "a", "encrypted_content": 1}, "input[0].encrypted_content", "invalid_type"),
        (CALL | {"extra_content": "x"}, "input[0].extra_content", "invalid_type"),
        (CALL | {"extra_content": {"a": "\ud800"}}, "input[0].extra_content", "invalid_value"),
        (CALL | {"call_id": "x" * 16_385}, "input[0].call_id", "invalid_value"),
    ],
)
def test_a_wrong_item_is_refused_by_the_part_that_is_wrong(item: Any, field: str, code: str) -> None:
    assert refused(item) == (field, code)
