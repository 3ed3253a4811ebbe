"""docs/openai.md has each parameter of the API, and says the truth about it."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types.responses import response_create_params
from trio.testing import MockClock

from service.api.openai.requests import CreateResponse
from tests.api.inprocess import open_api

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"
TABLE = re.compile(r"<!-- parameters -->\n(.*?)<!-- /parameters -->", re.DOTALL)
SAMPLES: dict[str, Any] = {
    "input": "Hi",
    "model": "scripted",
    "instructions": "Be brief.",
    "stream": True,
    "stream_options": {"include_obfuscation": True},
    "background": True,
    "store": False,
    "metadata": {"a": "b"},
    "temperature": 0.5,
    "top_p": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "max_output_tokens": 50,
    "max_tool_calls": 3,
    "tools": [{"type": "function", "name": "f", "parameters": {}}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "text": {"format": {"type": "json_object"}, "verbosity": "low"},
    "reasoning": {"effort": "low"},
    "include": ["reasoning.encrypted_content"],
    "truncation": "auto",
    "service_tier": "default",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "implicit"},
    "user": "x",
    "client_metadata": {"a": "b"},
    "access_programs": {"cyber": "standard"},
    "top_logprobs": 3,
    "context_management": [{"type": "compaction"}],
    "image": {"detail": "low"},
    "prompt": {"id": "pmpt_1"},
    "background_options": {"continuation_id": "x"},
    "moderation": {"model": "x"},
}
"""A value of each parameter that is not its default; those that name other objects are in test_responses_calls.py."""


def rows() -> dict[str, str]:
    table = TABLE.search(PAGE.read_text())
    assert table is not None
    return dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", table[1], re.MULTILINE))


def test_the_page_has_each_parameter_that_is_read_and_each_one_of_the_newest_sdk() -> None:
    assert list(rows()) == list(dict.fromkeys(rows()))
    assert rows().keys() == {field.encode_name for field in msgspec.structs.fields(CreateResponse)}
    of_sdk = set(response_create_params.ResponseCreateParamsStreaming.__annotations__)
    for base in response_create_params.ResponseCreateParamsBase.__mro__:
        of_sdk |= set(getattr(base, "__annotations__", {}))
    of_sdk |= set(response_create_params.ResponseCreateParamsBase.__annotations__)
    assert len(of_sdk) > 25
    assert of_sdk - rows().keys() == set()


@pytest.mark.parametrize(("name", "verdict"), rows().items())
async def test_each_parameter_is_taken_or_refused_as_the_page_says(
    name: str, verdict: str, autojump_clock: MockClock
) -> None:
    if name in ("previous_response_id", "conversation"):
        assert verdict == "supported"
        return
    needed = {"stream_options": {"stream": True}}.get(name, {})
    async with open_api() as api:
        body = {"input": "Hi"} | needed | {name: SAMPLES[name]}
        reply = await api.call("POST", "/v1/responses", body)
    if verdict == "refused":
        assert reply.status == 400
        assert (reply.json["error"]["code"], reply.json["error"]["param"]) == ("unsupported_parameter", name)
    else:
        assert verdict in ("supported", "no effect")
        assert reply.status == 200, reply
