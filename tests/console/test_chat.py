"""Conversations in a real browser: what a person does, and what happens to the connection meanwhile."""

import contextlib
import http.client
import json
from typing import Any

import httpx
import trio

from tests.console.accessibility import violations
from tests.console.chat_page import LAST, ChatPage
from tests.console.conftest import Tabs
from tests.docs.browser import CAP_S

LAID_OUT = """
{
  "html": "<img src=x onerror=\\"window.hit = 1\\">",
  "bidi": "safeU+202Ecod.exe",
  "big": 12345678901234567890,
  "list": [
    1,
    {
      "a": []
    }
  ]
}
""".strip()
"""How the arguments of the hostile call are shown: nothing is obeyed, and no number becomes another one."""


async def turns_of(tabs: Tabs, session: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await tabs.server.call("GET", f"/sessions/{session}/turns"))["data"]
    return found


async def open_chat(tabs: Tabs, session: str, **options: Any) -> ChatPage:
    chat = ChatPage(await tabs.open(f"#/chat/{session}", **options))
    await chat.page.wait_for("document.querySelector('.talk-facts')?.textContent")
    return chat


async def test_a_first_message_begins_a_conversation_that_is_renamed_and_deleted(tabs: Tabs) -> None:
    chat = ChatPage(await tabs.open())
    await chat.has("What shall we talk about?")
    await chat.send("What is a nursery?")
    await chat.is_in("completed")
    await chat.replies("its tasks.")  # a reply is drawn in steps
    assert await chat.turns() == [["completed", "What is a nursery?", "The nursery waits for its tasks."]]
    assert await chat.page.get(f"{LAST}.querySelector('.markdown strong').textContent") == "nursery"
    session = await chat.session()
    await chat.has("What is a nursery?", ".session-rows li:first-child")
    await chat.press("Rename")
    await chat.page.type_in("dialog input", "Nurseries")
    await chat.press("Rename")
    await chat.has("Nurseries", ".talk-title")
    await chat.has("Nurseries", ".session-rows li:first-child")
    assert (await tabs.server.call("GET", f"/sessions/{session}"))["title"] == "Nurseries"
    await chat.press("Delete")
    await chat.has("gone for good", "dialog")
    await chat.press("Delete")
    await chat.page.wait_for("location.hash === '#/chat'")
    async with httpx.AsyncClient(base_url=tabs.server.url, timeout=CAP_S) as client:
        assert (await client.get(f"/sessions/{session}")).status_code == 404
    assert await chat.page.get(f"document.querySelector('.session-rows a[href$=\"{session}\"]')") is None


async def test_a_reply_streams_is_stopped_and_asked_again(tabs: Tabs) -> None:
    session = await tabs.server.new_session("slow")
    chat = await open_chat(tabs, session)
    await chat.send("Count")
    await chat.replies("0 1 2 3 4 5 6 7")
    await chat.is_in("running")
    await chat.press("Stop")
    await chat.is_in("cancelled")
    await chat.has("Stopped.", ".turn:last-child .turn-end")
    [turn] = await turns_of(tabs, session)
    assert (turn["state"], turn["reason"]) == ("cancelled", "requested")
    await chat.replies_whole(turn["text"])
    assert (await chat.reply()).split() == turn["text"].split()
    await chat.press("Retry")
    await chat.has("2 of 2")
    await chat.replies("0 1 2")
    await chat.press("Stop")
    await chat.is_in("cancelled")
    await chat.press("Previous version")
    await chat.has("1 of 2")
    assert (await tabs.server.call("GET", f"/sessions/{session}"))["head"] == turn["id"]
    await chat.replies_whole(turn["text"])
    assert (await chat.reply()).split() == turn["text"].split()


async def test_a_message_is_edited_into_a_branch_and_a_conversation_is_forked(tabs: Tabs) -> None:
    session = await tabs.server.new_session()
    for text in ("One", "Two", "Three"):
        await tabs.server.say(session, text)
    chat = await open_chat(tabs, session)
    await chat.page.wait_for("document.querySelectorAll('.turn').length === 3")
    assert [it[1] for it in await chat.turns()] == ["One", "Two", "Three"]
    await chat.page.click(".turn:nth-child(2) .tools button:nth-of-type(3)")
    await chat.has("You edit an earlier message")
    await chat.page.type_in(".box", "Two, but better")
    await chat.page.press("Enter")
    await chat.page.wait_for("document.querySelectorAll('.turn').length === 2")
    await chat.is_in("completed")
    assert [it[1] for it in await chat.turns()] == ["One", "Two, but better"]
    await chat.press("Previous version")
    await chat.page.wait_for("document.querySelectorAll('.turn').length === 3")
    assert [it[1] for it in await chat.turns()] == ["One", "Two", "Three"]
    await chat.page.click(".turn:nth-child(2) .tools button:nth-of-type(4)")
    await chat.page.wait_for(f"!location.hash.endsWith('{session}')")
    await chat.page.wait_for("document.querySelectorAll('.turn').length === 2")
    assert [it[1] for it in await chat.turns()] == ["One", "Two"]


async def test_a_cut_connection_comes_back_with_nothing_lost_and_the_timeline_shows_it(tabs: Tabs) -> None:
    session = await tabs.server.new_session("slow")
    chat = await open_chat(tabs, session)
    await chat.send("Count")
    for times in (1, 2):
        await chat.replies(f" {9 * times} ")
        await chat.press_by_key("Cut my connection")
        await chat.page.wait_for(f"{LAST}.querySelectorAll('.moments [data-kind=back]').length === {times}")
    await chat.replies(" 40 ")
    await chat.has("2 cuts, none missing", ".sum")
    await chat.press("Stop")
    await chat.is_in("cancelled")
    [turn] = await turns_of(tabs, session)
    await chat.replies_whole(turn["text"])
    numbers = (await chat.reply()).split()
    assert numbers == turn["text"].split() == [str(it) for it in range(len(numbers))]
    await chat.has("Cancelled", ".turn:last-child .moments")
    # A silence is a moment, too: of a server, a network or a page that stands still for 1.5 s.
    moments = f"{LAST}.querySelectorAll('.moments [data-kind]:not([data-kind=gap]) b')"
    told = await chat.page.get(f"[...{moments}].map((it) => it.textContent)")
    assert told == ["Accepted", "Started", "First token", "Cut", "Back", "Cut", "Back", "Cancelled"]


async def test_a_reload_in_mid_stream_goes_on_with_the_whole_reply(tabs: Tabs) -> None:
    session = await tabs.server.new_session("slow")
    chat = await open_chat(tabs, session)
    await chat.send("Count")
    await chat.replies(" 9 ")
    await chat.page.reload()
    await chat.replies("0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 ")
    await chat.press("Stop")
    await chat.is_in("cancelled")
    [turn] = await turns_of(tabs, session)
    await chat.replies_whole(turn["text"])
    assert (await chat.reply()).split() == turn["text"].split()


async def test_a_message_whose_answer_was_lost_with_the_page_is_sent_once(tabs: Tabs) -> None:
    chat = ChatPage(await tabs.open())
    await chat.page.hold_answers("*/sessions/*/turns")
    await chat.send("Only once")
    session = await chat.session()
    with trio.fail_after(CAP_S):
        while not await turns_of(tabs, session):  # noqa: ASYNC110  another process's store sets no event
            await trio.sleep(0.02)
    await chat.page.call("Fetch.disable")
    await chat.page.reload()
    await chat.is_in("completed")
    assert [it["input"] for it in await turns_of(tabs, session)] == ["Only once"]
    assert [it[1] for it in await chat.turns()] == ["Only once"]


REFUSED_MESSAGES = """(() => {
  const real = fetch;
  const isLetGo = new Promise((done) => (window.letGo = done));
  const left = ({ signal }) => new Promise((_, fail) => signal.addEventListener("abort", () => fail(signal.reason)));
  window.fetch = async (url, options) => {
    if (options?.method !== "POST") return real(url, options);
    await Promise.race([isLetGo, left(options)]);
    const headers = { "Content-Type": "application/problem+json" };
    return new Response(JSON.stringify({ status: 409, code: "turn_in_progress" }), { status: 409, headers });
  };
})()"""
"""Has the page's messages refused, once they are let go."""


async def test_a_message_that_is_refused_after_its_conversation_was_left_is_in_its_box(tabs: Tabs) -> None:
    session, other = await tabs.server.new_session(), await tabs.server.new_session()
    chat = await open_chat(tabs, session)
    await chat.page.get(REFUSED_MESSAGES)
    await chat.send("Keep me")
    await chat.is_in("sending")
    await chat.page.get(f"location.hash = '#/chat/{other}'")
    await chat.page.wait_for("document.querySelector('.turn') === null")
    await chat.page.type_in(".box", "A draft")
    await chat.page.get("letGo()")
    await chat.has("A message to another conversation was refused. Another reply is being written", "#toasts")
    assert await chat.page.get("document.querySelector('.box').value") == "A draft"
    await chat.page.get(f"location.hash = '#/chat/{session}'")
    await chat.page.wait_for("document.querySelector('.box').value === 'Keep me'")
    await chat.has("Another reply is being written in this conversation", ".status")


REFUSED_EVENTS = """(() => {
  const real = fetch;
  window.refusedAt = [];
  window.fetch = async (url, options) => {
    if (!String(url).endsWith("/events")) return real(url, options);
    refusedAt.push(performance.now());
    document.body.dataset.refused = refusedAt.length;
    const problem = { status: 500, code: "internal_error", detail: "These events cannot be read." };
    const headers = { "Content-Type": "application/problem+json" };
    return new Response(JSON.stringify(problem), { status: 500, headers });
  };
})()"""
"""Has the page's calls for the events of turns refused, and their times kept."""


async def test_events_that_are_refused_are_asked_for_again_after_a_pause(tabs: Tabs) -> None:
    session = await tabs.server.new_session("calm")
    await tabs.server.say(session, "Go", background=True)
    chat = ChatPage(await tabs.open("#/chat"))
    await chat.page.get(REFUSED_EVENTS)
    await chat.page.get(f"location.hash = '#/chat/{session}'")
    await chat.page.wait_for("document.body.dataset.refused === '1'")
    await chat.has("These events cannot be read.", ".status")
    await chat.page.wait_for("document.body.dataset.refused >= 2")
    first, second = (await chat.page.get("refusedAt"))[:2]
    assert second - first >= 3900, "the pause is one of 4 s"


async def test_a_message_whose_answer_was_lost_is_shown_once(tabs: Tabs) -> None:
    session = await tabs.server.new_session("slow")
    tabs.expected.append("ERR_CONNECTION_RESET")
    chat = await open_chat(tabs, session)
    await chat.page.hold_answers("*/sessions/*/turns")
    await chat.send("Only once")
    with trio.fail_after(30):
        while not await turns_of(tabs, session):  # noqa: ASYNC110  another process's store sets no event
            await trio.sleep(0.02)
    await chat.page.get("document.dispatchEvent(new Event('visibilitychange')), null")  # the page looks at the server
    await chat.page.wait_for("document.querySelector('.turn[data-state=running]') !== null")
    assert [it[:2] for it in await chat.turns()] == [["running", "Only once"], ["sending", "Only once"]]
    await chat.page.lose_held_answer("POST")
    await chat.page.wait_for("document.querySelector('.turn[data-state=sending]') === null")
    await chat.replies("0 1 2 3")
    await chat.press("Stop")
    await chat.is_in("cancelled")
    assert [it[:2] for it in await chat.turns()] == [["cancelled", "Only once"]]
    assert len(await turns_of(tabs, session)) == 1


async def test_two_tabs_on_one_conversation_show_the_same(tabs: Tabs) -> None:
    session = await tabs.server.new_session("slow")
    one, other = await open_chat(tabs, session), await open_chat(tabs, session)
    await one.send("Count")
    await other.replies("0 1 2 3 4 5")
    await other.press("Stop")
    for chat in (one, other):
        await chat.is_in("cancelled")
    [turn] = await turns_of(tabs, session)
    for chat in (one, other):
        await chat.replies_whole(turn["text"])
        assert [(state, text, reply.split()) for state, text, reply in await chat.turns()] == [
            ("cancelled", "Count", turn["text"].split())
        ]


async def test_conflicts_and_limits_are_said_in_words_and_the_message_is_kept(tabs: Tabs) -> None:
    session = await tabs.server.new_session("slow")
    tabs.expected += ["status of 409", "status of 429"]
    chat = await open_chat(tabs, session)
    await tabs.server.say(session, "From elsewhere", background=True)
    await chat.send("From here")
    await chat.has("Another reply is being written in this conversation", ".status")
    await chat.page.wait_for("document.querySelector('.box').value === 'From here'")
    await chat.replies("0 1 2")
    assert [it[1] for it in await chat.turns()] == ["From elsewhere"]
    await chat.press("Queue")
    await chat.has("Waits until the reply before it has ended.")
    await chat.send("One too many")
    await chat.has("Too many messages wait in this conversation already. Attempt ", ".status")
    await chat.press("Stop")
    await chat.page.wait_for("document.querySelector('.turn').dataset.state === 'cancelled'")
    await chat.has("0 1 2", ".turn:nth-child(2) .answer")
    await chat.is_in("queued")
    await chat.press("Stop")
    await chat.page.wait_for("document.querySelector('.turn:nth-child(2)').dataset.state === 'cancelled'")
    await chat.replies("0 1 2")
    await chat.press("Stop")
    await chat.is_in("cancelled")
    assert [it[1] for it in await chat.turns()] == ["From elsewhere", "From here", "One too many"]


async def test_calls_wait_for_their_outputs_which_are_the_next_turn(tabs: Tabs) -> None:
    session = await tabs.server.new_session("calling")
    chat = await open_chat(tabs, session)
    await chat.send("What is the weather?")
    for _ in range(2):
        await chat.is_in("completed")
        await chat.has("waits for its output", ".call summary")
        summaries = await chat.page.get(f"[...{LAST}.querySelectorAll('summary')].map((it) => it.firstChild.data)")
        assert summaries == ["Reasoning", "Calls "]
        assert await chat.page.get(f"{LAST}.querySelector('.call code').textContent") == '{\n  "city": "Oslo"\n}'
        assert await chat.page.get("[...document.querySelectorAll('details')].map((it) => it.open)") == [False, True]
        await chat.page.reload()
    await chat.page.type_in(".call textarea", "4 °C")
    await chat.page.press("Control+Enter")
    await chat.page.wait_for("document.querySelectorAll('.turn').length === 2")
    await chat.is_in("completed")
    await chat.replies("The call returned")
    await chat.has("Result of get_weather", ".turn:last-child .asked")
    [_, turn] = await turns_of(tabs, session)
    said = turn["items"][0]
    assert (said["type"], said["output"]) == ("function_call_output", "4 °C")
    assert await chat.page.get("document.querySelector('form.calls textarea')") is None, "the call is answered"
    await chat.press("Edit")
    await chat.page.wait_for("document.activeElement.matches('.call textarea')")
    assert await chat.page.get("document.activeElement.value") == "4 °C"
    await chat.page.type_in(".call textarea", "5 °C")
    await chat.press("Send the output")
    await chat.has("2 of 2")
    await chat.replies("5 °C")


async def test_hostile_calls_are_text_and_a_refused_output_stays_in_its_box(tabs: Tabs) -> None:
    session = await tabs.server.new_session("calling twice")
    chat = await open_chat(tabs, session)
    await chat.send("Call")
    await chat.has("The model waits for the outputs of its calls.")
    shown = await chat.page.get(f"{LAST}.querySelector('.call code').textContent")
    assert shown == LAID_OUT
    assert await chat.page.get("document.querySelectorAll('.calls :is(img, b:not(.mono), script)').length") == 0
    assert await chat.page.get("window.hit ?? null") is None
    assert await violations(chat.page) == []
    tabs.expected.append("status of 413")
    await chat.page.get("Object.assign(document.querySelector('.call textarea'), { value: 'x'.repeat(300_000) }), null")
    await chat.press("Send 2 outputs")
    await chat.has("This message is longer than the server takes.", ".status")
    await chat.page.wait_for("document.querySelector('.call textarea')?.value.length === 300_000")
    await chat.page.type_in(".call textarea", "</textarea><script>window.hit = 1</script>")
    await chat.press("Send 2 outputs")
    await chat.page.wait_for("document.querySelectorAll('.turn').length === 2")
    await chat.is_in("completed")
    [_, turn] = await turns_of(tabs, session)
    assert [it["output"] for it in turn["items"][:2]] == ["</textarea><script>window.hit = 1</script>", ""]
    assert await chat.page.get("window.hit ?? null") is None


async def test_a_failure_says_why(tabs: Tabs) -> None:
    failing = await open_chat(tabs, await tabs.server.new_session("failing"))
    await failing.send("Fail")
    await failing.is_in("failed")
    await failing.has("The scripted model failed, as its URL says. (upstream_rejected)", ".turn-end")


async def test_a_hostile_reply_does_nothing_to_the_page_that_shows_it(tabs: Tabs) -> None:
    session = await tabs.server.new_session("hostile")
    chat = await open_chat(tabs, session)
    await chat.send("<script>window.hit = 'question'</script>")
    await chat.is_in("completed")
    await chat.replies("plain")
    assert await chat.page.get("window.hit ?? null") is None
    assert (
        await chat.page.get("document.querySelectorAll('.turns :is(script, img, iframe, object, style)').length") == 0
    )
    await chat.page.get(f"{LAST}.querySelectorAll('.markdown :not(a)').forEach((it) => it.click?.())")
    assert await chat.page.get("window.hit ?? null") is None
    assert await chat.copied(".code button") == "<script>window.hit = 'code'</script>\nrm -rf / # harmless[2K"


def create_thousand(url: str) -> None:
    """One connection and the library's plain client: with httpx the client takes longer than the server."""
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=CAP_S)) as connection:
        for number in range(1000):
            body = json.dumps({"title": f"Conversation number {number}"})
            connection.request("POST", "/sessions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 201


async def test_a_thousand_conversations_are_listed_and_searched(tabs: Tabs) -> None:
    await trio.to_thread.run_sync(create_thousand, tabs.server.url)
    chat = ChatPage(await tabs.open())
    await chat.page.wait_for("document.querySelectorAll('.session-rows li').length >= 50")
    assert await chat.page.get("document.querySelectorAll('.session-rows li').length") < 300, "only what is looked at"
    await chat.page.call("Page.bringToFront")
    for rows in range(100, 1001, 50):
        await chat.page.get("document.querySelector('.session-scroll').scrollTo(0, 1e7)")
        await chat.page.wait_for(f"document.querySelectorAll('.session-rows li').length >= {rows}")
    await chat.page.type_in(".sessions-search input", "number 777")
    await chat.page.wait_for("document.querySelectorAll('.session-rows li').length === 1")
    await chat.has("Conversation number 777", ".session-rows")
    await chat.page.click(".session-rows a")
    await chat.has("Conversation number 777", ".talk-title")
