"""Titles that a model writes: when, for which session, and what happens beside and after the call."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import ModelError, StoreError
from service.models.client import Usage
from service.sessions import titles
from service.sessions.commands import NewItems, NewSession, text_input
from service.sessions.titles import CALLS_MAX, TIMEOUT_S, TITLE_LENGTH_MAX, title_of
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from service.storage.records import SessionPatch, SessionRecord
from tests.sessions.puppet import Reply, Stage, open_stage
from tests.sessions.turns.test_turns import start

USAGE = Usage(input_tokens=50, output_tokens=7, reasoning_tokens=2, cached_tokens=40)


@asynccontextmanager
async def open_titled_stage(store: MemoryStore | None = None) -> AsyncIterator[Stage]:
    async with open_stage(store, title_model="titles") as stage:
        yield stage


async def _complete(stage: Stage, session_id: str = "s", text: str = "How do I brew tea?") -> None:
    """Run a turn to its completion."""
    turn = await start(stage.sessions, session_id, text)
    reply = await stage.puppet.next_reply()
    assert reply.request.model != "titles"
    reply.say("With hot water.")
    reply.finish()
    assert (await turn.wait_ended()).state == "completed"
    await wait_all_tasks_blocked()


async def _next_title(stage: Stage) -> Reply:
    reply = await stage.puppet.next_reply()
    assert reply.request.model == "titles"
    return reply


async def _session(stage: Stage) -> SessionRecord:
    return await stage.sessions.get_session("s")


async def test_a_session_without_a_title_gets_one_after_its_first_turn(autojump_clock: MockClock) -> None:
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        before = await _session(stage)
        assert before.title is None
        reply = await _next_title(stage)
        asked = [message.text for message in reply.request.prompt]
        assert "How do I brew tea?" in asked[-1]
        assert "With hot water." in asked[-1]
        reply.usage = USAGE
        reply.say("Brewing ", "Tea")
        stage.clock.advance(5)
        reply.finish()
        await wait_all_tasks_blocked()
        after = await _session(stage)
        assert after.title == "Brewing Tea"
        assert (after.last_accessed_at, after.expires_at) == (before.last_accessed_at, before.expires_at), "no use"
        assert (before.updated_at, after.updated_at) == (before.last_accessed_at, stage.clock())
        assert (after.input_tokens, after.output_tokens) == (1 + 50, 2 + 7)
        assert (after.reasoning_tokens, after.cached_tokens) == (2, 40)
        assert (after.message_count, after.head) == (before.message_count, before.head)
        assert len((await stage.sessions.list_turns("s", limit=9)).data) == 1
        await _complete(stage)
        assert stage.puppet.open_replies == 0, "one title for a session"
        stage.clock.advance(1)
        await stage.sessions.update_session("s", SessionPatch(title=None))
        assert (await _session(stage)).updated_at == stage.clock()


async def test_without_the_setting_no_title_is_written(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        assert len(stage.puppet.asked) == 1


async def test_a_session_that_has_a_title_keeps_it_without_a_call(autojump_clock: MockClock) -> None:
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s", title="Mine"))
        await _complete(stage)
        assert len(stage.puppet.asked) == 1
        assert (await _session(stage)).title == "Mine"


async def test_a_title_that_the_caller_sets_meanwhile_wins_and_the_call_is_paid(autojump_clock: MockClock) -> None:
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        reply = await _next_title(stage)
        await stage.sessions.update_session("s", SessionPatch(title="Mine"))
        reply.say("Its own")
        reply.finish()
        await wait_all_tasks_blocked()
        session = await _session(stage)
        assert (session.title, session.titled_at, session.output_tokens) == ("Mine", None, 2 + 2)


async def test_a_turn_that_does_not_complete_gives_no_title_and_the_first_that_does_gives_one(
    autojump_clock: MockClock,
) -> None:
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await stage.sessions.add_items("s", NewItems(items=text_input("A note")))
        failing = await start(stage.sessions, "s")
        (await stage.puppet.next_reply()).fail(ModelError("upstream_error", "It broke."))
        await failing.wait_ended()
        cancelled = await start(stage.sessions, "s")
        await stage.puppet.next_reply()
        await stage.sessions.cancel_turn("s", cancelled.id)
        await wait_all_tasks_blocked()
        assert stage.puppet.open_replies == 0
        await _complete(stage)
        reply = await _next_title(stage)
        reply.say("Tea")
        reply.finish()
        await wait_all_tasks_blocked()
        assert (await _session(stage)).title == "Tea"


async def test_a_call_that_fails_is_one_line_of_the_log_and_is_not_repeated(autojump_clock: MockClock) -> None:
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        with capture_logs() as logs:
            await _complete(stage)
            reply = await _next_title(stage)
            reply.usage = USAGE
            reply.fail(ModelError("upstream_error", "It broke."))
            await wait_all_tasks_blocked()
        told = [line for line in logs if line["event"] == "no title was written"]
        assert [(line["session_id"], line["error"]) for line in told] == [("s", "It broke.")]
        session = await _session(stage)
        assert (session.title, session.input_tokens) == (None, 1 + 50), "what was counted is paid for"
        await _complete(stage)
        assert stage.puppet.open_replies == 0
        assert (await _session(stage)).title is None


async def test_a_call_has_a_deadline(autojump_clock: MockClock) -> None:
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        began = trio.current_time()
        reply = await _next_title(stage)
        reply.say("Never")
        with capture_logs() as logs:
            await reply.closed.wait()
            await wait_all_tasks_blocked()
        assert trio.current_time() == began + TIMEOUT_S
        assert [line["log_level"] for line in logs] == ["warning"]
        assert (await _session(stage)).title is None


async def test_an_endless_answer_is_left_when_there_is_enough_of_it(autojump_clock: MockClock) -> None:
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        reply = await _next_title(stage)
        for _ in range(10):
            reply.say("word " * 100)
            await wait_all_tasks_blocked()
        assert reply.closed.is_set()
        assert len((await _session(stage)).title or "") in range(TITLE_LENGTH_MAX // 2, TITLE_LENGTH_MAX + 1)


async def test_a_deletion_cancels_the_call(autojump_clock: MockClock) -> None:
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        reply = await _next_title(stage)
        with capture_logs() as logs:
            await stage.sessions.delete_session("s")
            await wait_all_tasks_blocked()
        assert reply.closed.is_set()
        assert logs == []
        await stage.sessions.create_session(NewSession(id="s"))
        assert (await _session(stage)).title is None


async def test_a_title_of_messages_that_were_deleted_meanwhile_is_not_kept(autojump_clock: MockClock) -> None:
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        reply = await _next_title(stage)
        message, _ = (await stage.sessions.list_messages("s", limit=9)).data
        await stage.sessions.delete_item("s", message.item.id)
        reply.say("Tea")
        reply.finish()
        await wait_all_tasks_blocked()
        session = await _session(stage)
        assert (session.title, session.output_tokens) == (None, 2 + 2)


async def test_a_later_session_of_the_id_does_not_get_the_title(autojump_clock: MockClock) -> None:
    """Another process may delete the session, and does not know of the call."""
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        reply = await _next_title(stage)
        await stage.store.mark_deleted("s", now=stage.clock())
        await stage.store.remove_deleted("s")
        stage.clock.advance(1)
        await stage.sessions.create_session(NewSession(id="s"))
        reply.say("Tea")
        reply.finish()
        await wait_all_tasks_blocked()
        session = await _session(stage)
        assert (session.title, session.output_tokens) == (None, 0)


async def test_a_stop_cancels_all_calls_at_once_and_begins_none(autojump_clock: MockClock) -> None:
    async with open_titled_stage() as stage:
        for name in ("s", "t"):
            await stage.sessions.create_session(NewSession(id=name))
        running = await start(stage.sessions, "t")
        last = await stage.puppet.next_reply()
        await _complete(stage)
        reply = await _next_title(stage)
        assert not stage.sessions.drain.is_idle, "the other turn runs"
        stage.stop.enter(Phase.DRAINING)
        await wait_all_tasks_blocked()
        assert reply.closed.is_set()
        last.finish()
        await running.wait_ended()
        await wait_all_tasks_blocked()
        assert stage.puppet.open_replies == 0
        assert stage.sessions.drain.is_idle
        assert (await _session(stage)).title is None


async def test_a_few_titles_are_written_at_once_and_a_bounded_number_waits(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(titles, "WAITING_MAX", CALLS_MAX + 1)
    async with open_titled_stage() as stage:
        names = [f"s{n}" for n in range(CALLS_MAX + 3)]
        turns = []
        for name in names:
            await stage.sessions.create_session(NewSession(id=name))
            turns.append(await start(stage.sessions, name))
        for _ in names:
            (await stage.puppet.next_reply()).finish()
        for turn in turns:
            await turn.wait_ended()
        await wait_all_tasks_blocked()
        assert stage.puppet.open_replies == CALLS_MAX
        for _ in range(CALLS_MAX + 1):
            reply = await _next_title(stage)
            reply.say("Tea")
            reply.finish()
        await wait_all_tasks_blocked()
        sessions = (await stage.sessions.list_sessions(limit=99)).data
        assert [session.title for session in sessions].count("Tea") == CALLS_MAX + 1
        assert stage.puppet.open_replies == 0


async def test_a_store_that_refuses_the_title_is_one_line_of_the_log(autojump_clock: MockClock) -> None:
    class Refuses(MemoryStore):
        async def keep_title(self, *_: object, **__: object) -> bool:
            await trio.lowlevel.checkpoint()
            raise StoreError("The disk is full.")

    async with open_titled_stage(Refuses()) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        reply = await _next_title(stage)
        with capture_logs() as logs:
            reply.say("Tea")
            reply.finish()
            await wait_all_tasks_blocked()
        assert [(line["event"], line["error"]) for line in logs] == [("no title was written", "The disk is full.")]


FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        ("Brewing Tea", "Brewing Tea"),
        ("\n\n  Brewing\t Tea \r\nMore text", "Brewing Tea"),
        ('"Brewing Tea"', "Brewing Tea"),
        ("\u201cBrewing Tea.\u201d", "Brewing Tea"),
        ("\u00abDu th\u00e9\u00bb", "Du th\u00e9"),
        ("\u300c\u8336\u306e\u5165\u308c\u65b9\u300d", "\u8336\u306e\u5165\u308c\u65b9"),
        ('"Tea" and "Coffee"', '"Tea" and "Coffee"'),
        ("The dogs' tea", "The dogs' tea"),
        ("# **Brewing Tea**", "Brewing Tea"),
        ('Title: "Brewing Tea"', "Brewing Tea"),
        ("<think>\nThe user wants tea.\n</think>\n\nBrewing Tea", "Brewing Tea"),
        ("<think>The user", None),
        ("Tea?", "Tea?"),
        ("Tea...", "Tea..."),
        ("a\x00b\u202ec\x1bd\ufeff", "abcd"),
        (f"{FAMILY} at tea", f"{FAMILY} at tea"),
        ("\ud83d", None),
        ("", None),
        (" \n\u200b\n", None),
        ("---\nTea", "Tea"),
        ('""', None),
    ],
)
def test_a_title_is_one_plain_line_of_the_answer(answer: str, title: str | None) -> None:
    assert title_of(answer) == title


@pytest.mark.parametrize(
    "text", ["word " * 50, "x" * 500, FAMILY * 60, "e\u0301" * 90, "\u8336" * 200, "a" + "\u0301" * 500]
)
def test_a_long_title_is_cut_and_no_character_is_cut_in_two(text: str) -> None:
    title = title_of(text)
    assert title is not None
    assert TITLE_LENGTH_MAX // 2 <= len(title) <= TITLE_LENGTH_MAX
    assert title.endswith("\u2026")
    assert not title.endswith(("\u200d\u2026", " \u2026"))
    title.encode()


ANSWER_MAX = 4000
"""The code points of an answer that are looked at."""


@pytest.mark.parametrize(
    ("begin", "filling"),
    [
        ("Sure.\n", " "),
        ("", " "),
        ("", "\n"),
        ("", "\u200b"),
        ("", "<think>"),
        ("", "<think></think>"),
        ("", "title "),
        ("", "#>*- "),
        ("", "\"'`"),
        ("", "a\u0301"),
        ("", "\u0301"),
    ],
)
def test_the_title_of_any_answer_is_found_in_one_pass(begin: str, filling: str) -> None:
    """An answer of one event may be long, and its author is the caller: no client is served meanwhile."""
    for length in (ANSWER_MAX, 50_000):
        answer = begin + filling * (length // len(filling)) + "x"
        took_s = []
        for _ in range(5):
            began_at = time.thread_time()
            title_of(answer)
            took_s.append(time.thread_time() - began_at)
        assert min(took_s) < 0.005


async def test_of_an_answer_in_one_event_no_more_is_looked_at_than_of_one_in_many(autojump_clock: MockClock) -> None:
    assert title_of("-\n" * (ANSWER_MAX // 2 - 2) + "Tea") == "Tea"
    assert title_of("-\n" * (ANSWER_MAX // 2) + "Tea") is None
    async with open_titled_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        await _complete(stage)
        reply = await _next_title(stage)
        reply.say("-\n" * ANSWER_MAX + "Tea")
        reply.finish()
        await wait_all_tasks_blocked()
        assert (await _session(stage)).title is None
