"""A chat in the terminal: streams, stops at Ctrl-C, and goes on where it was after a cut or a restart of the server.

    python examples/chat.py http://127.0.0.1:8000 my-session

Ctrl-D ends it. Needs httpx.
"""

import json
import random
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx

ENDS = {"turn.completed", "turn.failed", "turn.cancelled", "turn.interrupted"}
PASSING = {502, 503, 504}  # the server, or the proxy before it, may answer a moment later
TIMEOUT = httpx.Timeout(10, read=60)  # the server sends a comment every 15 s: a connection silent for longer is dead


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a streamed response, one after the other."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def pause(attempt: int, response: httpx.Response | None = None) -> None:
    """Wait before the next attempt: longer each time, by chance, and at least as long as ``Retry-After`` says."""
    print("[the server does not answer; trying again]", file=sys.stderr, flush=True)
    backoff_s = min(10, 0.5 * 2**attempt) * random.uniform(0.5, 1)
    time.sleep(max(backoff_s, float(response.headers.get("Retry-After", 0)) if response else 0))


def ask(client: httpx.Client, method: str, path: str, **request: Any) -> Any:
    """The JSON that a call answers. For calls that are safe to repeat: it waits while the server is away."""
    attempt = 0
    while True:
        try:
            response = client.request(method, path, **request)
        except httpx.TransportError:
            pause(attempt)
        else:
            if response.status_code not in PASSING:
                response.raise_for_status()
                return response.json()
            pause(attempt, response)
        attempt += 1


def follow(client: httpx.Client, turn: str) -> Iterator[dict[str, Any]]:
    """All events of a turn to its last one, each once, across cuts and restarts."""
    seen = attempt = 0
    while True:
        refusal = None
        try:
            with client.stream("GET", f"{turn}/events", headers={"Last-Event-ID": str(seen)}) as response:
                if response.status_code == 204:  # the turn has ended, and all its events were seen
                    return
                if response.status_code == 410:  # a crash took events that this client may have seen
                    break
                if response.status_code in PASSING:
                    refusal = response
                else:
                    response.raise_for_status()
                    for event in events(response):
                        seen, attempt = event["seq"], 0
                        yield event
                        if event["type"] in ENDS:
                            return
        except httpx.TransportError:
            pass  # cut: come back with the last id
        pause(attempt, refusal)
        attempt += 1
    kept = ask(client, "GET", turn)
    yield {"type": f"turn.{kept['state']}", "reason": kept["reason"], "error": kept["error"], "text": kept["text"]}


def start(client: httpx.Client, session: str, text: str) -> str:
    """Start a turn that runs without a client, too; return its path.

    A call without an answer may have arrived all the same. All attempts have one key, so they start one turn.
    """
    key = {"Idempotency-Key": str(uuid.uuid4())}
    turn = ask(client, "POST", f"{session}/turns", json={"input": text, "background": True}, headers=key)
    return f"{session}/turns/{turn['id']}"


def show(event: dict[str, Any]) -> None:
    """Print what an event says."""
    if event["type"] == "turn.delta":
        print(event["text"], end="", flush=True)
    elif event["type"] in ENDS:
        if "text" in event:
            print(f"\n[a crash took a part of the reply; kept is]\n{event['text']}", end="")
        why = event["error"]["message"] if event.get("error") else event.get("reason") or ""
        print("" if event["type"] == "turn.completed" else f"\n[{event['type']} {why}]", flush=True)


def talk(client: httpx.Client, session: str, text: str) -> None:
    """Send a message and show the reply. Ctrl-C stops the reply and not the program."""
    turn = start(client, session, text)
    try:
        for event in follow(client, turn):
            show(event)
    except KeyboardInterrupt:
        ended = ask(client, "POST", f"{turn}/cancel")
        print(f"\n[turn.{ended['state']} {ended['reason'] or ''}]", flush=True)


def main() -> None:
    """Read messages, a line each, and show their replies."""
    server, session_id = (sys.argv[1:] + ["http://127.0.0.1:8000", "terminal"][len(sys.argv) - 1 :])[:2]
    session = f"/sessions/{session_id}"
    with httpx.Client(base_url=server, timeout=TIMEOUT) as client:
        try:
            ask(client, "POST", "/sessions", json={"id": session_id})
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 409:  # it is there already: the chat goes on
                raise SystemExit(str(error)) from None
        for line in sys.stdin:
            if not line.strip():
                continue
            try:
                talk(client, session, line.strip())
            except httpx.HTTPStatusError as error:
                print(f"[{error}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
