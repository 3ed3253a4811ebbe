"""The console by keyboard, on a phone, in other colours, and with a screen reader."""

from tests.console.accessibility import violations
from tests.console.chat_page import ChatPage
from tests.console.conftest import Tabs, use_theme
from tests.console.test_chat import open_chat, turns_of

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
    await chat.has("Edit", ".tools")
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


async def test_axe_finds_nothing_serious(tabs: Tabs) -> None:
    session = await tabs.server.new_session("hostile", title="Looked at")
    await tabs.server.say(session, "Once")
    await tabs.server.call("POST", f"/sessions/{session}/turns/{(await turns_of(tabs, session))[0]['id']}/retry")
    chat = await open_chat(tabs, session)
    await chat.replies("plain")
    await chat.press("Timeline")
    await chat.press("Edit")
    for theme in ("light", "dark"):
        await use_theme(chat.page, theme)
        assert await violations(chat.page) == [], theme
    await chat.press("Delete")
    for theme in ("light", "dark"):
        await use_theme(chat.page, theme)
        assert await violations(chat.page) == [], theme


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
