"""Ephemeral turns: their work is that of other turns, and nothing of them is left after their end."""

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import (
    InvalidRequestError,
    MadeIsGoneError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.ids import new_session_id
from service.models.client import Options, TextFormat, Usage
from service.sessions.commands import NewSession, NewTurn
from service.sessions.events.events import TurnCompleted
from service.sessions.turns.turn import Turn
from service.sessions.upkeep.recovery import recover_once
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from service.storage.records import FACE_BYTES_MAX, IdempotencyKey
from tests.sessions.active.test_refusing_store import FullDisk
from tests.sessions.puppet import Reply, Stage, kinds, open_stage, read_all
from tests.sessions.test_branches import _a_conversation
from tests.sessions.turns.test_turns import start

FACE = {"metadata": msgspec.Raw(b'{"a": 1e2}')}
OPTIONS = Options(top_p=0.5, text_format=TextFormat(type="json_object"), stop=("END",))


async def alone(stage: Stage, text: str = "hi", **new: object) -> tuple[Turn, Reply]:
    """Start an ephemeral turn with a session of its own."""
    turn = await start(
        stage.sessions, new_session_id(), text, ephemeral=True, creates_session=True, session_is_new=True, **new
    )
    return turn, await stage.puppet.next_reply()


async def conversation(stage: Stage, *texts: str) -> list[str]:
    """A session ``s`` with turns that have ended. Returns their ids."""
    return [turn.id for turn in await _a_conversation(stage, *texts)]


def is_empty(store: MemoryStore) -> bool:
    return not (store._sessions or store._turns)


async def test_a_live_reader_and_a_waiter_get_all_of_an_ephemeral_turn(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        turn, reply = await alone(stage, options=OPTIONS, face=FACE)
        assert reply.request.options == OPTIONS
        assert (await stage.sessions.get_turn(turn.session_id, turn.id)).face == FACE
        log, watch = await stage.sessions.open_events(turn.session_id, turn.id)
        reply.think("hm")
        reply.say("Hello")
        reply.call("call_1", '{"a":', "1}")
        reply.finish("tool_calls")
        record = await turn.wait_ended()
        assert (record.state, record.text, [item.type for item in record.output]) == (
            "completed",
            "Hello",
            ["reasoning", "message", "function_call"],
        )
        assert is_empty(stage.store), "the store removes the turn before its readers hear of the end"
        events = await read_all(log)
        assert kinds(events) == [
            *("turn.started", "turn.reasoning", "turn.delta", "turn.call", "turn.arguments", "turn.arguments"),
            "turn.completed",
        ]
        assert isinstance(events[-1], TurnCompleted)
        assert events[-1].stored
        watch.release()
        for call in (
            lambda: stage.sessions.get_turn(turn.session_id, turn.id),
            lambda: stage.sessions.open_events(turn.session_id, turn.id),
            lambda: stage.sessions.cancel_turn(turn.session_id, turn.id),
            lambda: stage.sessions.get_session(turn.session_id),
        ):
            with pytest.raises(SessionNotFoundError):
                await call()


async def test_an_ephemeral_turn_in_a_conversation_sees_it_and_leaves_it_as_it_was(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        first, _ = await conversation(stage, "a", "b")
        before = await stage.sessions.get_session("s")
        messages = await stage.sessions.list_messages("s", limit=100)
        turn = await start(stage.sessions, "s", "c", ephemeral=True)
        beside = await start(stage.sessions, "s", "d", ephemeral=True, parent=first)
        replies = [await stage.puppet.next_reply() for _ in range(2)]
        asked = [[item.text for item in reply.request.prompt] for reply in replies]
        assert asked == [["a", "A", "b", "B", "c"], ["a", "A", "d"]]
        assert await stage.sessions.list_messages("s", limit=100) == messages
        with pytest.raises(TurnInProgressError):
            await start(stage.sessions, "s", "e")
        for reply in replies:
            reply.say("x")
            reply.finish()
        for ended in (turn, beside):
            assert (await ended.wait_ended()).text == "x"
        after = await stage.sessions.get_session("s")
        assert after == msgspec.structs.replace(
            before,
            last_accessed_at=after.last_accessed_at,
            expires_at=after.expires_at,
            input_tokens=before.input_tokens + 2,
            output_tokens=before.output_tokens + 4,
        )
        with pytest.raises(TurnNotFoundError):
            await stage.sessions.get_turn("s", turn.id)
        following = await start(stage.sessions, "s", "e")
        reply = await stage.puppet.next_reply()
        assert [item.text for item in reply.request.prompt] == ["a", "A", "b", "B", "e"]
        reply.finish()
        await following.wait_ended()


async def test_a_turn_that_waits_for_an_ephemeral_one_follows_the_head(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        (first,) = await conversation(stage, "a")
        turn = await start(stage.sessions, "s", "b", ephemeral=True)
        reply = await stage.puppet.next_reply()
        queued = await start(stage.sessions, "s", "c", on_conflict="queue")
        assert queued.record().parent == first
        await wait_all_tasks_blocked()
        assert queued.state == "queued"
        with pytest.raises(TurnNotFoundError):
            await start(stage.sessions, "s", "d", parent=turn.id, on_conflict="queue")
        reply.finish()
        later = await stage.puppet.next_reply()
        assert [item.text for item in later.request.prompt] == ["a", "A", "c"]
        later.finish()
        assert (await queued.wait_ended()).state == "completed"
        assert (await stage.sessions.get_session("s")).head == queued.id


def _supersede(stage: Stage, turn: Turn) -> object:
    return start(stage.sessions, turn.session_id, "next", on_conflict="supersede")


def _cancel(stage: Stage, turn: Turn) -> object:
    return stage.sessions.cancel_turn(turn.session_id, turn.id)


def _delete(stage: Stage, turn: Turn) -> object:
    return stage.sessions.delete_session(turn.session_id)


@pytest.mark.parametrize(
    ("end", "reason"), [(_supersede, "superseded"), (_cancel, "requested"), (_delete, "session_deleted")]
)
async def test_every_way_to_end_it_removes_it(
    autojump_clock: MockClock, end: Callable[[Stage, Turn], object], reason: str
) -> None:
    async with open_stage() as stage:
        await conversation(stage)
        turn = await start(stage.sessions, "s", "secret", ephemeral=True)
        reply = await stage.puppet.next_reply()
        reply.say("Hel")
        await wait_all_tasks_blocked()
        await end(stage, turn)  # type: ignore[misc]
        record = await turn.wait_ended()
        assert (record.state, record.reason, record.text) == ("cancelled", reason, "Hel")
        assert turn.id not in stage.store._turns
        if reason == "superseded":
            (await stage.puppet.next_reply()).finish()
        await wait_all_tasks_blocked()


async def test_an_ephemeral_turn_ends_when_its_last_client_leaves(autojump_clock: MockClock) -> None:
    async with open_stage(disconnect_grace_s=0) as stage:
        new = NewTurn(text="hi", ephemeral=True, creates_session=True, session_is_new=True)
        turn, watch = await stage.sessions.start_turn(new_session_id(), new)
        await stage.puppet.next_reply()
        watch.release()
        assert (await turn.wait_ended()).reason == "disconnected"
        assert is_empty(stage.store)


async def test_a_stop_of_the_service_interrupts_and_removes_it(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        turn, _ = await alone(stage)
        stage.stop.enter(Phase.DRAINING)
        stage.sessions.drain.interrupt_all()
        assert (await turn.wait_ended()).reason == "shutdown"
        assert is_empty(stage.store)


async def test_an_end_that_the_store_refuses_is_removed_later(autojump_clock: MockClock) -> None:
    store = FullDisk("end_turn")
    async with open_stage(store) as stage:
        turn, reply = await alone(stage)
        reply.say("Hello")
        reply.finish()
        assert not (await turn.wait_ended()).stored
        await wait_all_tasks_blocked()
        assert (await stage.sessions.get_turn(turn.session_id, turn.id)).text == "Hello", "until the store has the end"
        store.refused.clear()
        await recover_once(stage.sessions, shared=False)
        assert is_empty(stage.store)
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.get_turn(turn.session_id, turn.id)


async def test_a_repeated_call_with_a_key_finds_an_ephemeral_turn_while_it_is_open(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        new = NewTurn(
            text="hi",
            background=True,
            ephemeral=True,
            creates_session=True,
            session_is_new=True,
            key=IdempotencyKey(caller="", key="k", fingerprint=b"f"),
        )
        turn, watch = await stage.sessions.start_turn("s", new)
        again, other = await stage.sessions.start_turn("s", new)
        assert again is turn
        (await stage.puppet.next_reply()).finish()
        await turn.wait_ended()
        for it in (watch, other):
            it.release()
        with pytest.raises(MadeIsGoneError):
            await stage.sessions.start_turn("s", new)


async def test_no_title_is_written_of_an_ephemeral_turn(autojump_clock: MockClock) -> None:
    async with open_stage(title_model="titles") as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn = await start(stage.sessions, "s", "a secret", ephemeral=True)
        reply = await stage.puppet.next_reply()
        reply.say("told")
        reply.finish()
        await turn.wait_ended()
        await wait_all_tasks_blocked()
        assert len(stage.puppet.asked) == 1
        assert (await stage.sessions.get_session("s")).title is None


async def test_the_tokens_of_an_ephemeral_turn_count_once_in_a_kept_session(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn = await start(stage.sessions, "s", "hi", ephemeral=True)
        reply = await stage.puppet.next_reply()
        reply.usage = Usage(input_tokens=10, output_tokens=20)
        reply.finish()
        await turn.wait_ended()
        session = await stage.sessions.get_session("s")
        assert (session.input_tokens, session.output_tokens, session.message_count) == (10, 20, 0)


async def test_turns_that_start_at_once_with_one_new_session_leave_no_session_that_nobody_asked_for(
    autojump_clock: MockClock,
) -> None:
    """One of them is ephemeral, and either one may be the first."""
    async with open_stage() as stage:
        results: list[object] = []

        async def begin(**new: Any) -> None:
            try:
                turn = await start(stage.sessions, "s", creates_session=True, on_conflict="queue", **new)
            except (SessionNotFoundError, TurnNotFoundError) as error:
                results.append(error)
            else:
                results.append(turn)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(begin, ephemeral=True))
            nursery.start_soon(begin)
        turns = [it for it in results if isinstance(it, Turn)]
        for _ in turns:
            (await stage.puppet.next_reply()).finish()
        for turn in turns:
            await turn.wait_ended()
        kept = [turn for turn in turns if not turn.is_ephemeral]
        assert set(stage.store._turns) == {turn.id for turn in kept}
        assert set(stage.store._sessions) == {turn.session_id for turn in kept}


async def test_what_a_face_keeps_is_bounded(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        body = b'{"metadata": {"a": 1}, "input": "' + b"x" * 100_000 + b'"}'
        face = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        del face["input"]
        turn = await start(stage.sessions, new_session_id(), creates_session=True, session_is_new=True, face=face)
        kept = turn.record().face
        assert kept == {"metadata": msgspec.Raw(b'{"a": 1}')}
        (await stage.puppet.next_reply()).finish()
        await turn.wait_ended()
        fits = {"a": msgspec.Raw(b'"' + b"x" * (FACE_BYTES_MAX - 8) + b'"')}
        assert len(msgspec.json.encode(fits)) == FACE_BYTES_MAX
        await start(stage.sessions, turn.session_id, face=fits)
        (await stage.puppet.next_reply()).finish()
        too_large = fits | {"b": msgspec.Raw(b"1")}
        before = await stage.sessions.list_turns(turn.session_id, limit=9)
        with pytest.raises(InvalidRequestError, match=str(FACE_BYTES_MAX)):
            await start(stage.sessions, turn.session_id, face=too_large, on_conflict="queue")
        assert len((await stage.sessions.list_turns(turn.session_id, limit=9)).data) == len(before.data)
