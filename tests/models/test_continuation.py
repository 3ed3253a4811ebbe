"""Replies that go on after a text: what is sent, and what of the answer is new."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from service.models.chat_completions import Dialect, encode_request
from service.models.client import (
    ArgumentsDelta,
    CallOpened,
    Finished,
    Message,
    ModelClient,
    ModelEvent,
    ModelRequest,
    Options,
    Progress,
    ReasoningDelta,
    TextDelta,
    TextFormat,
)
from service.models.continuation import ECHO_LENGTH_MIN, Continuation, ContinuedStream, Form, split
from service.models.openai_compatible import open_openai_compatible
from service.models.retrying import RetryingClient
from tests.models.replies import Reading, Reply, ask, take
from tests.models.upstream import WAIT_S, open_pair
from tests.upstreams.raw_server import DONE, Connection, delta, finish, open_raw_server, replying

WHITE = st.text(" \n\t\u00a0\u3000", max_size=4)
SOFT = st.text("ab \n\u00a0👋", max_size=12)
TEXT = st.builds("{}{}".format, SOFT, WHITE)
CUTS = st.lists(st.integers(0, 50), max_size=8)
SO_FAR = "The first half of a reply,"
HI = Message("user", "hi")


def rest_of(text: str, came: str) -> str:
    """What of an answer is new, told by the whole of it."""
    sent, white = split(text)
    if sent:
        came = came.removeprefix(sent)
    equal = next(length for length in range(len(white), -1, -1) if came.startswith(white[:length]))
    return came[equal:]


def pieces(text: str, cuts: Sequence[int]) -> list[str]:
    at = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(at)]


def fed(text: str, came: Sequence[str]) -> str:
    continuation = Continuation(text)
    return "".join([*map(continuation.feed, came), continuation.end()])


@given(text=TEXT, came=TEXT, echoes=st.booleans(), cuts=CUTS)
@example(text="a \n", came=" ", echoes=True, cuts=[1, 2])
def test_what_is_new_does_not_depend_on_how_the_answer_is_cut(
    text: str, came: str, echoes: bool, cuts: list[int]
) -> None:
    came = split(text)[0] + came if echoes else came
    new = rest_of(text, came)
    assert fed(text, pieces(came, cuts)) == new
    assert fed(text, list(came)) == new
    assert came.endswith(new), "only the head is taken off"


@given(whole=st.text("abc \n\u3000👋", max_size=30), cut=st.integers(0, 30), cuts=CUTS)
@pytest.mark.parametrize("echoes", [False, True])
def test_an_upstream_that_goes_on_after_what_was_sent_gives_the_whole_text(
    echoes: bool, whole: str, cut: int, cuts: list[int]
) -> None:
    text = whole[:cut]
    sent = split(text)[0]
    came = whole if echoes else whole[len(sent) :]
    if not echoes and sent and came.startswith(sent):
        return  # a repetition, which cannot be told from an echo
    assert text + fed(text, pieces(came, cuts)) == whole


@pytest.mark.parametrize(
    ("text", "came", "new"),
    [
        ("one ", " two", "two"),
        ("one ", "two", "two"),  # the server knows that the white space was there
        ("one", " two", " two"),
        ("one \n", " \n two", " two"),
        ("one \n", " two", "two"),  # less than was there
        ("one\n", "\n\ntwo", "\ntwo"),  # more than was there
        ("one ", "\n\ntwo", "\n\ntwo"),  # other white space: it may be the end of a paragraph
        ("one\n\n", "\n  two", "  two"),  # an indentation stays
        ("one\u3000", "\u3000two", "two"),
        (" \n", " \ntwo", "two"),  # no text yet: nothing of it was sent
        ("one ", "", ""),
        ("one ", "one two", "two"),
        ("one ", "on two", "on two"),
        ("one ", "on", "on"),
    ],
)
def test_only_equal_white_space_is_taken_off(text: str, came: str, new: str) -> None:
    assert fed(text, list(came)) == new
    assert fed(text, [came] if came else []) == new


def test_nothing_is_looked_at_any_more_once_all_is_new() -> None:
    continuation = Continuation("one ")
    assert not continuation.is_over
    assert continuation.feed("one two") == "two"
    assert continuation.is_over
    assert continuation.feed("one two") == "one two"
    assert continuation.end() == ""


class Events:
    """A stream of the given batches."""

    usage = None

    def __init__(self, *batches: Sequence[ModelEvent]) -> None:
        self._batches = list(batches)

    async def receive(self) -> Sequence[ModelEvent]:
        await trio.lowlevel.checkpoint()
        return self._batches.pop(0)

    async def relay(self, take: Any) -> None:
        while take(await self.receive()):
            pass


@pytest.mark.parametrize("relays", [False, True])
async def test_what_is_held_back_comes_before_calls_and_before_the_end(
    monkeypatch: pytest.MonkeyPatch, relays: bool
) -> None:
    monkeypatch.setattr(Reading, "relays", relays)
    end = Finished(finish_reason="stop")
    for last in (CallOpened(0, "c", "f"), ArgumentsDelta(0, "{}"), end):
        batches: list[Sequence[ModelEvent]] = [[ReasoningDelta("r")], [TextDelta("on")], [last]]
        batches += [[end]] if last != end else []
        stream = ContinuedStream(Events(*batches), "one two")
        reply = Reply()
        await take(stream, reply)
        assert reply.events == [ReasoningDelta("r"), Progress(), TextDelta("on"), last, *([end] if last != end else [])]


def body_of(request: ModelRequest, form: Form) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(encode_request(request, Dialect(), form))
    return decoded


@pytest.mark.parametrize(
    ("form", "message", "fields"),
    [
        ("trailing", {}, {}),
        ("prefix", {"prefix": True}, {}),
        ("final_message", {}, {"continue_final_message": True, "add_generation_prompt": False}),
    ],
)
def test_the_text_so_far_is_the_last_message_and_the_server_is_told_so(
    form: Form, message: dict[str, Any], fields: dict[str, Any]
) -> None:
    begun = ModelRequest(model="m", prompt=(HI,), max_output_tokens=5)
    body = body_of(begun, form)
    assert body == body_of(begun, "none"), "a reply that begins is asked for as ever"
    continued = body_of(ModelRequest(model="m", prompt=(HI,), max_output_tokens=5, prefix="Grüße 👋,\n and \n"), form)
    body["messages"].append({"role": "assistant", "content": "Grüße 👋,\n and", **message})
    assert continued == body | fields


def test_a_long_text_so_far_is_sent_whole() -> None:
    text = 'ä"\\\n👋' * 100_000
    body = body_of(ModelRequest(model="m", prompt=(HI,), prefix=text), "trailing")
    assert body["messages"][-1]["content"] == text


async def test_a_client_says_what_it_can_continue() -> None:
    as_json = Options(text_format=TextFormat(type="json_object"))
    for form, can in (("none", False), ("trailing", True), ("prefix", True), ("final_message", True)):
        async with open_openai_compatible("http://127.0.0.1:1", continuation=form) as real:  # type: ignore[arg-type]
            for client in (real, RetryingClient(real, retries_max=1)):
                assert client.can_continue(SO_FAR) is can
                assert client.can_continue(SO_FAR, Options(top_p=0.5)) is can
                assert not client.can_continue(SO_FAR, as_json), "a grammar begins anew"
                assert client.can_continue("x" * ECHO_LENGTH_MIN) is can
                for short in ("", " \n" * ECHO_LENGTH_MIN, "x" * (ECHO_LENGTH_MIN - 1) + " \n"):
                    assert not client.can_continue(short)


async def continued(client: ModelClient, text: str) -> Reply:
    with trio.fail_after(WAIT_S):
        return await ask(client, ModelRequest(model="m", prompt=(HI,), prefix=text))


async def test_only_the_new_part_of_an_answer_is_the_reply() -> None:
    for answer in ([" and", " the rest."], [*SO_FAR, " and", " the rest."], [SO_FAR + " and the rest."]):
        behaviour = replying(*map(delta, answer), finish(), DONE)
        async with open_pair(behaviour, continuation="prefix") as (_, client):
            reply = await continued(client, f"{SO_FAR} ")
            assert reply.text == "and the rest."
            assert reply.finished.finish_reason == "stop"
            assert all(reply.batches), "an empty batch"
            assert (await ask(client)).text == "".join(answer), "a reply that begins is taken whole"


async def test_a_refused_field_does_not_lose_the_text_so_far() -> None:
    """A request that is made in another dialect after a refusal still continues."""
    asked: list[dict[str, Any]] = []

    async def refuse_once(connection: Connection) -> None:
        asked.append(json.loads((await connection.receive_request()).body))
        await connection.send_response(400, {"error": {"message": "stream_options is not supported"}})
        asked.append(json.loads((await connection.receive_request()).body))
        await connection.send_head()
        for event in (delta(" and"), finish(), DONE):
            await connection.send_event(event)
        await connection.end_body()

    async with (
        open_raw_server(refuse_once) as server,
        open_openai_compatible(server.url, continuation="trailing") as client,
    ):
        assert (await continued(client, SO_FAR)).text == " and"
    assert [body["messages"][-1] for body in asked] == [{"role": "assistant", "content": SO_FAR}] * 2
    assert "stream_options" not in asked[1]


async def test_an_answer_without_anything_new_is_the_end_of_the_reply() -> None:
    for answer in ([], [SO_FAR], [""]):
        behaviour = replying(*map(delta, answer), finish(), DONE)
        async with open_pair(behaviour, continuation="final_message") as (_, client):
            reply = await continued(client, SO_FAR)
            assert reply.text == ""
            assert reply.finished.finish_reason == "stop"
