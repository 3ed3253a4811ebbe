"""Checks an installation within a minute: starts the real server, talks to it, stops it in mid-stream
and reads its log. ``just smoke`` prints the results and a verdict; the exit code is 0 only if all checks pass.

It uses only the standard library, and the server as any other program does.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

WAIT_S = 60
"""Bounds every wait."""
SETTINGS = {
    "LASTCALL_BIND": "127.0.0.1:0",
    "LASTCALL_LOG_FORMAT": "json",
    "LASTCALL_DRAIN_TIMEOUT_S": "0.5",
    "LASTCALL_RELEASE_TIMEOUT_S": "10",
}
CONFIG = """
model = "short"
upstreams = [
  { name = "short", url = "scripted:?tokens=100&rate=50", models = ["short"] },
  { name = "endless", url = "scripted:?silent_after=3", models = ["endless"] },
]
"""
"""Two models: one that ends its replies, and one whose reply still runs when the server is stopped."""


class SmokeError(Exception):
    """A check has failed."""


def main() -> int:
    """Run the smoke test and print the verdict."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder, "log")
        try:
            with running_server(log_path) as (server, address):
                said(f"the server serves on {address}")
                talk(address)
                stop_in_mid_stream(server, address)
            read_log(log_path)
        except (SmokeError, OSError, HTTPException, subprocess.TimeoutExpired) as error:
            print(f"  failed  {error}\n\nThe server's log:\n{log_path.read_text() if log_path.exists() else ''}")
            print("smoke: failed")
            return 1
    print(f"smoke: all is well, in {time.monotonic() - started:.1f} s")
    return 0


@contextmanager
def running_server(log_path: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A server with settings of its own, and its address."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LASTCALL_")}
    source = Path(__file__).parent.parent
    log_path.with_name("lastcall.toml").write_text(CONFIG)
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"],
            cwd=log_path.parent,
            env=environ | SETTINGS | {"PYTHONPATH": str(source)},
            stderr=log,
        )
    try:
        yield server, wait_serving(server, log_path)
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()


def wait_serving(server: "subprocess.Popen[bytes]", log_path: Path) -> str:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and server.poll() is None:
        for event in events_of(log_path):
            if event.get("message") == "serving":
                return str(event["urls"][0]).removeprefix("http://")
        time.sleep(0.02)
    raise SmokeError("the server does not start")


def talk(address: str) -> None:
    """A conversation of two turns, one streamed and one waited for."""
    for path in ("/healthz", "/readyz"):
        expect(200, call(address, "GET", path))
    session = expect(201, call(address, "POST", "/sessions", {"title": "smoke"}))
    turns = f"/sessions/{session['id']}/turns"
    stream = call(address, "POST", turns, {"input": "First."}, Accept="text/event-stream")
    events = list(read_events(stream))
    check(events[-1]["type"] == "turn.completed", f"the streamed turn ends with {events[-1]}")
    said(f"a turn was streamed: {len(events)} events, the last {events[-1]['type']}")
    turn = expect(200, call(address, "POST", turns, {"input": "Second."}))
    check(turn["state"] == "completed", f"the waited turn is {turn['state']}")
    session = expect(200, call(address, "GET", f"/sessions/{session['id']}"))
    check(session["message_count"] == 4, f"the session has {session['message_count']} messages instead of 4")
    said(f"a second turn was waited for, the session has {session['message_count']} messages")


def stop_in_mid_stream(server: "subprocess.Popen[bytes]", address: str) -> None:
    session = expect(201, call(address, "POST", "/sessions", {"model": "endless"}))
    turn = {"input": "Third."}
    events = read_events(call(address, "POST", f"/sessions/{session['id']}/turns", turn, Accept="text/event-stream"))
    check(
        any(event["type"] == "turn.delta" for event in events), "the stream has no delta"
    )  # this reads as far as the first delta
    signalled = time.monotonic()
    server.send_signal(signal.SIGTERM)
    last = list(events)[-1]
    check(last["type"] == "turn.interrupted", f"the stopped stream ends with {last}")
    code = server.wait(WAIT_S)
    check(code == 0, f"the server's exit code is {code}")
    said(f"stopped in mid-stream: {last['type']}, and gone {time.monotonic() - signalled:.2f} s after SIGTERM, rc 0")


def read_log(log_path: Path) -> None:
    events = list(events_of(log_path))
    bad = [event for event in events if event.get("level") not in ("debug", "info")]
    check(not bad, f"the log complains: {bad}")
    reports = [event for event in events if event.get("message") == "shutdown report"]
    check(len(reports) == 1, f"the log has {len(reports)} shutdown reports")
    check(reports[0]["tasks_left"] == 0 and not reports[0]["faults"], f"the shutdown was not clean: {reports[0]}")
    said(f"the log has {len(events)} lines and no complaint")


def events_of(log_path: Path) -> Iterator[dict[str, Any]]:
    """The log's lines; a line that is not ours, such as a traceback, counts as an error."""
    for line in log_path.read_text().splitlines():
        yield json.loads(line) if line.startswith("{") and line.endswith("}") else {"level": "not ours", "line": line}


def call(address: str, method: str, path: str, body: object = None, **headers: str) -> HTTPResponse:
    connection = HTTPConnection(address, timeout=WAIT_S)
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json", "Connection": "close"} | headers)
    return connection.getresponse()


def expect(status: int, response: HTTPResponse) -> dict[str, Any]:
    with response:
        body = response.read()
    check(response.status == status, f"{response.status} instead of {status}: {body.decode(errors='replace')}")
    parsed: dict[str, Any] = json.loads(body)
    return parsed


def read_events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream, which must end properly: with its last chunk."""
    with response:
        check(response.status == 200, f"the stream's status is {response.status}")
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SmokeError(otherwise)


def said(text: str) -> None:
    print(f"  ok      {text}")


if __name__ == "__main__":
    sys.exit(main())
