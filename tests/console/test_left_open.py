"""A page that is left open for a day: it keeps no more than it shows, and does nothing for what is over."""

from typing import Any

from tests.console.conftest import Tabs
from tests.docs.browser import Page

PAGE = 50
"""The conversations of one page of the list."""
MAKE = """
((count) => Promise.all(Array.from({ length: count }, () => fetch('sessions', {
  method: 'POST', headers: { 'Content-Type': 'application/json' }, body: '{"model": "quick"}',
}))).then(() => null))
"""
LOOK = "document.dispatchEvent(new Event('visibilitychange')), null"
ROWS = "[...document.querySelectorAll('.session-rows li a')].map((it) => it.hash.split('/')[2])"
SCROLLER = "document.querySelector('.session-scroll')"
DELETE = """
(async () => {
  for (;;) {
    const { data } = await (await fetch('sessions?limit=100')).json();
    if (data.length === 0) return;
    await Promise.all(data.map(({ id }) => fetch(`sessions/${id}`, { method: 'DELETE' })));
  }
})().then(() => null)
"""


async def newest(tabs: Tabs, count: int) -> list[str]:
    found: list[Any] = []
    path = "/sessions?limit=50"
    while len(found) < count:
        page = await tabs.server.call("GET", path)
        found += page["data"]
        path = f"/sessions?limit=50&after={page['next']}"
    return [it["id"] for it in found][:count]


async def first_row_is(page: Page, session: str) -> None:
    await page.wait_for(f"{ROWS}[0] === '{session}'")


async def test_the_list_of_conversations_has_no_hole_and_does_not_grow_by_itself(tabs: Tabs) -> None:
    page = await tabs.open("#/shutdowns")
    await page.get(DELETE)  # the conversations of other tests
    await page.get("location.hash = '#/chat'")
    for count in (10, PAGE + 20, PAGE + 20):  # more than a page between two looks
        await page.get(f"{MAKE}({count})")
        await page.get(LOOK)
        await first_row_is(page, (await newest(tabs, 1))[0])
    assert await page.get(ROWS) == await newest(tabs, PAGE)
    await page.wait_for(f"({SCROLLER}.scrollTo(0, 1e6), {ROWS}.length === {PAGE * 3})")
    assert (await page.get(ROWS))[: PAGE * 2] == await newest(tabs, PAGE * 2)
    before = await page.get(ROWS)
    await page.get(f"{MAKE}(1)")
    await page.get(LOOK)
    total = "document.querySelector('.sessions-head .soft').textContent"
    await page.wait_for(f"{total} === '{len(before) + 1}'")
    assert await page.get(ROWS) == before, "nothing moves under what is read"
    await page.get(f"{SCROLLER}.scrollTo(0, 0)")
    await first_row_is(page, (await newest(tabs, 1))[0])
    assert await page.get(ROWS) == await newest(tabs, PAGE)
    await page.get(DELETE)


async def test_a_view_that_was_left_hears_nothing_more(tabs: Tabs) -> None:
    page = await tabs.open("#/shutdowns")
    await page.get("""(() => {
      window.signals = [];
      const listen = MediaQueryList.prototype.addEventListener;
      MediaQueryList.prototype.addEventListener = function (type, act, options) {
        signals.push(options?.signal);
        return listen.call(this, type, act, options);
      };
    })()""")
    await page.get("location.hash = '#/tree'")
    await page.wait_for("document.querySelectorAll('.row').length > 3")
    assert set(await page.get("signals.map((it) => it?.aborted)")) == {False}
    await page.get("location.hash = '#/shutdowns'")
    await page.wait_for("document.querySelector('.view.shutdowns h1')")
    assert set(await page.get("signals.map((it) => it?.aborted)")) == {True}


async def test_a_timeline_is_drawn_until_its_stream_is_over_also_without_an_end(tabs: Tabs) -> None:
    page = await tabs.open("#/chat")
    seen = await page.get("""(async () => {
      const of = (name) => import(document.querySelector('script[type=module]').src.replace('app.js', name));
      const [{ Follower }, { Timeline }] = await Promise.all([of('follower.js'), of('timeline.js')]);
      const [timed, pauses] = [setTimeout, []];
      window.setTimeout = (act, ms) => (pauses.push(ms), timed(act, ms));
      const asks = (timeline) => {
        const before = pauses.length;
        timeline.draw();
        return pauses.length > before;
      };
      const acts = { onEnd() {}, onTurn() {}, onEvent() {} };
      const found = [];
      for (const ends of [() => { throw new Error('refused'); }, () => {}]) {
        const follower = new Follower({}, acts);
        let timeline = new Timeline(follower.log);
        document.body.append(timeline.element);
        found.push(asks(timeline));
        timeline.close();
        await follower.run(async function* () { ends(); });
        timeline = new Timeline(follower.log);
        document.body.append(timeline.element);
        found.push(asks(timeline));
        timeline.close();
      }
      return found;
    })()""")
    assert seen == [True, False, True, False]
