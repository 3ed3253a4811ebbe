"""The cases of the compliance suite of Open Responses, rebuilt as tests of this project.

The suite itself is a program in the repository of the specification (https://github.com/openresponses/openresponses,
``src/lib/compliance-tests.ts``) and in no package registry, so it cannot be installed here. These cases send what its
public description says that it sends, under its names, and check what it checks: that each answer and each event fits
the schema (here by the types that are generated from it, in :mod:`tests.api.openai.validation`), and what is said of
the case. To its seven cases come those that newer versions of it have. Images, files and hosted tools get the refusal
that ``docs/openai.md`` has.
"""

from typing import Any
from urllib.parse import quote

import pytest
from trio.testing import MockClock

from tests.api.inprocess import Api, Reply, open_api
from tests.api.openai.test_responses_calls import PATH, create, error_of, events_of, text_of
from tests.api.openai.validation import check_frame, check_response

CALLING = "scripted:?first_token_s=0&rate=0&call=" + quote('get_weather:{"location":"San Francisco, CA"}')
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}},
        "required": ["location"],
    },
}
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def message(role: str, content: object) -> dict[str, object]:
    return {"type": "message", "role": role, "content": content}


def response_of(reply: Reply, *, status: str = "completed") -> dict[str, Any]:
    """The response, which fits the schema, has this status and some output."""
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json"), reply
    response = check_response(reply.body)
    assert response["status"] == status
    assert response["output"]
    return response


async def streamed(api: Api, input_: object, **body: object) -> list[dict[str, Any]]:
    """The events of a stream, each of which fits the schema."""
    reply = await create(api, input_, stream=True, **body)
    events = events_of(reply)
    frames = reply.body.removesuffix(b"data: [DONE]\n\n").split(b"\n\n")[:-1]
    assert [check_frame(frame + b"\n\n") for frame in frames if not frame.startswith(b":")] == events
    assert events
    return events


async def test_basic_response(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        response_of(await create(api, [message("user", "Say hello in exactly 3 words.")], stream=False))


async def test_streaming_response(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        events = await streamed(api, [message("user", "Count from 1 to 5.")])
        assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.completed", "completed")


async def test_system_prompt(autojump_clock: MockClock) -> None:
    asked = [message("system", "You are a pirate. Always respond in pirate speak."), message("user", "Say hello.")]
    async with open_api() as api:
        response_of(await create(api, asked))


async def test_tool_calling(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        asked = [message("user", "What's the weather like in San Francisco?")]
        response = response_of(await create(api, asked, tools=[WEATHER]))
        assert "function_call" in {item["type"] for item in response["output"]}


async def test_tool_calling_streaming(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        asked = [message("user", "What's the weather like in San Francisco?")]
        events = await streamed(api, asked, tools=[WEATHER])
        told = {(event["type"], event.get("item", {}).get("type")) for event in events}
        assert told >= {
            ("response.output_item.added", "function_call"),
            ("response.function_call_arguments.delta", None),
            ("response.function_call_arguments.done", None),
            ("response.output_item.done", "function_call"),
        }


async def test_multi_turn(autojump_clock: MockClock) -> None:
    asked = [
        message("user", "My name is Alice."),
        message("assistant", "Hello Alice! Nice to meet you. How can I help you today?"),
        message("user", "What is my name?"),
    ]
    async with open_api() as api:
        response_of(await create(api, asked))


async def test_previous_response_id(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        first = response_of(await create(api, "Remember this code word: papaya. Reply with only OK."))
        asked = "What code word did I ask you to remember?"
        second = response_of(await create(api, asked, previous_response_id=first["id"]))
        assert second["previous_response_id"] == first["id"]


async def test_function_call_roundtrip(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        first = response_of(
            await create(
                api,
                "Use the weather tool to get the temperature in San Francisco.",
                tools=[WEATHER],
                tool_choice={"type": "function", "name": "get_weather"},
            )
        )
        (call,) = (item for item in first["output"] if item["type"] == "function_call")
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "64 degrees and clear"}
        second = response_of(await create(api, [output], previous_response_id=first["id"]))
        assert "64 degrees and clear" in text_of(second)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        pytest.param(
            {
                "input": [
                    message(
                        "user",
                        [
                            {"type": "input_text", "text": "What do you see in this image? Answer in one sentence."},
                            {"type": "input_image", "image_url": PIXEL},
                        ],
                    )
                ]
            },
            "unsupported_value",
            "input[0].content[1].type",
            id="image-input",
        ),
        pytest.param(
            {
                "input": [
                    message(
                        "user",
                        [
                            {"type": "input_text", "text": "Read the attached file and answer with its title only."},
                            {
                                "type": "input_file",
                                "filename": "fixture.pdf",
                                "file_data": "data:application/pdf;base64,JVBERi0xLjE=",
                            },
                        ],
                    )
                ]
            },
            "unsupported_value",
            "input[0].content[1].type",
            id="file-input",
        ),
        pytest.param(
            {
                "input": "Search the configured vector store for relevant content and summarize one result.",
                "tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}],
                "tool_choice": {"type": "file_search"},
                "include": ["file_search_call.results"],
            },
            "unsupported_value",
            "tool_choice",
            id="file-search",
        ),
        pytest.param(
            {
                "input": "Find the most relevant cached result for OpenResponses.",
                "tools": [{"type": "web_search", "external_web_access": False}],
                "tool_choice": {"type": "web_search"},
                "include": ["web_search_call.action.sources"],
            },
            "unsupported_value",
            "tool_choice",
            id="offline-web-search",
        ),
    ],
)
async def test_what_is_not_supported_gets_the_refusal_that_is_documented(
    body: dict[str, Any], code: str, param: str, autojump_clock: MockClock
) -> None:
    async with open_api() as api:
        error_of(await api.call("POST", PATH, {"model": "scripted"} | body), 400, code, param)
