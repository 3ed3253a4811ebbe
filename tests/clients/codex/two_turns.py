"""Two turns of Codex CLI with a command in each: ``python -m tests.clients.codex.two_turns CODEX``.

It runs in a network namespace of its own, so that Codex reaches this machine only: the caller makes it with
``unshare --map-root-user --net``.
"""

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import trio

from bench.server_process import ServerProcess
from tests.clients.checking import check
from tests.process.lastcall import SERVE, assert_clean, open_lastcall, wait_gone

COMMAND = "echo made-by-codex-$((6*7))"
PRINTED = "made-by-codex-42"
"""What the command prints: not a part of the request, so that only a shell can have made it."""
MODEL_URL = "scripted:?rate=0&call=exec_command:" + quote(json.dumps({"cmd": COMMAND}))
CONFIG = """
model = "scripted"
model_provider = "lastcall"
[model_providers.lastcall]
name = "Lastcall"
base_url = "http://127.0.0.1:{port}/v1"
wire_api = "responses"
"""
TURN_S = 25
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def raise_loopback() -> None:
    """Start the loopback interface, which is down in a new namespace.

    Source: https://man7.org/linux/man-pages/man7/netdevice.7.html
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


async def run_codex(codex: str, folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Run a turn of Codex. Return the id of its thread, and the items of its events by type."""
    home = {"HOME": str(folder), "CODEX_HOME": str(folder / "home")}
    command = [codex, "exec", "--json", "--skip-git-repo-check", *arguments]
    with trio.fail_after(TURN_S):
        done = await trio.run_process(
            command,
            cwd=folder / "work",
            env=os.environ | home,
            check=False,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
        )
    printed = done.stdout.decode(errors="replace")
    check(done.returncode == 0, f"codex ended with {done.returncode}: {printed[-800:]}")
    events = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    items = {event["item"]["type"]: event["item"] for event in events if event["type"] == "item.completed"}
    check(events[-1]["type"] == "turn.completed", f"its last event is {events[-1]}")
    return events[0]["thread_id"], items


def check_turn(items: dict[str, Any]) -> None:
    """Check that the command ran, and that the model has been told what it printed."""
    ran = items.get("command_execution", {})
    check(COMMAND in ran.get("command", ""), f"it ran {ran}")
    check((ran["exit_code"], ran["aggregated_output"]) == (0, f"{PRINTED}\n"), f"the command ended with {ran}")
    said = items.get("agent_message", {}).get("text", "")
    check(PRINTED in said, f"the answer does not quote what the command printed: {said!r}")


def prompt_sizes(server: ServerProcess) -> list[int]:
    """The size of the prompt of each reply that the model has completed."""
    lines = [json.loads(line) for line in server.log().splitlines() if '"turn ended"' in line]
    check(all(line["outcome"] == "completed" for line in lines), f"the turns ended with {lines}")
    return [line["input_tokens"] for line in lines]


async def run_two_turns(codex: str) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("home", "work"):
            (folder / part).mkdir()
        async with open_lastcall(SERVE, folder, model_url=MODEL_URL) as server:
            (folder / "home/config.toml").write_text(CONFIG.format(port=server.port))
            first, items = await run_codex(codex, folder, "The first question")
            check_turn(items)
            second, items = await run_codex(codex, folder, "resume", "--last", "The second question")
            check_turn(items)
            check(first == second, f"the second turn is in a thread of its own: {first}, {second}")
            sizes = prompt_sizes(server)
            check(len(sizes) == 4 and sizes == sorted(set(sizes)), f"the prompts do not grow: {sizes} tokens")
            server.signal_main(signal.SIGTERM)
            assert_clean(SERVE, server, await wait_gone(server))
    return f"2 turns in one thread, a command in each, its output in the answer; prompts of {sizes} tokens"


if __name__ == "__main__":
    raise_loopback()
    sys.stdout.write(trio.run(run_two_turns, sys.argv[1]))
