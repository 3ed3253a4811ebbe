"""What a turn asks of a model: its own options win over those of its session, and the bound of its model counts."""

from typing import Any

import pytest
from trio.testing import MockClock

from service.models.client import NO_OPTIONS, Message, Options, TextFormat
from service.sessions.commands import NewSession, NewTurn
from service.settings import Upstream
from service.storage.memory import MemoryStore
from service.storage.records import LeftOut, SessionPatch
from tests.sessions.puppet import LeavesPathsOut, Stage, open_stage
from tests.sessions.turns.test_turns import start

OF_SESSION = {"model": "s", "system_message": "of the session", "temperature": 0.5, "max_output_tokens": 10}
OF_TURN = {"model": "t", "system_message": "of the turn", "temperature": 0.0, "max_output_tokens": 20}


async def asked(stage: Stage, session_id: str, **new: Any) -> dict[str, Any]:
    """Start a turn; returns what the model was asked."""
    turn = await start(stage.sessions, session_id, "now", **new)
    reply = await stage.puppet.next_reply()
    reply.finish()
    await turn.wait_ended()
    request = reply.request
    first = request.prompt[0]
    return {
        "model": request.model,
        "system_message": first.text if isinstance(first, Message) and first.role == "system" else None,
        "temperature": request.temperature,
        "max_output_tokens": request.max_output_tokens,
    }


async def test_a_turn_has_the_options_of_its_session(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession(**OF_SESSION))).id  # type: ignore[arg-type]
        assert await asked(stage, session_id) == OF_SESSION


@pytest.mark.parametrize("option", OF_TURN)
async def test_an_option_of_a_turn_wins_for_this_turn_alone(autojump_clock: MockClock, option: str) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession(**OF_SESSION))).id  # type: ignore[arg-type]
        assert await asked(stage, session_id, **{option: OF_TURN[option]}) == OF_SESSION | {option: OF_TURN[option]}
        assert await asked(stage, session_id) == OF_SESSION


async def test_options_that_nothing_names_are_left_to_the_model_server(autojump_clock: MockClock) -> None:
    async with open_stage(model="default") as stage:
        session_id = (await stage.sessions.create_session(NewSession(**OF_SESSION))).id  # type: ignore[arg-type]
        unset = SessionPatch(model=None, system_message=None, temperature=None, max_output_tokens=None)
        await stage.sessions.update_session(session_id, unset)
        assert await asked(stage, session_id) == dict.fromkeys(OF_SESSION) | {"model": "default"}
        turn = await stage.sessions.get_turn(session_id, (await stage.sessions.get_session(session_id)).head or "")
        assert (turn.system_message, turn.temperature, turn.max_output_tokens) == (None, None, None)


async def test_a_turn_keeps_the_options_that_it_ran_with(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession(**OF_SESSION))).id  # type: ignore[arg-type]
        await asked(stage, session_id, system_message="own")
        turn = await stage.sessions.get_turn(session_id, (await stage.sessions.get_session(session_id)).head or "")
        assert (turn.model, turn.system_message, turn.temperature, turn.max_output_tokens) == ("s", "own", 0.5, 10)


@pytest.mark.parametrize("kind", [MemoryStore, LeavesPathsOut])
async def test_the_prompts_of_a_model_have_its_own_bound(autojump_clock: MockClock, kind: type[MemoryStore]) -> None:
    upstream = Upstream(
        name="u", url="scripted:", models=("small", "large"), prompt_bytes_max={"small": 3600, "large": 10_000}
    )
    async with open_stage(kind(), upstreams=[upstream], input_bytes_max=1024, prompt_bytes_max=2560) as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        for text in ("a", "b", "c", "d"):
            turn, watch = await stage.sessions.start_turn(session_id, NewTurn(text=text * 1000, model="large"))
            with watch:
                reply = await stage.puppet.next_reply()
                assert len(reply.request.prompt) == "abcd".index(text) * 2 + 1
                reply.say("r")
                reply.finish()
                assert (await turn.wait_ended()).left_out is None
        small = await start(stage.sessions, session_id, "now", model="small")
        reply = await stage.puppet.next_reply()
        assert [item.text[:1] for item in reply.request.prompt] == ["b", "r", "c", "r", "d", "r", "n"]
        reply.finish()
        assert (await small.wait_ended()).left_out == LeftOut(2, 1001)


OPTIONS = Options(
    top_p=0.5,
    text_format=TextFormat(type="json_schema", name="x", schema={"type": "object"}),
    reasoning_effort="low",
    verbosity="low",
    presence_penalty=1,
    frequency_penalty=-1,
    stop=("END",),
    seed=7,
)


@pytest.mark.parametrize("kind", [MemoryStore, LeavesPathsOut])
async def test_further_options_go_to_the_model_for_this_turn_alone(
    autojump_clock: MockClock, kind: type[MemoryStore]
) -> None:
    async with open_stage(kind()) as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        turns = [
            await start(stage.sessions, session_id, "a"),
            await start(stage.sessions, session_id, "b", options=OPTIONS, on_conflict="queue"),
            await start(stage.sessions, session_id, "c", on_conflict="queue"),
        ]
        for turn, options in zip(turns, (NO_OPTIONS, OPTIONS, NO_OPTIONS), strict=True):
            reply = await stage.puppet.next_reply()
            assert reply.request.options == options
            reply.finish()
            assert (await turn.wait_ended()).options == options
            assert (await stage.sessions.get_turn(session_id, turn.id)).options == options
