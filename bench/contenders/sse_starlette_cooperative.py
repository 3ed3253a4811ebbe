"""The strongest contender: sse-starlette with its cooperative shutdown, written with care.

The README's pattern checks the ``shutdown_event`` between two tokens, so a stream whose model is silent would wait for
the whole grace period. Here a task of the response relays into a memory channel (also the README's pattern) and stops
as soon as the event is set; then the terminal event is sent. The grace period only bounds streams that hang.

Source: https://github.com/sysid/sse-starlette, "Cooperative Shutdown" and "Memory Channels Alternative"
"""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectSendStream
from fastapi import FastAPI, Request
from sse_starlette import EventSourceResponse

from bench.contenders.relaying import COMPLETED, INTERRUPTED, Ask, Replies, delta, open_model_client, relay


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
    shutdown_event = anyio.Event()
    sender, receiver = anyio.create_memory_object_stream[dict[str, str]](10)

    async def produce() -> None:
        async with sender:
            terminal = await relay_until(shutdown_event, state, ask.message, sender)
            await sender.send({"data": json.dumps(terminal)})

    return EventSourceResponse(
        receiver,
        data_sender_callable=produce,
        shutdown_event=shutdown_event,
        shutdown_grace_period=2.0,
        send_timeout=30,
        headers={"Cache-Control": "no-cache"},
    )


async def relay_until(
    shutdown_event: anyio.Event, state: Any, message: str, sender: MemoryObjectSendStream[dict[str, str]]
) -> dict[str, str]:
    """Relay until the reply is whole or the event is set. Returns the terminal event."""
    terminal = INTERRUPTED
    async with anyio.create_task_group() as group:

        async def relay_all() -> None:
            nonlocal terminal
            async with aclosing(relay(state.client, state.replies, message)) as tokens:
                async for token in tokens:
                    await sender.send({"data": json.dumps(delta(token))})
            terminal = COMPLETED
            group.cancel_scope.cancel()

        group.start_soon(relay_all)
        await shutdown_event.wait()
        group.cancel_scope.cancel()
    return terminal


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}
