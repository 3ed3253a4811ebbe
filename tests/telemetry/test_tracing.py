"""Traces: a request, its turn and the calls of the model are one tree, across tasks, processes and to the upstream."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from math import inf
from typing import Any

import pytest
import trio
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.sessions.commands import NewTurn
from service.settings import Settings
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from service.telemetry.trace_export import Losses, WatchedExporter
from service.telemetry.trace_variables import find_tracing, refusal_of
from service.telemetry.tracing import open_asked_tracing, open_tracing
from tests.kept_log import kept_log, lines_of
from tests.service.serving import Serving, read_to_end, serving
from tests.sessions.puppet import open_stage
from tests.upstreams.raw_server import Connection, Request, open_raw_server

CAP_S = 60
MARK = "zyzzyva"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Model:
    """A model server: it replies with two tokens, unless the input says otherwise, and keeps the requests."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.goes_on = trio.Event()

    async def __call__(self, connection: Connection) -> None:
        while True:
            request = await connection.receive_request()
            self.asked.append(request)
            said = request.json["messages"][-1]["content"]  # type: ignore[index]
            if said == "fails once" and len(self.asked) == 1:
                await connection.send_response(
                    503, {"error": {"message": f"overloaded by {MARK}"}}, {"retry-after": "0"}
                )
                continue
            if said == "is refused":
                await connection.send_response(400, {"error": {"message": f"no {MARK}"}})
                continue
            await connection.send_head(headers={"x-request-id": "up-1"})
            await connection.send_event(chunk({"content": f"{MARK} "}))
            if said == "waits":
                await self.goes_on.wait()
            await connection.send_event(chunk({"content": MARK}, "stop"))
            usage = {
                "prompt_tokens": 7,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 3},
                "completion_tokens_details": {"reasoning_tokens": 1},
            }
            await connection.send_event({"choices": [], "usage": usage})
            await connection.send_event(b"[DONE]")
            await connection.end_body()


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


class Traced:
    """A service whose spans are kept in memory: all of them, once it is closed."""

    def __init__(self, server: Serving, model: Model) -> None:
        self.server = server
        self.model = model

    async def call(self, method: str, path: str, body: object = None, **fields: str) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        lines = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(data)), **fields}
        if data:
            lines["Content-Type"] = "application/json"
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        async with await trio.open_tcp_stream("127.0.0.1", self.server.port) as stream:
            await stream.send_all(head.encode() + b"\r\n" + data)
            return await read_to_end(stream)

    async def turn(self, text: str, **options: Any) -> bytes:
        return await self.call("POST", "/sessions/s/turns", {"input": text, **options})


@asynccontextmanager
async def open_traced(exporter: InMemorySpanExporter, **settings: Any) -> AsyncIterator[Traced]:
    model = Model()
    with trio.fail_after(CAP_S):
        async with open_raw_server(model) as upstream:
            defaults = {"store_url": "memory:", "model_url": upstream.url, "model": "m"}
            opening = partial(open_tracing, exporter=exporter)
            async with serving(Settings(**defaults | settings), open_tracing=opening) as server:
                traced = Traced(server, model)
                await traced.call("POST", "/sessions", {"id": "s", "title": MARK, "system_message": MARK})
                yield traced


def named(spans: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def parent_of(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


ASKED = "POST /sessions/<session_id>/turns"


async def test_a_request_its_turn_and_the_call_of_the_model_are_one_tree() -> None:
    exporter = InMemorySpanExporter()
    async with open_traced(exporter) as traced:
        answer = await traced.turn(f"says {MARK}", temperature=0.5, max_output_tokens=9)
        [asked] = traced.model.asked
    turn_id = json.loads(answer.partition(b"\r\n\r\n")[2])["id"]
    spans = exporter.get_finished_spans()
    [request], [turn], [call] = named(spans, ASKED), named(spans, "turn"), named(spans, "chat m")
    assert [parent_of(it) for it in (request, turn, call)] == [None, ids(request), ids(turn)]
    assert [it.kind for it in (request, turn, call)] == [SpanKind.SERVER, SpanKind.INTERNAL, SpanKind.CLIENT]
    assert all(it.status.status_code is StatusCode.UNSET for it in (request, turn, call))
    trace_id, span_id = ids(call)
    assert asked.headers["traceparent"][:53] == f"00-{trace_id:032x}-{span_id:016x}-"
    about_call = attributes(call)
    assert 0 < about_call.pop("gen_ai.response.time_to_first_chunk") < CAP_S
    assert about_call == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": f"127.0.0.1:{asked.headers['host'].rpartition(':')[2]}",
        "gen_ai.conversation.id": "s",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.usage.reasoning.output_tokens": 1,
        "server.address": "127.0.0.1",
        "server.port": int(asked.headers["host"].rpartition(":")[2]),
        "lastcall.upstream.request_id": "up-1",
    }
    about_turn = attributes(turn)
    assert about_turn["lastcall.turn.id"] == turn_id
    assert (about_turn["lastcall.turn.outcome"], about_turn["lastcall.turn.code"]) == ("completed", "stop")
    assert about_turn["gen_ai.conversation.id"] == "s"
    assert about_turn["lastcall.turn.attempts"] == 1
    about_request = attributes(request)
    assert (about_request["http.route"], about_request["http.response.status_code"]) == (ASKED.partition(" ")[2], 200)
    assert about_request["url.path"] == "/sessions/s/turns"
    assert about_request["lastcall.request.id"] == about_turn["lastcall.request.id"]
    about_process = request.resource.attributes
    assert (about_process["service.name"], about_process["process.pid"]) == ("lastcall", os.getpid())
    assert MARK not in "".join(span.to_json() for span in spans), "no word of a conversation is in a trace"


async def test_the_caller_s_trace_goes_on_and_the_log_names_it() -> None:
    exporter = InMemorySpanExporter()
    with kept_log("json") as read:
        async with open_traced(exporter) as traced:
            await traced.turn("x")
            await traced.call("GET", f"/{MARK}?q={MARK}", traceparent="00-nonsense")
            await traced.call("POST", "/chat", {"message": "x"}, traceparent=CALLER, tracestate="a=b")
            state = traced.model.asked[-1].headers["tracestate"]
        (first, second) = lines_of(read(), "turn ended")
    spans = exporter.get_finished_spans()
    trace_id, span_id = int(CALLER[3:35], 16), int(CALLER[36:52], 16)
    [request] = named(spans, "POST /chat")
    assert (parent_of(request), state) == ((trace_id, span_id), "a=b")
    assert first["trace_id"] != second["trace_id"] == f"{trace_id:032x}"
    [lost] = named(spans, "GET")
    assert parent_of(lost) is None
    assert attributes(lost)["http.response.status_code"] == 404
    assert "url.path" not in attributes(lost)


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/sessions", {}, 401),
        ("/sessions", {"Authorization": "Bearer sesame-of-a-scraper"}, 403),
        ("/admin/tree", {"Authorization": "Bearer sesame-of-a-caller", "Origin": "http://elsewhere"}, 403),
        ("/healthz", {}, 200),
        ("/sessions/none", {"Authorization": "Bearer sesame-of-a-caller"}, 404),
    ],
    ids=["no key", "a key that may not", "a page of another origin", "no key is needed", "let pass"],
)
async def test_a_stranger_puts_no_span_into_a_trace_of_another_and_has_none_taken(
    path: str, fields: dict[str, str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["sesame-of-a-caller", {"name": "s", "key": "sesame-of-a-scraper", "may": ["metrics"]}]
    is_let_pass = status == 404
    for sampler, is_taken in (("parentbased_always_on", True), ("parentbased_always_off", is_let_pass)):
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
        exporter = InMemorySpanExporter()
        with kept_log("json") as read:
            async with open_traced(exporter, api_keys=keys, access_log="on") as traced:
                await traced.call("GET", path, traceparent=CALLER, **fields)
            [told] = [it for it in lines_of(read(), "request") if it["method"] == "GET"]
        spans = [it for it in exporter.get_finished_spans() if it.name.startswith("GET")]
        assert len(spans) == is_taken
        assert told["status"] == status
        assert told.get("trace_id") == (f"{ids(spans[0])[0]:032x}" if is_taken else None)
        if is_taken:
            caller = (int(CALLER[3:35], 16), int(CALLER[36:52], 16))
            assert parent_of(spans[0]) == (caller if is_let_pass else None)
            assert (ids(spans[0])[0] == caller[0]) == is_let_pass
            assert attributes(spans[0])["http.response.status_code"] == status


async def test_a_queued_turn_is_a_child_of_its_own_request_and_its_wait_is_seen() -> None:
    """The task of the session was started by another request."""
    exporter = InMemorySpanExporter()
    async with open_traced(exporter) as traced:
        await traced.turn("waits", background=True)
        await traced.turn("x", background=True, on_conflict="queue")
        traced.model.goes_on.set()
        for turn in traced.server.service.sessions.open_turns():
            await turn.ended.wait()
    spans = exporter.get_finished_spans()
    requests, turns, calls = named(spans, ASKED), named(spans, "turn"), named(spans, "chat m")
    assert [parent_of(it) for it in turns] == [ids(it) for it in requests]
    assert [parent_of(it) for it in calls] == [ids(it) for it in turns]
    assert len({ids(it)[0] for it in spans}) == 3, "each request has a trace of its own"
    events = [[event.name for event in it.events] for it in turns]
    assert events == [["turn.first_token"], ["turn.started", "turn.first_token"]]


async def test_a_repetition_is_an_event_of_the_call_and_a_failure_an_error_of_all_that_failed() -> None:
    exporter = InMemorySpanExporter()
    async with open_traced(exporter) as traced:
        await traced.turn("fails once")
        first, second = traced.model.asked
        await traced.turn("is refused")
    spans = exporter.get_finished_spans()
    [repeated, refused], [good, failed] = named(spans, "chat m"), named(spans, "turn")
    assert first.headers["traceparent"] == second.headers["traceparent"]
    [event] = repeated.events
    assert (event.name, (event.attributes or {})["error.type"]) == ("repeated", "upstream_error")
    assert attributes(repeated)["lastcall.call.repeats"] == attributes(good)["lastcall.turn.attempts"] - 1 == 1
    assert [it.status.status_code for it in (repeated, good)] == [StatusCode.UNSET] * 2
    assert [it.status.status_code for it in (refused, failed)] == [StatusCode.ERROR] * 2
    assert [attributes(it)["error.type"] for it in (refused, failed)] == ["upstream_rejected"] * 2
    assert not refused.status.description
    assert MARK not in "".join(span.to_json() for span in spans)


async def test_a_cancelled_turn_leaves_no_span_open_and_is_no_error() -> None:
    exporter = InMemorySpanExporter()
    async with open_traced(exporter) as traced:
        await traced.turn("waits", background=True)
        [turn] = traced.server.service.sessions.open_turns()
        await turn.log.wait_beyond(1)  # the first token after the start
        await traced.call("POST", f"/sessions/s/turns/{turn.id}/cancel")
    [ended], [call] = named(exporter.get_finished_spans(), "turn"), named(exporter.get_finished_spans(), "chat m")
    assert (attributes(ended)["lastcall.turn.outcome"], attributes(ended)["lastcall.turn.code"]) == (
        "cancelled",
        "requested",
    )
    assert attributes(call)["lastcall.call.dropped"] is True
    assert [it.status.status_code for it in (ended, call)] == [StatusCode.UNSET] * 2


async def test_a_trace_that_the_caller_does_not_take_is_not_taken_here() -> None:
    exporter = InMemorySpanExporter()
    with kept_log("json") as read:
        async with open_traced(exporter) as traced:
            await traced.call("POST", "/chat", {"message": "x"}, traceparent=f"{CALLER[:-2]}00")
            assert traced.model.asked[0].headers["traceparent"][-2:] == "00"
        assert "trace_id" not in lines_of(read(), "turn ended")[0]
    assert len(exporter.get_finished_spans()) == 1, "of the request that made the session"


async def test_the_sampler_and_the_service_s_name_are_those_of_the_standard_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=chat,team=blue")
    exporter = InMemorySpanExporter()
    async with open_tracing(exporter=exporter, flush_deadline=lambda: inf) as tracing:
        tracing.begin("a", "server", parent={"traceparent": CALLER}).end()
    assert exporter.get_finished_spans() == ()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1.0")
    exporter = InMemorySpanExporter()
    async with open_tracing(exporter=exporter, flush_deadline=lambda: inf) as tracing:
        tracing.begin("a", "server").end()
    [span] = exporter.get_finished_spans()
    about = span.resource.attributes
    assert (about["service.name"], about["team"]) == ("chat", "blue")


async def test_without_traces_no_field_of_them_goes_to_the_model() -> None:
    model = Model()
    with trio.fail_after(CAP_S):
        async with (
            open_raw_server(model) as upstream,
            serving(Settings(store_url="memory:", model_url=upstream.url, model="m")) as server,
        ):
            traced = Traced(server, model)
            await traced.call("POST", "/chat", {"message": "x"}, traceparent=CALLER)
    assert "traceparent" not in model.asked[0].headers


@pytest.mark.parametrize("goes_on", [True, False], ids=["by a request", "by itself"])
async def test_a_turn_that_goes_on_in_another_process_is_a_child_of_the_first_one_s_span(goes_on: bool) -> None:
    exporter = InMemorySpanExporter()
    store = MemoryStore()
    new = NewTurn(text="Hi", creates_session=True, on_interrupt="retry", on_disconnect="continue")
    with trio.fail_after(CAP_S):
        async with open_tracing(exporter=exporter, flush_deadline=lambda: inf) as tracing:
            async with open_stage(store, tracing=tracing) as first:
                turn, watch = await first.sessions.start_turn("s", new)
                await first.puppet.next_reply()
                first.stop.enter(Phase.INTERRUPTING)
                first.sessions.drain.interrupt_all()
                await first.sessions.drain.wait_idle()
                watch.release()
            async with open_stage(store, tracing=tracing) as second:
                asking = tracing.begin("asks", "server", parent={})
                with asking.current() if goes_on else nullcontext():
                    _, watch = await second.sessions.open_events("s", turn.id)
                asking.end()
                (await second.puppet.next_reply()).finish()
                await second.sessions.open_turns()[0].ended.wait()
                watch.release()
    spans = exporter.get_finished_spans()
    [suspended, completed], [asks] = named(spans, "turn"), named(spans, "asks")
    assert parent_of(completed) == ids(suspended)
    assert [attributes(it)["lastcall.turn.outcome"] for it in (suspended, completed)] == ["suspended", "completed"]
    assert [attributes(it)["lastcall.turn.attempt"] for it in (suspended, completed)] == [1, 2]
    assert [(link.context.trace_id, link.context.span_id) for link in completed.links] == (
        [ids(asks)] if goes_on else []
    )
    assert [parent_of(it) for it in named(spans, "chat scripted")] == [ids(suspended), ids(completed)]


@pytest.mark.parametrize(
    ("variables", "on", "warning"),
    [
        ({}, False, None),
        ({"OTEL_SERVICE_NAME": "chat", "OTEL_RESOURCE_ATTRIBUTES": "a=b"}, False, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, False, None),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True, None),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True, None),
        ({"OTEL_TRACES_EXPORTER": "console, OTLP"}, True, None),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False, None),
        ({"OTEL_SDK_DISABLED": "True", "OTEL_TRACES_EXPORTER": "otlp"}, False, None),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, False, "OTEL_TRACES_EXPORTER is 'zipkin'"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True, None),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False, "PROTOCOL is 'grpc'"),
        (
            {
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            True,
            None,
        ),
    ],
)
def test_the_standard_variables_say_whether_there_are_traces(
    variables: dict[str, str], on: bool, warning: str | None
) -> None:
    open_it, told = find_tracing(variables)
    assert (open_it is open_asked_tracing) == on
    assert (told is None) == (warning is None)
    assert (warning or "") in (told or "")


def test_traces_that_are_asked_for_without_the_extra_are_a_warning_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "service.telemetry.tracing", None)
    assert find_tracing({}) == (None, None)
    open_it, told = find_tracing({"OTEL_TRACES_EXPORTER": "otlp"})
    assert open_it is None
    assert "pip install 'lastcall[otel]'" in (told or "")


async def lose_spans(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """Lose a span on the way to a collector that these variables name. Returns the log."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with kept_log("json") as read:
        async with open_tracing(flush_deadline=lambda: inf) as tracing:
            tracing.begin("a", "server", parent={"traceparent": CALLER, "tracestate": f"dear diary {MARK}"}).end()
        return read()


@pytest.mark.parametrize("headers", [f"Authorization: Bearer {MARK}", f'"Authorization=Bearer {MARK}"', f"a=é{MARK}"])
async def test_what_is_wrong_with_the_collector_s_headers_is_said_without_the_key_in_them(
    monkeypatch: pytest.MonkeyPatch, headers: str
) -> None:
    async with open_raw_server(refuse) as server:
        log = await lose_spans(
            monkeypatch, OTEL_EXPORTER_OTLP_ENDPOINT=f"{server.url}/ingest/{MARK}", OTEL_EXPORTER_OTLP_HEADERS=headers
        )
    [told] = lines_of(log, "OpenTelemetry does not understand its variables")
    assert (told["level"], told["variables"]) == ("warning", ["OTEL_EXPORTER_OTLP_HEADERS"])
    [lost] = lines_of(log, "spans are lost")
    assert (lost["level"], lost["reason"], lost["spans"]) == ("warning", "the collector answered 401", 1)
    assert len(log.splitlines()) == 2
    assert MARK not in log


async def refuse(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_response(401, {"error": MARK})


def test_lost_spans_are_one_line_a_minute_with_their_number_and_the_rest_at_the_end() -> None:
    class Broken(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            raise ConnectionRefusedError(f"http://collector/{MARK}")

    losses = Losses()
    exporter = WatchedExporter(Broken(), losses)
    with kept_log("json") as read:
        for _ in range(3):
            exporter.export([ReadableSpan("a")])
        assert [it["spans"] for it in lines_of(read(), "spans are lost")] == [1]
        losses.tell()
        losses.tell()
        log = read()
    first, rest = lines_of(log, "spans are lost")
    assert (first["reason"], rest["spans"]) == ("the collector could not be asked (ConnectionRefusedError)", 2)
    assert MARK not in log


async def test_a_full_queue_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    goes_on = threading.Event()

    class Slow(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            goes_on.wait(CAP_S)
            return super().export(spans)

    with kept_log("json") as read:
        async with open_tracing(flush_deadline=lambda: inf, exporter=Slow()) as tracing:
            for _ in range(9):
                tracing.begin("a", "server").end()
            goes_on.set()
        [lost] = lines_of(read(), "spans are lost")
    assert lost["reason"] == "the queue is full (OTEL_BSP_MAX_QUEUE_SIZE)"


async def test_a_collector_that_refuses_connections_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_raw_server(refuse) as server:
        url = server.url
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")
    log = await end_with(None)
    [lost] = lines_of(log, "spans are lost")
    assert lost["reason"] == "the collector could not be asked (ConnectionError)"


async def test_a_wait_between_two_attempts_is_over_when_the_service_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(InMemorySpanExporter):
        def __init__(self) -> None:
            super().__init__()
            self.waits, self.ends = threading.Event(), threading.Event()

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            logging.getLogger("opentelemetry.exporter.otlp").warning("Transient error %s", "Service Unavailable")
            self.waits.set()
            self.ends.wait(CAP_S)
            return SpanExportResult.FAILURE

        def shutdown(self) -> None:
            self.ends.set()

    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    exporter = Waiting()
    log = await end_with(exporter, lambda: exporter.waits.wait(CAP_S))
    [lost] = lines_of(log, "spans are lost")
    assert lost["reason"] == "the collector answered 503"


async def end_with(exporter: SpanExporter | None, wait: Callable[[], object] = bool) -> str:
    """Make a span, wait, and end. Returns the log: it does not say that the end has waited for the collector."""
    with kept_log("json") as read:
        async with open_tracing(exporter=exporter, flush_deadline=lambda: trio.current_time() + 20) as tracing:
            tracing.begin("a", "server").end()
            await trio.to_thread.run_sync(wait)
        log = read()
    assert "traces were lost" not in log
    return log


async def test_an_end_without_a_thread_loses_traces_and_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    with kept_log("json") as read:
        async with open_tracing(exporter=exporter, flush_deadline=lambda: inf):

            async def no_thread(shutdown: Callable[[], object], **_: object) -> None:
                monkeypatch.undo()
                await trio.to_thread.run_sync(shutdown)  # so that this test leaves no thread of the libraries
                raise RuntimeError("can't start new thread")

            monkeypatch.setattr("trio.to_thread.run_sync", no_thread)
        [told] = lines_of(read(), "traces were lost: they could not be sent at the end of the stop")
    assert (told["level"], told["reason"]) == ("warning", 'RuntimeError("can\'t start new thread")')


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "abc", "ValueError: OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT must be "),
        ("OTEL_BSP_SCHEDULE_DELAY", "0", "ValueError: schedule_delay_millis must be positive."),
    ],
)
async def test_a_variable_that_the_libraries_refuse_is_a_warning_and_the_service_serves(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    opening, _ = find_tracing({"OTEL_TRACES_EXPORTER": "otlp", name: value})
    with kept_log("json") as read:
        settings = Settings(store_url="memory:", model_url="scripted:")
        async with (
            serving(settings, open_tracing=opening) as server,
            await server.connect("GET", "/sessions") as answer,
        ):
            assert b" 200 " in await read_to_end(answer)
        [told] = lines_of(read(), "there are no traces")
    assert told["reason"].startswith(f"the libraries refuse their variables ({reason}")


@pytest.mark.parametrize("batch", [None, "300"])
async def test_a_queue_smaller_than_a_batch_makes_batches_smaller(
    monkeypatch: pytest.MonkeyPatch, batch: str | None
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    if batch is not None:
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", batch)
    exporter = InMemorySpanExporter()
    async with open_tracing(exporter=exporter, flush_deadline=lambda: inf) as tracing:
        tracing.begin("a", "server").end()
    assert len(exporter.get_finished_spans()) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"Port is not a number: '{MARK} word'", "ValueError"),
        ("a limit must be positive", "ValueError: a limit must be positive"),
    ],
)
def test_an_error_s_text_is_not_told_if_it_has_a_part_of_the_collector_s_address(text: str, told: str) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://collector:{MARK}%20word"}
    assert refusal_of(variables, ValueError(text)) == f"the libraries refuse their variables ({told})"


@pytest.mark.processes
def test_a_variable_that_the_libraries_refuse_at_their_import_is_a_warning() -> None:
    code = "import os; from service.telemetry.trace_variables import find_tracing; print(find_tracing(os.environ))"
    variables = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "abc"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **variables}
    )
    assert ran.stdout.startswith("(None, 'the libraries refuse their variables (ValueError: ")


async def test_a_variable_that_does_not_count_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "sometimes")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "much")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "many")
    with kept_log("json") as read:
        async with open_tracing(flush_deadline=lambda: inf):
            pass
        [told] = lines_of(read(), "OpenTelemetry does not understand its variables")
    assert told["variables"] == ["OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_EXPORTER_OTLP_COMPRESSION", "OTEL_TRACES_SAMPLER"]
