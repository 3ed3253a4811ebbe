"""One Chromium and one server for the tests of a module: their starts take longer than the tests.

A test gets tabs of its own in a profile of its own, which the browser forgets with the test. The server's models are
scripts, chosen by the session: see :data:`MODELS`.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import trio

from bench.server_process import python_command
from tests.console.hostile import HOSTILE
from tests.docs.browser import CAP_S, Browser, Page, chromium, end, start

MODELS = {
    "quick": "scripted:?rate=0&first_token_s=0&text=" + quote("The **nursery** waits for its tasks."),
    "slow": "scripted:?tokens=4000&rate=25&first_token_s=0.1",
    "calm": "scripted:?tokens=4000&rate=2&first_token_s=0.1",
    "short": "scripted:?tokens=60&rate=40&first_token_s=0.1",
    "hostile": "scripted:?rate=0&first_token_s=0&text=" + quote(HOSTILE),
    "calling": 'scripted:?rate=0&first_token_s=0&reasoning=12&call=get_weather:{"city":"Oslo"}',
    "failing": "scripted:?tokens=9&rate=0&first_token_s=0&fail_after=4&fail_code=upstream_rejected",
}
"""The models of the server, by name: what each session's replies are."""
_LISTENS = re.compile(r"Running on http://127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """Call its API, and return the JSON of the answer. Raises: httpx.HTTPStatusError, for a refusal."""
        async with httpx.AsyncClient(base_url=self.url, timeout=CAP_S) as client:
            response = await client.request(method, path, json=body)
            return response.raise_for_status().json() if response.content else None

    async def new_session(self, model: str = "quick", **fields: object) -> str:
        session: str = (await self.call("POST", "/sessions", {"model": model, **fields}))["id"]
        return session

    async def say(self, session: str, text: str, **fields: object) -> Any:
        """A turn that has ended."""
        return await self.call("POST", f"/sessions/{session}/turns", {"input": text, **fields})


def config_of(folder: Path) -> Path:
    """A file of settings with the models."""
    upstreams = [
        f"[[upstreams]]\nname = {json.dumps(name)}\nurl = {json.dumps(url)}\nmodels = [{json.dumps(name)}]\n"
        for name, url in MODELS.items()
    ]
    path = folder / "lastcall.toml"
    path.write_text("\n".join(upstreams))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without keys and with a store in memory."""
    folder = tmp_path_factory.mktemp("server")
    env = {name: value for name, value in os.environ.items() if not name.startswith("LASTCALL_")}
    env |= {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_STORE_URL": "memory:", "LASTCALL_DRAIN_TIMEOUT_S": "0"}
    env |= {"LASTCALL_CONFIG_FILE": str(config_of(folder)), "LASTCALL_LOG_FORMAT": "json"}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(python_command("-m", "service", "serve"), env=env, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + CAP_S
        while (found := _LISTENS.search(log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield Server(f"http://127.0.0.1:{found[1]}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(CAP_S)
    assert process.returncode == 0, log.read_text()
    assert "Traceback" not in log.read_text()


@dataclass
class KeptBrowser:
    """A Chromium that serves one test after another, and what was not read of its pipe."""

    pipe: socket.socket
    calls: int = 0
    rest: bytes = b""


@pytest.fixture(scope="module")
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
            url: Of another server than the module's.
        """
        target = await self._browser.call("Target.createTarget", url="about:blank", browserContextId=self._profile)
        attached = await self._browser.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = self._browser.pages[attached["sessionId"]] = Page(self._browser, attached["sessionId"])
        self.pages.append(page)
        for domain in ("Page", "Runtime", "Log"):
            await page.call(f"{domain}.enable")
        await page.call("Page.bringToFront")  # a tab that is covered gets no frames
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await page.call("Emulation.setDeviceMetricsOverride", **metrics)
        await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        await page.open(f"{url or self.server.url}/{address}")
        await page.wait_for("document.querySelector('.view')?.children.length")
        return page


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
        async with open_tabs(kept_browser, server) as opened:
            yield opened
