"""The scripted client: the parameters of its URL, and replies that follow them exactly and on time."""

from typing import Any
from urllib.parse import urlencode

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from service.errors import ModelError, SettingsError
from service.models.client import (
    ArgumentsDelta,
    CallOpened,
    EncryptedReasoning,
    Finished,
    FunctionCall,
    FunctionCallOutput,
    Message,
    ModelRequest,
    Options,
    ReasoningDelta,
    TextDelta,
    TextFormat,
    Usage,
)
from service.models.scripted import Script, ScriptedClient, open_scripted
from tests.models.replies import Reply, ask, asking, take


def scripted(query: str) -> ScriptedClient:
    return ScriptedClient(Script.from_url(f"scripted:?{query}"))


async def failure_of(client: ScriptedClient, came: Reply) -> ModelError:
    async def ask_once() -> None:
        async with client.stream(asking()) as stream:
            await take(stream, came)

    with pytest.raises(ModelError) as caught:
        await ask_once()
    return caught.value


async def test_tokens_come_at_their_rate_after_the_first(autojump_clock: MockClock) -> None:
    times = []
    reply = Reply()
    async with scripted("tokens=5&rate=10&first_token_s=2").stream(asking()) as stream:
        start = trio.current_time()
        for _ in range(5):
            reply.batches.append(await stream.receive())
            times.append(round(trio.current_time() - start, 6))
    assert times == [2, 2.1, 2.2, 2.3, 2.4]
    assert reply.finished.finish_reason == "stop"


async def test_a_late_caller_gets_all_that_is_due_and_the_schedule_does_not_move(autojump_clock: MockClock) -> None:
    async with scripted("tokens=100&rate=10&first_token_s=1").stream(asking()) as stream:
        start = trio.current_time()
        assert len(await stream.receive()) == 1
        await trio.sleep_until(start + 2.05)
        assert [event.text for event in await stream.receive() if isinstance(event, TextDelta)] == [
            f"{number} " for number in range(1, 11)
        ]
        await stream.receive()
        assert trio.current_time() - start == pytest.approx(2.1)


async def test_tokens_are_numbered_and_counted(autojump_clock: MockClock) -> None:
    reply = await ask(scripted("tokens=3&reasoning=2"))
    assert reply.text == "0 1 2 "
    assert reply.reasoning == "0 1 "
    assert [type(event) for event in reply.events] == [ReasoningDelta] * 2 + [TextDelta] * 3 + [Finished]
    assert reply.finished == Finished(
        finish_reason="stop", usage=Usage(input_tokens=1, output_tokens=5, reasoning_tokens=2)
    )


async def test_calls_come_after_the_text_in_pieces_and_end_the_reply(autojump_clock: MockClock) -> None:
    client = scripted('tokens=1&encrypted=3&call=get:{"city":"Oslo"}&call=now&rate=10&first_token_s=0')
    reply = await ask(client)
    assert reply.events == [
        EncryptedReasoning("eee"),
        TextDelta("0 "),
        CallOpened(0, "call_1_0", "get"),
        ArgumentsDelta(0, '{"city":'),
        ArgumentsDelta(0, '"Oslo"}'),
        CallOpened(1, "call_1_1", "now"),
        Finished(finish_reason="tool_calls", usage=Usage(input_tokens=1, output_tokens=6, reasoning_tokens=1)),
    ]
    assert len(reply.batches) == 6, "each token at its time"
    cut = (await ask(client, asking(max_output_tokens=3))).events
    assert cut[:-1] == reply.events[:3]
    assert isinstance(cut[-1], Finished)
    assert cut[-1].finish_reason == "length"


async def test_outputs_of_calls_are_quoted_and_not_called_for_again(autojump_clock: MockClock) -> None:
    said = (Message("user", "hi"), FunctionCall("call_1_0", "get", "{}"), FunctionCallOutput("call_1_0", "4 °C"))
    reply = await ask(scripted("call=get"), ModelRequest(model="m", prompt=said))
    assert reply.text.startswith("The call returned: “4 °C”")
    assert reply.finished.finish_reason == "stop"


async def test_a_call_has_no_id_of_the_prompt_though_the_client_left_a_part_of_the_prompt_out(
    autojump_clock: MockClock,
) -> None:
    """The id that the prompt's length gives is taken, and so is one of the next."""
    calls = (FunctionCall("call_4_0", "get", "{}"), FunctionCall("call_5_1", "now", "{}"))
    prompt = (*calls, FunctionCallOutput("call_4_0", "4"), Message("user", "again"))
    reply = await ask(scripted("call=get&call=now"), ModelRequest(model="m", prompt=prompt))
    assert [it.call_id for it in reply.events if isinstance(it, CallOpened)] == ["call_6_0", "call_6_1"]


async def test_only_calls_are_a_reply_without_a_text(autojump_clock: MockClock) -> None:
    assert [type(event) for event in (await ask(scripted("call=get&reasoning=1"))).events] == [
        *(ReasoningDelta, CallOpened, Finished),
    ]


async def test_tokens_have_the_size_that_was_asked_for(autojump_clock: MockClock) -> None:
    reply = await ask(scripted("tokens=200&token_bytes=4&rate=0"))
    assert {len(event.text.encode()) for event in reply.events if isinstance(event, TextDelta)} == {4}
    assert len(reply.text) == 800


async def test_without_a_rate_nothing_waits_and_no_batch_is_large(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    reply = await ask(scripted("tokens=1000&rate=0&first_token_s=0"))
    assert trio.current_time() == start
    assert max(len(batch) for batch in reply.batches) <= 65
    assert len(reply.events) == 1001


async def test_no_tokens_are_an_empty_reply(autojump_clock: MockClock) -> None:
    assert (await ask(scripted("tokens=0"))).events == [
        Finished(finish_reason="stop", usage=Usage(input_tokens=1, output_tokens=0))
    ]


async def test_the_bound_on_the_output_cuts_the_reply(autojump_clock: MockClock) -> None:
    client = scripted("tokens=10&reasoning=2")
    async with client.stream(asking(max_output_tokens=5)) as stream:
        reply = await take(stream)
    assert (reply.reasoning, reply.text) == ("0 1 ", "0 1 2 ")
    assert reply.finished.finish_reason == "length"
    async with client.stream(asking(max_output_tokens=12)) as stream:
        assert (await take(stream)).finished.finish_reason == "stop"


async def test_it_fails_after_so_many_tokens(autojump_clock: MockClock) -> None:
    came = Reply()
    error = await failure_of(scripted("tokens=10&reasoning=1&fail_after=4"), came)
    assert (error.code, error.retryable) == ("upstream_error", True)
    assert (came.reasoning, came.text) == ("0 ", "0 1 2 ")


async def test_it_refuses_a_request(autojump_clock: MockClock) -> None:
    came = Reply()
    error = await failure_of(scripted("fail_after=0&fail_code=model_not_found"), came)
    assert (error.code, error.retryable) == ("model_not_found", False)
    assert came.batches == []


async def test_it_falls_silent_after_so_many_tokens(autojump_clock: MockClock) -> None:
    client = scripted("tokens=10&silent_after=3")
    came = Reply()
    with trio.move_on_after(1_000_000) as scope:
        async with client.stream(asking()) as stream:
            await take(stream, came)
    assert scope.cancelled_caught
    assert came.text == "0 1 2 "
    assert client.streams_open == 0


async def test_its_close_can_hang(autojump_clock: MockClock) -> None:
    client = scripted("tokens=10&ignore_close_s=5")
    with trio.CancelScope() as scope:
        async with client.stream(asking()) as stream:
            await stream.receive()
            left = trio.current_time()
            scope.cancel()
    assert trio.current_time() - left == pytest.approx(5)
    assert client.streams_open == 0


async def test_without_parameters_it_quotes_the_input_and_says_how_to_get_a_model(autojump_clock: MockClock) -> None:
    async with open_scripted("scripted:") as client:
        reply = await ask(client, asking("  What is\n\n a “last call”? "))
    assert reply.text.startswith("You said: “What is a “last call”?” ")
    assert "LASTCALL_MODEL_URL" in reply.text
    assert len(reply.batches) > 20, "the reply is streamed"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_any_input_is_quoted_in_short(text: str) -> None:
    from service.models.scripted import _answer

    answer = "".join(_answer(text, has_outputs=False))
    assert len(answer) < 400
    answer.encode()


def test_a_long_input_is_cut_between_words_or_at_least_between_characters() -> None:
    from service.models.scripted import _shortened

    assert _shortened("word " * 100) == ("word " * 24).rstrip()[:119] + "…"
    family = "👩\u200d👩\u200d👧"
    assert _shortened(family * 100).removesuffix("…").replace(family, "") == ""
    assert _shortened("e\u0301" * 100) == "e\u0301" * 60 + "…"
    assert _shortened("x" + "e\u0301" * 100) == "x" + "e\u0301" * 59 + "…"
    assert _shortened("🇩🇪" * 100).removesuffix("…").replace("🇩🇪", "") in ("", "🇩🇪")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("scripted", "scripted:"),
        ("script:?tokens=1", "script:"),
        ("scripted:tokens=1", "scripted:tokens=1"),
        ("scripted:?tokns=1", "tokns"),
        ("scripted:?tokens", "tokens"),
        ("scripted:?tokens=", "tokens"),
        ("scripted:?tokens=many", "many"),
        ("scripted:?tokens=-1", "-1"),
        ("scripted:?tokens=1.5", "1.5"),
        ("scripted:?tokens=99999999999", "99999999999"),
        ("scripted:?tokens=1&tokens=2", "tokens"),
        ("scripted:?rate=-1", "rate"),
        ("scripted:?rate=nan", "rate"),
        ("scripted:?rate=inf", "rate"),
        ("scripted:?first_token_s=inf", "first_token_s"),
        ("scripted:?token_bytes=0", "token_bytes"),
        ("scripted:?fail_code=", "fail_code"),
        ("scripted:?fail_code=no_such_code", "fail_code"),
        ("scripted:?silent_after=null", "silent_after"),
        ("scripted:?=1", "''"),
        ("scripted:?call=", "call"),
        ("scripted:?call=f&call=:{}", ":{}"),
        ("scripted:?call=a b", "a b"),
        ("scripted:?encrypted=0", "encrypted"),
        ("scripted:?continues=maybe", "continues"),
    ],
)
def test_a_wrong_url_is_refused_by_name(url: str, named: str) -> None:
    with pytest.raises(SettingsError, match=r"^model_url: ") as caught:
        Script.from_url(url)
    assert named in str(caught.value)
    assert str(caught.value).isprintable()


def test_every_parameter_can_be_set() -> None:
    url = (
        "scripted:?tokens=200&rate=50&first_token_s=0.2&token_bytes=8&reasoning=3&fail_after=100&fail_code=rate_limited"
        "&silent_after=150&ignore_close_s=1&encrypted=9&call=f&text=Hi&finish=length&refuse=seed"
        "&continues=false"
    )
    assert set(Script.__struct_fields__) == {pair.partition("=")[0] for pair in url.partition("?")[2].split("&")}
    assert Script.from_url(url) == Script(
        tokens=200,
        rate=50,
        first_token_s=0.2,
        token_bytes=8,
        reasoning=3,
        fail_after=100,
        fail_code="rate_limited",
        silent_after=150,
        ignore_close_s=1,
        encrypted=9,
        call=("f",),
        text="Hi",
        finish="length",
        refuse=("seed",),
        continues=False,
    )


async def test_a_text_of_the_script_comes_word_by_word_and_unchanged(autojump_clock: MockClock) -> None:
    for text, tokens in (("Hello there,  friend.\n", 3), (" x", 1), ("\n", 1), ('{"a": "ä 👋"}', 3)):
        reply = await ask(scripted(urlencode({"text": text, "rate": 0, "first_token_s": 0})))
        assert reply.text == text
        assert len(reply.events) == tokens + 1


async def test_a_text_comes_before_calls_and_the_end_has_the_reason_of_the_script(autojump_clock: MockClock) -> None:
    reply = await ask(scripted("text=Well.&call=f&finish=content_filter"))
    assert [type(event) for event in reply.events] == [TextDelta, CallOpened, Finished]
    assert reply.finished.finish_reason == "content_filter"


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (None, "{}"),
        ({"type": "object"}, "{}"),
        ({"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}, '{"b":"text","a":0}'),
        ({"type": "object", "properties": {"b": {}, "a": {"enum": [1]}}, "required": ["a", {}]}, '{"a":1}'),
        ({"anyOf": [{"type": "array"}, {"type": "null"}]}, "[]"),
        ({"type": ["boolean", "null"]}, "false"),
        ({"const": 5}, "5"),
        ({"type": [{}], "enum": [], "anyOf": []}, "null"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, '{"a":null}'),
    ],
)
async def test_a_json_text_fits_a_usual_schema(
    autojump_clock: MockClock, schema: dict[str, Any] | None, text: str
) -> None:
    text_format = TextFormat(type="json_object" if schema is None else "json_schema", name="x", schema=schema)
    request = ModelRequest(model="m", prompt=(Message("user", "hi"),), options=Options(text_format=text_format))
    assert (await ask(scripted("rate=0"), request)).text == text


async def test_a_schema_that_is_nested_deeply_is_cut(autojump_clock: MockClock) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}}
    options = Options(text_format=TextFormat(type="json_schema", name="x", schema=schema))
    request = ModelRequest(model="m", prompt=(Message("user", "hi"),), options=options)
    assert "null" in (await ask(scripted("rate=0"), request)).text


async def test_a_parameter_that_the_script_refuses_is_named(autojump_clock: MockClock) -> None:
    client = scripted("refuse=seed&refuse=top_p&rate=0")
    assert (await ask(client)).text
    for options, refused in ((Options(top_p=1), "top_p"), (Options(seed=0, top_p=0.5), "top_p")):
        request = ModelRequest(model="m", prompt=(Message("user", "hi"),), options=options)
        with pytest.raises(ModelError) as caught:
            await ask(client, request)
        assert (caught.value.code, caught.value.parameter) == ("parameter_refused", refused)
    assert client.streams_open == 0


def after(text: str, *, max_output_tokens: int | None = None) -> ModelRequest:
    """A request to go on after a text."""
    return ModelRequest(model="m", prompt=(Message("user", "hello"),), max_output_tokens=max_output_tokens, prefix=text)


CONTINUED = (
    "tokens=12",
    "tokens=12&token_bytes=5&reasoning=3",
    "reasoning=2&encrypted=9",
    urlencode({"text": "Hello  there,\n\n friend 👋.\n"}),
    urlencode({"text": " Well.", "call": 'get:{"city":"Oslo"}', "finish": "length"}),
)


@pytest.mark.parametrize("query", CONTINUED)
async def test_a_reply_that_is_cut_anywhere_goes_on_as_without_the_cut(autojump_clock: MockClock, query: str) -> None:
    client = scripted(f"{query}&rate=0&first_token_s=0")
    whole = await ask(client)
    rest = [event for event in whole.events if isinstance(event, CallOpened | ArgumentsDelta)]
    for cut in range(1, len(whole.text) + 1):
        assert client.can_continue(whole.text[:cut])
        reply = await ask(client, after(whole.text[:cut]))
        assert whole.text[:cut] + reply.text == whole.text
        assert reply.reasoning == "", "the text has begun, so the reasoning is over"
        assert [event for event in reply.events if isinstance(event, CallOpened | ArgumentsDelta)] == rest
        assert reply.finished.finish_reason == whole.finished.finish_reason


async def test_a_reply_that_goes_on_counts_and_paces_what_is_new(autojump_clock: MockClock) -> None:
    client = scripted("tokens=6&reasoning=2&rate=10&first_token_s=1")
    start = trio.current_time()
    reply = await ask(client, after("0 1 2 3 "))
    assert reply.text == "4 5 "
    assert trio.current_time() - start == pytest.approx(1.1)
    assert reply.finished.usage == Usage(input_tokens=5, output_tokens=2, reasoning_tokens=0)
    assert (await ask(client, after("0 1 2 "))).finished.usage == Usage(input_tokens=4, output_tokens=3)


async def test_all_counts_of_a_script_are_of_the_whole_reply(autojump_clock: MockClock) -> None:
    limited = await ask(scripted("tokens=10&reasoning=2"), after("0 1 ", max_output_tokens=5))
    assert (limited.text, limited.finished.finish_reason) == ("2 ", "length")
    beyond = await ask(scripted("tokens=10"), after("0 1 2 3 ", max_output_tokens=2))
    assert (beyond.text, beyond.finished.finish_reason) == ("", "length")
    came = Reply()
    with pytest.raises(ModelError):
        async with scripted("tokens=10&reasoning=1&fail_after=4").stream(after("0 1 ")) as stream:
            await take(stream, came)
    assert came.text == "2 "


async def test_a_text_that_the_script_would_not_have_begun_with_is_refused(autojump_clock: MockClock) -> None:
    client = scripted("tokens=3")
    for text in ("0 2 ", "00", "0 1 2 3", "x"):
        with pytest.raises(ModelError, match="would not have begun") as caught:
            await ask(client, after(text))
        assert (caught.value.code, caught.value.retryable) == ("upstream_rejected", False)
    assert client.streams_open == 0


def test_a_script_can_be_one_that_does_not_go_on() -> None:
    assert scripted("tokens=3").can_continue("0 ")
    assert not scripted("tokens=3").can_continue("")
    assert not scripted("tokens=3&continues=false").can_continue("0 ")
