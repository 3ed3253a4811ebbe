"""The application over an open service, called in this process: without sockets, so the clock may jump."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
from quart_trio.testing.connections import TestHTTPConnection
from quart_trio.wrappers import TrioRequest
from trio.testing import wait_all_tasks_blocked

from service.api.app import Application, attach, create_app, detach
from service.cluster.peer_transport import PeerTransport
from service.settings import Settings
from service.supervisor import Service, open_service

LOOPBACK = {"client": ("127.0.0.1", 50_000), "server": ("127.0.0.1", 8000)}
CAP_S = 200
"""Bound of every call, mostly on a clock that jumps."""
SSE = {"Accept": "text/event-stream"}
_unused: list[Application] = []
"""Applications without a service. Making one compiles its routes, which takes longer than many a test."""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream, each checked to have its seq as its id."""
        events = []
        for frame in self.body.decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in frame.splitlines())
            if "data" in lines:
                event = json.loads(lines["data"])
                assert lines["id"] == str(event["seq"])
                events.append(event)
        return events

    def problem(self, status: int, code: str, field: str | None = None) -> dict[str, Any]:
        """The body; checks that it is the problem document with this code."""
        assert (self.status, self.headers["content-type"]) == (status, "application/problem+json"), self
        problem: dict[str, Any] = self.json
        assert (problem["status"], problem["code"], problem.get("field")) == (status, code, field), problem
        assert problem["type"] == f"/docs#{code}"
        assert problem["title"]
        assert problem["detail"]
        return problem


class Api:
    """Calls the application as a client on the same machine would."""

    def __init__(self, app: Application, service: Service) -> None:
        self.app = app
        self.service = service

    def open(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        scope: dict[str, Any] | None = None,
    ) -> TestHTTPConnection:
        """A request that the test sends step by step; use with ``async with``."""
        client = self.app.test_client()
        connection = client.request(path, method=method, headers=headers, scope_base=LOOPBACK | (scope or {}))
        assert isinstance(connection, TestHTTPConnection)
        return connection

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
        scope: dict[str, Any] | None = None,
    ) -> Reply:
        """Send a whole request and return its whole reply."""
        if body is not None:
            raw = json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} | (headers or {})
        received = bytearray()
        connection = self.open(method, path, headers=headers, scope=scope)
        with trio.fail_after(CAP_S):
            async with connection:
                if raw is not None:
                    await connection.send(raw)
                await connection.send_complete()
                while True:
                    try:
                        received += await connection.receive()
                    except trio.EndOfChannel:
                        break
        assert connection.status_code is not None
        headers = {name.lower(): value for name, value in (connection.headers or {}).items()}
        if path.startswith("/v1/"):
            from tests.api.openai.validation import check_answer  # takes a second to import

            media_type = headers.get("content-type", "")
            check_answer(method, path, connection.status_code, media_type, bytes(received))
        return Reply(connection.status_code, headers, bytes(received))

    async def new_session(self, **body: object) -> str:
        reply = await self.call("POST", "/sessions", body)
        assert reply.status == 201
        session_id: str = reply.json["id"]
        return session_id


def request_context(path: str, *, method: str = "GET", headers: Any = None, scope: Any = None) -> Any:
    """A context with a request without a body, for what reads the current request.

    Quart 0.23 would put the body into a queue that a request of ours does not have, so the request is Quart's own.
    """
    app = create_app()
    app.request_class = TrioRequest  # type: ignore[assignment]
    return app.test_request_context(path, method=method, headers=headers or {}, scope_base=scope or LOOPBACK)


async def leave(connection: TestHTTPConnection) -> None:
    """Leave as a client does, at any moment; returns when the application has noticed."""
    await connection.disconnect()
    await wait_all_tasks_blocked()
    await connection._client_send.aclose()  # otherwise leaving the connection would wait for an end


STORE_URL = "memory:"
"""Of an application whose settings name no store."""


@asynccontextmanager
async def open_api(**settings: Any) -> AsyncIterator[Api]:
    """An application that is attached to a service of its own, in memory unless the settings say otherwise.

    Args:
        settings: And ``peers``, the way in which other processes are reached, if not only through Unix sockets.
    """
    peers: PeerTransport | None = settings.pop("peers", None)
    settings = {"store_url": STORE_URL} | settings
    if settings["store_url"] != "memory:":
        # The close of a file leaves the file's threads behind when its time is over, and no test is about that time.
        settings = {"release_timeout_s": CAP_S} | settings
    app = _unused.pop() if _unused else create_app()
    async with open_service(Settings(**settings), peers=peers) as service:
        attach(app, service)
        try:
            yield Api(app, service)
        finally:
            detach(app)
            _unused.append(app)
