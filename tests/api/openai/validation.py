"""Objects and events of the Responses API, checked by the types of others.

Two independent sets: those of OpenAI's own SDK, and those that are generated from the schema of Open Responses. Both
are used in pydantic's strict mode, in which nothing is converted: ``"1"`` is no number.
"""

from functools import cache
from typing import Any

import openresponses_types.types as open_responses
from msgspec.json import decode
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

_OF_OPEN_RESPONSES = {
    "response.created": "ResponseCreatedStreamingEvent",
    "response.queued": "ResponseQueuedStreamingEvent",
    "response.in_progress": "ResponseInProgressStreamingEvent",
    "response.completed": "ResponseCompletedStreamingEvent",
    "response.failed": "ResponseFailedStreamingEvent",
    "response.incomplete": "ResponseIncompleteStreamingEvent",
    "response.output_item.added": "ResponseOutputItemAddedStreamingEvent",
    "response.output_item.done": "ResponseOutputItemDoneStreamingEvent",
    "response.content_part.added": "ResponseContentPartAddedStreamingEvent",
    "response.content_part.done": "ResponseContentPartDoneStreamingEvent",
    "response.output_text.delta": "ResponseOutputTextDeltaStreamingEvent",
    "response.output_text.done": "ResponseOutputTextDoneStreamingEvent",
    "response.function_call_arguments.delta": "ResponseFunctionCallArgumentsDeltaStreamingEvent",
    "response.function_call_arguments.done": "ResponseFunctionCallArgumentsDoneStreamingEvent",
}
NOT_IN_OPEN_RESPONSES = {"response.reasoning_text.delta", "response.reasoning_text.done"}
"""Open Responses calls these ``response.reasoning.delta`` and ``.done``, names that OpenAI's SDKs refuse."""


@cache
def adapter_of(kind: Any) -> TypeAdapter[Any]:
    """What validates values of a type. It takes a tenth of a second to make, so there is one for all tests."""
    return TypeAdapter(kind)


def check_response(encoded: bytes, *, of_open_responses: bool = True) -> dict[str, Any]:
    """Check a Response object, and return it."""
    adapter_of(Response).validate_json(encoded, strict=True)
    if of_open_responses:
        adapter_of(open_responses.ResponseResource).validate_json(encoded, strict=True)
    response = decode(encoded, type=dict[str, Any])
    return response


def check_item(encoded: bytes) -> dict[str, Any]:
    """Check an item as a list of a response's input shows it, and return it."""
    adapter_of(ResponseItem).validate_json(encoded, strict=True)
    return decode(encoded, type=dict[str, Any])


def check_frame(frame: bytes) -> dict[str, Any]:
    """Check a frame of a stream, and return its event."""
    name, _, data = frame.removesuffix(b"\n\n").partition(b"\n")
    assert name.startswith(b"event: ")
    assert data.startswith(b"data: ")
    assert len(frame.decode().splitlines()) == 3, "a line end within the data"
    encoded = data.removeprefix(b"data: ")
    event = decode(encoded, type=dict[str, Any])
    assert event["type"].encode() == name.removeprefix(b"event: ")
    adapter_of(ResponseStreamEvent).validate_json(encoded, strict=True)
    if event["type"] not in NOT_IN_OPEN_RESPONSES:
        adapter_of(getattr(open_responses, _OF_OPEN_RESPONSES[event["type"]])).validate_json(encoded, strict=True)
    return event
