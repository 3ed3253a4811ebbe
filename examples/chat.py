"""A chat in the terminal: streams, stops at Ctrl-C, and goes on where it was after a cut or a restart of the server.

    python -m examples.chat http://127.0.0.1:8000 my-session

Ctrl-D ends it. Needs httpx and AnyIO, as the client does; run it in the project's folder.
"""

import signal
import sys
from contextlib import suppress

import anyio
from lastcall_client import Client, Event, LastcallError, TurnStream, Waiting


def say_waiting(_: Waiting) -> None:
    """Print that the client waits before it tries again."""
    print("[the server does not answer; trying again]", file=sys.stderr, flush=True)


def show(stream: TurnStream, event: Event) -> None:
    """Print what an event says."""
    if event.type == "turn.delta":
        print(event.text, end="", flush=True)
    elif event.type == "turn.resumed":
        print(f"\n[another process goes on with the reply; so far it is]\n{stream.text}", end="", flush=True)
    elif event.is_end:
        if "replaces" in event.data:
            print(f"\n[a crash took a part of the reply; kept is]\n{stream.text}", end="")
        error = event.data.get("error")
        why = error["message"] if error else event.data.get("reason") or ""
        print("" if event.type == "turn.completed" else f"\n[{event.type} {why}]", flush=True)


async def talk(client: Client, session_id: str, text: str) -> None:
    """Send a message and show the reply. Ctrl-C stops the reply and not the program."""
    stream = client.stream(session_id, text)

    async def stop_at_ctrl_c() -> None:
        async for _ in interrupts:
            if stream.turn_id is None:  # no server has taken the message yet
                group.cancel_scope.cancel()
            else:
                await stream.cancel()  # the stream gets turn.cancelled

    with anyio.open_signal_receiver(signal.SIGINT) as interrupts:
        async with stream, anyio.create_task_group() as group:
            group.start_soon(stop_at_ctrl_c)
            async for event in stream:
                show(stream, event)
            group.cancel_scope.cancel()


async def main() -> None:
    """Read messages, a line each, and show their replies."""
    server, session_id = (sys.argv[1:] + ["http://127.0.0.1:8000", "terminal"][len(sys.argv) - 1 :])[:2]
    async with Client(server, on_wait=say_waiting) as client:
        try:
            await client.create_session(id=session_id)
        except LastcallError as error:
            if error.code != "session_exists":  # it is there already: the chat goes on
                raise SystemExit(str(error)) from None
        while line := await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            if line.strip():
                try:
                    await talk(client, session_id, line.strip())
                except* LastcallError as group:
                    print(*(f"[{error}]" for error in group.exceptions), file=sys.stderr, flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        anyio.run(main, backend="trio")
