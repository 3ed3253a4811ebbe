"""Large answers are encoded in steps, and are the same as in one."""

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from service.api.http.long_json import encode_json
from service.api.native.turn_wire import Turn
from service.settings import Settings
from service.storage.records import Item
from tests.longest_step import STEP_MAX_S, watching_steps
from tests.storage.rows import a_turn, ended

REPLY_BYTES = Settings.model_fields["reply_bytes_max"].default
INPUT_BYTES = Settings.model_fields["input_bytes_max"].default
TRIES = 3
"""Caches and a shared core cost processor time, too."""


def _turn(text: str, said: str = "hi", *, calls: bool = True) -> Turn:
    end = ended(a_turn(texts=[said]), text=text)
    call = Item(id="c", type="function_call", role="assistant", text=text[:10], call_id="c", name="f")
    return Turn.of(msgspec.structs.replace(end, output=(*end.output, call)) if calls else end)


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("text", ["", "a", '"\\\n\x01é😀', "\u2028\x7f/</script>"])
@pytest.mark.parametrize("length", [1, 65535, 65536, 65537, 200_000])
async def test_an_answer_in_steps_is_the_same_as_in_one(
    autojump_clock: MockClock, text: str, length: int, calls: bool
) -> None:
    turn = _turn((text * length)[:length], said=text[:1] * 70_000, calls=calls)
    assert await encode_json(turn) == msgspec.json.encode(turn)


async def test_other_tasks_run_while_a_large_answer_is_encoded(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.steps.STEP_S", 0)
    steps = 0

    async def count() -> None:
        nonlocal steps
        while True:
            await trio.lowlevel.checkpoint()
            steps += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await encode_json(_turn("x" * 10 * 65536))
        nursery.cancel_scope.cancel()
    assert steps >= 20, "ten for the text, ten for the item"


@pytest.mark.serial
async def test_the_largest_turn_does_not_hold_the_event_loop() -> None:
    turn = _turn("\x01" * REPLY_BYTES, said="\x01" * INPUT_BYTES)
    longest: list[float] = []

    async def encode() -> None:
        assert len(await encode_json(turn)) > 2 * 6 * (REPLY_BYTES + INPUT_BYTES)

    for _ in range(TRIES):
        with watching_steps() as watched:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(encode)
                await trio.testing.wait_all_tasks_blocked()
        longest.append(watched.seconds)
    assert min(longest) < STEP_MAX_S
