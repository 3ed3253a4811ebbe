"""The items of a conversation in pages, in both orders, beside turns that run, branch and are deleted."""

import pytest
from trio.testing import MockClock

from service.errors import InvalidRequestError, ItemNotFoundError, SessionNotFoundError
from service.sessions.commands import NewItems, NewSession, NewTurn
from service.sessions.items import ItemsPage
from service.storage.records import SessionPatch
from tests.sessions.puppet import Stage, open_stage
from tests.sessions.turns.test_calls_in_prompts import asks, brings, calls, says
from tests.sessions.turns.test_turns import start

MUCH = 1024 * 1024


async def a_conversation(stage: Stage, length: int = 5) -> str:
    """A session with the texts a A b B …"""
    session_id = (await stage.sessions.create_session(NewSession())).id
    items = tuple(item for text in "abcdefghij"[:length] for item in (asks(text), says(text.upper())))
    await stage.sessions.add_items(session_id, NewItems(items=items))
    return session_id


async def a_page(
    stage: Stage, session_id: str, *, limit: int, after: str | None = None, newest_first: bool = True
) -> ItemsPage:
    return await stage.sessions.list_items(
        session_id, limit=limit, after=after, newest_first=newest_first, bytes_max=MUCH
    )


async def all_pages(stage: Stage, session_id: str, *, limit: int, newest_first: bool) -> list[str]:
    """The texts of each page."""
    pages: list[str] = []
    after = None
    while True:
        page = await a_page(stage, session_id, limit=limit, after=after, newest_first=newest_first)
        pages.append("".join(placed.item.text for placed in page.data))
        if not page.has_more:
            return pages
        after = page.data[-1].item.id


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("newest_first", [True, False])
async def test_pages_have_each_item_once_in_order(limit: int, newest_first: bool, autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await a_conversation(stage)
        pages = await all_pages(stage, session_id, limit=limit, newest_first=newest_first)
        whole = "EeDdCcBbAa" if newest_first else "aAbBcCdDeE"
        assert pages == [whole[start : start + limit] for start in range(0, 10, limit)]


@pytest.mark.parametrize("newest_first", [True, False])
async def test_a_conversation_without_items_is_an_empty_page(newest_first: bool, autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        assert await a_page(stage, session_id, limit=5, newest_first=newest_first) == ItemsPage((), has_more=False)
        with pytest.raises(SessionNotFoundError):
            await a_page(stage, "none", limit=5, newest_first=newest_first)


async def test_reasoning_and_calls_are_items_and_an_empty_reply_is_none(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        turn = await start(stage.sessions, session_id, "a")
        reply = await stage.puppet.next_reply()
        reply.think("hm")
        reply.call("1", "{}")
        reply.finish("tool_calls")
        await turn.wait_ended()
        await stage.sessions.add_items(session_id, NewItems(items=(brings("1", "out"),)))
        empty = await start(stage.sessions, session_id, "b")
        (await stage.puppet.next_reply()).finish()
        await empty.wait_ended()
        page = await a_page(stage, session_id, limit=9, newest_first=False)
        assert [(placed.item.type, placed.item.text) for placed in page.data] == [
            ("message", "a"),
            ("reasoning", "hm"),
            ("function_call", "{}"),
            ("function_call_output", "out"),
            ("message", "b"),
        ]


async def test_the_input_of_a_running_turn_is_there_and_its_output_comes_with_its_end(
    autojump_clock: MockClock,
) -> None:
    async with open_stage() as stage:
        session_id = await a_conversation(stage, 1)
        turn = await start(stage.sessions, session_id, "now")
        reply = await stage.puppet.next_reply()
        reply.say("Well")
        await turn.log.wait_beyond(1)
        for newest_first in (True, False):
            assert sorted(await all_pages(stage, session_id, limit=1, newest_first=newest_first)) == ["A", "a", "now"]
        reply.finish()
        await turn.wait_ended()
        assert await all_pages(stage, session_id, limit=9, newest_first=False) == ["aAnowWell"]


async def test_a_page_goes_on_towards_the_root_also_if_the_head_has_moved(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await a_conversation(stage, 3)
        first = await a_page(stage, session_id, limit=1)
        root = (await stage.sessions.list_turns(session_id, limit=1)).data[0]
        await stage.sessions.update_session(session_id, SessionPatch(head=root.id))
        assert await all_pages(stage, session_id, limit=9, newest_first=True) == ["Aa"]
        rest = await a_page(stage, session_id, limit=9, after=first.data[0].item.id)
        assert "".join(placed.item.text for placed in rest.data) == "cBbAa"
        with pytest.raises(InvalidRequestError, match="not on the path"):
            await a_page(stage, session_id, limit=9, after=first.data[0].item.id, newest_first=False)


async def test_an_item_of_no_turn_begins_no_page(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await a_conversation(stage, 1)
        other = await a_page(stage, await a_conversation(stage, 2), limit=1)
        for after in ("msg_0", other.data[0].item.id):
            for newest_first in (True, False):
                with pytest.raises(InvalidRequestError) as refused:
                    await a_page(stage, session_id, limit=1, after=after, newest_first=newest_first)
                assert refused.value.field == "after"


@pytest.mark.parametrize("newest_first", [True, False])
async def test_a_page_is_bounded_in_bytes_and_the_next_one_goes_on(
    newest_first: bool, autojump_clock: MockClock
) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        items = tuple(asks(name * 10_000) for name in "abcdef")
        for item in items:  # each is a turn of its own
            await stage.sessions.add_items(session_id, NewItems(items=(item,)))
        seen = ""
        after: str | None = None
        pages = 0
        has_more = True
        while has_more:
            page = await stage.sessions.list_items(
                session_id, limit=100, after=after, newest_first=newest_first, bytes_max=15_000
            )
            assert page.data
            seen += "".join(placed.item.text[0] for placed in page.data)
            after, has_more = page.data[-1].item.id, page.has_more
            pages += 1
        assert seen == ("fedcba" if newest_first else "abcdef")
        assert newest_first or pages > 1


async def test_pages_go_on_when_items_and_turns_are_deleted(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await a_conversation(stage, 4)
        first = await a_page(stage, session_id, limit=3)
        assert "".join(placed.item.text for placed in first.data) == "DdC"
        items = await a_page(stage, session_id, limit=9)
        gone = next(placed.item.id for placed in items.data if placed.item.text == "b")
        await stage.sessions.delete_item(session_id, gone)
        rest = await a_page(stage, session_id, limit=9, after=first.data[-1].item.id)
        assert "".join(placed.item.text for placed in rest.data) == "cBAa"
        await stage.sessions.delete_turn(session_id, first.data[-1].turn.id)
        with pytest.raises(InvalidRequestError):
            await a_page(stage, session_id, limit=9, after=first.data[-1].item.id)


async def test_an_item_is_found_on_every_branch_and_not_in_another_session(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await a_conversation(stage, 2)
        items = (await a_page(stage, session_id, limit=9, newest_first=False)).data
        await stage.sessions.add_items(session_id, NewItems(items=(asks("x"), calls("1")), parent=items[1].turn.id))
        for placed in items:
            found = await stage.sessions.find_item(session_id, placed.item.id)
            assert (found.item, found.turn.id) == (placed.item, placed.turn.id)
        with pytest.raises(ItemNotFoundError):
            await stage.sessions.find_item(await a_conversation(stage, 1), items[-1].item.id)
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.find_item("none", items[0].item.id)


async def test_items_of_an_ephemeral_turn_are_in_no_conversation(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await a_conversation(stage, 1)
        new = NewTurn(text="secret", ephemeral=True)
        turn, watch = await stage.sessions.start_turn(session_id, new)
        with watch:
            await stage.puppet.next_reply()
            assert await all_pages(stage, session_id, limit=9, newest_first=True) == ["Aa"]
            with pytest.raises(ItemNotFoundError):
                await stage.sessions.find_item(session_id, turn.record().input[0].id)
