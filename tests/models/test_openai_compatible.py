"""The real client with well-behaved servers of every kind: the requests it sends, and how it reads replies."""

import json
import weakref
from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from service.errors import ModelError, SettingsError
from service.freezes import watch_for_freezes
from service.models import chat_completions, openai_compatible
from service.models.chat_completions import ReplyDecoder
from service.models.client import Finished, Message, ModelEvent, ModelRequest, ReasoningDelta, TextDelta, Usage
from service.models.continuation import Form
from service.models.openai_compatible import OpenAICompatibleStream, open_openai_compatible
from service.models.scripted import open_scripted
from service.steps import Steps
from tests.models.replies import ask, asking, take
from tests.models.upstream import API_KEY, WAIT_S, open_pair, open_upstream
from tests.upstreams.raw_server import (
    DONE,
    Behaviour,
    Connection,
    Request,
    delta,
    finish,
    open_raw_server,
    reasoning,
    replying,
    unused_port,
    usage,
)

# Requests


def noting(requests: list[Request]) -> Behaviour:
    async def note(connection: Connection) -> None:
        while True:
            requests.append(await connection.receive_request())
            await connection.send_head()
            for payload in (delta("ok"), finish(), DONE):
                await connection.send_event(payload)
            await connection.end_body()

    return note


async def test_a_request_has_all_fields_of_the_turn_and_no_others() -> None:
    requests: list[Request] = []
    async with open_upstream(noting(requests)) as upstream:
        messages = (Message("system", "Be brief."), Message("user", "Grüße 👩‍👩‍👧"))
        await ask(upstream.client, ModelRequest(model="m", prompt=messages, temperature=0.0, max_output_tokens=9))
        await ask(upstream.client, ModelRequest(model="m", prompt=messages[1:]))
    full, plain = requests
    assert full.method == "POST"
    assert full.target == "/v1/chat/completions"
    assert full.headers["authorization"] == f"Bearer {API_KEY}"
    assert full.headers["accept-encoding"] == "identity"
    assert full.headers["content-type"] == "application/json"
    assert full.json == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße 👩‍👩‍👧"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "max_tokens": 9,
    }
    assert plain.json.keys() == {"model", "messages", "stream", "stream_options"}


async def test_a_request_has_these_headers_and_no_others() -> None:
    requests: list[Request] = []
    async with open_upstream(noting(requests)) as upstream:
        await ask(upstream.client)
        host = f"127.0.0.1:{upstream.server.port}"
    assert requests[0].headers == {
        "host": host,
        "content-length": str(len(requests[0].body)),
        "accept": "text/event-stream",
        "accept-encoding": "identity",
        "connection": "keep-alive",
        "user-agent": "lastcall",
        "content-type": "application/json",
        "authorization": f"Bearer {API_KEY}",
    }


async def test_no_cookie_is_kept() -> None:
    """A cookie of a load balancer would send all turns to one model server."""
    requests: list[Request] = []

    async def pin(connection: Connection) -> None:
        while True:
            requests.append(await connection.receive_request())
            await connection.send_head(headers={"set-cookie": "AWSALB=first; Path=/"})
            for payload in (delta("ok"), finish(), DONE):
                await connection.send_event(payload)
            await connection.end_body()

    async with open_upstream(pin) as upstream:
        for _ in range(2):
            assert (await ask(upstream.client)).text == "ok"
    assert ["cookie" in request.headers for request in requests] == [False, False]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/openai/v1", "/openai/v1/chat/completions"),
        ("/api/chat/completions", "/api/chat/completions"),
        ("/v1?api-version=2", "/v1/chat/completions?api-version=2"),
        ("?api-version=2", "/v1/chat/completions?api-version=2"),
        ("/v1#fragment", "/v1/chat/completions"),
        ("/a%20b/v1", "/a%20b/v1/chat/completions"),
    ],
)
async def test_the_url_may_be_the_base_or_the_whole_address(path: str, target: str) -> None:
    requests: list[Request] = []
    async with open_upstream(noting(requests), path=path) as upstream:
        await ask(upstream.client)
        assert upstream.client.name == f"127.0.0.1:{upstream.server.port}"
    assert requests[0].target == target


async def test_userinfo_in_the_url_is_basic_authentication_and_in_no_name() -> None:
    requests: list[Request] = []
    with trio.fail_after(WAIT_S):
        async with open_raw_server(noting(requests)) as server:
            url = server.url.replace("http://", "http://user:pass%20word@")
            async with open_openai_compatible(url) as client:
                await ask(client)
                assert client.name == f"127.0.0.1:{server.port}"
    assert requests[0].headers["authorization"] == "Basic dXNlcjpwYXNzIHdvcmQ="


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://secret@host",
        "https://",
        "http://[secret",
        "http://host:secret",
        "http://host:99999",
        "http://host:0",
        "http://" + "x" * 64 + ".example",
        "file:///secret",
        "http://ho st/secret",
        "/v1",
    ],
)
async def test_an_unusable_url_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^model_url: ") as caught:
        async with open_openai_compatible(url):
            pass
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "two words", "new\nline", "kéy", "\x00"])
async def test_an_unusable_key_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(SettingsError, match=r"^model_api_key: ") as caught:
        async with open_openai_compatible("http://localhost", api_key=key):
            pass
    assert not key or key not in str(caught.value)


async def test_a_key_beside_userinfo_is_refused() -> None:
    with pytest.raises(SettingsError, match="model_api_key") as caught:
        async with open_openai_compatible("http://user:secret@localhost", api_key="secret"):
            pass
    assert "secret" not in str(caught.value)


async def test_an_error_in_one_of_several_upstreams_names_that_upstream() -> None:
    with pytest.raises(SettingsError, match=r"^upstreams\.second\.url: "):
        async with open_openai_compatible("nowhere", name="second"):
            pass
    with pytest.raises(SettingsError, match=r"^upstreams\.second\.api_key: "):
        async with open_openai_compatible("http://localhost", name="second", api_key=""):
            pass
    with pytest.raises(SettingsError, match=r"^upstreams\.second\.url: "):
        async with open_scripted("scripted:?no=1", name="second"):
            pass


def refusing_fields(fields: dict[str, str], requests: list[Request]) -> Behaviour:
    """A server that refuses a request with one of the fields, with the given words for this field."""

    async def refuse(connection: Connection) -> None:
        while True:
            request = await connection.receive_request()
            requests.append(request)
            refused = [words for field, words in fields.items() if field in request.json]
            if refused:
                await connection.send_response(400, {"error": {"message": refused[0]}})
            else:
                await connection.send_head()
                await connection.send_event(finish())
                await connection.send_event(DONE)
                await connection.end_body()

    return refuse


OPENAI_WORDS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
MISTRAL_WORDS = "body.stream_options.include_usage: Extra inputs are not permitted"


async def test_a_field_that_a_server_refuses_is_replaced_from_then_on() -> None:
    """The servers are OpenAI's and Mistral's. The turn does not notice the refusal."""
    requests: list[Request] = []
    refusals = {"max_tokens": OPENAI_WORDS, "stream_options": MISTRAL_WORDS}
    async with open_upstream(refusing_fields(refusals, requests)) as upstream:
        for bound in (5, 6):
            await ask(upstream.client, asking(max_output_tokens=bound))
        assert upstream.server.connections_made == 1
    first, second, third, again = [request.json for request in requests]
    assert (first["max_tokens"], first["stream_options"]) == (5, {"include_usage": True})
    assert (second["max_completion_tokens"], second["stream_options"]) == (5, {"include_usage": True})
    assert third["max_completion_tokens"] == 5
    assert again["max_completion_tokens"] == 6
    assert not {"max_tokens", "stream_options"} & (third.keys() | again.keys())


async def test_a_field_that_one_model_refuses_is_sent_to_another_model() -> None:
    requests: list[Request] = []
    async with open_upstream(refusing_fields({"stream_options": MISTRAL_WORDS}, requests)) as upstream:
        for model in ("one", "other", "one"):
            await ask(upstream.client, ModelRequest(model=model, prompt=(Message("user", "hi"),)))
    assert [(request.json["model"], "stream_options" in request.json) for request in requests] == [
        ("one", True),
        ("one", False),
        ("other", True),
        ("other", False),
        ("one", False),
    ]


async def test_a_model_name_that_a_refusal_repeats_teaches_nothing() -> None:
    """The server knows no such model, and then it does: the first request for it is the usual one."""
    requests: list[Request] = []
    known: set[str] = set()

    async def answer(connection: Connection) -> None:
        while True:
            request = await connection.receive_request()
            requests.append(request)
            model = request.json["model"]
            if model not in known:
                await connection.send_response(400, {"error": {"message": f"There is no model {model!r}."}})
            else:
                await connection.send_head()
                await connection.send_event(finish())
                await connection.send_event(DONE)
                await connection.end_body()

    made_up = "stream_options and max_completion_tokens"
    request = ModelRequest(model=made_up, prompt=(Message("user", "hi"),), max_output_tokens=5)
    async with open_upstream(answer) as upstream:
        with pytest.raises(ModelError, match="There is no model"):
            await ask(upstream.client, request)
        refused = len(requests)
        known.add(made_up)
        await ask(upstream.client, request)
    assert refused == 3, "each field is tried in another way once"
    assert len(requests) == refused + 1
    assert (requests[-1].json["stream_options"], requests[-1].json["max_tokens"]) == ({"include_usage": True}, 5)


async def test_a_server_that_refuses_it_either_way_is_asked_twice() -> None:
    words = {"error": {"message": "Neither max_tokens nor max_completion_tokens, nor stream_options, please."}}
    asked = 0

    async def refuse(connection: Connection) -> None:
        nonlocal asked
        while True:
            await connection.receive_request()
            asked += 1
            await connection.send_response(400, words)

    async with open_upstream(refuse) as upstream:
        with pytest.raises(ModelError, match="Neither max_tokens") as caught:
            await ask(upstream.client, asking(max_output_tokens=5))
        assert (caught.value.code, caught.value.retryable) == ("upstream_rejected", False)
        assert asked == 3, "once as usual, once without the one, once without the other"


async def test_proxies_in_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{unused_port()}")
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    async with open_upstream(replying(delta("direct"), finish(), DONE)) as upstream:
        assert (await ask(upstream.client)).text == "direct"


# How replies are read


async def replies_to(*payloads: object) -> list[ModelEvent]:
    async with open_upstream(replying(*payloads)) as upstream:
        return (await ask(upstream.client)).events


async def test_a_deepseek_reasoning_stream_is_reasoning_and_then_text() -> None:
    """DeepSeek's API sends a comment while it waits, both fields in each delta, and the usage in the last chunk."""

    def chunk(content: str | None, thought: str | None, **more: object) -> dict[str, object]:
        choice = {"index": 0, "delta": {"content": content, "reasoning_content": thought}, "logprobs": None}
        return {"object": "chat.completion.chunk", "choices": [choice | {"finish_reason": None} | more]}

    async def reason(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        for _ in range(3):
            await connection.send_body(b": keep-alive\n\n")
        first = chunk(None, "")
        await connection.send_event(first)
        for thought in ("Hm", ", ", "yes."):
            await connection.send_event(chunk(None, thought))
        for text in ("It ", "is."):
            await connection.send_event(chunk(text, None))
        told = {"prompt_tokens": 5, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 4}}
        await connection.send_event(chunk("", None, finish_reason="stop") | {"usage": told})
        await connection.send_event(DONE)
        await connection.end_body()

    async with open_upstream(reason) as upstream:
        reply = await ask(upstream.client)
    assert [type(event) for event in reply.events] == [ReasoningDelta] * 3 + [TextDelta] * 2 + [Finished]
    assert reply.reasoning == "Hm, yes."
    assert reply.text == "It is."
    assert reply.finished.usage == Usage(input_tokens=5, output_tokens=9, reasoning_tokens=4)


async def test_reasoning_is_read_under_its_other_name() -> None:
    events = await replies_to(reasoning("Hm", "reasoning"), delta("Yes"), finish(), DONE)
    assert events == [ReasoningDelta("Hm"), TextDelta("Yes"), Finished(finish_reason="stop")]


@pytest.mark.parametrize(
    ("reason", "mapped"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "tool_calls"),
        ("function_call", "tool_calls"),
        ("end_turn", "stop"),
        ("something_new", "stop"),
    ],
)
async def test_finish_reasons_are_mapped(reason: str, mapped: str) -> None:
    events = await replies_to(delta("x"), finish(reason), DONE)
    assert isinstance(events[-1], Finished)
    assert events[-1].finish_reason == mapped


@pytest.mark.parametrize(
    ("payloads", "expected"),
    [
        ([delta("x"), finish(), usage(3, 4), DONE], Usage(input_tokens=3, output_tokens=4)),
        ([delta("x"), finish(), usage(3, 4, 2), DONE], Usage(input_tokens=3, output_tokens=4, reasoning_tokens=2)),
        ([delta("x"), finish() | {"usage": {"prompt_tokens": 3}}, DONE], Usage(input_tokens=3, output_tokens=0)),
        ([delta("x") | {"usage": None}, finish() | {"usage": None}, DONE], None),
        ([usage(1, 1), delta("x"), usage(1, 2), finish(), usage(1, 3)], Usage(input_tokens=1, output_tokens=3)),
        (
            [delta("x"), finish(), {"choices": [], "usage": {"prompt_tokens": None, "extra": {}}}, DONE],
            Usage(input_tokens=0, output_tokens=0),
        ),
    ],
)
async def test_usage_is_read_in_each_place_where_servers_send_it(
    payloads: list[object], expected: Usage | None
) -> None:
    events = await replies_to(*payloads)
    assert events == [TextDelta("x"), Finished(finish_reason="stop", usage=expected)]


async def test_overhead_is_not_progress_and_ready_text_comes_at_once() -> None:
    """All that has arrived is one batch; comments, roles and empty deltas are none."""
    taken = trio.Event()

    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    overhead = [role, delta(""), {"choices": []}, {"choices": [], "prompt_filter_results": [{}]}, {"choices": None}]

    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        await connection.send_body(b": waiting\n\n\n")
        for payload in overhead:
            await connection.send_event(payload)
        await connection.send_body(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n' * 3)
        await taken.wait()
        await connection.send_event(finish())
        await connection.send_event(DONE)
        await connection.end_body()

    async with open_upstream(reply) as upstream, upstream.client.stream(asking()) as stream:
        batches = [await stream.receive()]
        taken.set()
        batches.append(await stream.receive())
    assert batches == [[TextDelta("a")] * 3, [Finished(finish_reason="stop")]]


async def test_a_prompt_is_not_held_in_its_encoded_form_while_the_reply_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        pass

    class Body(bytes):
        held: Held

    held: list[weakref.ref[Held]] = []

    def encode(request: ModelRequest, dialect: chat_completions.Dialect, form: Form) -> Steps[bytes]:
        body = Body((yield from chat_completions.request_encoded(request, dialect, form)))
        body.held = Held()
        held.append(weakref.ref(body.held))
        return body

    monkeypatch.setattr(openai_compatible, "request_encoded", encode)
    behave = replying(delta("x"), finish(), DONE)
    async with open_upstream(behave) as upstream, upstream.client.stream(asking()) as stream:
        assert [reference() for reference in held] == [None]
        await take(stream)


async def test_a_head_that_comes_late_is_waited_for() -> None:
    """Some servers load the model before the head; the caller bounds the wait."""

    async def load_first(connection: Connection) -> None:
        await connection.receive_request()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await connection.send_head()
        for payload in (delta("loaded"), finish(), DONE):
            await connection.send_event(payload)

    async with open_upstream(load_first) as upstream:
        assert (await ask(upstream.client)).text == "loaded"


SPLIT_STREAM = (
    b"\xef\xbb\xbf: comment\r\n\r\n"
    + 'event: message\r\ndata: {"choices": [{"delta": {"content": "Grüße 👩‍👩‍👧"}}]}\r\n\r\n'.encode()
    + 'data: {"choices": [{"delta":\ndata: {"content": "你好"}}]}\n\n'.encode()
    + b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\r\r: more\rdata: [DONE]\n\n'
)
SPLIT_REPLY: Sequence[ModelEvent] = [
    TextDelta("Grüße 👩‍👩‍👧"),
    TextDelta("你好"),
    Finished(finish_reason="length"),
]


async def test_a_stream_cut_at_any_byte_reads_the_same() -> None:
    """The cuts are inside characters, CRLFs and JSON: each cut alone, and all at once."""
    cuts = [[cut] for cut in range(len(SPLIT_STREAM) + 1)] + [list(range(len(SPLIT_STREAM)))]

    async def reply(connection: Connection) -> None:
        for request_cuts in cuts:
            await connection.receive_request()
            await connection.send_head()
            for start, end in zip([0, *request_cuts], [*request_cuts, len(SPLIT_STREAM)], strict=True):
                if start < end:
                    await connection.send_body(SPLIT_STREAM[start:end])
            await connection.end_body()

    async with open_upstream(reply) as upstream:
        for _ in cuts:
            assert (await ask(upstream.client)).events == SPLIT_REPLY
        assert upstream.server.connections_made == 1


@pytest.mark.processes
async def test_text_in_every_script_arrives_whole_from_an_independent_server(fakellm_url: str) -> None:
    with trio.fail_after(WAIT_S):
        async with open_openai_compatible(fakellm_url) as client:
            assert (await ask(client, asking("hello in every script"))).text == "Grüße 你好 👩‍👩‍👧 مرحبا"


@pytest.mark.processes
async def test_usage_is_read_from_an_independent_server(llmock_url: str) -> None:
    with trio.fail_after(WAIT_S):
        async with open_openai_compatible(llmock_url) as client:
            usage_told = (await ask(client)).finished.usage
    assert usage_told is not None
    assert usage_told.input_tokens > 0
    assert usage_told.output_tokens > 0


# How a reply ends


async def end_without_done(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_head()
    for payload in (delta("whole"), finish(), usage(1, 2)):
        await connection.send_event(payload)
    await connection.end_body()
    await connection.wait_closed()


async def close_without_done(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_head(chunked=False)
    for payload in (delta("whole"), finish(), usage(1, 2)):
        await connection.send_event(payload)


async def break_without_done(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_head()
    for payload in (delta("whole"), finish(), usage(1, 2)):
        await connection.send_event(payload)
    await connection.send(b"7\r\nin the m")


ALL_BUT_DONE = b"".join(b"data: %b\n\n" % json.dumps(it).encode() for it in (delta("whole"), finish(), usage(1, 2)))
"""In one piece: the clients of these servers wait for the usage for a moment only."""


async def hang_without_done(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_head()
    await connection.send_body(ALL_BUT_DONE)
    await connection.wait_closed()


async def comment_for_ever_without_done(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_head()
    await connection.send_body(ALL_BUT_DONE)
    while True:
        await connection.send_body(b": still here\n\n")
        await trio.sleep(0.001)


@pytest.mark.parametrize(
    ("behave", "timeout_s"),
    [
        (end_without_done, WAIT_S),
        (close_without_done, WAIT_S),
        (break_without_done, WAIT_S),
        (hang_without_done, 0.05),
        (comment_for_ever_without_done, 0.05),
    ],
)
async def test_a_reply_with_a_finish_reason_is_whole_without_done(
    behave: Behaviour, timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_compatible, "_USAGE_TIMEOUT_S", timeout_s)
    monkeypatch.setattr(openai_compatible, "_REUSE_TIMEOUT_S", timeout_s)
    async with open_upstream(behave) as upstream:
        reply = await ask(upstream.client)
    assert reply.text == "whole"
    assert reply.finished == Finished(finish_reason="stop", usage=Usage(input_tokens=1, output_tokens=2))


class Timed:
    """A response's body: chunks, each after its number of seconds, and then silence."""

    def __init__(self, *timed: tuple[float, object]) -> None:
        self._timed = list(timed)

    async def receive(self) -> bytes:
        if not self._timed:
            await trio.sleep_forever()
        after_s, payload = self._timed.pop(0)
        await trio.sleep(after_s)
        return b"data: %b\n\n" % json.dumps(payload).encode()


STOPPING: dict[str, object] = {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("timed", "text", "took_s"),
    [
        ([(1, STOPPING)] * 5, "xxxxx", 5 + 2),  # gateways with a finish reason in each chunk
        ([(1, STOPPING), (2.5, STOPPING)], "x", 1 + 2),
        ([(1, finish()), (25, delta("late")), (1.5, delta("r"))], "later", 1 + 25 + 1.5 + 2),  # Open WebUI
        ([(1, finish()), (31, delta("too late"))], "", 1 + 30),
        ([(1, finish("tool_calls"))], "", 1 + 2),
        ([(1, STOPPING), (1.5, usage(1, 2)), (1, usage(1, 3))], "x", 1 + 2),
    ],
)
async def test_how_long_a_text_is_waited_for_after_a_finish_reason(
    timed: list[tuple[float, object]], text: str, took_s: float, autojump_clock: MockClock
) -> None:
    start = trio.current_time()
    reply = await take(OpenAICompatibleStream(Timed(*timed), ReplyDecoder(redact=str)))
    assert reply.text == text
    assert trio.current_time() - start == pytest.approx(took_s)


async def test_a_text_that_came_in_a_freeze_is_read_before_the_reply_is_taken_for_whole(mock_clock: MockClock) -> None:
    texts: list[str] = []

    async def read() -> None:
        texts.append((await take(OpenAICompatibleStream(Timed(*timed), ReplyDecoder(redact=str)))).text)

    timed = [(0.0, finish()), (25.0, delta("late")), (1.5, usage(1, 2))]
    with watch_for_freezes(clock=trio.current_time, cpu_clock=lambda: 0):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for passing_s in (100, 100, *[0.04] * 60):  # two freezes, then the rest of the last deadline
                await trio.testing.wait_all_tasks_blocked()
                mock_clock.jump(passing_s)
    assert texts == ["late"]


# The client's connections


@pytest.mark.parametrize("kept", [1, 5])
async def test_a_request_over_kept_connections_that_are_broken_is_sent_over_a_new_one(kept: int) -> None:
    """A load balancer may drop kept connections: the server is well, so the new connection costs no retry."""
    arrived = 0
    all_there = trio.Event()

    async def answer_once(connection: Connection) -> None:
        nonlocal arrived
        await connection.receive_request()
        arrived += 1
        if arrived == kept:
            all_there.set()
        await all_there.wait()
        await connection.send_head()
        for payload in (delta("well"), finish(), DONE):
            await connection.send_event(payload)
        await connection.end_body()
        await connection.receive_request()  # the server closes the connection instead of an answer

    async with open_upstream(answer_once) as upstream:
        async with trio.open_nursery() as nursery:
            for _ in range(kept):
                nursery.start_soon(ask, upstream.client)
        assert upstream.server.connections_made == upstream.server.established == kept
        assert (await ask(upstream.client)).text == "well"
        assert upstream.server.connections_made == kept + 1


async def test_a_whole_reply_leaves_its_connection_to_the_next_turn() -> None:
    async with open_upstream(replying(delta("x"), finish(), DONE)) as upstream:
        for _ in range(5):
            await ask(upstream.client)
        assert upstream.server.connections_made == 1


async def test_a_whole_reply_whose_response_does_not_end_costs_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_compatible, "_REUSE_TIMEOUT_S", 0.05)

    async def keep_the_end(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        await connection.send_event(finish())
        await connection.send_event(DONE)
        await connection.wait_closed()

    async with open_upstream(keep_the_end) as upstream:
        for _ in range(2):
            await ask(upstream.client)
            assert upstream.server.established == 0
        assert upstream.server.connections_made == 2


async def test_a_kept_connection_that_the_server_has_closed_is_not_used() -> None:
    async def close_after_a_reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        await connection.send_event(finish())
        await connection.send_event(DONE)
        await connection.end_body()

    async with open_upstream(close_after_a_reply) as upstream:
        for _ in range(5):
            await ask(upstream.client)
            await upstream.server.wait_idle()
        assert upstream.server.connections_made == 5


async def test_no_stream_waits_for_another() -> None:
    """More streams than any pool's usual limit; the server answers none before all have arrived."""
    count = 150
    arrived = 0
    all_there = trio.Event()

    async def answer_all_at_once(connection: Connection) -> None:
        nonlocal arrived
        await connection.receive_request()
        arrived += 1
        if arrived == count:
            all_there.set()
        await all_there.wait()
        await connection.send_head()
        await connection.send_event(finish())
        await connection.send_event(DONE)
        await connection.end_body()

    async def ask_once(client: openai_compatible.OpenAICompatibleClient) -> None:
        await ask(client)

    with trio.fail_after(WAIT_S):
        async with open_pair(answer_all_at_once) as (server, client):
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(ask_once, client)
            assert server.connections_made == count


async def test_what_a_server_counts_with_each_piece_is_known_when_the_reply_is_left_early() -> None:
    """xAI and Gemini count so. Most servers count at the end only."""

    async def count(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        for written in (1, 2):
            told = {"prompt_tokens": 9, "completion_tokens": written, "prompt_tokens_details": {"cached_tokens": 8}}
            await connection.send_event(delta("x") | {"usage": told})
        await connection.wait_closed()

    async with open_upstream(count) as upstream:
        events: list[ModelEvent] = []
        async with upstream.client.stream(asking()) as stream:
            while len(events) < 2:
                events += await stream.receive()
        assert events == [TextDelta("x")] * 2
        assert stream.usage == Usage(input_tokens=9, output_tokens=2, cached_tokens=8)
