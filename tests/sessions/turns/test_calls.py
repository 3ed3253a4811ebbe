"""Calls of functions in turns: events, items, bounds and ends; the outputs that the next turn brings."""

from collections.abc import Sequence

import msgspec
import pytest
import trio
from trio.testing import MockClock

from service.errors import ResumeConflictError
from service.ids import new_item_id
from service.models.client import (
    ArgumentsDelta,
    CallOpened,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    Message,
    Tools,
)
from service.sessions.commands import NewSession, NewTurn, text_input
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import TurnArguments, TurnCall, TurnDelta, TurnReasoning
from service.sessions.turns import reply as turn_reply
from service.sessions.turns.prompt import BEGINNING_LEFT_OUT
from service.sessions.turns.turn import Turn
from service.storage.records import Item, LeftOut, TurnRecord
from tests.sessions.puppet import LeavesPathsOut, Reply, Stage, kinds, open_stage, read_all


def output(call_id: str, text: str) -> Item:
    return Item(
        id=new_item_id("function_call_output"), type="function_call_output", role="user", text=text, call_id=call_id
    )


async def begin(stage: Stage, session: str, new: NewTurn) -> tuple[Turn, Reply]:
    turn, watch = await stage.sessions.start_turn(session, msgspec.structs.replace(new, background=True))
    watch.release()
    return turn, await stage.puppet.next_reply()


async def new_session(stage: Stage) -> str:
    return (await stage.sessions.create_session(NewSession())).id


ASK = NewTurn(text="hi", on_disconnect="continue")


async def test_calls_are_events_and_items_with_the_same_ids(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await new_session(stage)
        turn, reply = await begin(stage, session, ASK)
        reply.think("hm")
        reply.say("Let", " me")
        reply.call("call_a", '{"x":', name="get")
        reply.call("call_b", name="put", upstream='{"u":1}')
        reply.argue(0, "1}")
        reply.argue(1, "{}")
        reply.say("Done")
        reply.finish("tool_calls")
        ended = await turn.wait_ended()
        events = await read_all(turn.log)
        assert [type(event) for event in events[1:-1]] == [
            *(TurnReasoning, TurnDelta, TurnDelta, TurnCall, TurnArguments),
            *(TurnCall, TurnArguments, TurnArguments, TurnDelta),
        ]
        assert kinds(events)[-1] == "turn.completed"
        openings = [event for event in events if isinstance(event, TurnCall)]
        pieces = [(event.item, event.text) for event in events if isinstance(event, TurnArguments)]
        assert [(it.item, it.call_id, it.name) for it in openings] == [(2, "call_a", "get"), (3, "call_b", "put")]
        assert pieces == [(2, '{"x":'), (2, "1}"), (3, "{}")]
        assert [(item.type, item.text, item.call_id, item.complete) for item in ended.output] == [
            ("reasoning", "hm", "", True),
            ("message", "Let me", "", True),
            ("function_call", '{"x":1}', "call_a", True),
            ("function_call", "{}", "call_b", True),
            ("message", "Done", "", True),
        ]
        assert [it.id for it in openings] == [ended.output[2].id, ended.output[3].id]
        assert ended.output[3].upstream == '{"u":1}'
        assert (ended.finish_reason, ended.text) == ("tool_calls", "Let meDone")
        messages = await stage.sessions.list_messages(session, limit=10)
        assert [message.item for message in messages.data] == [*ended.input, *ended.output[1:]]
        assert (await stage.sessions.get_session(session)).message_count == 5
        assert await stage.sessions.get_turn(session, turn.id) == ended


async def test_a_text_and_reasoning_in_turns_are_two_items(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        turn, reply = await begin(stage, await new_session(stage), ASK)
        for _ in range(3):
            reply.think("a")
            reply.say("b")
        reply.finish()
        assert [item.text for item in (await turn.wait_ended()).output] == ["aaa", "bbb"]


async def test_encrypted_reasoning_is_kept_with_the_reasoning_that_it_follows(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await new_session(stage)
        turn, reply = await begin(stage, session, ASK)
        reply.think("hm")
        reply.encrypt("gAAA", '{"n":1}')
        reply.encrypt("gBBB")
        reply.call("a")
        reply.finish("tool_calls")
        ended = await turn.wait_ended()
        assert [(it.type, it.text, it.encrypted, it.upstream) for it in ended.output[:-1]] == [
            ("reasoning", "hm", "gAAA", '{"n":1}'),
            ("reasoning", "", "gBBB", ""),
        ]
        assert kinds(await read_all(turn.log)) == ["turn.started", "turn.reasoning", "turn.call", "turn.completed"]
        _, reply = await begin(stage, session, NewTurn(items=(output("a", "1"),)))
        assert [item.text for item in reply.request.prompt] == ["hi", "gAAA", "gBBB", "hm", "", "1"]
        reply.finish()


async def test_outputs_go_to_the_model_with_their_calls_and_the_tools(autojump_clock: MockClock) -> None:
    tools = Tools(functions=(FunctionTool(name="get"),), choice="auto")
    async with open_stage() as stage:
        session = await new_session(stage)
        turn, reply = await begin(stage, session, msgspec.structs.replace(ASK, tools=tools))
        assert reply.request.tools == tools
        reply.call("a", "{}", name="get")
        reply.finish("tool_calls")
        await turn.wait_ended()
        items = (output("a", "4 °C"), *text_input("and?"))
        turn, reply = await begin(stage, session, NewTurn(items=items))
        assert reply.request.tools == Tools(), "tools are for one turn"
        assert reply.request.prompt == (
            Message("user", "hi"),
            FunctionCall("a", "get", "{}"),
            FunctionCallOutput("a", "4 °C"),
            Message("user", "and?"),
        )
        reply.finish()
        assert (await turn.wait_ended()).input == items


async def test_a_fork_has_calls_with_ids_of_its_own_and_goes_on_from_them(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await new_session(stage)
        turn, reply = await begin(stage, session, ASK)
        reply.call("a", "{}")
        reply.finish("tool_calls")
        await turn.wait_ended()
        copy = await stage.sessions.fork_session(session)
        assert copy.head is not None
        record = await stage.sessions.get_turn(copy.id, copy.head)
        (call,) = record.output
        log, _ = await stage.sessions.open_events(copy.id, copy.head)
        (opening,) = (event for event in await read_all(log) if isinstance(event, TurnCall))
        assert call.call_id == opening.call_id == "a"
        assert call.id == opening.id != turn.record().output[0].id
        _, reply = await begin(stage, copy.id, NewTurn(items=(output("a", "1"),)))
        assert [item.text for item in reply.request.prompt] == ["hi", "{}", "1"]
        reply.finish()


@pytest.mark.parametrize(("arguments", "complete"), [('{"x":1}', True), ('{"x":', False), ("", False)])
async def test_a_call_of_a_turn_that_was_cancelled_is_complete_if_its_arguments_are_whole(
    arguments: str, complete: bool, autojump_clock: MockClock
) -> None:
    async with open_stage() as stage:
        session = await new_session(stage)
        turn, reply = await begin(stage, session, ASK)
        reply.call("a", *filter(None, [arguments]))
        await trio.testing.wait_all_tasks_blocked()
        assert turn.record().output[0].complete == complete
        ended = await stage.sessions.cancel_turn(session, turn.id)
        assert [item.complete for item in ended.output] == [complete]
        assert await stage.sessions.get_turn(session, turn.id) == ended


async def test_arguments_that_are_no_object_are_complete_if_the_model_says_so(autojump_clock: MockClock) -> None:
    for reason, complete in ("tool_calls", True), ("stop", True), ("length", False), ("content_filter", False):
        async with open_stage() as stage:
            turn, reply = await begin(stage, await new_session(stage), ASK)
            reply.call("a", "not JSON")
            reply.finish(reason)  # type: ignore[arg-type]
            assert (await turn.wait_ended()).output[0].complete == complete


async def test_arguments_and_names_count_against_the_bound_of_a_reply(autojump_clock: MockClock) -> None:
    async with open_stage(reply_bytes_max=1024) as stage:
        session = await new_session(stage)
        turn, reply = await begin(stage, session, ASK)
        reply.call("a", "x" * 500, "y" * 600)
        ended = await turn.wait_ended()
        assert ended.error is not None
        assert ended.error.code == "reply_too_large"
        assert [len(item.text) for item in ended.output] == [500]
        turn, reply = await begin(stage, session, ASK)
        for number in range(100):
            reply.call(f"{number:020}")
        ended = await turn.wait_ended()
        assert ended.error is not None
        assert ended.error.code == "reply_too_large"
        assert len(ended.output) == 1024 // 21
        turn, reply = await begin(stage, session, ASK)
        reply.encrypt("e" * 1024)
        ended = await turn.wait_ended()
        assert ended.error is not None
        assert ended.error.code == "reply_too_large"


async def test_a_long_call_beyond_the_bound_of_prompts_stays_with_its_output(autojump_clock: MockClock) -> None:
    async with open_stage(prompt_bytes_max=4096, input_bytes_max=2048) as stage:
        session = await new_session(stage)
        turn, reply = await begin(stage, session, ASK)
        reply.call("a", '"' + "x" * 5000 + '"')
        reply.finish("tool_calls")
        await turn.wait_ended()
        turn, reply = await begin(stage, session, NewTurn(items=(output("a", "1"),)))
        assert [item.text[:1] for item in reply.request.prompt] == ["h", '"', "1"]
        reply.finish()
        await turn.wait_ended()
        assert turn.record().left_out is None


async def test_the_output_of_an_unknown_call_reads_the_path_once(autojump_clock: MockClock) -> None:
    class Counting(LeavesPathsOut):
        reads = 0

        async def read_path(self, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
            self.reads += bytes_max is not None  # measuring reads without a bound
            return await super().read_path(session_id, turn_id, bytes_max=bytes_max)

    store = Counting()
    async with open_stage(store, prompt_bytes_max=4096, input_bytes_max=2048) as stage:
        session = await new_session(stage)
        for text in "x" * 2000, "y" * 2000, "z" * 1000:
            turn, reply = await begin(stage, session, NewTurn(text=text))
            reply.say("R")
            reply.finish()
            await turn.wait_ended()
        reads = store.reads
        turn, reply = await begin(stage, session, NewTurn(items=(output("none", "1"),)))
        reply.finish()
        await turn.wait_ended()
        assert turn.record().left_out == LeftOut(2, 2001)
        assert store.reads == reads + 1


async def test_a_client_that_comes_back_with_the_same_outputs_gets_its_turn(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await new_session(stage)
        turn, reply = await begin(stage, session, NewTurn(items=(output("a", "1"),)))
        reply.finish()
        await turn.wait_ended()
        turn_id, _, watch = await stage.sessions.resume_newest(session, said=(output("a", "1"),), after=1)
        watch.release()
        assert turn_id == turn.id
        for other in (output("a", "2"),), (output("b", "1"),), text_input("1"), ():
            with pytest.raises(ResumeConflictError):
                await stage.sessions.resume_newest(session, said=other, after=1)


async def test_the_line_of_a_turns_end_counts_its_calls(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    from structlog.testing import capture_logs

    with capture_logs() as lines:
        async with open_stage() as stage:
            session = await new_session(stage)
            for calls in 2, 0:
                turn, reply = await begin(stage, session, ASK)
                for number in range(calls):
                    reply.call(f"{number}")
                reply.finish()
                await turn.wait_ended()
    assert [line.get("calls") for line in lines if line["event"] == "turn ended"] == [2, None]


def test_what_is_left_out_is_said_in_words_that_no_model_takes_for_the_users() -> None:
    assert BEGINNING_LEFT_OUT.startswith("[")


def test_the_calls_of_a_model_are_told_apart_from_those_of_an_earlier_process() -> None:
    log = EventLog(bytes_max=1000)
    reply = turn_reply.Reply(log, "t")
    earlier = Item(id="c", type="function_call", role="assistant", text='{"a": 1}', call_id="call_1", name="f")
    reply.restore([earlier, Item(id="m", role="assistant", text="So far")])
    opened = CallOpened(0, "call_2", "g", "")
    call = reply.event_of(opened)
    assert isinstance(call, TurnCall)
    reply.note(opened, call, 0)
    arguments = reply.event_of(ArgumentsDelta(0, "{}"))
    assert isinstance(arguments, TurnArguments)
    assert (call.item, arguments.item, reply.calls) == (2, 2, 2)
