"""``lastcall chat`` and ``lastcall sessions``, on a terminal and in pipes, with a real server."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import trio

from bench.server_process import Launch, open_server, python_command
from service.api.operator.tree import VIEWERS_MAX
from service.cli import client_commands
from service.cli.main import main
from service.client_settings import ClientSettingsError, read_target
from service.errors import SettingsError
from service.setting_sources import read_sources
from service.settings import Settings
from tests.cli.terminals import ADMIN_KEY, API_KEYS, CAP_S, KEY, Served, open_terminal, serving
from tests.clients.surroundings import open_cutting_proxy
from tests.docs.test_examples import open_model, program

HOSTILE = (
    "\x1b]52;c;ZXZpbA==\x07\x1b]0;title\x1b\\\x1b[2J\x1b[H\x9b31m\x08\x08\rover "
    "\u202egnp.exe\u2066 \u200b\x00 end\n\ttab 世界 é"
)
ENDED = re.compile(r"completed · .* · quick")
SAID = (
    "You said: “{}” I am a script and not a model, so that is all I can say about it. "
    "Name a real one in LASTCALL_MODEL_URL and LASTCALL_MODEL, and it answers here."
)
CONFIG = f"""
model = "quick"
upstreams = [
  {{ name = "quick", url = "scripted:?rate=400&first_token_s=0", models = ["quick"] }},
  {{ name = "begun", url = "scripted:?silent_after=1&first_token_s=0&text=%0ASo%20far", models = ["begun"] }},
  {{ name = "endless", url = "scripted:?silent_after=3&first_token_s=0", models = ["endless"] }},
  {{ name = "failing", url = "scripted:?tokens=9&rate=400&fail_after=3", models = ["failing"] }},
  {{ name = "hostile", url = "scripted:?rate=400&text={quote(HOSTILE)}", models = ["hostile"] }},
]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("server"), {}, config=CONFIG) as served:
        yield served


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LASTCALL_URL", "LASTCALL_API_KEY_FILE", "LASTCALL_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LASTCALL_API_KEY", KEY)


@contextlib.contextmanager
def standard_input(data: bytes) -> Iterator[None]:
    """A pipe that holds this, as the process's standard input."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    before = os.dup(0)
    os.dup2(read, 0)
    os.close(read)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def is_asking(shown: str) -> bool:
    """Whether the last line asks for a message."""
    return shown.endswith("\n>")


def one_line(shown: str) -> str:
    """What a screen shows, as it was before the terminal broke its lines."""
    return shown.replace("\n", "")


# In a pipe


def test_a_message_from_a_pipe_is_answered_in_plain_text(server: Served, capfd: pytest.CaptureFixture[str]) -> None:
    with standard_input("What is a\nnürsery?\n".encode()):
        assert main(["chat", "--url", server.url, "--session", "piped"]) == 0
    printed = capfd.readouterr()
    assert printed.out == SAID.format("What is a nürsery?") + "\n"
    assert printed.err == ""
    assert server.get("/sessions/piped/turns")["data"][0]["input"] == "What is a\nnürsery?\n"


def test_one_message_is_sent_to_the_session_and_the_model_that_are_named(
    server: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    assert client_commands.main(["chat", "Hi", "--url", server.url, "--session", "named", "--model", "failing"]) == 1
    printed = capfd.readouterr()
    assert printed.out.count("\n") == 1
    assert printed.err.startswith("lastcall: failed: upstream_error: ")
    assert client_commands.main(["chat", "Hi", "--url", server.url, "--session", "named", "--json"]) == 0
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [events[0]["type"], events[-1]["type"]] == ["turn.started", "turn.completed"]
    assert "".join(it.get("text", "") for it in events) == SAID.format("Hi")
    assert [it["model"] for it in server.get("/sessions/named/turns")["data"]] == ["failing", "quick"]


def test_a_hostile_reply_is_harmless_and_keeps_its_lines_tabs_and_letters(
    server: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    assert client_commands.main(["chat", "Hi", "--url", server.url, "--model", "hostile"]) == 0
    out = capfd.readouterr().out
    assert re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", out) == []
    assert out.startswith(r"\x1b]52;c;ZXZpbA==\x07\x1b]0;title")
    assert out.endswith("end\n\ttab 世界 é\n")


@pytest.mark.parametrize(
    ("arguments", "key", "told"),
    [
        (["chat", "Hi", "--url", "127.0.0.1:1"], KEY, (69, "no server answers at http://127.0.0.1:1 (all attempts")),
        (["sessions", "--url", "unix:/nowhere"], KEY, (69, "no server answers at unix:/nowhere (")),
        (["chat", "Hi"], "wrong", (77, "does not accept this API key: set LASTCALL_API_KEY, or name")),
        (["sessions"], ADMIN_KEY, (77, "refuses: This API key may not do this: it needs the permission")),
        (["tree"], KEY, (77, "refuses: This API key may not do this: it needs the permission 'administer'")),
        (["drain"], KEY, (77, "refuses: This API key may not do this: it needs the permission 'administer'")),
        (["sessions"], "", (77, "requires an API key: set LASTCALL_API_KEY")),
        (["sessions", "--after", "nonsense"], KEY, (1, "refused: ")),
        (["chat", "Hi", "--session", "no/id"], KEY, (1, "refused: ")),
        (["chat", " "], KEY, (2, "there is no message")),
        (["chat", "Hi", "--url", "ftp://host"], KEY, (2, "--url: 'ftp://host' should be http://host:port")),
        (["chat", "Hi", "--api-key-file", "/nowhere"], KEY, (2, "--api-key-file should name a file that holds")),
        (["chat", "Hi"], "two words", (2, "LASTCALL_API_KEY: a key is one word of ASCII characters")),
    ],
)
def test_an_exit_code_and_one_line_say_what_is_wrong(  # noqa: PLR0917  fixtures
    arguments: list[str],
    key: str,
    told: tuple[int, str],
    server: Served,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LASTCALL_API_KEY", key)
    monkeypatch.setenv("LASTCALL_URL", server.url)
    code, line = told
    assert client_commands.main(arguments) == code
    printed = capfd.readouterr()
    assert printed.out == ""
    assert line in printed.err
    assert printed.err.startswith("lastcall: ")
    assert printed.err.count("\n") == 1
    assert key not in printed.err or not key


def test_the_key_may_be_in_a_file(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LASTCALL_API_KEY")
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert client_commands.main(["sessions", "--url", server.url, "--api-key-file", "key"]) == 0
    monkeypatch.setenv("LASTCALL_API_KEY_FILE", "key")
    assert client_commands.main(["sessions", "--url", server.url]) == 0


def test_characters_that_the_locale_does_not_have_are_written_in_others(
    server: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    assert client_commands.main(["chat", "Hi", "--url", server.url], encoding="iso8859-1") == 0
    assert capfd.readouterr().out.startswith('You said: "Hi" I am')
    arguments = ["chat", "Hi", "--url", server.url, "--model", "hostile"]
    assert client_commands.main(arguments, encoding="ascii") == 0
    assert capfd.readouterr().out.endswith("\ttab \\u4e16\\u754c \\xe9\n")


def running_turn(server: Served, session: str) -> str | None:
    """The turn that runs in a session, once it has a text."""
    if session not in [it["id"] for it in server.get("/sessions?status=running&limit=100")["data"]]:
        return None
    turn = server.get(f"/sessions/{session}/turns")["data"][-1]
    found: str | None = turn["id"] if turn["text"] else None
    return found


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)], ids=str
)
async def test_a_turn_whose_command_is_stopped_is_cancelled(
    number: signal.Signals, code: int, server: Served, tmp_path: Path
) -> None:
    session = f"given-up-{code}"
    arguments = ["--url", server.url, "--session", session, "--model", "begun"]
    async with program("-m", "service", "chat", "Talk", *arguments, folder=tmp_path) as (piped, output):
        await output.until("^\n")  # of a piece that goes on: the command has the line that has begun, too
        turn = running_turn(server, session)
        assert turn is not None
        piped.send_signal(number)
        await output.until("^So \n")
        assert await piped.wait() == code
    ended = server.get(f"/sessions/{session}/turns/{turn}")
    assert (ended["state"], ended["reason"]) == ("cancelled", "requested")


def test_a_turn_whose_reader_has_gone_is_cancelled(server: Served) -> None:
    read, write = os.pipe()
    os.close(read)
    before = os.dup(1)
    os.dup2(write, 1)
    try:
        arguments = ["--url", server.url, "--session", "unread", "--model", "endless", "--json"]
        assert client_commands.main(["chat", "Talk", *arguments]) == 141
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(write)
    assert server.get("/sessions/unread/turns")["data"][0]["state"] == "cancelled"


def test_the_help_of_a_command_loads_no_server_and_no_event_loop() -> None:
    code = "import sys; sys.argv = ['lastcall', 'chat', '--help']; from service.__main__ import main\n"
    code += "try:\n    main()\nfinally:\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "go on with this session" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded.isdisjoint({"trio", "httpx", "hypercorn", "quart", "pydantic", "structlog", "service.settings"})


# Sessions


def test_sessions_are_listed_in_pages_and_searched(server: Served, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        server.post("/sessions", {"id": f"walrus-{number}", "title": f"A walrus\u202e {number}"})
    url = ["--url", server.url]
    assert main(["sessions", "walrus", *url, "--limit", "2"]) == 0
    rows = [line.split("\t") for line in capfd.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["walrus-2", "walrus-1"]
    assert [row[1:4:2] for row in rows] == [["idle", "0"]] * 2
    assert rows[0][4] == r"A walrus\u202e 2"
    assert main(["sessions", "walrus", *url, "--limit", "1", "--all", "--json"]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [it["id"] for it in found] == ["walrus-2", "walrus-1", "walrus-0"]
    assert main(["sessions", "gnu", *url]) == 0
    assert capfd.readouterr().out == ""


async def test_a_page_of_sessions_on_a_terminal_says_how_to_get_the_next(server: Served, tmp_path: Path) -> None:
    url = ["--url", server.url]
    for name in ("zebra-1", "zebra-2"):
        server.post("/sessions", {"id": name, "title": f"A zebra of {name}"})
    async with open_terminal("sessions", "zebra", *url, "--limit", "1", folder=tmp_path, columns=300) as terminal:
        assert await terminal.ends() == 0
    shown = terminal.screen.text()
    assert "more: lastcall sessions --url" in shown
    assert re.search(r"^zebra-2 +[0-9]+ s +0  A zebra of zebra-2$", shown, re.MULTILINE)
    cursor = re.search(r"--after (\S+) zebra", shown)
    assert cursor
    async with open_terminal(
        "sessions", "zebra", *url, "--after", cursor[1], folder=tmp_path, NO_COLOR="1"
    ) as terminal:
        assert await terminal.ends() == 0
    assert re.search(r"^zebra-1 ", terminal.screen.text(), re.MULTILINE)
    assert "more:" not in terminal.screen.text()
    assert "\x1b[" not in terminal.raw


# On a terminal


async def test_ctrl_c_cancels_the_turn_and_another_one_leaves(server: Served, tmp_path: Path) -> None:
    arguments = ["chat", "--url", server.url, "--session", "stopped", "--model", "endless"]
    async with open_terminal(*arguments, folder=tmp_path) as terminal:
        await terminal.shows(is_asking)
        assert "2004" in terminal.screen.modes
        await terminal.type("Talk\r")
        await terminal.shows("\nYou said")  # and on without an end
        assert server.get("/sessions/stopped")["status"] == "running"
        await terminal.type("\x03")
        await terminal.shows(lambda shown: "cancelled" in shown and is_asking(shown))
        [turn] = server.get("/sessions/stopped/turns")["data"]
        assert (turn["state"], turn["reason"]) == ("cancelled", "requested")
        await terminal.type("\x03")
        assert await terminal.ends() == 130
    assert terminal.screen.text().endswith("lastcall chat --session stopped goes on with this conversation")
    assert "2004" not in terminal.screen.modes


Acts = Callable[[trio.SocketStream, bytes], Awaitable[None]]
"""Answers a request, of which this is what the client has sent up to the end of the head at least."""
_OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: "
_JSON, _EVENTS, _HTML = _OK + b"application/json\r\n", _OK + b"text/event-stream\r\n", _OK + b"text/html\r\n"
_AWAY = b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n<h1>502</h1>"
"""What a proxy says in its server's place."""


@contextlib.asynccontextmanager
async def open_fake(acts: Acts) -> AsyncIterator[str]:
    """A server that is none of ours, and its URL. It closes each connection after its answer."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            received = b""
            while b"\r\n\r\n" not in received:
                if not (data := await stream.receive_some(65536)):
                    return
                received += data
            await acts(stream, received)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


def says(answer: bytes) -> Acts:
    """Answer each request with this."""

    async def act(stream: trio.SocketStream, _: bytes) -> None:
        await stream.send_all(answer)

    return act


def of_no_sessions(acts: Acts) -> Acts:
    """Answer the list of sessions, which is empty, and leave all other requests to these acts."""

    async def act(stream: trio.SocketStream, received: bytes) -> None:
        if received.startswith(b"GET /sessions"):
            await stream.send_all(_JSON + b'\r\n{"data": [], "next": null}')
        else:
            await acts(stream, received)

    return act


class _HangingServer:
    """A server that takes a message and begins to answer, and does not answer the call that cancels the turn."""

    def __init__(self) -> None:
        self.asked_to_cancel = trio.Event()

    async def act(self, stream: trio.SocketStream, received: bytes) -> None:
        if received.startswith(b"POST /chat"):
            begun = {"type": "turn.started", "seq": 1, "session_id": "s", "turn_id": f"turn_{7:032d}", "model": "m"}
            events = (f"data: {json.dumps(it)}\n\n" for it in (begun, {"type": "turn.delta", "seq": 2, "text": "So"}))
            await stream.send_all(_EVENTS + b"\r\n" + "".join(events).encode())
        else:
            self.asked_to_cancel.set()
        await trio.sleep_forever()


async def test_a_second_ctrl_c_leaves_although_the_turn_has_not_ended(tmp_path: Path) -> None:
    hanging = _HangingServer()
    async with (
        open_fake(of_no_sessions(hanging.act)) as url,
        open_terminal("chat", "--url", url, folder=tmp_path) as terminal,
    ):
        await terminal.shows(is_asking)
        await terminal.type("Hi\r")
        await terminal.shows("\nSo")
        await terminal.type("\x03")
        with trio.fail_after(CAP_S):
            await hanging.asked_to_cancel.wait()
        await terminal.type("\x03")
        assert await terminal.ends() == 130


class _LateServer:
    """A server that takes a message and does not answer it, but the same message once it is sent again."""

    def __init__(self) -> None:
        self.taken = trio.Event()
        self.keys: list[bytes] = []
        self.cancelled: list[bytes] = []

    async def act(self, stream: trio.SocketStream, received: bytes) -> None:
        if received.startswith(b"POST /chat"):
            self.keys += re.findall(rb"(?i)\nidempotency-key: (.*)\r", received)
            if len(self.keys) == 1:
                self.taken.set()
            else:
                location = f"Location: /sessions/s/turns/turn_{7:032d}\r\n\r\n"
                await stream.send_all(_EVENTS + location.encode() + b'data: {"type": "turn.started", "seq": 1}\n\n')
            await trio.sleep_forever()
        self.cancelled.append(received.split()[1])
        await stream.send_all(_JSON + b'\r\n{"state": "cancelled"}')


@pytest.mark.parametrize("is_conversation", [False, True], ids=["one message", "a conversation"])
async def test_a_turn_that_no_answer_has_named_is_cancelled_too(tmp_path: Path, is_conversation: bool) -> None:
    late = _LateServer()
    async with open_fake(of_no_sessions(late.act)) as url:
        if is_conversation:
            async with open_terminal("chat", "--url", url, folder=tmp_path) as terminal:
                await terminal.shows(is_asking)
                await terminal.type("Hi\r")
                await late.taken.wait()
                await terminal.type("\x03")
                shown = await terminal.shows(lambda shown: "stopped before" in shown and is_asking(shown))
                assert "\nstopped before the server had answered\n" in shown
                await terminal.type("\x04")
                assert await terminal.ends() == 0
            assert terminal.screen.text().endswith("lastcall chat --session s goes on with this conversation")
        else:
            async with program("-m", "service", "chat", "Hi", "--url", url, folder=tmp_path) as (piped, _):
                await late.taken.wait()
                piped.send_signal(signal.SIGINT)
                assert await piped.wait() == 130
    assert late.cancelled == [b"/sessions/s/turns/turn_%032d/cancel" % 7]
    assert len(late.keys) == 2
    assert len(set(late.keys)) == 1


async def test_a_message_that_no_server_takes_is_given_up_at_once(tmp_path: Path) -> None:
    late = _LateServer()
    async with contextlib.AsyncExitStack() as server:
        url = await server.enter_async_context(open_fake(of_no_sessions(late.act)))
        async with open_terminal("chat", "--url", url, folder=tmp_path, columns=120) as terminal:
            await terminal.shows(is_asking)
            await terminal.type("Hi\r")
            await late.taken.wait()
            await server.aclose()
            await terminal.shows("connection lost: ")
            await terminal.type("\x03")
            await terminal.shows("given up before the server has answered; if it has taken the message, the turn runs")
            await terminal.shows(is_asking)
            await terminal.type("\x04")
            assert await terminal.ends() == 0


async def test_a_terminal_that_is_closed_leaves_the_turn_running(server: Served, tmp_path: Path) -> None:
    arguments = ["chat", "--url", server.url, "--session", "left-alone", "--model", "endless"]
    async with open_terminal(*arguments, folder=tmp_path) as terminal:
        await terminal.shows(is_asking)
        await terminal.type("Talk\r")
        await terminal.shows("\nYou said")
        terminal.process.send_signal(signal.SIGHUP)
        assert await terminal.ends() == 129
    turn = running_turn(server, "left-alone")
    assert turn is not None
    server.post(f"/sessions/left-alone/turns/{turn}/cancel", {})


async def test_a_proxy_without_its_server_is_told(tmp_path: Path) -> None:
    async with (
        open_fake(says(_AWAY)) as url,
        program("-m", "service", "sessions", "--url", url, folder=tmp_path) as (piped, output),
    ):
        await output.until(f"lastcall: no server answers at {url}: the proxy before it says 502\n")
        assert await piped.wait() == 69


async def test_what_answers_and_is_no_lastcall_server_is_told(tmp_path: Path) -> None:
    async with open_fake(says(_HTML + b"\r\n<h1>It works!</h1>")) as url:
        async with program("-m", "service", "sessions", "--url", url, folder=tmp_path) as (piped, output):
            await output.until(f"lastcall: what answers at {url} does not speak as Lastcall does: [^\n]*no JSON.\n")
            assert await piped.wait() == 76
        async with open_terminal("tree", "--url", url, folder=tmp_path, columns=200) as terminal:
            assert await terminal.ends() == 76
        assert terminal.screen.text().endswith("answers no event stream.")


async def test_two_terminals_follow_one_turn_and_another_session_is_another_conversation(
    server: Served, tmp_path: Path
) -> None:
    shared = ["chat", "--url", server.url, "--session", "shared"]
    async with (
        open_terminal(*shared, "--model", "endless", folder=tmp_path) as first,
        open_terminal("chat", "--url", server.url, "--session", "other", folder=tmp_path) as other,
    ):
        await first.shows(is_asking)
        await first.type("Talk to both\r")
        await first.shows("\nYou said")
        async with open_terminal(*shared, folder=tmp_path) as second:
            await second.shows("> Talk to both\nYou said")
            await second.type("\x03")
            await second.shows(lambda shown: "cancelled" in shown and is_asking(shown))
            await first.shows("cancelled")
            await second.type("\x1b[A")  # the message before, to change it
            await second.shows("\n> Talk to both")
            await second.type("\x15\x04")
            assert await second.ends() == 0
        await other.shows(is_asking)
        await other.type("Hi\r")
        shown = await other.shows(lambda shown: ENDED.search(shown) is not None)
        assert SAID.format("Hi") in one_line(shown)
        assert "both" not in shown


async def test_a_hostile_reply_does_nothing_to_the_terminal(server: Served, tmp_path: Path) -> None:
    async with open_terminal("chat", "--url", server.url, "--model", "hostile", folder=tmp_path) as terminal:
        await terminal.shows(is_asking)
        await terminal.type(
            "\x1b[200~pasted\r\x1b[31m\x1b[201~\r"
        )  # the screen fails at a sequence that it does not know
        shown = await terminal.shows("completed")
        assert r"\x1b]52;c;ZXZpbA==\x07\x1b]0;title\x1b" in shown
        assert "31" not in terminal.screen.styles
        assert "end\n        tab 世界 é" in shown
        await terminal.type("\x04")
        assert await terminal.ends() == 0


async def test_a_message_of_wide_characters_is_drawn_anew_when_the_size_changes(server: Served, tmp_path: Path) -> None:
    async with open_terminal("chat", "--url", server.url, folder=tmp_path, columns=20) as terminal:
        await terminal.shows(is_asking)
        await terminal.type("世界 in a message of two rows")
        await terminal.shows("> 世界 in a message\n of two rows")
        terminal.resize(60, 24)
        await terminal.shows("> 世界 in a message of two rows")
        await terminal.type("\x01\x1b[C\x1b[C\x17")  # deletes the word before the third place
        await terminal.shows(">  in a message of two rows")
        await terminal.type("\x03\x04")
        assert await terminal.ends() == 0


async def test_a_lost_connection_is_told_and_the_reply_goes_on_where_it_was(server: Served, tmp_path: Path) -> None:
    async with open_cutting_proxy(server.port, cut_after_seq=9) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        async with open_terminal("chat", "--url", url, folder=tmp_path, columns=50) as terminal:
            await terminal.shows(is_asking)
            await terminal.type("What is a nursery?\r")
            await terminal.shows("connection lost: ")
            shown = await terminal.shows(lambda it: "connection lost, and resumed (1)" in one_line(it))
            assert f"> What is a nursery?{SAID.format('What is a nursery?')}completed" in one_line(shown)
            await terminal.type("\x04")
            assert await terminal.ends() == 0


async def test_a_reply_goes_on_after_a_restart_of_the_server_and_nothing_is_lost_or_doubled(
    tmp_path: Path, port: int
) -> None:
    async with open_model() as model:
        settings = {"model_url": model.url, "model": "example", "drain_timeout_s": "0"}
        settings |= {"model_continuation": "trailing"}
        url = ["--url", f"127.0.0.1:{port}"]
        with serving(tmp_path, settings, port=port) as server:
            async with (
                open_terminal("chat", *url, "--session", "seen", folder=tmp_path) as terminal,
                program("-m", "service", "chat", "Count", *url, "--session", "piped", folder=tmp_path) as (
                    piped,
                    output,
                ),
            ):
                await terminal.shows(is_asking)
                await terminal.type("Count\r")
                for _ in range(2):
                    await (await model.asked("Count")).say("one-two-three-\nfour-five-", "six-")
                await terminal.shows("\nfour-five-six-")
                await output.until("one-two-three-\n")
                server.process.send_signal(signal.SIGTERM)
                await terminal.shows("connection lost: ")
                await output.until("lastcall: connection lost [^\n]*\n")
                assert server.process.wait(timeout=CAP_S) == 0
                with serving(tmp_path, settings, port=port) as again:
                    for _ in range(2):
                        reply = await model.asked("six-")  # the text so far, to be gone on with
                        await reply.say("seven")
                        await reply.end()
                    shown = await terminal.shows("connection lost, and resumed (1)")
                    assert "\n> Count\none-two-three-\nfour-five-six-seven\ncompleted" in shown
                    last = await output.until("lastcall: the server is back, and the reply goes on\n.*seven\n")
                    assert last.endswith("goes on\nfour-five-six-seven\n")
                    assert await piped.wait() == 0
                    texts = [again.get(f"/sessions/{it}/turns")["data"][0]["text"] for it in ("seen", "piped")]
                    assert texts == ["one-two-three-\nfour-five-six-seven"] * 2


# The tree


def begin_endless(server: Served, *sessions: str) -> list[str]:
    """Begin a turn without an end in each of these new sessions, and return their ids."""
    turns = []
    for session in sessions:
        server.post("/sessions", {"id": session, "model": "endless"})
        turns.append(server.post(f"/sessions/{session}/turns", {"input": "Go", "background": True})["id"])
    return turns


async def test_a_live_tree_shows_sessions_and_turns_and_a_cancelled_turn_leaves_it(
    server: Served, tmp_path: Path
) -> None:
    turns = begin_endless(server, "oak", "elm")
    names = ("worker ", "session oak", "session elm", f"turn {turns[0]}  running", f"turn {turns[1]}", "q leaves")
    command = ["tree", "--url", server.url]
    async with open_terminal(*command, folder=tmp_path, columns=150, rows=60, LASTCALL_API_KEY=ADMIN_KEY) as terminal:
        for name in names:
            await terminal.shows(name)
        server.post(f"/sessions/oak/turns/{turns[0]}/cancel", {})
        await terminal.shows(lambda shown: "session oak" not in shown and turns[0] not in shown)
        assert f"turn {turns[1]}" in await terminal.shows("session elm")
        terminal.resize(60, 8)
        await terminal.shows("lines 1 to 7 of ")
        await terminal.type("\x1b[B\x1b[B")
        await terminal.shows("lines 3 to 9 of ")
        await terminal.type("q")
        assert await terminal.ends() == 0
    server.post(f"/sessions/elm/turns/{turns[1]}/cancel", {})
    assert terminal.screen.modes >= {"7", "25"}  # lines are broken again, and the cursor is seen
    assert "1049" not in terminal.screen.modes


async def test_ctrl_z_gives_the_terminal_back_until_the_tree_goes_on(server: Served, tmp_path: Path) -> None:
    command = ["tree", "--url", server.url]
    async with open_terminal(*command, folder=tmp_path, columns=150, LASTCALL_API_KEY=ADMIN_KEY) as terminal:
        await terminal.shows("q leaves")
        for _ in range(2):
            assert "1049" in terminal.screen.modes
            await terminal.type("\x1a")
            wait_stopped = partial(os.waitid, os.P_PID, terminal.process.pid, os.WSTOPPED)
            assert await trio.to_thread.run_sync(wait_stopped) is not None
            await terminal.shows(lambda _: "1049" not in terminal.screen.modes)
            assert terminal.screen.modes >= {"7", "25"}
            assert terminal.is_echoing()
            terminal.process.send_signal(signal.SIGCONT)
            await terminal.shows(lambda shown: "1049" in terminal.screen.modes and "q leaves" in shown)
        assert not terminal.is_echoing()
        await terminal.type("q")
        assert await terminal.ends() == 0


async def test_a_tree_that_no_keys_reach_is_drawn_once(server: Served, tmp_path: Path) -> None:
    command = ["tree", "--url", server.url]
    async with open_terminal(*command, folder=tmp_path, has_keys=False, LASTCALL_API_KEY=ADMIN_KEY) as terminal:
        assert await terminal.ends() == 0
    assert terminal.screen.text().startswith("worker ")
    assert "1049" not in terminal.screen.modes
    assert "Traceback" not in terminal.raw


def test_a_tree_in_a_pipe_is_drawn_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASTCALL_API_KEY", ADMIN_KEY)
    with serving(tmp_path, {}, config=CONFIG) as server:  # of which no look before shares its snapshot with this one
        [turn] = begin_endless(server, "ash")
        assert main(["tree", "--url", server.url]) == 0
        drawn = capfd.readouterr().out.splitlines()
        [at] = [number for number, line in enumerate(drawn) if line.endswith("─ session ash")]
        assert drawn[at + 1].partition("─ ")[2].startswith(f"turn {turn}  running · endless · event ")
        assert not any(line.endswith("─ cancel scope") for line in drawn)
        assert main(["tree", "--url", server.url, "--all"]) == 0
        assert "─ cancel scope" in capfd.readouterr().out
        assert main(["tree", "--url", server.url, "--json"]) == 0
        nodes = json.loads(capfd.readouterr().out)["nodes"]
        assert [it["session"] for it in nodes if it.get("turn") == turn] == ["ash"]


async def test_a_tree_with_too_many_viewers_is_refused_for_the_moment(server: Served, tmp_path: Path) -> None:
    url = f"{server.url}/admin/tree/events?nodes=10&interval_ms=5000"
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(trust_env=False, timeout=CAP_S) as http, contextlib.AsyncExitStack() as viewers:
        following = 0
        while following < VIEWERS_MAX:
            answer = await viewers.enter_async_context(http.stream("GET", url, headers=headers))
            following += answer.status_code == 200
            if answer.status_code != 200:
                await trio.sleep(0.1)  # a viewer of the test before is not gone yet
        command = ["tree", "--url", server.url]
        async with open_terminal(*command, folder=tmp_path, columns=200, LASTCALL_API_KEY=ADMIN_KEY) as terminal:
            assert await terminal.ends() == 75
    shown = terminal.screen.text()
    assert shown.startswith(f"lastcall: {server.url} refuses for the moment: 16 viewers follow the tree already")


async def test_a_tree_whose_server_is_drained_says_so_and_shows_the_next_one(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASTCALL_API_KEY", ADMIN_KEY)
    settings = {"model_url": "scripted:"}
    with serving(tmp_path, settings, port=port) as server:
        command = ["tree", "--url", server.url]
        async with open_terminal(*command, folder=tmp_path, columns=150, LASTCALL_API_KEY=ADMIN_KEY) as terminal:
            await terminal.shows(f"worker {server.process.pid} · serving")
            await terminal.shows("q leaves")
            drained = ["-m", "service", "drain", "--wait", "--url", server.url]
            async with program(*drained, folder=tmp_path) as (drain, output):
                await output.until("The server at .* drains; it stops as at SIGTERM: .*gone after [0-9.]+ s\n")
                assert await drain.wait() == 0
            assert server.process.wait(timeout=CAP_S) == 0
            await terminal.shows("old, because no server answers at")
            with serving(tmp_path, settings, port=port) as again:
                serving_again = f"worker {again.process.pid} · serving"
                await terminal.shows(lambda shown: serving_again in shown and "old, because" not in shown)
                await terminal.type("\x1c")  # Ctrl+\
                assert await terminal.ends() == 131


async def test_a_drain_that_is_waited_for_ends_once_no_worker_takes_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASTCALL_API_KEY", ADMIN_KEY)
    (tmp_path / "lastcall.toml").write_text(API_KEYS + CONFIG)
    env = {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_STORE_URL": f"sqlite:{tmp_path}/lastcall.db"}
    env |= {"LASTCALL_DRAIN_TIMEOUT_S": "1", "LASTCALL_RELEASE_TIMEOUT_S": "30"}  # on a busy machine, too
    launch = Launch(python_command("-m", "service", "serve", "--workers", "2"), env=env, workers=2, folder=tmp_path)
    async with open_server(launch, log_path=tmp_path / "server.log", start_timeout_s=CAP_S) as server:
        workers = await server.wait_workers(2)
        url = f"http://127.0.0.1:{server.port}"
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=CAP_S, trust_env=False) as http:
            # A turn without an end: the drain lasts, and the server takes clients until it is over.
            (await http.post("/sessions", json={"id": "oak", "model": "endless"})).raise_for_status()
            begun = {"input": "Go", "background": True}
            (await http.post("/sessions/oak/turns", json=begun)).raise_for_status()
        async with program("-m", "service", "drain", "--wait", "--url", url, folder=tmp_path) as (drain, output):
            await output.until("The server at .* drains; 2 processes stop as at SIGTERM: .*gone after [0-9.]+ s\n")
            assert await drain.wait() == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port)).close()
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code == 0
    assert not any(map(lives, workers))


class _DrainedServer:
    """A server that drains, and cuts each connection that asks for its workers, or whose proxy then says 502."""

    def __init__(self, *, has_proxy: bool) -> None:
        self._has_proxy = has_proxy
        self.has_cut_two = trio.Event()
        self.cut: int | None = None

    async def serve(self, stream: trio.SocketStream) -> None:
        received = b""
        async with stream:
            while not received.endswith(b"{}" if received.startswith(b"POST") else b"\r\n\r\n"):
                data = await stream.receive_some(65536)
                if not data:
                    return
                received += data
            if received.startswith(b"POST"):
                self.cut = 0
                answer: dict[str, Any] = {"workers": 2, "bounds_s": {"draining": 2, "total": CAP_S}}
            elif self.cut is None:
                answer = {"workers": [{"pid": 7, "started_at": "2026-01-31T09:30:00Z"}]}
            else:
                self.cut += 1
                if self.cut == 2:
                    self.has_cut_two.set()
                if self._has_proxy:
                    await stream.send_all(_AWAY)
                return
            await stream.send_all(_JSON + b"\r\n" + json.dumps(answer).encode())


@pytest.mark.parametrize("gone", ["refused", "tunnel", "proxy"])
async def test_a_drain_that_is_waited_for_takes_no_cut_connection_for_its_end(tmp_path: Path, gone: str) -> None:
    is_refused = gone == "refused"
    drained = _DrainedServer(has_proxy=gone == "proxy")
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
    async with program("-m", "service", "drain", "--wait", "--url", url, folder=tmp_path) as (drain, output):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, drained.serve, [listener])
            with trio.fail_after(CAP_S):
                await drained.has_cut_two.wait()
            if not is_refused:
                await output.until("gone after [0-9.]+ s\n")
                assert drained.cut == 10
            nursery.cancel_scope.cancel()  # which closes the listener
        if is_refused:
            await output.until("gone after [0-9.]+ s\n")
        assert await drain.wait() == 0


def lives(pid: int) -> bool:
    """Whether there is such a process."""
    return Path(f"/proc/{pid}").exists()


# Without a server


def test_the_server_is_the_one_that_the_settings_bind(tmp_path: Path) -> None:
    def url(text: str = "", **environ: str) -> str:
        (tmp_path / "lastcall.toml").write_text(text)
        return read_target(environ={f"LASTCALL_{name}": value for name, value in environ.items()}).shown

    bind = Settings.model_fields["bind"].default
    assert url() == f"http://{bind}"
    assert url('bind = "0.0.0.0:81"') == "http://127.0.0.1:81"
    assert url('bind = "[::]:81"\ntls_certfile = "x"') == "https://[::1]:81"
    assert url('bind = "0.0.0.0:81"', BIND="host:82") == "http://host:82"
    assert url(BIND="unix:/run/lastcall.sock") == "unix:/run/lastcall.sock"
    assert url(BIND="host:82", URL="https://example.com/ai/") == "https://example.com/ai"
    for text in ("bind = 1", 'bind = "127.0.0.1:0"', "bind ="):
        with pytest.raises(ClientSettingsError, match="use --url"):
            url(text)


def test_a_server_takes_no_client_s_key_for_its_own() -> None:
    assert read_sources({"LASTCALL_URL": "http://host", "LASTCALL_API_KEY": ""}).settings() == Settings()
    with pytest.raises(SettingsError, match="LASTCALL_API_KEY: is what clients send; the keys"):
        read_sources({"LASTCALL_API_KEY": "a-key-of-a-client"}).settings()
    both = {"LASTCALL_API_KEY": "a-key-of-a-client", "LASTCALL_API_KEYS": "a-key-of-the-server"}
    assert len(read_sources(both).settings().api_keys) == 1
