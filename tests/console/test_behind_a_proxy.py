"""The console of a server with keys, below a path of a proxy (nginx) and for a key that may not administer."""

from pathlib import Path

from tests.clients.surroundings import open_nginx
from tests.cluster.deployed_front import needed_program
from tests.console.chat_page import LAST, ChatPage
from tests.console.conftest import CONFIG, Server, Tabs, own_server
from tests.console.test_operator_views import VIEWS
from tests.docs.browser import Page

TALKS = "t" * 32
ADMINISTERS = "a" * 32
KEYS = f"""
[[api_keys]]
name = "talks"
key = "{TALKS}"
may = ["talk"]
[[api_keys]]
name = "administers"
key = "{ADMINISTERS}"
may = ["talk", "administer"]
"""
HYPERCORN = "-m hypercorn --worker-class trio --workers 0 --root-path /ai --bind 127.0.0.1:0 service.asgi:app"


async def enter_key(page: Page, key: str) -> None:
    await page.wait_for("document.querySelector('dialog[open] input')")
    await page.type_in("dialog input", key)
    await page.press("Enter")


async def test_a_server_with_keys_below_a_path_of_a_proxy(tabs: Tabs, tmp_path: Path) -> None:
    """One server for both halves: its start takes longer than they do."""
    needed_program("nginx")
    tabs.expected += ["status of 401", "status of 403"]
    served = own_server(tmp_path, {}, key=ADMINISTERS, config=CONFIG + KEYS, command=HYPERCORN.split())
    async with served as (server, process):
        async with open_nginx(process.port) as port:
            await each_view_finds_the_server(tabs, server, f"http://127.0.0.1:{port}")
            await tabs.leave()
        await each_view_says_what_a_key_may_not(tabs, server)
        await tabs.leave()


async def each_view_finds_the_server(tabs: Tabs, server: Server, front: str) -> None:
    """nginx as it comes: it passes the path on, and buffers what does not say that it streams."""
    page = await tabs.open(url=f"{front}/ai")
    assert await page.get("location.pathname") == "/ai/"
    await enter_key(page, ADMINISTERS)
    chat = ChatPage(page)
    session = await server.new_session("slow", title="Below a path")
    await page.get(f"location.hash = '#/chat/{session}'")
    await chat.has("Below a path", ".talk-title")
    await chat.send("Count")
    await chat.replies("0 1 2 3")
    await page.reload()
    await chat.replies("0 1 2 3 4 5 6 7 8")
    await chat.press_by_key("Cut my connection")
    await page.wait_for(f"{LAST}.querySelector('.moments [data-kind=back]')")
    await chat.press("Stop")
    await chat.is_in("cancelled")
    [turn] = (await server.call("GET", f"/sessions/{session}/turns"))["data"]
    await chat.replies_whole(turn["text"])
    assert (await chat.reply()).split() == turn["text"].split()
    for view, shown in VIEWS.items():
        await page.get(f"location.hash = '#/{view}'")
        await page.wait_for(f"document.querySelector('.view.{view} :is({shown})')")
    loaded = await page.get("[...new Set(performance.getEntriesByType('resource').map((it) => it.name))]")
    assert loaded, "the browser lists what the page has loaded"
    assert [it for it in loaded if not it.startswith(f"{front}/ai/")] == []
    assert await page.get("[...document.links].find((it) => it.innerText === 'API').href") == f"{front}/ai/docs"
    taken_off = await tabs.open(f"#/chat/{session}", url=f"{front}/taken-off/ai")
    await enter_key(taken_off, ADMINISTERS)
    await ChatPage(taken_off).has("Below a path", ".talk-title")


async def each_view_says_what_a_key_may_not(tabs: Tabs, server: Server) -> None:
    page = await tabs.open("#/tree", url=server.url)
    await enter_key(page, TALKS)
    for view in VIEWS:
        await page.get(f"location.hash = '#/{view}'")
        await page.reload()
        await page.wait_for("document.querySelector('.refusal[data-code=not_permitted]')")
        assert "may not administer" in await page.get("document.querySelector('.refusal').innerText")
        assert not await page.get("document.querySelector('.view-actions .danger')?.checkVisibility()")
