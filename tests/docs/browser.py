"""Drives a real browser without a window through a pipe: Chromium and its DevTools protocol.

It does only what the tests of the examples need: open pages, click, type, read them, and collect all that the pages
complain about. A driver from PyPI would bring 45 MB and an event loop of its own; the pipe is a socket that Trio reads.

Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

CAP_S = 60
"""Bound of every wait; not a promise of the server."""
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--disable-dev-shm-usage", "--disable-breakpad", "--disable-extensions"),
    *("--no-first-run", "--no-default-browser-check", "--disable-sync", "--disable-background-networking"),
    *("--disable-component-update", "--disable-default-apps", "--no-proxy-server", "--password-store=basic"),
    # only the names of this machine can be resolved
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
_COMPLAINTS = frozenset({"error", "warning", "assert"})


def chromium() -> str:
    """The browser's program. Without one a test is skipped, but fails in CI, which installs one."""
    for name in PROGRAMS:
        if (found := shutil.which(name)) is not None:
            return found
    reason = "no Chromium here, which runs the pages of examples/: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


class PageError(AssertionError):
    """The page raised an error, or did not reach the expected state in time."""


class Page:
    """A tab. ``complaints`` is what it wrote to its console as errors and warnings, uncaught exceptions included."""

    def __init__(self, browser: "Browser", session_id: str) -> None:
        self.complaints: list[str] = []
        self._frame = ""
        self._loaders: set[str] = set()
        self._loaded = trio.Event()
        self._browser = browser
        self._session_id = session_id
        self._paused, self._next_paused = trio.open_memory_channel[dict[str, Any]](10)

    async def call(self, method: str, **params: Any) -> Any:
        """Call the protocol for this tab, and return the result."""
        return await self._browser.call(method, session_id=self._session_id, **params)

    async def begin(self) -> None:
        """Have the browser tell what happens in this tab."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.setLifecycleEventsEnabled", enabled=True)

    async def open(self, url: str) -> None:
        """Load a URL and wait for the ``load`` event of its page. That of the empty page before may come yet."""
        found = await self.call("Page.navigate", url=url)
        assert "errorText" not in found, found
        self._frame = found["frameId"]
        while found["loaderId"] not in self._loaders:
            self._loaded = trio.Event()
            await self._loaded.wait()

    async def reload(self) -> None:
        self._loaded = trio.Event()
        await self.call("Page.reload")
        await self._loaded.wait()

    async def get(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited if it is a promise. Raises: PageError, if it throws."""
        done = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise PageError(f"{expression}: {done['exceptionDetails']}")
        return done["result"].get("value")

    async def wait_for(self, condition: str) -> None:
        """Return once an expression is true.

        The page evaluates it after each change of the document, and from time to time: the address, the focus and what
        is in a box change without one.

        Raises:
            PageError: The expression was not true in time.
        """
        observed = "{subtree: true, childList: true, characterData: true, attributes: true}"
        watch = f"""new Promise((done) => {{
            const look = () => ({condition}) && (observer.disconnect(), clearInterval(timer), done(true));
            const observer = new MutationObserver(look);
            observer.observe(document, {observed});
            const timer = setInterval(() => {{ try {{ look(); }} catch {{}} }}, 100);
            look();
        }})"""
        with trio.move_on_after(CAP_S):
            await self.get(watch)
            return
        seen = await self.get("document.body.innerText")
        raise PageError(f"never true: {condition}\nthe page:\n{seen}\nits console: {self.complaints}")

    async def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element; see :meth:`click_on`."""
        await self.click_on(f"document.querySelector({json.dumps(selector)})")

    async def click_on(self, found: str) -> None:
        """Press and release the mouse in the middle of an element, once nothing covers it.

        A moment is left to an element that moves, as those of a page do that is still being built.

        Raises:
            PageError: There was no such element in time.
        """
        await self.call("Page.bringToFront")
        middle = f"""(async () => {{
            for (let looks = 0, before = null; ; looks++) {{
                const found = {found};
                found?.scrollIntoView({{block: 'center'}});
                const box = found?.getBoundingClientRect();
                const [x, y] = box ? [box.x + box.width / 2, box.y + box.height / 2] : [0, 0];
                const hit = box?.width > 0 ? document.elementFromPoint(x, y) : null;
                const isHit = hit !== null && (found.contains(hit) || hit.contains(found));
                if (isHit && (looks > 10 || (before?.[0] === x && before?.[1] === y))) return [x, y];
                before = isHit ? [x, y] : null;
                await new Promise((done) => setTimeout(done, 20));
            }}
        }})()"""
        with trio.move_on_after(CAP_S) as cap:
            x, y = await self.get(middle)
        if cap.cancelled_caught:
            raise PageError(f"{found} cannot be clicked: it is not there, or covered")
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type_in(self, selector: str, text: str) -> None:
        """Replace the content of an element by a text."""
        await self.click(selector)
        await self.get(f"document.querySelector({json.dumps(selector)}).select()")
        await self.call("Input.insertText", text=text)

    async def press(self, *keys: str) -> None:
        """Press and release keys, one after the other: `Tab`, `Enter`, `Escape`, `ArrowDown`, `a`, `Control+Enter`."""
        await self.call("Page.bringToFront")
        for pressed_key in keys:
            key = pressed_key.removeprefix("Control+")
            modifiers = 0 if key == pressed_key else 2
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40}.get(key, 0)
            pressed = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
            await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **pressed)
            await self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    async def write(self, text: str) -> None:
        """Write a text where the focus is."""
        await self.call("Input.insertText", text=text)

    async def hold_answers(self, url: str) -> None:
        """Keep answers from URLs of this pattern from the page."""
        await self.call("Fetch.enable", patterns=[{"urlPattern": url, "requestStage": "Response"}])

    async def lose_held_answer(self, method: str) -> None:
        """Lose the first held answer to this method, as a broken connection does; hold no other."""
        async for paused in self._next_paused:
            if paused["request"]["method"] == method:
                await self.call("Fetch.failRequest", requestId=paused["requestId"], errorReason="ConnectionReset")
                break
            await self.call("Fetch.continueRequest", requestId=paused["requestId"])
        await self.call("Fetch.disable")

    def on_event(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Page.lifecycleEvent" if params["name"] == "load":
                self._loaders.add(params["loaderId"])
                if params["frameId"] == self._frame:
                    self._loaded.set()
            case "Fetch.requestPaused":
                self._paused.send_nowait(params)
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in _COMPLAINTS:
                self.complaints.append(str([it.get("value", it.get("description")) for it in params["args"]]))
            case "Log.entryAdded" if params["entry"]["level"] in _COMPLAINTS:
                self.complaints.append(params["entry"]["text"])


class Browser:
    """A running Chromium. Made by :func:`open_browser`."""

    def __init__(self, stream: trio.SocketStream, *, calls: int = 0, rest: bytes = b"") -> None:
        """Speak with the browser at the other end of a pipe.

        Args:
            calls: How many calls it has had on this pipe: their numbers are not used again.
            rest: The beginning of a message that was read already.
        """
        self.pages: dict[str, Page] = {}
        self.calls = calls
        self.rest = rest
        self._stream = stream
        self._sending = trio.Lock()
        self._answers: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}

    async def new_page(self, url: str) -> Page:
        """A new tab with this URL, loaded."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = self.pages[attached["sessionId"]] = Page(self, attached["sessionId"])
        await page.begin()
        await page.open(url)
        return page

    async def call(self, method: str, *, session_id: str | None = None, **params: Any) -> Any:
        """Call the protocol, and return the result. Raises: PageError, if the browser refuses the call."""
        self.calls += 1
        number = self.calls
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session_id is not None:
            message["sessionId"] = session_id
        send, receive = trio.open_memory_channel[dict[str, Any]](1)
        self._answers[number] = send
        try:
            async with self._sending:
                await self._stream.send_all(json.dumps(message).encode() + b"\0")
            answer = await receive.receive()
        finally:
            del self._answers[number]
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']}")
        return answer["result"]

    async def hand_out(self) -> None:
        """Pass the browser's messages on to their tabs, until the browser closes the pipe."""
        async for data in self._stream:
            *messages, self.rest = (self.rest + data).split(b"\0")
            for raw in messages:
                self._take(json.loads(raw))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            if (send := self._answers.get(message["id"])) is not None:
                send.send_nowait(message)
        elif (page := self.pages.get(message.get("sessionId", ""))) is not None:
            page.on_event(message["method"], message["params"])


@asynccontextmanager
async def open_browser(folder: Path) -> AsyncIterator[Browser]:
    """A browser with a profile of its own in this folder; all its processes are gone on leaving."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = start(chromium(), folder, theirs.fileno())
    try:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream, trio.open_nursery() as nursery:
            browser = Browser(stream)
            nursery.start_soon(browser.hand_out)
            yield browser
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * CAP_S):
            await trio.to_thread.run_sync(end, process, f"HOME={folder}".encode())


def start(program: str, folder: Path, pipe: int) -> "subprocess.Popen[bytes]":
    """Start the browser. It reads from descriptor 3 and writes to descriptor 4."""
    command = ["bash", "-c", f'exec "$@" 3<&{pipe} 4>&{pipe}', "bash", program, *FLAGS]
    with (folder / "browser.log").open("wb") as log:
        return subprocess.Popen(
            [*command, f"--user-data-dir={folder}/profile"],
            pass_fds=(pipe,),
            env=os.environ | {"HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end(process: "subprocess.Popen[bytes]", mark: bytes) -> None:
    """Kill the browser with all processes that it has started, and return once they are gone.

    The crash handlers leave the group and do not die with the browser: the mark in their environment tells them, or
    that this process, which takes orphans in once a server was measured, is their parent. A process that is about to
    run its program has neither for a moment, so the search is repeated until it finds no process twice in a row.
    """
    started: set[int] = set()
    empty_searches = 0
    deadline = time.monotonic() + CAP_S
    while empty_searches < 2 and time.monotonic() < deadline:
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        started |= {pid for pid in pids if _group(pid) == process.pid or mark in _environment(pid) or _is_orphan(pid)}
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        started = {pid for pid in started if pid != process.pid and _is_there(pid)}
        empty_searches = 0 if started or process.returncode is None else empty_searches + 1
        time.sleep(0.01)
    process.wait(CAP_S)


def _is_orphan(pid: int) -> bool:
    """Whether a process is a child of this one and a part of a browser."""
    with suppress(OSError):
        name, _, fields = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        return name.startswith("chrom") and int(fields.split()[1]) == os.getpid()
    return False


def _group(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def _environment(pid: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def _is_there(pid: int) -> bool:
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    return Path(f"/proc/{pid}").exists()
