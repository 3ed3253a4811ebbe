"""One Chromium and one server for all tests of the console: their starts take longer than the tests.

A test gets tabs of its own in a profile of its own, which the browser forgets with the test; turns that it leaves open
are ended with it. The server's models are scripts, chosen by the session: see :data:`MODELS`.
"""

import json
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import trio

from bench.server_process import Launch, ServerProcess, open_server, python_command
from tests.console.hostile import HOSTILE, HOSTILE_CALL
from tests.docs.browser import CAP_S, Browser, Page, chromium, end, start
from tests.kept_server import CAP_S as START_S
from tests.kept_server import SERVE, kept_server

MODELS = {
    "quick": "scripted:?rate=0&first_token_s=0&text=" + quote("The **nursery** waits for its tasks."),
    "slow": "scripted:?tokens=4000&rate=25&first_token_s=0.1",
    "calm": "scripted:?tokens=4000&rate=2&first_token_s=0.1",
    "short": "scripted:?tokens=60&rate=40&first_token_s=0.1",
    "hostile": "scripted:?rate=0&first_token_s=0&text=" + quote(HOSTILE),
    "calling": 'scripted:?rate=0&first_token_s=0&reasoning=12&call=get_weather:{"city":"Oslo"}',
    "calling twice": "scripted:?rate=0&first_token_s=0&text=Two%20calls.&call=" + quote(HOSTILE_CALL) + "&call=now",
    "failing": "scripted:?tokens=9&rate=0&first_token_s=0&fail_after=4&fail_code=upstream_rejected",
}
"""The models of the server, by name: what each session's replies are."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    key: str | None = None

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """Call its API, and return the JSON of the answer. Raises: httpx.HTTPStatusError, for a refusal."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=CAP_S) as client:
            response = await client.request(method, path, json=body)
            return response.raise_for_status().json() if response.content else None

    async def new_session(self, model: str = "quick", **fields: object) -> str:
        session: str = (await self.call("POST", "/sessions", {"model": model, **fields}))["id"]
        return session

    async def say(self, session: str, text: str, **fields: object) -> Any:
        """A turn that has ended."""
        return await self.call("POST", f"/sessions/{session}/turns", {"input": text, **fields})

    async def end_turns(self) -> None:
        """End what a test has left running, for the test that comes next."""
        for session in (await self.call("GET", "/sessions?status=running&limit=100"))["data"]:
            await self.call("DELETE", f"/sessions/{session['id']}")


CONFIG = "\n".join(
    f"[[upstreams]]\nname = {json.dumps(name)}\nurl = {json.dumps(url)}\nmodels = [{json.dumps(name)}]\n"
    for name, url in MODELS.items()
)
"""The settings that have the models."""


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without keys and with a store in memory, in which one message may wait in a session."""
    settings = {"drain_timeout_s": "0", "queued_turns_max": "1"}
    with kept_server(tmp_path_factory.mktemp("server"), settings, config=CONFIG) as (url, _):
        yield Server(url)


@asynccontextmanager
async def own_server(
    folder: Path,
    settings: Mapping[str, str],
    *,
    port: int = 0,
    key: str | None = None,
    config: str = CONFIG,
    command: Sequence[str] = SERVE,
) -> AsyncIterator[tuple[Server, ServerProcess]]:
    """A server of one test, which may stop or kill it, with its store in this folder.

    Args:
        settings: By their names in lower case.
        key: What calls are made with.
        config: The content of ``lastcall.toml``.
        command: The arguments of Python.
    """
    (folder / "lastcall.toml").write_text(config)
    own = {"bind": f"127.0.0.1:{port}", "store_url": f"sqlite:{folder}/store.db", "log_format": "json"}
    own["release_timeout_s"] = "30"
    settings = own | dict(settings)
    env = {f"LASTCALL_{name.upper()}": value for name, value in settings.items()}
    launch = Launch(python_command(*command), env=env, folder=folder)
    log = folder / f"server-{time.monotonic_ns()}.log"
    async with open_server(launch, log_path=log, start_timeout_s=START_S) as process:
        yield Server(f"http://127.0.0.1:{process.port}", key), process


async def use_theme(page: Page, theme: str) -> None:
    """Have the system of this page prefer ``light`` or ``dark``, and return once its colours have changed."""
    await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    changes = "document.getAnimations().filter((it) => it instanceof CSSTransition).map((it) => it.finished)"
    await page.get(f"Promise.allSettled({changes}).then(() => null)")


@dataclass
class KeptBrowser:
    """A Chromium that serves one test after another, and what was not read of its pipe."""

    pipe: socket.socket
    calls: int = 0
    rest: bytes = b""


@pytest.fixture(scope="package")
def kept_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeptBrowser]:
    folder = tmp_path_factory.mktemp("browser")
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = start(chromium(), folder, theirs.fileno())
        try:
            yield KeptBrowser(ours)
        finally:
            end(process, f"HOME={folder}".encode())


class Tabs:
    """Opens tabs of one profile: they share what a browser keeps, and are told of each other's changes."""

    def __init__(self, browser: Browser, profile: str, server: Server) -> None:
        self.server = server
        self.pages: list[Page] = []
        self.expected: list[str] = []
        """Parts of complaints that a test provokes: a browser writes each refusal of a server to its console."""
        self._browser = browser
        self._profile = profile

    async def open(
        self, address: str = "", *, url: str | None = None, width: int = 1280, height: int = 800, theme: str = "light"
    ) -> Page:
        """A tab with the console at this address (``#/chat/…``), which has found the server.

        Args:
            url: Of another server.
        """
        target = await self._browser.call("Target.createTarget", url="about:blank", browserContextId=self._profile)
        attached = await self._browser.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = self._browser.pages[attached["sessionId"]] = Page(self._browser, attached["sessionId"])
        self.pages.append(page)
        await page.begin()
        await page.call("Page.bringToFront")  # a tab that is covered gets no frames
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await page.call("Emulation.setDeviceMetricsOverride", **metrics)
        await use_theme(page, theme)
        await page.open(f"{url or self.server.url}/{address}")
        await page.wait_for("document.querySelector('.view')?.children.length")
        return page

    async def leave(self) -> None:
        """Have all tabs leave the console before the end of a server which it would go on to ask."""
        for page in self.pages:
            await page.open("about:blank")


@asynccontextmanager
async def open_tabs(kept: KeptBrowser, server: Server) -> AsyncIterator[Tabs]:
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(kept.pipe.dup()))
    async with stream, trio.open_nursery() as nursery:
        browser = Browser(stream, calls=kept.calls, rest=kept.rest)
        nursery.start_soon(browser.hand_out)
        profile = (await browser.call("Target.createBrowserContext"))["browserContextId"]
        tabs = Tabs(browser, profile, server)
        try:
            yield tabs
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CAP_S):
                await browser.call("Target.disposeBrowserContext", browserContextId=profile)
            nursery.cancel_scope.cancel()
            kept.calls, kept.rest = browser.calls, browser.rest
    complaints = [it for page in tabs.pages for it in page.complaints if not any(part in it for part in tabs.expected)]
    assert complaints == [], "a page has complained on its console: an error, or a violation of its policy"


@pytest.fixture
async def tabs(kept_browser: KeptBrowser, server: Server) -> AsyncIterator[Tabs]:
    """What opens tabs. Afterwards no page may have written an error to its console."""
    with trio.fail_after(10 * CAP_S):
        try:
            async with open_tabs(kept_browser, server) as opened:
                yield opened
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CAP_S):
                await server.end_turns()
