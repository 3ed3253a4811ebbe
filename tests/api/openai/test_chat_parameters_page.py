"""docs/openai.md has each parameter of chat completions, and says the truth about it."""

import re
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from service.api.openai.chat_requests import CreateChatCompletion
from tests.api.inprocess import open_api

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"
TABLE = re.compile(r"<!-- chat parameters -->\n(.*?)<!-- /chat parameters -->", re.DOTALL)
TOOLS = [{"type": "function", "function": {"name": "f"}}]
SAMPLES: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 0.5,
    "max_completion_tokens": 50,
    "max_tokens": 50,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "stop": "x",
    "seed": 7,
    "reasoning_effort": "low",
    "verbosity": "low",
    "response_format": {"type": "json_object"},
    "tools": TOOLS,
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "n": 2,
    "store": True,
    "modalities": ["text", "audio"],
    "service_tier": "flex",
    "logprobs": True,
    "top_logprobs": 3,
    "logit_bias": {"1": 5},
    "audio": {"voice": "x"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "moderation": {"model": "x"},
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "metadata": {"a": "b"},
    "user": "x",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "implicit"},
}
"""A value of each parameter that is not its default."""
NEEDED: dict[str, dict[str, Any]] = {"stream_options": {"stream": True}, "tool_choice": {"tools": TOOLS}}


def rows() -> dict[str, str]:
    table = TABLE.search(PAGE.read_text())
    assert table is not None
    return dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", table[1], re.MULTILINE))


def test_the_page_has_each_parameter_that_is_read() -> None:
    assert rows().keys() == set(CreateChatCompletion.__struct_fields__)


@pytest.mark.parametrize(("name", "verdict"), rows().items())
async def test_each_parameter_is_taken_or_refused_as_the_page_says(
    name: str, verdict: str, autojump_clock: MockClock
) -> None:
    body = {"model": "m", "messages": SAMPLES["messages"]} | NEEDED.get(name, {}) | {name: SAMPLES[name]}
    async with open_api(model_url="scripted:?tokens=1&rate=0&first_token_s=0") as api:
        reply = await api.call("POST", "/v1/chat/completions", body)
    if verdict == "refused":
        assert reply.status == 400
        assert (reply.json["error"]["code"], reply.json["error"]["param"]) == ("unsupported_parameter", name)
    else:
        assert verdict in ("supported", "no effect")
        assert reply.status == 200, reply
