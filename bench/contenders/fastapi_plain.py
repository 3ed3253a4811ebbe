"""FastAPI with a plain ``StreamingResponse``, which is what most services have: each token is a string that is sent.

It also keeps sessions in SQLite, so that a JSON request can be compared.

Source: https://fastapi.tiangolo.com/advanced/custom-response/#streamingresponse
"""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from bench.contenders.relaying import (
    COMPLETED,
    Ask,
    NewSession,
    Replies,
    Session,
    Sessions,
    delta,
    open_model_client,
    relay,
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.replies = Replies()
    app.state.sessions = Sessions()
    async with open_model_client() as app.state.client:
        yield
    app.state.sessions.close()
    app.state.replies.close()


app = FastAPI(lifespan=lifespan)


@app.post("/chat")
async def chat(ask: Ask, request: Request) -> StreamingResponse:
    state = request.app.state

    async def events() -> AsyncIterator[str]:
        async with aclosing(relay(state.client, state.replies, ask.message)) as tokens:
            async for token in tokens:
                yield f"data: {json.dumps(delta(token))}\n\n"
        yield f"data: {json.dumps(COMPLETED)}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


@app.post("/sessions", status_code=201)
async def create_session(new: NewSession, request: Request) -> Session:
    return Session.model_validate(request.app.state.sessions.create(new.id))


@app.get("/sessions/{session_id}")
async def get_session(session_id: str, request: Request) -> Session:
    found = request.app.state.sessions.find(session_id)
    if found is None:
        raise HTTPException(404)
    return Session.model_validate(found)


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}
