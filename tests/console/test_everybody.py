"""The console by keyboard, on a phone, in other colours, with a screen reader, and with a server that restarts."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio

from bench.server_process import Launch, ServerProcess, open_server, python_command
from tests.console.accessibility import violations
from tests.console.chat_page import LAST, ChatPage
from tests.console.conftest import Tabs, config_of
from tests.console.test_chat import open_chat, turns_of
from tests.docs.browser import CAP_S

KEY = "a-key-of-sixteen-or-more"
FOCUSED = "(document.activeElement?.getAttribute('aria-label') ?? document.activeElement?.textContent)"


# A keyboard


async def test_a_keyboard_is_enough(tabs: Tabs) -> None:
    session = await tabs.server.new_session("slow", title="By keyboard")
    page = await tabs.open("#/chat")
    chat = ChatPage(page)
    await chat.has("By keyboard", ".session-rows")
    await page.get("document.querySelector('.skip').focus()")
    assert await page.get("document.querySelector('.skip').getBoundingClientRect().bottom") > 0
    await page.press("Enter")
    assert await page.get("document.activeElement.id + location.hash") == "main#/chat"
    await page.press("/")
    assert await page.get(FOCUSED) == "Search all conversations"
    await page.press("Tab")
    await page.press("Enter")
    await chat.has("By keyboard", ".talk-title")
    await page.wait_for("document.activeElement.matches('.box')")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert await page.get(outline) == "solid"
    await page.write("Count")
    await page.press("Enter")
    await chat.replies("0 1 2 3")
    await page.press("Escape")
    await chat.is_in("cancelled")
    await page.get("document.activeElement.blur()")
    await page.press("?")
    await chat.has("write a message", "dialog")
    await page.press("Escape")
    await page.wait_for("!document.querySelector('dialog')")
    await page.press("e")
    await page.wait_for("document.activeElement.matches('.box') && document.activeElement.value === 'Count'")
    await page.press("Escape")
    await page.wait_for("document.querySelector('.edit-bar').hidden")
    assert len(await turns_of(tabs, session)) == 1


# A phone


async def test_on_a_phone_one_thing_is_shown_at_a_time_and_nothing_sticks_out(tabs: Tabs) -> None:
    session = await tabs.server.new_session("hostile", title="On a phone")
    await tabs.server.say(session, "word" * 200)
    page = await tabs.open("#/chat", width=360, height=640)
    chat = ChatPage(page)
    await chat.has("On a phone", ".session-rows")
    sticks_out = "document.scrollingElement.scrollWidth > 360 || "
    sticks_out += "[...document.querySelectorAll('button, .turn, header')].some("
    sticks_out += "(it) => it.checkVisibility() && it.getBoundingClientRect().right > 361)"
    assert not await page.get("document.querySelector('.talk').checkVisibility()")
    assert not await page.get(sticks_out)
    await page.click(".session-rows a")
    await chat.replies("plain")
    assert not await page.get("document.querySelector('.sessions').checkVisibility()")
    assert not await page.get(sticks_out)
    await chat.press("Timeline")
    assert not await page.get(sticks_out)
    await chat.press("All conversations")
    await page.wait_for("document.querySelector('.sessions').checkVisibility()")


# Those who cannot see it, or see it otherwise


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_serious(theme: str, tabs: Tabs) -> None:
    session = await tabs.server.new_session("hostile", title="Looked at")
    await tabs.server.say(session, "Once")
    await tabs.server.call("POST", f"/sessions/{session}/turns/{(await turns_of(tabs, session))[0]['id']}/retry")
    chat = await open_chat(tabs, session, theme=theme)
    await chat.replies("plain")
    await chat.press("Timeline")
    await chat.press("Edit")
    assert await violations(chat.page) == []
    await chat.press("Delete")
    assert await violations(chat.page) == []


async def test_what_happens_is_told_to_screen_readers_and_not_each_token(tabs: Tabs) -> None:
    chat = await open_chat(tabs, await tabs.server.new_session("short"))
    await chat.page.get(
        "window.told = [], new MutationObserver(() => window.told.push(document.getElementById('said').textContent))"
        ".observe(document.getElementById('said'), { childList: true, characterData: true, subtree: true }), null"
    )
    await chat.send("Count")
    await chat.is_in("completed")
    await chat.page.wait_for("document.getElementById('said').textContent === 'The reply has ended: completed.'")
    assert await chat.page.get("window.told") == ["The reply has ended: completed."]
    live = "[...document.querySelectorAll('[aria-live], [role=status], [role=log], [role=alert]')]"
    assert not await chat.page.get(f"{live}.some((it) => it.querySelector('.turn') || it.closest('.turn'))")


async def test_a_theme_that_was_chosen_stays(tabs: Tabs) -> None:
    page = await tabs.open("#/chat", theme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = await page.get(background)
    await ChatPage(page).press("Use the dark theme")
    dark = await page.get(background)
    assert light != dark
    await page.reload()
    assert await page.get(background) == dark


# A server with keys, which stops and comes back


@asynccontextmanager
async def serving(folder: Path, *, port: int = 0) -> AsyncIterator[ServerProcess]:
    env = {"LASTCALL_BIND": f"127.0.0.1:{port}", "LASTCALL_STORE_URL": f"sqlite:{folder}/lastcall.db"}
    env |= {"LASTCALL_API_KEYS": KEY, "LASTCALL_CONFIG_FILE": str(config_of(folder)), "LASTCALL_DRAIN_TIMEOUT_S": "0"}
    launch = Launch(python_command("-m", "service", "serve"), env=env)
    async with open_server(launch, log_path=folder / f"server-{port}.log", start_timeout_s=60) as server:
        yield server


async def test_a_restart_in_mid_stream_loses_nothing_and_doubles_nothing(tabs: Tabs, tmp_path: Path) -> None:
    tabs.expected += ["ERR_CONNECTION", "status of 401", "status of 503", "ERR_INCOMPLETE", "ERR_EMPTY"]
    headers = {"Authorization": f"Bearer {KEY}"}
    async with serving(tmp_path) as server:
        port = server.port
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=CAP_S) as client:
            session = (await client.post("/sessions", json={"model": "slow"})).json()["id"]
            chat = ChatPage(await tabs.open(f"#/chat/{session}", url=url))
            await chat.has("This server asks for a key", "dialog")
            await chat.page.type_in("dialog input", KEY)
            await chat.page.press("Enter")
            await chat.page.wait_for("document.querySelector('.talk-facts')?.textContent")
            assert KEY not in await chat.page.get("location.href + document.cookie + JSON.stringify(localStorage)")
            await chat.send("Count")
            await chat.replies(" 9 ")
        server.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            await server.wait_gone()
    await chat.is_in("interrupted")
    await chat.has("The server was stopped before the end of this reply. What had arrived is kept.", ".turn-end")
    await chat.has("The server does not answer.", "#notice")
    await chat.replies_whole(await chat.copied(".tools > .button"))
    interrupted = await chat.reply()
    await chat.send("Are you back?")
    await chat.has("Attempt ", ".status")
    async with serving(tmp_path, port=port) as server:
        await chat.has("The server is back", "#notice")
        await chat.page.wait_for("document.querySelectorAll('.turn').length === 2")
        await chat.replies("0 1 2 3")
        await chat.press("Stop")
        await chat.is_in("cancelled")
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=CAP_S) as client:
            first, second = (await client.get(f"/sessions/{session}/turns")).json()["data"]
        assert [(it["input"], it["state"]) for it in (first, second)] == [
            ("Count", "interrupted"),
            ("Are you back?", "cancelled"),
        ]
        assert interrupted.split() == first["text"].split()
        await chat.replies_whole(second["text"])
        assert (await chat.reply()).split() == second["text"].split()
        assert await chat.page.get(f"{LAST}.querySelector('.asked').textContent") == "Are you back?"
        other = await tabs.open("#/chat", url=url)
        await ChatPage(other).has("This server asks for a key", "dialog")
        assert json.loads(await other.get("JSON.stringify(sessionStorage)")).get("lastcall.key") is None
