"""A request on its way through Quart-Trio, with two faults mended and one addition.

* hypercorn tells the application of a disconnect when a response is complete; Quart-Trio then cancels the request
  while that last send is still inside hypercorn, which is about to make the connection ready for the next request.
  Its idle timer never starts: kept-alive connections live for ever, and a shutdown waits for each of them. So the
  last send is shielded. Source: hypercorn 0.18 ``H11Protocol._maybe_recycle``, quart-trio 0.12 and 0.13
  ``TrioASGIHTTPConnection``. Proven by ``tests/hosting/test_http_connection.py``.
* A client that is still sending its request when the work has ended is answered, not waited for.
* From the end of the lame duck on, each response on HTTP/1 says that the connection closes.
"""

from functools import partial
from typing import Any

import trio
from quart import Quart
from quart.wrappers import Request
from quart_trio.asgi import TrioASGIHTTPConnection

from service.api.bodies import BoundedBody
from service.errors import ShuttingDownError
from service.shutdown import Shutdown

LAST_SEND_TIMEOUT_S = 30
"""The shield's own bound; who does not read for so long is not worth a clean connection."""

_REQUESTS = "lastcall.requests"


class OpenRequests(set[Request]):
    """The requests of an application, as far as the shutdown has to do with them."""

    def __init__(self, shutdown: Shutdown) -> None:
        super().__init__()
        self._shutdown = shutdown

    @property
    def closing(self) -> bool:
        return not self._shutdown.accepting

    def refuse_uploads(self) -> None:
        """Have the requests whose bodies are not complete answered with 503."""
        for request in self:
            if isinstance(request.body, BoundedBody):
                request.body.refuse(ShuttingDownError())


def open_requests(app: Quart, shutdown: Shutdown) -> OpenRequests:
    """Tell the application's connections of this shutdown."""
    requests = app.extensions[_REQUESTS] = OpenRequests(shutdown)
    return requests


class HTTPConnection(TrioASGIHTTPConnection):
    """One request."""

    async def __call__(self, receive: Any, send: Any) -> None:
        request = self._create_request_from_scope(send)
        requests: OpenRequests | None = self.app.extensions.get(_REQUESTS)
        if requests is not None:
            requests.add(request)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.handle_messages, nursery, request, receive)
                # In this task and not beside it, as Quart-Trio does: each request would pay for the task.
                await self.handle_request(nursery, request, partial(self._send, send))
        finally:
            if requests is not None:
                requests.discard(request)

    async def _send(self, send: Any, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            with trio.CancelScope(shield=True, deadline=trio.current_time() + LAST_SEND_TIMEOUT_S):
                await send(message)
            return
        if message["type"] == "http.response.start" and self._closes():
            headers = [pair for pair in message["headers"] if pair[0].lower() != b"connection"]
            message["headers"] = [*headers, (b"connection", b"close")]
        await send(message)

    def _closes(self) -> bool:
        requests: OpenRequests | None = self.app.extensions.get(_REQUESTS)
        return requests is not None and requests.closing and self.scope["http_version"] < "2"
