"""The models that callers may name: how servers tell theirs, and what the service makes of these and the settings."""

import gzip
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import ModelError
from service.models import listed_models
from service.models.client import NO_OPTIONS, ListedModel, ListsModels, ModelRequest, Options
from service.models.listed_models import MODELS_MAX, read_models
from service.models.model_catalog import FRESH_S, RETRY_S, TIMEOUT_S, ModelCatalog
from service.models.retrying import RetryingClient
from service.models.scripted import Script, ScriptedClient
from service.models.upstreams import Upstreams
from tests.models.replies import ask
from tests.models.upstream import API_KEY, WAIT_S, open_upstream
from tests.upstreams.raw_server import DONE, Connection, Request, delta, finish, refusing

GPT = {"id": "gpt", "object": "model", "created": 1_769_851_800, "owned_by": "openai", "permission": [{}]}


def listing(*models: object, **more: object) -> bytes:
    return json.dumps({"object": "list", "data": models, **more}).encode()


def names(models: Sequence[ListedModel]) -> list[str]:
    return [model.id for model in models]


# The body


def test_a_list_is_read_with_what_it_tells_of_each_model() -> None:
    found = read_models(listing(GPT, {"id": "models/gemini-3", "created": None}, first_id="gpt"))
    assert found == (ListedModel(id="gpt", created=1_769_851_800, owned_by="openai"), ListedModel(id="models/gemini-3"))


def test_a_list_without_an_object_around_it_is_read() -> None:
    assert names(read_models(json.dumps([GPT, {"id": "b"}]).encode())) == ["gpt", "b"]


@pytest.mark.parametrize(
    "entry",
    [
        *({}, {"id": None}, {"id": 5}, {"id": ""}, {"id": "x" * 257}, {"id": "a\nb"}, {"id": "a\0"}, {"name": "x"}),
        *(None, "gpt", 5, ["gpt"]),
    ],
)
def test_an_entry_that_is_no_model_is_left_out(entry: object) -> None:
    assert names(read_models(listing({"id": "a"}, entry, {"id": "b"}))) == ["a", "b"]


def test_what_a_server_tells_wrongly_of_a_model_is_left_out_and_the_model_is_not() -> None:
    for wrong in (
        {"created": "x", "owned_by": 5},
        {"created": -1, "owned_by": "\n"},
        {"created": 10**30, "owned_by": ""},
    ):
        assert read_models(listing({"id": "a", **wrong})) == (ListedModel(id="a"),)


def test_a_model_that_is_there_twice_is_told_once_and_the_number_is_bounded() -> None:
    assert read_models(listing({"id": "a", "created": 1}, {"id": "a", "created": 2})) == (
        ListedModel(id="a", created=1),
    )
    many = read_models(listing(*({"id": f"m{n}"} for n in range(MODELS_MAX + 5))))
    assert len(many) == MODELS_MAX


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"null",
        b"<html>",
        b'{"data": null}',
        b'{"data": {}}',
        b'"x"',
        b'{"data": [}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_another_body_is_no_list(body: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        read_models(body)


# The client


def answering(requests: list[Request], body: bytes, headers: dict[str, str] | None = None) -> Any:
    async def answer(connection: Connection) -> None:
        while True:
            request = await connection.receive_request()
            requests.append(request)
            if request.method == "GET":
                await connection.send_response(200, body, headers)
                continue
            await connection.send_head()
            for payload in (delta("ok"), finish(), DONE):
                await connection.send_event(payload)
            await connection.end_body()

    return answer


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("", "/v1/models"),
        ("/openai/v1/", "/openai/v1/models"),
        ("/v1/chat/completions", "/v1/models"),
        ("/v1?api-version=2026", "/v1/models?api-version=2026"),
    ],
)
async def test_the_list_is_beside_chat_completions_and_uses_its_connection(path: str, target: str) -> None:
    requests: list[Request] = []
    async with open_upstream(answering(requests, listing(GPT)), path=path) as upstream:
        assert isinstance(upstream.client, ListsModels)
        for _ in range(2):
            assert names(await upstream.client.list_models()) == ["gpt"]
        assert (await ask(upstream.client)).text == "ok"
        assert upstream.server.connections_made == 1
    first = requests[0]
    assert (first.method, first.target, first.body) == ("GET", target, b"")
    assert first.headers["authorization"] == f"Bearer {API_KEY}"
    assert first.headers["accept"] == "application/json"
    assert "content-type" not in first.headers


async def test_a_compressed_list_is_read() -> None:
    body = gzip.compress(listing(GPT))
    async with open_upstream(answering([], body, {"content-encoding": "gzip"})) as upstream:
        assert isinstance(upstream.client, ListsModels)
        assert names(await upstream.client.list_models()) == ["gpt"]


@pytest.mark.parametrize("status", [404, 401, 500, 301])
async def test_a_server_without_a_list_says_so(status: int) -> None:
    async with open_upstream(refusing(status, {"error": {"message": "no"}})) as upstream:
        assert isinstance(upstream.client, ListsModels)
        with pytest.raises(ModelError, match=str(status)):
            await upstream.client.list_models()


async def test_a_list_that_is_too_large_or_no_list_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.models import openai_compatible

    monkeypatch.setattr(openai_compatible, "LIST_BYTES_MAX", 1000)
    assert listed_models.LIST_BYTES_MAX > 1024 * 1024
    for body, words in ((listing({"id": "x" * 1000}), "1000 bytes"), (b"<html>", "cannot be read")):
        async with open_upstream(answering([], body)) as upstream:
            assert isinstance(upstream.client, ListsModels)
            with pytest.raises(ModelError, match=words):
                await upstream.client.list_models()


async def test_a_caller_that_leaves_within_the_answer_leaves_no_connection() -> None:
    answered = trio.Event()

    async def stall(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head(200, {"content-length": "100"}, chunked=False)
        await connection.send(b"{")
        answered.set()
        await connection.wait_closed()

    async with open_upstream(stall) as upstream, trio.open_nursery() as nursery:
        assert isinstance(upstream.client, ListsModels)
        nursery.start_soon(upstream.client.list_models)
        with trio.fail_after(WAIT_S):
            await answered.wait()
        nursery.cancel_scope.cancel()


# The catalog


class Lister:
    """A client whose list a test decides."""

    def __init__(self, name: str, *models: ListedModel) -> None:
        self.name = name
        self.models = models
        self.asked = 0
        self.failure: ModelError | None = None
        self.takes_s = 0.0

    async def list_models(self) -> Sequence[ListedModel]:
        self.asked += 1
        await trio.sleep(self.takes_s)
        if self.failure is not None:
            raise self.failure
        return self.models

    def can_continue(self, text: str, options: Options = NO_OPTIONS) -> bool:
        return False

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        raise AssertionError("no test asks for a reply")
        yield

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


A, B, C = (ListedModel(id=name, created=n, owned_by="o") for n, name in enumerate("abc"))


async def test_one_upstream_adds_all_models_that_it_lists_to_the_default_one(autojump_clock: MockClock) -> None:
    catalog = ModelCatalog(Upstreams(Lister("one", A, B)), default_model="b")
    assert await catalog.list() == (B, A)
    assert await catalog.find("a") == A
    assert await catalog.find("z") is None
    other = ModelCatalog(Upstreams(Lister("one", A)), default_model="unlisted")
    assert await other.list() == (ListedModel(id="unlisted"), A)


async def test_several_upstreams_have_the_models_of_the_settings(autojump_clock: MockClock) -> None:
    one, two = Lister("one", A, B), Lister("two", B, C)
    catalog = ModelCatalog(Upstreams(by_model={"c": two, "x": one, "a": one}), default_model="c")
    assert await catalog.list() == (C, ListedModel(id="x"), A)
    assert (one.asked, two.asked) == (1, 1), "each server once"


async def test_a_client_without_a_list_adds_nothing(autojump_clock: MockClock) -> None:
    scripted = RetryingClient(ScriptedClient(Script()), retries_max=0)
    assert await ModelCatalog(Upstreams(scripted), default_model="scripted").list() == (ListedModel(id="scripted"),)


async def test_a_list_is_kept_for_a_while_and_then_asked_for_again(autojump_clock: MockClock) -> None:
    lister = Lister("one", A)
    catalog = ModelCatalog(Upstreams(RetryingClient(lister, retries_max=3)), default_model="a")
    for _ in range(3):
        assert await catalog.list() == (A,)
    assert lister.asked == 1
    await trio.sleep(FRESH_S)
    lister.models = (A, B)
    assert await catalog.list() == (A, B)
    assert lister.asked == 2


async def test_callers_at_once_ask_the_server_once(autojump_clock: MockClock) -> None:
    lister = Lister("one", A, B)
    lister.takes_s = 1
    catalog = ModelCatalog(Upstreams(lister), default_model="a")
    found: list[Sequence[ListedModel]] = []

    async def look() -> None:
        found.append(await catalog.list())

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(look)
    assert found == [(A, B)] * 20
    assert lister.asked == 1


async def test_a_server_that_fails_or_hangs_costs_a_bounded_time_and_its_last_list_stays(
    autojump_clock: MockClock,
) -> None:
    lister = Lister("one", A, B)
    catalog = ModelCatalog(Upstreams(lister), default_model="a")
    await catalog.list()
    for failure, takes_s in ((ModelError("upstream_error", "It failed."), 0.0), (None, 1000.0)):
        lister.failure, lister.takes_s = failure, takes_s
        await trio.sleep(FRESH_S)
        asked, start = lister.asked, trio.current_time()
        with capture_logs() as logs:
            for _ in range(3):
                assert await catalog.list() == (A, B)
        assert lister.asked == asked + 1
        assert trio.current_time() - start == (TIMEOUT_S if takes_s else 0)
        assert [line["upstream"] for line in logs] == ["one"]
        await trio.sleep(RETRY_S)
        lister.failure, lister.takes_s = None, 0.0
        assert await catalog.list() == (A, B)
        assert lister.asked == asked + 2


async def test_servers_are_asked_at_the_same_time(autojump_clock: MockClock) -> None:
    listers = [Lister(str(n), A) for n in range(4)]
    for lister in listers:
        lister.takes_s = 1000
    catalog = ModelCatalog(Upstreams(by_model={f"m{n}": it for n, it in enumerate(listers)}), default_model="m0")
    start = trio.current_time()
    assert names(await catalog.list()) == ["m0", "m1", "m2", "m3"]
    assert trio.current_time() - start == TIMEOUT_S


async def test_the_next_caller_asks_if_the_one_that_asks_leaves(autojump_clock: MockClock) -> None:
    lister = Lister("one", A, B)
    lister.takes_s = 2
    catalog = ModelCatalog(Upstreams(lister), default_model="a")
    found: list[Sequence[ListedModel]] = []

    async def look() -> None:
        found.append(await catalog.list())

    async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await wait_all_tasks_blocked()
        outer.start_soon(look)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert found == [(A, B)]
    assert lister.asked == 2
