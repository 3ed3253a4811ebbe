"""FastAPI as in its documentation: a path operation that yields events, and a lifespan that opens and closes.

Source: https://fastapi.tiangolo.com/tutorial/server-sent-events/ and /advanced/events/
"""

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.sse import EventSourceResponse

from bench.contenders.relaying import COMPLETED, Ask, Replies, delta, open_model_client, relay


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.replies = Replies()
    async with open_model_client() as app.state.client:
        yield
    app.state.replies.close()


app = FastAPI(lifespan=lifespan)


@app.post("/chat", response_class=EventSourceResponse)
async def chat(ask: Ask, request: Request) -> AsyncIterable[dict[str, Any]]:
    state = request.app.state
    async with aclosing(relay(state.client, state.replies, ask.message)) as tokens:
        async for token in tokens:
            yield delta(token)
    yield COMPLETED


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}
