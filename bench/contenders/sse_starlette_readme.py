"""FastAPI with sse-starlette as in its README: a generator in an ``EventSourceResponse``.

Source: https://github.com/sysid/sse-starlette, "Quick Start" and "Error Handling and Timeouts"
"""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI, Request
from sse_starlette import EventSourceResponse

from bench.contenders.relaying import COMPLETED, Ask, Replies, delta, open_model_client, relay


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.replies = Replies()
    async with open_model_client() as app.state.client:
        yield
    app.state.replies.close()


app = FastAPI(lifespan=lifespan)


@app.post("/chat")
async def chat(ask: Ask, request: Request) -> EventSourceResponse:
    state = request.app.state

    async def generate_events() -> AsyncIterator[dict[str, str]]:
        async with aclosing(relay(state.client, state.replies, ask.message)) as tokens:
            async for token in tokens:
                yield {"data": json.dumps(delta(token))}
        yield {"data": json.dumps(COMPLETED)}

    return EventSourceResponse(generate_events(), send_timeout=30, headers={"Cache-Control": "no-cache"})


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}
