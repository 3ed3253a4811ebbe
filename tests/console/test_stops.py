"""A page whose server is stopped, killed, busy and back: all on one server of its own, because starts are dear."""

import json
import signal
from pathlib import Path

import trio

from tests.console.chat_page import LAST, ChatPage
from tests.console.conftest import Server, Tabs, own_server
from tests.docs.browser import CAP_S

KEY = "a-key-of-sixteen-or-more"
OTHER_KEY = "another-key-of-the-server"
NOTE_NOTICES = """(() => { // some are shown for seconds only
  window.notices = '';
  const notice = document.getElementById('notice');
  new MutationObserver(() => (notices += notice.textContent)).observe(notice, { childList: true });
})()"""


async def is_asked_for_a_key_once(tabs: Tabs, url: str) -> None:
    """A question that was closed does not come back by itself. The view Tree asks again once the server is back."""
    page = await tabs.open("#/chat", url=url)
    await page.wait_for("document.querySelector('dialog[open]')")
    await page.press("Escape")
    await page.wait_for("document.querySelector('.list-status').innerText === 'The server asks for a key.'")
    await page.get("""(() => {
      const [fetched, timed] = [fetch, setTimeout];
      window.asked = [];
      window.fetch = (url, options) => {
        asked.push(new URL(url, location).pathname);
        if (window.isAway) return Promise.resolve(new Response("", { status: 404 })); // as of a proxy
        return fetched(url, options);
      };
      window.setTimeout = (act, ms) => timed(act, ms === 1000 ? 0 : ms); // the pause of Tree between two attempts
    })()""")
    await page.get("location.hash = '#/tree'")
    await page.wait_for("document.querySelector('.tree-trouble')?.innerText.includes('This needs a key')")
    for _ in range(5):
        await page.get("fetch('readyz').then(() => null)")
    assert await page.get("asked.filter((it) => it.startsWith('/admin'))") == ["/admin/tree/events"]
    await page.get("window.isAway = true, dispatchEvent(new Event('online')), null")
    await page.wait_for("document.querySelector('#link-state').dataset.state === 'unreachable'")
    await page.get("window.isAway = false, null")
    await page.wait_for("asked.filter((it) => it.startsWith('/admin')).length === 2")
    for _ in range(5):
        await page.get("fetch('readyz').then(() => null)")
    assert await page.get("asked.filter((it) => it.startsWith('/admin')).length") == 2
    assert await page.get("document.querySelector('dialog')") is None
    await page.get("location.hash = '#/chat'")
    await page.wait_for("document.querySelector('.box')")
    await page.type_in(".box", "Is anybody there?")
    await page.press("Enter")
    await page.wait_for("document.querySelector('dialog[open]')")
    await page.press("Escape")
    await page.wait_for("!document.querySelector('dialog')")
    await page.click("[aria-label='Enter a key']")
    await page.wait_for("document.querySelector('dialog[open]')?.innerText.includes('This server asks for a key')")
    await page.call("Page.close")


async def test_a_stop_and_a_crash_in_mid_stream_lose_nothing_and_double_nothing(
    tabs: Tabs, tmp_path: Path, port: int
) -> None:
    tabs.expected += [
        "ERR_CONNECTION",
        "ERR_SOCKET_NOT_CONNECTED",  # a connection that was reset before it was used
        "status of 401",
        "status of 410",
        "status of 503",
        "ERR_INCOMPLETE",
        "ERR_EMPTY",
    ]
    settings = {"api_keys": KEY, "drain_timeout_s": "0", "live_turns_max": "2", "checkpoint_interval_s": "0.1"}
    async with own_server(tmp_path, settings, port=port, key=KEY) as (server, process):
        url = server.url
        session = await server.new_session("slow")
        await is_asked_for_a_key_once(tabs, url)
        chat = ChatPage(await tabs.open(f"#/chat/{session}", url=url))
        await chat.has("This server asks for a key", "dialog")
        await chat.page.type_in("dialog input", KEY)
        await chat.page.press("Enter")
        await chat.page.wait_for("document.querySelector('.talk-facts')?.textContent")
        assert KEY not in await chat.page.get("location.href + document.cookie + JSON.stringify(localStorage)")
        await chat.send("Count")
        await chat.replies(" 9 ")
        await chat.page.get(NOTE_NOTICES)
        process.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            await process.wait_gone()
    await chat.is_in("interrupted")
    await chat.has("The server was stopped before the end of this reply. What had arrived is kept.", ".turn-end")
    await chat.has("The server does not answer.", "#notice")
    await chat.replies_whole(await chat.copied(".tools > .button"))
    interrupted = await chat.reply()
    await chat.send("Are you back?")
    await chat.has("Attempt ", ".status")
    async with own_server(tmp_path, settings, port=port, key=KEY) as (server, process):
        await chat.page.wait_for("notices.includes('The server is back')")
        await chat.page.wait_for("document.querySelectorAll('.turn').length === 2")
        await chat.replies("0 1 2 3")
        assert await chat.page.get(f"{LAST}.querySelector('.asked').textContent") == "Are you back?"
        first, second = (await server.call("GET", f"/sessions/{session}/turns"))["data"]
        assert [(it["input"], it["state"]) for it in (first, second)] == [
            ("Count", "interrupted"),
            ("Are you back?", "running"),
        ]
        assert interrupted.split() == first["text"].split()

        # A second turn fills the server, and goes on after the crash; a third one waits for a place.
        other = ChatPage(await tabs.open("#/chat", url=url))
        await other.has("This server asks for a key", "dialog")
        assert json.loads(await other.page.get("JSON.stringify(sessionStorage)")).get("lastcall.key") is None
        resumed = await server.new_session("slow")
        body = {"input": "Go on", "background": True, "on_disconnect": "continue", "on_interrupt": "continue"}
        turn = (await server.call("POST", f"/sessions/{resumed}/turns", body))["id"]
        await other.page.type_in("dialog input", KEY)
        await other.page.press("Enter")
        await other.page.get(f"location.hash = '#/chat/{resumed}'")  # also while the view is still being loaded
        await other.replies("0 1 2 3")
        third = ChatPage(await tabs.open("#/chat", url=url))
        await third.page.type_in("dialog input", KEY)
        await third.page.press("Enter")
        await third.send("Is there a place?")
        await third.has("The server writes as many replies as it may. Attempt ", ".status")
        assert (await third.turns())[0][:2] == ["sending", "Is there a place?"]

        await chat.page.call("Page.bringToFront")  # a hidden tab asks for nothing, but for the events of its turns
        await chat.replies(" 30 ")
        await chat.page.get("window.notices = ''")
        process.signal_group(signal.SIGKILL)
        with trio.fail_after(CAP_S):
            await process.wait_gone()
    await chat.has("The server does not answer", "#notice")
    await third.has("The server does not answer. Attempt ", ".status")
    async with own_server(tmp_path, settings, port=port, key=KEY) as (server, _):
        await chat.page.wait_for("notices.includes('The server is back')")
        await chat.is_in("interrupted")
        await chat.has(
            "The server crashed before the end of this reply. What it had stored is kept.", ".turn:last-child .turn-end"
        )
        kept = (await server.call("GET", f"/sessions/{session}/turns/{second['id']}"))["text"]
        assert kept.split()
        await chat.page.wait_for(f"{LAST}.querySelector('.markdown').textContent.trim() === {json.dumps(kept.strip())}")
        assert [it[:2] for it in await chat.turns()] == [["interrupted", "Count"], ["interrupted", "Are you back?"]]

        await other.has(
            "The server was gone in the middle of this reply, which goes on after what was kept.", ".turn-end"
        )
        await other.has("attempt 2 of the server, after what was kept", ".moments")
        await other.replies(" 60 ")
        await other.press("Stop")
        await other.is_in("cancelled")
        whole = (await server.call("GET", f"/sessions/{resumed}/turns/{turn}"))["text"].split()
        assert whole == [str(it) for it in range(len(whole))]
        await other.replies_whole(" ".join(whole))
        assert (await other.reply()).split() == whole
        await third.replies("its tasks.")
        await third.is_in("completed")
        assert len(await third.turns()) == 1


async def send_with_a_revoked_key(chat: ChatPage, text: str) -> None:
    """Send this, and return once another key is asked for. The key changes at this moment: a poll would ask, too."""
    await chat.page.type_in(".box", text)
    revoke = "sessionStorage.setItem('lastcall.key', 'a-key-that-was-revoked')"
    await chat.page.get(f"{revoke}, document.querySelector('.composer').requestSubmit(), null")
    await chat.has("This server asks for a key", "dialog")
    await chat.has("The server asks for a key.", ".status")


async def test_messages_that_wait_for_the_server_or_a_key_are_all_sent_once(tabs: Tabs, tmp_path: Path) -> None:
    tabs.expected += ["ERR_", "status of 401", "status of 503", "Failed to fetch dynamically imported module"]
    settings = {"api_keys": f"{KEY},{OTHER_KEY}", "drain_timeout_s": "0"}
    async with own_server(tmp_path, settings, key=KEY) as (server, process):
        port, url = process.port, server.url
        one, two = [await server.new_session(title=title) for title in ("One", "Two")]
        chat = ChatPage(await tabs.open(f"#/chat/{one}", url=url))
        await chat.page.type_in("dialog input", KEY)
        await chat.page.press("Enter")
        await chat.has("One", ".talk-title")
        process.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            await process.wait_gone()

    # While the server is away, messages are left behind in two conversations and in a new one.
    await chat.send("For one")
    await chat.has("Attempt ", ".status")
    await chat.page.get(f"location.hash = '#/chat/{two}'")
    await chat.page.wait_for("document.querySelector('.turn') === null")
    await chat.send("For two")
    await chat.has("Attempt ", ".status")
    await chat.page.get("location.hash = '#/chat/new'")
    await chat.page.wait_for("document.querySelector('.turn') === null")
    await chat.send("Begins a conversation")
    await chat.has("Attempt ", ".status")
    await chat.page.get(f"location.hash = '#/chat/{one}'")
    await chat.page.wait_for(f"{LAST}?.querySelector('.asked').textContent === 'For one'")
    assert await chat.page.get("document.querySelector('.box').value") == ""
    await chat.page.type_in(".box", "A draft")
    await chat.page.get("location.hash = '#/tree'")
    await chat.page.wait_for("document.querySelector('.view.tree')?.children.length")

    async with own_server(tmp_path, settings, port=port, key=KEY) as (server, _):
        with trio.fail_after(CAP_S):
            while json.loads(await chat.page.get("sessionStorage.getItem('lastcall.outbox')")):  # noqa: ASYNC110  it tells its page nothing
                await trio.sleep(0.05)
        assert await chat.page.get("location.hash") == "#/tree"
        sessions = {it["title"]: it["id"] for it in (await server.call("GET", "/sessions"))["data"]}
        assert set(sessions) == {"One", "Two", "Begins a conversation"}
        for title, text in (("One", "For one"), ("Two", "For two"), ("Begins a conversation", "Begins a conversation")):
            turns = (await server.call("GET", f"/sessions/{sessions[title]}/turns"))["data"]
            assert [it["input"] for it in turns] == [text]

        # A key that is revoked keeps the message, too, and what is written meanwhile.
        await chat.page.get(f"location.hash = '#/chat/{one}'")
        await chat.is_in("completed")
        assert await chat.page.get("document.querySelector('.box').value") == "A draft"
        await send_with_a_revoked_key(chat, "Please keep me")
        await chat.page.get("document.querySelector('.box').value = 'Another draft', null")
        await chat.page.type_in("dialog input", OTHER_KEY)
        await chat.page.press("Enter")
        await chat.page.wait_for(f"{LAST}?.querySelector('.asked').textContent === 'Please keep me'")
        await chat.is_in("completed")
        assert await chat.page.get("document.querySelector('.box').value") == "Another draft"
        turns = (await server.call("GET", f"/sessions/{one}/turns"))["data"]
        assert [it["input"] for it in turns] == ["For one", "Please keep me"]


async def new_conversation(tabs: Tabs, server: Server) -> tuple[str, ChatPage]:
    """An empty conversation, by its id and in a tab that has the key."""
    session = await server.new_session(title="One")
    chat = ChatPage(await tabs.open(f"#/chat/{session}", url=server.url))
    await chat.page.type_in("dialog input", KEY)
    await chat.page.press("Enter")
    await chat.has("One", ".talk-title")
    return session, chat


async def is_refused(chat: ChatPage, text: str) -> None:
    """Send a message with a key that was revoked, and close the question for another one."""
    await send_with_a_revoked_key(chat, text)
    await chat.page.press("Escape")
    await chat.page.wait_for("!document.querySelector('dialog')")


async def test_a_message_whose_key_was_refused_is_sent_by_the_next_attempt(tabs: Tabs, tmp_path: Path) -> None:
    """It goes before what is written meanwhile, and is sent once."""
    tabs.expected += ["status of 401"]
    async with own_server(tmp_path, {"api_keys": KEY}, key=KEY) as (server, _):
        session, chat = await new_conversation(tabs, server)

        await is_refused(chat, "First")
        await chat.send("Second")
        await chat.has("This server asks for a key", "dialog")
        await chat.page.type_in("dialog input", KEY)
        await chat.page.press("Enter")
        await chat.page.wait_for(f"{LAST}?.querySelector('.asked').textContent === 'First'")
        await chat.is_in("completed")
        assert await chat.page.get("document.querySelector('.box').value") == "Second"
        await chat.press("Send")
        await chat.page.wait_for(f"{LAST}.querySelector('.asked').textContent === 'Second'")
        await chat.is_in("completed")

        # The server takes the key again: no question is needed.
        await is_refused(chat, "Third")
        await chat.press("Stop")
        await chat.has("The message waits for a key. Send tries it again.", ".status")
        await chat.page.get(f"sessionStorage.setItem('lastcall.key', {json.dumps(KEY)}), null")
        await chat.press("Send")
        await chat.is_in("completed")
        assert await chat.page.get("document.querySelector('dialog')") is None
        turns = (await server.call("GET", f"/sessions/{session}/turns"))["data"]
        assert [it["input"] for it in turns] == ["First", "Second", "Third"]
        await tabs.leave()


async def test_a_message_left_behind_is_sent_with_the_key_that_is_entered_elsewhere(tabs: Tabs, tmp_path: Path) -> None:
    tabs.expected += ["status of 401", "status of 403"]  # the key may not administer
    async with own_server(tmp_path, {"api_keys": KEY}, key=KEY) as (server, _):
        session, chat = await new_conversation(tabs, server)
        await is_refused(chat, "Left behind")
        await chat.page.get("location.hash = '#/tree'")
        await chat.has("This server asks for a key", "dialog")  # the message is sent on, and refused again
        await chat.page.type_in("dialog input", KEY)
        await chat.page.press("Enter")
        await chat.page.wait_for("sessionStorage.getItem('lastcall.outbox') === '[]'")
        assert await chat.page.get("location.hash") == "#/tree"
        turns = (await server.call("GET", f"/sessions/{session}/turns"))["data"]
        assert [it["input"] for it in turns] == ["Left behind"]
        await tabs.leave()
