"""Reasoning of a turn on its way back to its model: with the next turn, also after the reply was kept and read."""

import json
from typing import Any

import msgspec
import pytest
from trio.testing import MockClock

from service.models.chat_completions import Dialect, encode_request
from service.models.client import EncryptedReasoning, FunctionCall, Reasoning, is_signature
from service.sessions.commands import NewSession
from service.storage.memory import MemoryStore
from service.storage.records import Item
from tests.sessions.puppet import LeavesPathsOut, Reply, open_stage
from tests.sessions.turns.prompts import build_prompt
from tests.sessions.turns.test_calls_in_prompts import LAST, asks, brings, calls, done
from tests.sessions.turns.test_turns import start

SIGNED = '{"type":"reasoning.text","format":"anthropic-claude-v1","index":0}'
SEALED = '{"type":"reasoning.encrypted","id":"rs_1"}'
EVERYTHING = 10**9


def assistants(reply: Reply, **dialect: Any) -> list[dict[str, Any]]:
    """What the assistant says in the request of a reply, as a server gets it."""
    body = json.loads(encode_request(reply.request, Dialect(**dialect)))
    return [message for message in body["messages"] if message["role"] == "assistant"]


@pytest.mark.parametrize("kind", [MemoryStore, LeavesPathsOut])
async def test_each_signature_goes_back_with_the_words_that_it_signs(
    autojump_clock: MockClock, kind: type[MemoryStore]
) -> None:
    async with open_stage(kind()) as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        turn = await start(stage.sessions, session_id, "The weather?")
        reply = await stage.puppet.next_reply()
        reply.think("Let me ", "see.")
        reply.encrypt("sig1", SIGNED)
        reply.think("Or rather", " not.")
        reply.encrypt("sig2", SIGNED.replace("0", "1"))
        reply.encrypt("gAAA", SEALED)
        reply.say("Well.")
        reply.call("call_1", "{}")
        reply.finish("tool_calls")
        record = await turn.wait_ended()
        assert [(item.type, item.text, item.encrypted) for item in record.output] == [
            ("reasoning", "Let me see.", "sig1"),
            ("reasoning", "Or rather not.", "sig2"),
            ("reasoning", "", "gAAA"),
            ("message", "Well.", ""),
            ("function_call", "{}", ""),
        ]
        output = Item(id="fco_1", type="function_call_output", role="user", text="4", call_id="call_1")
        following = await start(stage.sessions, session_id, items=(output,))
        reply = await stage.puppet.next_reply()
        (said,) = assistants(reply)
        assert said["reasoning_details"] == [
            {**json.loads(SIGNED), "text": "Let me see.", "signature": "sig1"},
            {**json.loads(SIGNED), "index": 1, "text": "Or rather not.", "signature": "sig2"},
            {**json.loads(SEALED), "data": "gAAA"},
        ]
        assert said["content"] == "Well."
        (said,) = assistants(reply, wants_reasoning=True)
        assert said["reasoning_content"] == "Let me see.\n\nOr rather not."
        reply.finish()
        await following.wait_ended()
        other = await start(stage.sessions, session_id, "Hm?", model="another")
        reply = await stage.puppet.next_reply()
        for said in assistants(reply, wants_reasoning=True):
            assert "reasoning_details" not in said
            assert said.get("reasoning_content", "") == "", "another model's thoughts"
        reply.finish()
        await other.wait_ended()


def thinks(text: str, encrypted: str = "", upstream: str = "") -> Item:
    return Item(id=f"r_{text}", type="reasoning", role="assistant", text=text, encrypted=encrypted, upstream=upstream)


def test_words_go_back_only_before_calls_and_count_where_they_may() -> None:
    plain = done([asks("a")], thinks("hm"), Item(id="x", role="assistant", text="A"))
    calling = done([asks("b")], thinks("hm"), calls("1"))
    prompt = build_prompt(
        [plain, calling, msgspec.structs.replace(LAST, input=(brings("1"),))], system_message=None, bytes_max=EVERYTHING
    )
    assert [it for it in prompt.items if isinstance(it, Reasoning)] == [Reasoning("hm")]
    assert isinstance(prompt.items[prompt.items.index(Reasoning("hm")) + 1], FunctionCall)
    without = done([asks("b")], calls("1"))
    assert calling.message_bytes == without.message_bytes + 2
    assert plain.message_bytes == 2


def test_a_signature_counts_with_its_words() -> None:
    said = Item(id="x", role="assistant", text="A")
    for reasoning, size in (
        (thinks("words", "sig", SIGNED), 5 + 3 + len(SIGNED)),
        (thinks("words", "sig", SEALED), 3 + len(SEALED)),
        (thinks("words"), 0),
    ):
        assert done([asks("a")], reasoning, said).message_bytes == 2 + size
        brought = done([asks("a"), reasoning, said, asks("b")], said)
        assert brought.message_bytes == 4 + size, "also as a part of the input"
        assert is_signature(reasoning.upstream) == ("reasoning.text" in reasoning.upstream)


def test_encrypted_reasoning_of_a_history_in_the_input_goes_back_untouched() -> None:
    history = (
        asks("The weather?"),
        thinks("hm", "sig", SIGNED),
        calls("1"),
        brings("1"),
        thinks("", "gAAA", SEALED),
        Item(id="x", role="assistant", text="4 degrees."),
        asks("now"),
    )
    turn = msgspec.structs.replace(LAST, input=history)
    items = build_prompt([turn], system_message=None, bytes_max=EVERYTHING).items
    assert [it for it in items if isinstance(it, EncryptedReasoning)] == [
        EncryptedReasoning("sig", SIGNED, "hm"),
        EncryptedReasoning("gAAA", SEALED),
    ]
    assert [it.role for it in items] == ["user", *["assistant"] * 3, "tool", *["assistant"] * 2, "user"]
