"""The client in ``clients/js`` gets through all scenarios in a browser, which also goes offline and hides pages."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.clients.client_driver import Job, Results
from tests.clients.scenarios import RETRY, SEEN_ALL, SEND, STARTED, WHOLE, Scenario, cut, hangs, replays, serve_scenario
from tests.clients.test_client_scenarios import check_result, run_scenarios
from tests.docs.blocks import ROOT
from tests.docs.browser import Page, open_browser
from tests.docs.test_examples import program
from tests.upstreams.raw_server import open_raw_server

pytestmark = pytest.mark.processes

CAP_S = 240
"""Bound of a test; not a promise of the client."""
LOAD = "Promise.all([import('/tests/clients/client_driver.mjs'), import('/clients/js/lastcall.js')])"


NewPage = Callable[[], Awaitable[Page]]


@asynccontextmanager
async def open_pages(folder: Path) -> AsyncIterator[NewPage]:
    """What opens pages that may import the client."""
    arguments = ("-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(ROOT))
    with trio.fail_after(CAP_S):
        async with open_browser(folder) as chromium, program(*arguments) as (_, output):
            said = await output.until(r"\(http://127\.0\.0\.1:\d+/\)")
            yield partial(chromium.new_page, f"{said.strip('()')}tests/clients/")


async def in_page(page: Page, jobs: Sequence[Job]) -> Sequence[Results]:
    asked = json.dumps([job.as_json() for job in jobs])
    run = f"{LOAD}.then(([driver, client]) => Promise.all({asked}.map((job) => driver.doSteps(client, job))))"
    results: Sequence[Results] = json.loads(await page.get(f"{run}.then(JSON.stringify)"))
    return results


async def test_the_client_gets_through_all_scenarios_in_a_page(tmp_path: Path) -> None:
    async with open_pages(tmp_path) as new_page:
        await run_scenarios(partial(in_page, await new_page()))


PATIENT = {"pause_s": 3600, "pause_max_s": 3600, "patience_s": 1e9, "silence_s": 3600, "timeout_s": 3600}
"""Bounds of a client that never comes back by itself."""


@asynccontextmanager
async def open_waiting(page: Page, scenario: Scenario) -> AsyncIterator[None]:
    """A client in the page does the one step of a scenario; ``window.waited`` is its first pause."""
    async with open_raw_server(partial(serve_scenario, scenario, seen=[])) as server:
        job = json.dumps(Job(server.url, [SEND], PATIENT).as_json())
        await page.get(
            f"""void {LOAD}.then(async ([driver, client]) => {{
                window.waited = window.results = undefined;
                const onWait = (waiting) => (window.waited ??= waiting);
                const onEvent = () => (window.seen = true);
                window.results = await driver.doSteps(client, {job}, {{ onWait, onEvent }});
                document.body.dataset.state = "done";
            }})"""
        )
        yield
        await page.wait_for("document.body.dataset.state === 'done'")
        [result] = json.loads(await page.get("JSON.stringify(window.results)"))
        check_result(result, SEEN_ALL)


def until(condition: str) -> str:
    """A promise for a condition that changes nothing on the page."""
    return f"new Promise((done) => {{ const look = () => (({condition}) ? done() : setTimeout(look, 5)); look(); }})"


WAITED = until("window.waited")


async def network(page: Page, *, offline: bool) -> None:
    await page.call(
        "Network.emulateNetworkConditions", offline=offline, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )


async def comes_back_when_the_browser_is_online_again(page: Page) -> None:
    await page.get(LOAD + ".then(() => null)")
    await page.call("Network.enable")
    await network(page, offline=True)
    async with open_waiting(page, Scenario([replays(WHOLE)], [SEND], [SEEN_ALL])):
        await page.get(WAITED)
        assert await page.get("window.waited.isOffline") is True
        assert await page.get("window.waited.error.code") == "unreachable"
        await network(page, offline=False)


async def comes_back_when_its_page_is_shown_and_not_when_it_is_hidden(page: Page) -> None:
    cut_once = Scenario([cut(STARTED), replays(WHOLE)], [SEND], [SEEN_ALL])
    async with open_waiting(page, cut_once):
        await page.get(WAITED)
        await page.get(
            "(() => { const get = window.fetch; window.fetch = (...it) => (window.asked = true, get(...it)); })()"
        )
        for state in ("hidden", "visible"):
            assert await page.get("window.asked") is None
            await page.get(
                f"Object.defineProperty(document, 'visibilityState', {{configurable: true, get: () => '{state}'}}),"
                "document.dispatchEvent(new Event('visibilitychange')), new Promise((done) => setTimeout(done))"
            )


async def gives_a_silent_connection_one_heartbeat_when_the_browser_is_online_again(page: Page) -> None:
    """Of the 3600 s of silence it waits for a third then, and a second: the test has that timer go off at once."""
    timers = """
        window.timers = [];
        const set = window.setTimeout.bind(window);
        window.setTimeout = (run, ms) => (window.timers.push([run, ms]), set(run, ms));
        const fire = (wanted) => window.timers.filter(([, ms]) => ms === wanted).forEach(([run]) => run());
    """
    silent_once = Scenario([hangs(RETRY + STARTED), replays(WHOLE)], [SEND], [SEEN_ALL])
    await page.get(f"(() => {{{timers} window.fire = fire; }})()")
    async with open_waiting(page, silent_once):
        await page.get(
            "new Promise((done) => { const look = () => (window.seen ? done() : setTimeout(look, 5)); look(); })"
        )
        await page.get("void window.dispatchEvent(new Event('online'))")
        await page.get("fire(1_201_000)")
        await page.get(WAITED)
        assert await page.get("window.waited.error.code") == "timeout"
        await page.get("void window.dispatchEvent(new Event('online'))")


async def test_a_client_in_a_page_goes_by_what_the_browser_tells_of_its_network_and_its_windows(tmp_path: Path) -> None:
    async with open_pages(tmp_path) as new_page:
        await comes_back_when_the_browser_is_online_again(await new_page())
        await comes_back_when_its_page_is_shown_and_not_when_it_is_hidden(await new_page())
        await gives_a_silent_connection_one_heartbeat_when_the_browser_is_online_again(await new_page())
