"""Forwarding: a request about turns that another process runs is answered by that process, through this one.

The owner answers on a Unix socket (``peer_address``), which only processes of the same user reach. What it says goes to
the client as it comes, heartbeats included, and a client that leaves has left there too. Where the owner dies in the
middle, its turns are recovered here and a stream goes on from the store: it ends with its terminal event
all the same.
"""

import re
from collections.abc import AsyncIterator
from contextlib import suppress

import h11
import structlog
import trio
from quart import current_app, request
from quart.wrappers.response import ResponseBody
from quart_trio.wrappers import TrioResponse

from service.api.bodies import kept_body
from service.api.held import give_back_later
from service.api.serving import current_service
from service.api.sse import MEDIA_TYPE, EventStream
from service.errors import OwnedElsewhereError, StoreError

logger = structlog.get_logger("lastcall.forwarding")

PEER = "lastcall.peer"
"""In the ASGI scope of a request that came from another process of this service: it was admitted there."""
_HOPS = "lastcall-hops"
_HOPS_MAX = 3
"""The owner may change while a request is on its way; it does not change for ever."""
_CONNECT_TIMEOUT_S = 2.0
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"date", b"server", b"expect")
)
_TURN_PATH = re.compile(r"/sessions/([^/]+)/turns/(turn_[0-9a-f]{32})")
_LAST_ID = re.compile(rb"(?:^|\n)id: (\d+)\n(?!.*\nid: )", re.DOTALL)


def is_from_peer() -> bool:
    """Whether the current request came from another process of this service."""
    return PEER in request.scope


async def forward(error: OwnedElsewhereError) -> TrioResponse:
    """Have the current request answered by the owner that ``error`` names.

    Raises:
        StoreError: It cannot be reached and whether it has accepted the request is unknown; or the owner
            changed too often.
    """
    hops = int(request.headers.get(_HOPS, "0")) if is_from_peer() else 0
    if error.address is None or hops >= _HOPS_MAX:
        raise StoreError(str(error))
    try:
        with trio.fail_after(_CONNECT_TIMEOUT_S):
            stream = await trio.open_unix_socket(error.address)
    except (OSError, trio.TooSlowError):
        return await _answer_here(error)
    give_back_later(stream.socket.close)
    peer = _Peer(stream)
    try:
        await peer.send_request(hops + 1)
        head = await peer.receive_head()
    except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as broken:
        if request.method == "POST" and not request.path.endswith("/cancel"):
            await current_service().sessions.recover()
            raise StoreError(
                "The process that runs this session's turns has died; whether it accepted the request shows in the "
                "session's turns."
            ) from broken
        return await _answer_here(error)
    headers = [(name.decode(), value.decode("latin-1")) for name, value in head.headers if name not in _HOP_BY_HOP]
    response = TrioResponse(b"", head.status_code)
    response.headers.clear()
    response.headers.extend(headers)
    if head.status_code != 204 and request.method != "HEAD":
        is_stream = response.headers.get("Content-Type", "").startswith(MEDIA_TYPE)
        response.response = ForwardedBody(peer, is_stream=is_stream, location=response.headers.get("Location"))
    response.timeout = None
    return response


async def _answer_here(error: OwnedElsewhereError) -> TrioResponse:
    """The owner is gone: end its turns and begin the request anew, here."""
    service = current_service()
    await service.sessions.recover()
    if (await service.store.find_owner(error.session_id)) is not None:
        raise StoreError(str(error))
    response = await current_app.dispatch_request()
    assert isinstance(response, TrioResponse)
    return response


class ForwardedBody(ResponseBody):
    """A body on its way from the owner to the client. Of an event stream only whole frames are passed on."""

    def __init__(self, peer: "_Peer", *, is_stream: bool, location: str | None) -> None:
        self._peer = peer
        self._is_stream = is_stream
        self._turn = _TURN_PATH.match(location or request.path)
        self._cursor = 0
        if is_stream and request.headers.get("Last-Event-ID", request.args.get("after", "")).isdigit():
            self._cursor = int(request.headers.get("Last-Event-ID") or request.args["after"])
        self._unsent = b""
        self._from_store: AsyncIterator[bytes] | None = None

    async def __aenter__(self) -> "ForwardedBody":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass  # the connection to the owner is closed with the request

    def __aiter__(self) -> "ForwardedBody":
        return self

    async def __anext__(self) -> bytes:
        while self._from_store is None:
            try:
                data = await self._peer.receive_body()
            except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError):
                if self._turn is None or not self._is_stream:
                    raise
                self._from_store = await self._go_on_from_store()
                break
            if not data:
                raise StopAsyncIteration
            if not self._is_stream:
                return data
            if frames := self._whole_frames(data):
                return frames
        return await anext(self._from_store)

    def _whole_frames(self, data: bytes) -> bytes:
        self._unsent += data
        end = self._unsent.rfind(b"\n\n") + 2
        if end == 1:
            return b""
        frames, self._unsent = self._unsent[:end], self._unsent[end:]
        last_id = _LAST_ID.search(frames)
        if last_id is not None:
            self._cursor = int(last_id[1])
        return frames

    async def _go_on_from_store(self) -> AsyncIterator[bytes]:
        """The rest of the stream, once the turn that lost its process has been recovered."""
        assert self._turn is not None
        service = current_service()
        session_id, turn_id = self._turn.groups()
        logger.info("a stream goes on from the store: its owner died", session_id=session_id, turn_id=turn_id)
        await service.sessions.recover()
        log, watch = await service.sessions.open_events(session_id, turn_id, after=self._cursor)
        give_back_later(watch.release)
        slot = service.sessions.open_stream()
        give_back_later(slot.close, ended=False)
        return EventStream(
            log, slot, cursor=self._cursor, heartbeat_interval_s=service.settings.heartbeat_interval_s
        ).__aiter__()


class _Peer:
    """The client's side of one request to another process."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._protocol = h11.Connection(h11.CLIENT)

    async def send_request(self, hops: int) -> None:
        """Send the current request as it came in, less what concerned only its own connection."""
        body = kept_body(request)
        headers = [
            (name, value)
            for name, value in request.scope["headers"]
            if name.lower() not in _HOP_BY_HOP and name.lower() not in (b"content-length", _HOPS.encode())
        ]
        if not any(name.lower() == b"host" for name, _ in headers):
            headers.append((b"host", b"localhost"))  # HTTP/2 has it in :authority
        headers += [
            (b"content-length", b"%d" % len(body)),
            (_HOPS.encode(), b"%d" % hops),
            (b"connection", b"close"),
        ]
        target = request.scope["raw_path"] + (b"?" + request.query_string if request.query_string else b"")
        data = b"".join(
            self._protocol.send(event) or b""
            for event in (
                h11.Request(method=request.method, target=target, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
        )
        with suppress(trio.BrokenResourceError):  # it may have answered before it read everything
            await self._stream.send_all(data)

    async def receive_head(self) -> h11.Response:
        event = await self._next_event()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next_event()
        if not isinstance(event, h11.Response):
            raise h11.RemoteProtocolError("the owner has closed the connection")
        return event

    async def receive_body(self) -> bytes:
        """What has come of the body; empty at its end."""
        event = await self._next_event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._protocol.next_event()) is h11.NEED_DATA:
            self._protocol.receive_data(await self._stream.receive_some(65536))
        return event  # type: ignore[return-value]
