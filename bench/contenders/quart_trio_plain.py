"""Plain Quart-Trio on hypercorn, as in the documentation of both, without the service's hosting.

Source: https://quart.palletsprojects.com/en/latest/how_to_guides/server_sent_events/
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx
from quart import Response, request
from quart_trio import QuartTrio

from bench.contenders.relaying import COMPLETED, Replies, delta, open_model_client, relay

app = QuartTrio(__name__)


class State:
    """The open resources of one worker."""

    client: httpx.AsyncClient
    replies: Replies


@app.before_serving
async def start() -> None:
    State.client = open_model_client()
    State.replies = Replies()


@app.after_serving
async def stop() -> None:
    await State.client.aclose()
    State.replies.close()


@app.post("/chat")
async def chat() -> Response:
    message = (await request.get_json())["message"]

    async def events() -> AsyncIterator[bytes]:
        async with aclosing(relay(State.client, State.replies, message)) as tokens:
            async for token in tokens:
                yield f"data: {json.dumps(delta(token))}\n\n".encode()
        yield f"data: {json.dumps(COMPLETED)}\n\n".encode()

    response = Response(events(), content_type="text/event-stream")
    response.timeout = None
    return response


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok", "pid": str(os.getpid())}
