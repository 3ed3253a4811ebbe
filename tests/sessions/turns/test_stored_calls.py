"""Texts, reasoning and calls in any order: stored, restarted and replayed they give the same frames and items."""

import tempfile
from collections.abc import Sequence
from functools import partial

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.native.event_frames import encode_frame
from service.errors import StoreError
from service.sessions.commands import NewSession, NewTurn
from service.sessions.events.events import Event, TurnArguments, TurnCall, TurnDelta, TurnReasoning
from service.sessions.upkeep.checkpoints import checkpoint_turns
from service.storage.records import TurnRecord, is_json_object
from service.storage.sqlite import open_sqlite_store
from tests.sessions.puppet import CAP_S, IN_A_FILE, Reply, open_stage, read_all
from tests.storage.conftest import MEMORY_DISK

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4) | st.just("x" * 300)
STEPS = st.one_of(
    st.tuples(st.just("say"), texts),
    st.tuples(st.just("think"), texts),
    st.tuples(st.just("encrypt"), texts),
    st.tuples(st.just("call"), st.sampled_from(["{}", '{"a":', ""])),
    st.tuples(st.just("argue"), st.sampled_from(["1}", '{"b":2}', "}"])),
    st.tuples(st.sampled_from(["deliver", "checkpoint"]), st.none()),
)
scripts = st.lists(STEPS, max_size=16)
ends = st.sampled_from(["finish", "cancel", "crash"])


def take(reply: Reply, step: str, text: str | None, calls: int) -> int:
    """Take a step of a script. Returns the number of calls so far."""
    match step:
        case "say":
            reply.say(text or "")
        case "think":
            reply.think(text or "")
        case "encrypt":
            reply.encrypt(text or "", "{}")
        case "call":
            reply.call(f"call_{calls}", *filter(None, [text]))
            return calls + 1
        case "argue" if calls:
            reply.argue(len(text or "") % calls, text or "")
    return calls


async def run(script: Sequence[tuple[str, str | None]], end: str, path: str) -> None:
    async with open_sqlite_store(path) as store, open_stage(store, **IN_A_FILE) as stage:  # type: ignore[arg-type]
        session = (await stage.sessions.create_session(NewSession())).id
        turn, watch = await stage.sessions.start_turn(session, NewTurn(text="hi", background=True))
        watch.release()
        reply = await stage.puppet.next_reply()
        calls = 0
        for step, text in script:
            calls = take(reply, step, text, calls)
            if step in ("deliver", "checkpoint"):
                await trio.testing.wait_all_tasks_blocked()
            if step == "checkpoint":
                await checkpoint_turns(store, [turn], store_timeout_s=CAP_S)
        await trio.testing.wait_all_tasks_blocked()
        stored_seq = turn.stored_seq
        if end == "finish":
            reply.finish("tool_calls")
        else:
            if end == "crash":
                store.end_turn = refuse  # type: ignore[assignment, method-assign]
            await stage.sessions.cancel_turn(session, turn.id)
        ended = await turn.wait_ended()
        live = await read_all(turn.log)
    async with open_sqlite_store(path) as store, open_stage(store, **IN_A_FILE) as stage:  # type: ignore[arg-type]
        await store.recover(now=stage.clock())
        kept = await stage.sessions.get_turn(session, turn.id)
        log, _ = await stage.sessions.open_events(session, turn.id)
        replayed = await read_all(log)
        messages = await stage.sessions.list_messages(session, limit=100)
    check_items(kept, replayed)
    assert [message.item for message in messages.data] == [
        item for item in (*kept.input, *kept.output) if item.type != "reasoning"
    ]
    if end == "crash":
        assert kept.reason == "crash"
        frames = [encode_frame(event) for event in replayed[:-1]]
        assert frames == [encode_frame(event) for event in live[: max(stored_seq, len(frames))]]
        assert len(frames) >= stored_seq
    else:
        assert kept == ended
        assert [encode_frame(event) for event in replayed] == [encode_frame(event) for event in live]


async def refuse(*_: object, **__: object) -> object:
    await trio.lowlevel.checkpoint()
    raise StoreError("The disk is full.")


def check_items(turn: TurnRecord, events: Sequence[Event]) -> None:
    """The items are what the events tell."""
    assert turn.text == "".join(event.text for event in events if isinstance(event, TurnDelta))
    reasoning = "".join(item.text for item in turn.output if item.type == "reasoning")
    assert reasoning == "".join(event.text for event in events if isinstance(event, TurnReasoning))
    openings = {event.item: event for event in events if isinstance(event, TurnCall)}
    assert openings.keys() == {index for index, item in enumerate(turn.output) if item.type == "function_call"}
    for index, opening in openings.items():
        item = turn.output[index]
        assert (item.id, item.call_id, item.name) == (opening.id, opening.call_id, opening.name)
        pieces = (event.text for event in events if isinstance(event, TurnArguments) and event.item == index)
        assert item.text == "".join(pieces)
        assert item.complete == (turn.state == "completed" or is_json_object(item.text))


@given(scripts, ends)
@settings(max_examples=40)
def test_any_reply_is_the_same_after_it_was_stored_and_read_again(
    script: list[tuple[str, str | None]], end: str
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        trio.run(partial(run, script, end, f"{folder}/lastcall.db"))
