"""A request whose client does not read."""

from typing import Any

import trio

from tests.api.inprocess import LOOPBACK, Api


class StalledCall:
    """A request whose client takes no part of the answer before :meth:`read`."""

    def __init__(self, api: Api, method: str, path: str, body: bytes = b"") -> None:
        self.status = 0
        self.body = b""
        self._app = api.app
        self._read = trio.Event()
        self._receives = iter([{"type": "http.request", "body": body, "more_body": False}])
        target, _, query = path.partition("?")
        self._scope = LOOPBACK | {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.1"},
            "http_version": "2",
            "method": method,
            "scheme": "http",
            "path": target,
            "raw_path": target.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "extensions": {},
        }

    async def run(self) -> None:
        await self._app(self._scope, self._receive, self._send)  # type: ignore[arg-type]

    def read(self) -> None:
        self._read.set()

    async def _receive(self) -> dict[str, Any]:
        for message in self._receives:
            return message
        await trio.sleep_forever()
        raise AssertionError

    async def _send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
        await self._read.wait()
