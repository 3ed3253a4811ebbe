"""The relay of a careful asyncio author: Starlette on uvicorn with uvloop and httptools, aiohttp's client, orjson.

The lines of the model server are split here, without a generator for each line, and the frames that come in one read
go out in one write. It keeps the replies as the other contenders do, and bounds its connects and reads as they do.
"""

import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import aiohttp
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from bench.contenders.relaying import COMPLETED, Replies, Sessions, delta


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.replies = Replies()
    app.state.sessions = Sessions()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as app.state.client:
        yield
    app.state.sessions.close()
    app.state.replies.close()


async def chat(request: Request) -> StreamingResponse:
    message = orjson.loads(await request.body())["message"]
    state = request.app.state

    async def frames() -> AsyncIterator[bytes]:
        async with aclosing(_relay(state.client, state.replies, message)) as replies:
            async for some in replies:
                yield some
        yield _frame(COMPLETED)

    return StreamingResponse(frames(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _relay(client: aiohttp.ClientSession, replies: Replies, message: str) -> AsyncGenerator[bytes, None]:
    """Yield the frames of each read. The reply is stored after every kind of end."""
    body = {"model": "bench", "stream": True, "messages": [{"role": "user", "content": message}]}
    tokens: list[str] = []
    state = "interrupted"
    rest = b""
    try:
        async with client.post(_CHAT, data=orjson.dumps(body), headers=_JSON) as response:
            response.raise_for_status()
            async for data in response.content.iter_any():
                *lines, rest = (rest + data).split(b"\n")
                if new := [token for line in lines if line.startswith(b"data: {") and (token := _token(line))]:
                    tokens += new
                    yield b"".join([_frame(delta(token)) for token in new])
        state = "completed"
    finally:
        replies.keep(message, "".join(tokens), state)


def _token(line: bytes) -> str:
    choices = orjson.loads(line[6:])["choices"]
    return str(choices[0]["delta"].get("content") or "") if choices else ""


def _frame(event: dict[str, str]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(event)


async def create_session(request: Request) -> Response:
    created = request.app.state.sessions.create(orjson.loads(await request.body())["id"])
    return Response(orjson.dumps(created), status_code=201, media_type="application/json")


async def get_session(request: Request) -> Response:
    found = request.app.state.sessions.find(request.path_params["session_id"])
    if found is None:
        return Response(b'{"detail":"Not Found"}', status_code=404, media_type="application/json")
    return Response(orjson.dumps(found), media_type="application/json")


async def healthz(request: Request) -> Response:  # noqa: ARG001  Starlette passes it
    return Response(b'{"status":"ok"}', media_type="application/json")


_CHAT = f"{os.environ.get('BENCH_UPSTREAM', '')}/chat/completions"
_JSON = {"Content-Type": "application/json"}
app = Starlette(
    routes=[
        Route("/chat", chat, methods=["POST"]),
        Route("/sessions", create_session, methods=["POST"]),
        Route("/sessions/{session_id}", get_session),
        Route("/healthz", healthz),
    ],
    lifespan=lifespan,
)
