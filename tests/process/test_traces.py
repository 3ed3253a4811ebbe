"""Traces of real servers, as a collector gets them over OTLP: across two workers, and with a collector that hangs."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.process.clients import new_session, open_client
from tests.process.lastcall import CAP_S, CONFIGURED_2, SERVE, open_lastcall, wait_gone
from tests.process.test_workers import SLOW, on_file, reaching_others
from tests.upstreams.raw_server import Connection, open_raw_server

pytestmark = pytest.mark.parallel

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
RELEASE_S = 20
"""So long a collector must not hold up a stop: it has half a second."""
Attributes = dict[str, Any]


class Collector:
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.resources: list[Attributes] = []
        self.spans: list[tuple[int, Any]] = []

    async def __call__(self, connection: Connection) -> None:
        while True:
            request = await connection.receive_request()
            self.paths.add(request.target)
            for of_process in ExportTraceServiceRequest.FromString(request.body).resource_spans:
                resource = attributes(of_process.resource)
                self.resources.append(resource)
                for of_scope in of_process.scope_spans:
                    self.spans += [(resource["process.pid"], span) for span in of_scope.spans]
            await connection.send_response(200, b"", {"content-type": "application/x-protobuf"})

    def named(self, name: str) -> list[tuple[int, Any]]:
        return [(pid, span) for pid, span in self.spans if span.name == name]

    def of_trace(self, traceparent: str) -> list[tuple[int, Any]]:
        return [(pid, span) for pid, span in self.spans if span.trace_id == bytes.fromhex(traceparent[3:35])]

    def has_all_of(self, traceparent: str) -> bool:
        """Whether it has the two spans of a request that was passed on, and the spans of a turn and of its start."""
        of_turn = ("turn", "chat bench", "POST /sessions/<session_id>/turns")
        return len(self.of_trace(traceparent)) >= 2 and all(map(self.named, of_turn))


def attributes(of: Any) -> Attributes:
    return {it.key: getattr(it.value, it.value.WhichOneof("value")) for it in of.attributes}


@asynccontextmanager
async def open_collector() -> AsyncIterator[tuple[Collector, dict[str, str]]]:
    """A collector, and the variables that name it."""
    collector = Collector()
    async with open_raw_server(collector) as server:
        yield collector, {"OTEL_EXPORTER_OTLP_ENDPOINT": server.url, "OTEL_SERVICE_NAME": "chat"}


async def test_a_request_that_another_worker_passes_on_is_one_trace_in_a_collector(tmp_path: Path) -> None:
    async with open_collector() as (collector, variables):
        settings = on_file(tmp_path, model_url=SLOW, **variables, OTEL_BSP_SCHEDULE_DELAY="50")
        async with open_lastcall(CONFIGURED_2, tmp_path, **settings) as server, open_client(server) as [client]:
            session = await new_session(client, "s")
            started = await client.post(f"{session}/turns", json={"input": "go", "background": True})
            turn = started.headers["location"]
            async with (
                trio.open_nursery() as nursery,  # noqa: ASYNC112  the answer comes once the owner is let go on
                reaching_others(server, tmp_path, session, requests=1),
            ):
                nursery.start_soon(_get, client, turn, {"traceparent": CALLER})
            await client.post(f"{turn}/cancel")
            # At the end the collector has half a second: less than a pause of this process may take.
            with trio.fail_after(CAP_S):
                while not collector.has_all_of(CALLER):  # noqa: ASYNC110  other processes send
                    await trio.sleep(0.02)
            server.signal_main(signal.SIGTERM)
            gone = await wait_gone(server)
        assert gone.exit_code == 0
        log = server.log()
    assert collector.paths == {"/v1/traces"}
    assert {it["service.name"] for it in collector.resources} == {"chat"}
    assert len({it["service.instance.id"] for it in collector.resources}) == 2
    passed_on = collector.of_trace(CALLER)
    assert [it.name for _, it in passed_on] == ["GET /sessions/<session_id>/turns/<turn_id>"] * 2
    [(first_pid, first), (owner_pid, second)] = sorted(
        passed_on, key=lambda it: it[1].parent_span_id != bytes.fromhex(CALLER[36:52])
    )
    assert first.parent_span_id == bytes.fromhex(CALLER[36:52])
    assert second.parent_span_id == first.span_id
    assert first_pid != owner_pid
    [(_, of_turn)], [(_, call)] = collector.named("turn"), collector.named("chat bench")
    [(_, request)] = collector.named("POST /sessions/<session_id>/turns")
    assert (of_turn.parent_span_id, call.parent_span_id) == (request.span_id, of_turn.span_id)
    assert attributes(of_turn)["lastcall.turn.outcome"] == "cancelled"
    [ended] = [json.loads(line) for line in log.splitlines() if '"turn ended"' in line]
    assert ended["trace_id"] == of_turn.trace_id.hex()


async def _get(client: Any, path: str, headers: dict[str, str]) -> None:
    assert (await client.get(path, headers=headers)).status_code == 200


async def test_a_collector_that_never_answers_holds_up_no_stop(tmp_path: Path) -> None:
    asked = trio.Event()

    async def hang(connection: Connection) -> None:
        await connection.receive_request()
        asked.set()
        await trio.sleep_forever()

    async with open_raw_server(hang) as collector:
        variables: dict[str, Any] = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        variables["OTEL_EXPORTER_OTLP_TIMEOUT"] = "3600"
        async with open_lastcall(SERVE, tmp_path, release_timeout_s=RELEASE_S, **variables) as server:
            async with open_client(server) as [client]:
                await new_session(client, "s")
            await asked.wait()
            server.signal_main(signal.SIGTERM)
            gone = await wait_gone(server)
        assert gone.exit_code == 0, "late traces are no fault of the service"
        lines = [json.loads(line) for line in server.log().splitlines()]
    [lost] = [line for line in lines if line["message"].startswith("traces were lost")]
    assert lost["level"] == "warning"
    [report] = [line for line in lines if line["message"] == "shutdown report"]
    assert (report["faults"], report["tasks_left"]) == ([], 0)
    assert report["phases_ms"]["releasing"] < RELEASE_S * 1000
