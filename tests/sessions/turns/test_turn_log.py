"""One line for each turn's end, with what an operator needs, and the turn's ids on each line of its work."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import ModelError, StoreError
from service.models.retrying import RetryingClient
from service.sessions.commands import NewTurn
from service.sessions.turns.turn import Turn
from service.storage.memory import MemoryStore
from service.storage.records import EndResult
from service.telemetry.log_context import log_context
from tests.kept_log import kept_log, lines_of
from tests.sessions.puppet import Stage, open_stage

SECRET = "what only the user and the model know"


def ends_in(log: str) -> list[dict[str, Any]]:
    return lines_of(log, "turn ended")


class RefusingStore(MemoryStore):
    """A store that refuses the end of a turn while ``refuses`` is set."""

    refuses = False

    async def end_turn(self, *args: Any, **kwargs: Any) -> EndResult:
        if self.refuses:
            await trio.lowlevel.checkpoint()
            raise StoreError("The disk is full.")
        return await super().end_turn(*args, **kwargs)


async def start(stage: Stage, request_id: str | None = "req_1", **fields: Any) -> Turn:
    with log_context(request_id=request_id):  # the context of a request: the session's task starts in it
        turn, watch = await stage.sessions.start_turn("s", NewTurn(text=SECRET, request_id=request_id, **fields))
    if fields.get("background"):
        watch.release()
    return turn


async def test_a_turn_that_completes_has_one_line_with_its_ids_times_and_counts(autojump_clock: MockClock) -> None:
    with kept_log("json") as read:
        async with open_stage() as stage:
            turn = await start(stage, creates_session=True)
            reply = await stage.puppet.next_reply()
            await trio.sleep(2)
            reply.say(SECRET, "!")
            await trio.sleep(1)
            reply.finish()
            await turn.wait_ended()
        (line,) = ends_in(read())
        assert SECRET not in read()
    assert {name: line[name] for name in line if name not in ("timestamp", "pid")} == {
        "level": "info",
        "message": "turn ended",
        "logger": "lastcall.turn",
        "session_id": "s",
        "turn_id": turn.id,
        "request_id": "req_1",
        "upstream": "puppet",
        "model": "scripted",
        "outcome": "completed",
        "code": "stop",
        "input_tokens": 1,
        "output_tokens": 2,
        "first_token_s": 2.0,
        "total_s": 3.0,
        "attempts": 1,
        "events": 4,
        "text_length": len(SECRET) + 1,
        "text_bytes": len(SECRET) + 1,
    }


async def test_a_turn_that_fails_is_a_warning_that_says_why(autojump_clock: MockClock) -> None:
    with kept_log("json") as read:
        async with open_stage() as stage:
            stage.puppet.refuse = ModelError("upstream_auth", "The model server did not accept the API key (HTTP 401).")
            await (await start(stage, creates_session=True)).wait_ended()
        (line,) = ends_in(read())
    assert (line["level"], line["outcome"], line["code"]) == ("warning", "failed", "upstream_auth")
    assert "did not accept the API key" in line["error"]
    assert (line["first_token_s"], line["text_length"]) == (None, 0)


async def test_each_way_to_end_is_one_line_with_its_reason(autojump_clock: MockClock) -> None:
    with kept_log("json") as read:
        async with open_stage(queued_turns_max=2) as stage:
            first = await start(stage, "req_1", creates_session=True, background=True)
            queued = await start(stage, "req_2", on_conflict="queue", background=True)
            await stage.puppet.next_reply()
            await trio.sleep(5)
            await stage.sessions.cancel_turn("s", first.id)
            await stage.puppet.next_reply()
            newest = await start(stage, "req_3", on_conflict="supersede", background=True)
            await queued.wait_ended()
            await stage.puppet.next_reply()
        lines = {line["turn_id"]: line for line in ends_in(read())}
        assert len(ends_in(read())) == 3
    ends = [(line["outcome"], line["code"], line["request_id"], line["level"]) for line in lines.values()]
    assert ends == [
        ("cancelled", "requested", "req_1", "info"),
        ("cancelled", "superseded", "req_2", "info"),
        ("interrupted", "shutdown", "req_3", "info"),
    ]
    assert ["queued_s" in lines[turn.id] for turn in (first, queued, newest)] == [False, True, True]
    assert lines[queued.id]["queued_s"] == 5.0


async def test_an_end_that_the_store_refused_is_one_warning(autojump_clock: MockClock) -> None:
    store = RefusingStore()
    with kept_log("json") as read:
        async with open_stage(store) as stage:
            turn = await start(stage, creates_session=True)
            reply = await stage.puppet.next_reply()
            store.refuses = True
            reply.finish()
            await turn.wait_ended()
            await wait_all_tasks_blocked()
            store.refuses = False
            await stage.sessions.pending_writes.retry()
        (line,) = ends_in(read())
    assert (line["level"], line["outcome"], line["stored"]) == ("warning", "completed", False)


@pytest.mark.parametrize("turns", [1, 2])
async def test_a_retry_names_its_own_session_turn_request_and_upstream(autojump_clock: MockClock, turns: int) -> None:
    """This is also true if the request of another turn started the session's task."""
    with kept_log("json") as read:
        async with open_stage(queued_turns_max=2) as stage:
            retrying = RetryingClient(stage.puppet, retries_max=1)
            stage.sessions._acceptance._client_for = lambda _model: retrying
            stage.puppet.refuse = ModelError("upstream_unreachable", "refused", retryable=True)
            started = [
                await start(stage, f"req_{number}", creates_session=True, on_conflict="queue", background=True)
                for number in range(turns)
            ]
            for turn in started:
                await turn.wait_ended()
        lines = lines_of(read(), "model call will be repeated")
        attempts = [line["attempts"] for line in ends_in(read())]
    assert [(it["session_id"], it["turn_id"], it["request_id"], it["upstream"]) for it in lines] == [
        ("s", turn.id, f"req_{number}", "puppet") for number, turn in enumerate(started)
    ]
    assert attempts == [2] * turns


async def test_a_session_that_crashes_names_itself_and_no_request(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("broken")

    monkeypatch.setattr("service.sessions.active.acceptance.run_turn", crash)
    with kept_log("json") as read:
        async with open_stage() as stage:
            await (await start(stage, creates_session=True)).wait_ended()
        (crashed,) = lines_of(read(), "session crashed")
        (ended,) = ends_in(read())
    assert crashed["session_id"] == "s"
    assert "request_id" not in crashed
    assert (ended["outcome"], ended["code"], ended["request_id"]) == ("failed", "internal_error", "req_1")
