"""The old back end: FastAPI on uvicorn, sessions in memory, an expiry loop, clean-up in the lifespan.

``ORIGIN_VERSION`` chooses between its two shutdown designs, rebuilt as they were, faults and all. Both run after
uvicorn's own wait for connections, so neither can end a stream.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from bench.contenders.relaying import COMPLETED, Ask, Replies, delta, open_model_client, relay

EXPIRY_INTERVAL_S = 300
IDLE_TIMEOUT_S = 1800


@dataclass
class Session:
    """One conversation."""

    created_at: float = field(default_factory=time.time)
    last_accessed_at: float = field(default_factory=time.time)
    messages: int = 0


class Sessions:
    """All sessions, in memory."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._lock = asyncio.Lock()

    async def touch(self, session_id: str) -> None:
        async with self._lock:
            session = self._sessions.setdefault(session_id, Session())
            session.last_accessed_at = time.time()
            session.messages += 1

    async def clear(self) -> None:
        async with self._lock:
            self._sessions.clear()

    async def run_expiry(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_INTERVAL_S)
            async with self._lock:
                now = time.time()
                for name in [n for n, s in self._sessions.items() if now - s.last_accessed_at > IDLE_TIMEOUT_S]:
                    del self._sessions[name]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    print("starting")
    app.state.replies = Replies()
    app.state.client = open_model_client()
    app.state.sessions = Sessions()
    app.state.expiry = asyncio.create_task(app.state.sessions.run_expiry())
    try:
        yield
    finally:
        print("stopping")
        await (stop_first if os.environ["ORIGIN_VERSION"] == "1" else stop_second)(app)
        print("stopped")


async def stop_first(app: FastAPI) -> None:
    """The first design: it waits for every task of the loop, its own task included."""
    app.state.expiry.cancel()
    try:
        await asyncio.wait_for(app.state.expiry, 5)
    except (asyncio.CancelledError, TimeoutError):
        print("warning: the expiry task was cancelled or timed out")
    await app.state.sessions.clear()
    await app.state.client.aclose()
    pending = [task for task in asyncio.all_tasks() if not task.done()]
    try:
        await asyncio.wait_for(asyncio.gather(*pending, return_exceptions=True), 5)
    except TimeoutError:
        print("warning: tasks did not end in time")
    except Exception as error:  # noqa: BLE001  as it was
        print(f"error: {error}")


async def stop_second(app: FastAPI) -> None:
    """The second design: it has shorter waits and hides every error."""
    if not app.state.expiry.done():
        app.state.expiry.cancel()
        with suppress(asyncio.CancelledError, TimeoutError):
            await asyncio.wait_for(app.state.expiry, 2)
    with suppress(TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(3.0):
            await app.state.sessions.clear()
    with suppress(TimeoutError, asyncio.CancelledError):
        await asyncio.wait_for(app.state.client.aclose(), 3)
    pending = [task for task in asyncio.all_tasks() if not task.done() and task is not asyncio.current_task()]
    if pending:
        with suppress(TimeoutError, asyncio.CancelledError):
            _, left = await asyncio.wait(pending, timeout=2, return_when=asyncio.ALL_COMPLETED)
            for task in left:
                task.cancel()
            await asyncio.sleep(0.1)


app = FastAPI(lifespan=lifespan)


@app.post("/chat")
async def chat(ask: Ask, request: Request) -> StreamingResponse:
    state = request.app.state
    await state.sessions.touch(ask.message)

    async def events() -> AsyncIterator[str]:
        async with aclosing(relay(state.client, state.replies, ask.message)) as tokens:
            async for token in tokens:
                yield f"data: {json.dumps(delta(token))}\n\n"
        yield f"data: {json.dumps(COMPLETED)}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}
