"""The examples do what they say: the programs as processes, the pages in a real browser, against a real server."""

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from bench.server_process import Launch, ServerProcess, open_server, python_command
from tests.clients.surroundings import open_cutting_proxy
from tests.docs import browser
from tests.docs.blocks import ROOT
from tests.docs.browser import CAP_S, Browser, Page, open_browser
from tests.upstreams.raw_server import DONE, Connection, delta, finish, open_raw_server

EXAMPLES = ROOT / "examples"
LAST = "document.querySelector('.turn:last-child')"
REPLY = f"({LAST}?.querySelector('.reply').textContent ?? '')"
STATE = f"{LAST}?.dataset.state"
STATUS = "document.getElementById('status').textContent"


class Reply:
    """A reply whose text the test decides. ``question`` is the last message that the model was sent."""

    def __init__(self, connection: Connection, question: str) -> None:
        self.question = question
        self._connection = connection

    async def say(self, *tokens: str) -> None:
        for token in tokens:
            await self._connection.send_event(delta(token))

    async def end(self) -> None:
        await self._connection.send_last_events(finish(), DONE)


class Model:
    """A model server whose replies the test decides, so that no test depends on the time of a token."""

    def __init__(self, url: str, replies: trio.MemoryReceiveChannel[Reply]) -> None:
        self.url = url
        self._replies = replies

    async def asked(self, question: str) -> Reply:
        """The reply to the next question, which ends in this text: unanswered questions are sent again in front."""
        with trio.fail_after(CAP_S):
            reply = await self._replies.receive()
        assert reply.question.endswith(question)
        return reply


@asynccontextmanager
async def open_model() -> AsyncIterator[Model]:
    begun, replies = trio.open_memory_channel[Reply](10)

    async def answer(connection: Connection) -> None:
        messages: Any = (await connection.receive_request()).json["messages"]
        await connection.send_head(headers={"connection": "close"})
        await begun.send(Reply(connection, messages[-1]["content"]))
        await connection.wait_closed()

    async with open_raw_server(answer) as server:
        yield Model(server.url, replies)


@asynccontextmanager
async def serving(
    folder: Path, model_url: str, *, origin: str = "", port: int = 0, live_turns_max: int = 1000, goes_on: bool = False
) -> AsyncIterator[ServerProcess]:
    """Run a server that the pages of this origin may call. It stops at once, and keeps its sessions in this folder."""
    env = {"LASTCALL_BIND": f"127.0.0.1:{port}", "LASTCALL_STORE_URL": f"sqlite:{folder}/lastcall.db"}
    env |= {"LASTCALL_MODEL_URL": model_url, "LASTCALL_MODEL": "example", "LASTCALL_DRAIN_TIMEOUT_S": "0"}
    env |= {"LASTCALL_CORS_ORIGINS": origin} if origin else {}
    env |= {"LASTCALL_LIVE_TURNS_MAX": str(live_turns_max)}
    env |= {"LASTCALL_ON_INTERRUPT": "continue", "LASTCALL_MODEL_CONTINUATION": "trailing"} if goes_on else {}
    launch = Launch(python_command("-m", "service", "serve"), env=env)
    async with open_server(launch, log_path=folder / f"server-{time.monotonic_ns()}.log", start_timeout_s=60) as server:
        yield server


async def stopped(server: ServerProcess, number: int) -> None:
    """Signal a server and wait until it is gone."""
    server.signal_main(number)
    with trio.fail_after(CAP_S):
        await server.wait_gone()


@asynccontextmanager
async def program(*arguments: str, folder: Path = EXAMPLES) -> AsyncIterator[tuple[trio.Process, "Output"]]:
    """Run a Python program, and collect its output; the program is killed on leaving."""
    pipe = subprocess.PIPE
    command = python_command("-u", *arguments)
    process = await trio.lowlevel.open_process(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, cwd=folder)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        async with process.stdin, process.stdout:
            yield process, Output(process.stdout)
    finally:
        process.kill()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CAP_S):
            await process.wait()


class Output:
    """The output of a program so far."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self.text = ""
        self._stream = stream

    async def until(self, pattern: str) -> str:
        """Read on until a pattern is there; return the text up to its end. Later calls search after this text."""
        with trio.move_on_after(CAP_S):
            while True:
                if found := re.search(pattern, self.text, re.DOTALL):
                    self.text = self.text[found.end() :]
                    return found[0]
                if not (data := await self._stream.receive_some()):
                    break
                self.text += data.decode()
        raise AssertionError(f"{pattern!r} never came, but {self.text!r}")


async def turns(port: int, session_id: str) -> list[dict[str, Any]]:
    """The turns of a session in the server."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=CAP_S) as client:
        response = await client.get(f"/sessions/{session_id}/turns")
        data: list[dict[str, Any]] = response.json()["data"]
        return data


# Pages


class Chat:
    """The chat page in a tab."""

    def __init__(self, page: Page) -> None:
        self.page = page

    async def session_id(self) -> str:
        found: str = await self.page.get("location.hash.slice(1)")
        return found

    async def send(self, text: str) -> None:
        await self.page.type_in("#message", text)
        await self.page.click("#send")

    async def press(self, button: str) -> None:
        """Press a button of the last turn."""
        place = {"Retry": "first", "Edit": "last"}[button]
        await self.page.click(f".turn:last-child button:{place}-of-type")

    async def shows(self, reply: str, state: str = "running") -> None:
        """Return once the last turn has this reply and this state, and the page shows no other message."""
        await self.page.wait_for(f"{REPLY} === {json.dumps(reply)} && {STATE} === {json.dumps(state)}")
        if state != "running":
            await self.page.wait_for("!document.getElementById('send').disabled")

    async def says(self, status: str) -> None:
        await self.page.wait_for(f"{STATUS} === {json.dumps(status)}")

    async def text_of(self, part: str) -> list[str]:
        """The texts of this part of all turns on the page."""
        selector = json.dumps(f".turn .{part}")
        found: list[str] = await self.page.get(
            f"[...document.querySelectorAll({selector})].map((it) => it.textContent)"
        )
        return found


class Examples:
    """A browser, and the origin that has the pages of examples/."""

    def __init__(self, browser: Browser, origin: str) -> None:
        self.browser = browser
        self.origin = origin

    async def open_page(self, name: str, port: int, session: str = "") -> Page:
        return await self.browser.new_page(f"{self.origin}/{name}?server=http://127.0.0.1:{port}{session}")

    async def open_chat(self, port: int, session: str = "") -> Chat:
        """The chat page, ready to send. Without the id of a session it makes one."""
        page = await self.open_page("chat.html", port, session)
        await page.wait_for("!document.getElementById('send').disabled")
        return Chat(page)


@asynccontextmanager
async def open_examples(folder: Path) -> AsyncIterator[Examples]:
    """A browser and the pages, served as examples/README.md says."""
    arguments = ("-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(EXAMPLES))
    async with open_browser(folder) as chromium, program(*arguments) as (_, output):
        said = await output.until(r"\(http://127\.0\.0\.1:\d+/\)")
        yield Examples(chromium, said.strip("()/"))


@asynccontextmanager
async def open_all(folder: Path, *, live_turns_max: int = 1000) -> AsyncIterator[tuple[Examples, Model, ServerProcess]]:
    async with (
        open_examples(folder) as examples,
        open_model() as model,
        serving(folder, model.url, origin=examples.origin, live_turns_max=live_turns_max) as server,
    ):
        yield examples, model, server


def assert_quiet(*pages: Page, but: str | None = None) -> None:
    """Check that the pages complained only of failed requests of this kind, which the browser reports by itself."""
    complaints = [it for page in pages for it in page.complaints]
    assert [it for it in complaints if but is None or not re.fullmatch(f"Failed to load resource: (?:{but})", it)] == []


async def test_a_message_streams_its_reply_and_html_in_it_stays_text(tmp_path: Path) -> None:
    hostile = "<script>window.harmed=1</script><img src=x onerror='window.harmed=1'>"
    async with open_all(tmp_path) as (examples, model, server):
        chat = await examples.open_chat(server.port)
        await chat.send("Hello")
        reply = await model.asked("Hello")
        await reply.say("Good ")
        await chat.shows("Good ")
        await reply.say("day\u2028 \N{GRINNING FACE}\n")
        await chat.shows("Good day\u2028 \N{GRINNING FACE}\n")
        await reply.end()
        await chat.shows("Good day\u2028 \N{GRINNING FACE}\n", "completed")

        await chat.send(hostile)
        reply = await model.asked(hostile)
        await reply.say(hostile, *hostile)
        await reply.end()
        await chat.shows(2 * hostile, "completed")
        assert await chat.text_of("input") == ["Hello", hostile]
        assert await chat.page.get("document.querySelectorAll('main script, main img').length") == 0
        assert await chat.page.get("window.harmed") is None
        assert await chat.page.get("document.getElementById('message').value") == ""
        assert_quiet(chat.page)


async def test_a_reply_is_stopped_retried_and_its_question_edited(tmp_path: Path) -> None:
    async with open_all(tmp_path) as (examples, model, server):
        chat = await examples.open_chat(server.port)

        async def stop(question: str, said: str) -> None:
            reply = await model.asked(question)
            await reply.say(said)
            await chat.shows(said)
            await chat.page.click("#stop")
            await chat.shows(said, "cancelled")
            assert (await chat.text_of("end"))[-1] == "Stopped."

        await chat.send("first")
        await stop("first", "one")
        await chat.send("second")
        await stop("second", "two")
        await chat.press("Retry")
        await stop("second", "three")
        await chat.press("Edit")
        assert await chat.page.get("document.getElementById('message').value") == "second"
        await chat.send("another")
        await stop("another", "four")
        assert await chat.text_of("input") == ["first", "another"]

        had = await turns(server.port, await chat.session_id())
        assert [turn["input"] for turn in had] == ["first", "second", "second", "another"]
        assert [turn["parent"] for turn in had] == [None, had[0]["id"], had[0]["id"], had[0]["id"]]
        assert [turn["text"] for turn in had] == ["one", "two", "three", "four"]
        assert_quiet(chat.page)


async def test_a_reload_in_mid_stream_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    async with open_all(tmp_path) as (examples, model, server):
        chat = await examples.open_chat(server.port)
        await chat.send("Count")
        reply = await model.asked("Count")
        said = ""
        for number in range(3):
            await reply.say(f"{number} ", "and ")
            said += f"{number} and "
            await chat.shows(said)
            await chat.page.reload()
        await chat.shows(said)
        await reply.end()
        await chat.shows(said, "completed")
        assert [turn["state"] for turn in await turns(server.port, await chat.session_id())] == ["completed"]
        assert_quiet(chat.page)


@pytest.mark.parametrize("name", ["chat.html", "eventsource.html"])
async def test_a_cut_connection_is_resumed_without_loss_and_without_doubling(tmp_path: Path, name: str) -> None:
    reply_text = "document.querySelector('#reply, .turn:last-child .reply')?.textContent"
    async with (
        open_all(tmp_path) as (examples, model, server),
        open_cutting_proxy(server.port, cut_after_seq=3) as proxy,
    ):
        page = await examples.open_page(name, proxy.port)
        await page.wait_for("!document.querySelector('form button').disabled")
        await page.type_in("#message", "Count")
        await page.click("form button")
        reply = await model.asked("Count")
        await reply.say("1 ")
        await page.wait_for(f"{reply_text} === '1 '")
        await reply.say("2 ", "3 ")
        await page.wait_for(f"{reply_text} === '1 2 3 '")
        await reply.say("4 ")
        await page.wait_for(f"{reply_text} === '1 2 3 4 '")
        await reply.end()
        await page.wait_for(f"{STATUS} === 'completed' || {STATE} === 'completed'")
        assert await page.get(reply_text) == "1 2 3 4 "
        assert any(b"last-event-id: " in request.lower() for request in proxy.requests)
        assert_quiet(page, but="net::ERR_.*")


async def test_a_message_whose_answer_is_lost_is_not_sent_twice(tmp_path: Path) -> None:
    async with open_all(tmp_path) as (examples, model, server):
        chat = await examples.open_chat(server.port)
        await chat.page.hold_answers("*/turns")
        await chat.send("Count")
        with trio.fail_after(CAP_S):
            await chat.page.lose_held_answer("POST")
        reply = await model.asked("Count")
        await reply.say("1 2 3")
        await chat.shows("1 2 3")
        await reply.end()
        await chat.shows("1 2 3", "completed")
        assert len(await turns(server.port, await chat.session_id())) == 1
        assert_quiet(chat.page, but="net::ERR_.*")


async def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    async with open_all(tmp_path, live_turns_max=1) as (examples, model, server):
        first, second = await examples.open_chat(server.port), await examples.open_chat(server.port)
        await first.send("Mine")
        reply = await model.asked("Mine")
        await second.send("Yours")
        await second.says(AWAY)
        await reply.end()
        await first.shows("", "completed")
        await (await model.asked("Yours")).end()
        await second.shows("", "completed")
        await second.says("")
        assert_quiet(first.page, second.page, but=r"the server responded with a status of 503 \(\)")


AWAY = "The server is away or busy. Trying again…"


async def test_a_stop_in_mid_stream_is_shown_and_a_retry_waits_for_the_next_server(tmp_path: Path, port: int) -> None:
    async with open_examples(tmp_path) as examples, open_model() as model:
        async with serving(tmp_path, model.url, origin=examples.origin, port=port) as server:
            chat = await examples.open_chat(server.port)
            await chat.send("Count")
            await (await model.asked("Count")).say("1 2 ")
            await chat.shows("1 2 ")
            await stopped(server, signal.SIGTERM)
            await chat.shows("1 2 ", "interrupted")
            assert await chat.text_of("end") == ["The server was stopped before the end of the reply."]
            await chat.press("Retry")
            await chat.says(AWAY)
        async with serving(tmp_path, model.url, origin=examples.origin, port=port):
            reply = await model.asked("Count")
            await reply.say("1 2 3")
            await reply.end()
            await chat.shows("1 2 3", "completed")
            await chat.says("")
            had = await turns(server.port, await chat.session_id())
            assert [(turn["state"], turn["parent"]) for turn in had] == [("interrupted", None), ("completed", None)]
            assert_quiet(chat.page, but="net::ERR_.*")


WAVES = "\N{WAVING HAND SIGN}" * 20


@pytest.mark.parametrize("name", ["chat.html", "eventsource.html"])
async def test_a_reply_goes_on_in_the_page_after_stops(tmp_path: Path, name: str, port: int) -> None:
    """First a text that is too short to be continued begins anew; then a longer one goes on, twice."""
    reply_text = "document.querySelector('#reply, .turn:last-child .reply')?.textContent"
    async with open_examples(tmp_path) as examples, open_model() as model:
        serve = partial(serving, tmp_path, model.url, origin=examples.origin, goes_on=True, port=port)
        async with serve() as server:
            page = await examples.open_page(name, server.port)
            await page.wait_for("!document.querySelector('form button').disabled")
            await page.type_in("#message", "Count")
            await page.click("form button")
            await (await model.asked("Count")).say("1 2 ")
            await page.wait_for(f"{reply_text} === '1 2 '")
            await stopped(server, signal.SIGTERM)
        async with serve() as again:
            await (await model.asked("Count")).say(WAVES, " and ")
            await page.wait_for(f"{reply_text} === '{WAVES} and '")
            await stopped(again, signal.SIGTERM)
        async with serve():
            reply = await model.asked(f"{WAVES} and")
            await reply.say(" more")
            await reply.end()
            await page.wait_for(f"{reply_text} === '{WAVES} and more'")
            await page.wait_for(f"{STATUS} === 'completed' || {STATE} === 'completed'")
            assert_quiet(page, but="net::ERR_.*")


async def test_a_text_is_cut_by_code_points(tmp_path: Path) -> None:
    async with open_all(tmp_path) as (examples, _, server):
        page = await examples.open_page("eventsource.html", server.port)
        await page.get(
            "import('./small_client.js').then(({ textAfter }) => document.title = "
            "textAfter('\N{WAVING HAND SIGN}a\N{WAVING HAND SIGN}b', { type: 'turn.resumed', text_length: 3 })), 0"
        )
        await page.wait_for("document.title === '\N{WAVING HAND SIGN}a\N{WAVING HAND SIGN}'")
        assert_quiet(page)


async def test_after_a_crash_in_mid_stream_the_page_shows_the_stored_reply(tmp_path: Path, port: int) -> None:
    async with open_examples(tmp_path) as examples, open_model() as model:
        async with serving(tmp_path, model.url, origin=examples.origin, port=port) as server:
            chat = await examples.open_chat(server.port)
            await chat.send("Count")
            await (await model.asked("Count")).say("1 2 ")
            await chat.shows("1 2 ")
            await stopped(server, signal.SIGKILL)
            await chat.says(AWAY)
        async with serving(tmp_path, model.url, origin=examples.origin, port=port):
            await chat.page.wait_for(f"{STATE} === 'interrupted'")
            [turn] = await turns(server.port, await chat.session_id())
            await chat.shows(turn["text"], "interrupted")
            assert await chat.text_of("end") == ["The server crashed before the end of the reply."]
            await chat.says("")
            assert_quiet(chat.page, but=r"net::ERR_.*|the server responded with a status of 410 \(\)")


async def test_two_tabs_show_one_conversation(tmp_path: Path) -> None:
    async with open_all(tmp_path) as (examples, model, server):
        first = await examples.open_chat(server.port)
        session_id = await first.session_id()
        second = await examples.open_chat(server.port, f"#{session_id}")
        await first.send("Count")
        reply = await model.asked("Count")
        await reply.say("1 ")
        for tab in (first, second):
            await tab.shows("1 ")
        await reply.say("2")
        await reply.end()
        for tab in (first, second):
            await tab.shows("1 2", "completed")
        assert_quiet(first.page, second.page)

        url = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(base_url=url, timeout=CAP_S) as client:  # a tab on another machine
            body = {"input": "elsewhere", "background": True}
            assert (await client.post(f"/sessions/{session_id}/turns", json=body)).status_code == 202
        reply = await model.asked("elsewhere")
        # This message is refused, because the other turn runs: the page shows that turn, and keeps the message.
        await second.send("mine")
        await reply.say("was first")
        await second.shows("was first")
        assert await second.page.get("document.getElementById('message').value") == "mine"
        await reply.end()
        await second.shows("was first", "completed")
        await second.page.click("#send")
        await (await model.asked("mine")).end()
        await second.shows("", "completed")
        assert await second.text_of("input") == ["Count", "elsewhere", "mine"]
        assert_quiet(first.page, second.page, but=r"the server responded with a status of 409 \(\)")


async def test_an_event_source_comes_back_after_a_crash(tmp_path: Path, port: int) -> None:
    reply_text = "document.getElementById('reply').textContent"
    async with open_examples(tmp_path) as examples, open_model() as model:
        async with serving(tmp_path, model.url, origin=examples.origin, port=port) as server:
            page = await examples.open_page("eventsource.html", server.port)
            await page.type_in("#message", "Count")
            await page.click("button")
            await (await model.asked("Count")).say("1 2 ")
            await page.wait_for(f"{reply_text} === '1 2 '")
            await stopped(server, signal.SIGKILL)
            await page.wait_for(f"{STATUS} === 'waiting for the server'")
        async with serving(tmp_path, model.url, origin=examples.origin, port=port):
            await page.wait_for(f"{STATUS} === 'interrupted'")
            await page.click("button")
            reply = await model.asked("Count")
            await reply.say("1 2 3")
            await page.wait_for(f"{reply_text} === '1 2 3' && {STATUS} === 'running'")
            await reply.end()
            await page.wait_for(f"{reply_text} === '1 2 3' && {STATUS} === 'completed'")
            assert_quiet(page, but=r"net::ERR_.*|the server responded with a status of 410 \(\)")


EXAMPLE_FILES = [path.read_text() for path in EXAMPLES.iterdir() if path.suffix in {".js", ".py"}]
SNIPPETS = re.findall(r"(?ms)^```(?:js|python)\n(.*?)^```$", (ROOT / "docs/client-guide.md").read_text())


def test_each_snippet_of_the_guide_is_a_part_of_an_example() -> None:
    assert len(SNIPPETS) >= 8
    for snippet in SNIPPETS:
        assert any(snippet in text for text in EXAMPLE_FILES), snippet


def test_ci_fails_where_there_is_no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        browser.chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no Chromium here"):
        browser.chromium()


# Programs


async def test_the_terminal_chat_streams_resumes_stops_at_ctrl_c_and_survives_a_crash(
    tmp_path: Path, port: int
) -> None:
    trouble = r"\[the server does not answer; trying again\]\n"
    async with open_model() as model, contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(tmp_path, model.url, port=port))
        proxy = await stack.enter_async_context(open_cutting_proxy(server.port, cut_after_seq=3))
        arguments = ("-m", "examples.chat", f"http://127.0.0.1:{proxy.port}", "me")
        chat, output = await stack.enter_async_context(program(*arguments, folder=ROOT))
        assert chat.stdin is not None
        await chat.stdin.send_all(b"Hello\nCount\nAgain\n")
        reply = await model.asked("Hello")
        await reply.say("Good ")
        await output.until("^Good ")
        await reply.say("day\u2028")  # the connection is cut here
        await output.until(f"^day\u2028{trouble}")
        await reply.say(".")
        await reply.end()
        await output.until(r"^\.\n")

        await (await model.asked("Count")).say("1 2 ")
        await output.until("^1 2 ")
        chat.send_signal(signal.SIGINT)
        await output.until(r"^\n\[turn\.cancelled requested\]\n")

        await (await model.asked("Again")).say("1 2 ")
        await output.until("^1 2 ")
        await stopped(server, signal.SIGKILL)
        await output.until(f"^{trouble}")
        await stack.enter_async_context(serving(tmp_path, model.url, port=port))
        await output.until(r"\[turn\.interrupted crash\]\n")
        await chat.stdin.send_all(b"Bye\n")
        await (await model.asked("Bye")).end()
        await chat.stdin.aclose()
        with trio.fail_after(CAP_S):
            assert await chat.wait() == 0
        states = [turn["state"] for turn in await turns(server.port, "me")]
        assert states == ["completed", "cancelled", "interrupted", "completed"]


async def test_a_model_of_your_own_answers_behind_the_server(tmp_path: Path) -> None:
    async with program("own_model.py", "0") as (_, output):
        model_url = (await output.until(r"http://\S+\n")).strip()
        async with (
            serving(tmp_path, model_url) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client,
        ):
            for message in ("one", "two"):
                response = await client.post("/chat", json={"session_id": "me", "message": message})
                assert response.text.count("turn.completed") == 1
            texts = [turn["text"] for turn in await turns(server.port, "me")]
            assert texts == ["This is answer 1 to: one", "This is answer 2 to: two"]
