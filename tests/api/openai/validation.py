"""Objects and events of OpenAI's API, checked by the types of others.

Two independent sets: those of OpenAI's own SDK, and those that are generated from the published schema of Open
Responses, where that covers an object: responses, their events and their items. Both are used in pydantic's strict
mode, in which nothing is converted: ``"1"`` is no number.

Every answer under ``/v1`` that the tests in this process get is checked: :func:`check_answer`.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import openresponses_types.types as open_responses
from msgspec.json import decode, encode
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.conversations import Conversation, ConversationDeletedResource, ConversationItem, ConversationItemList
from openai.types.responses import Response, ResponseItem, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

_OF_OPEN_RESPONSES = {
    "error": "ErrorStreamingEvent",
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


_ITEM = (
    open_responses.Message
    | open_responses.FunctionCall
    | open_responses.FunctionCallOutput
    | open_responses.ReasoningBody
)
_NEVER_NULL = ("content", "encrypted_content", "phase", "namespace", "extra_content")
"""Fields of items that may be left out and not be null; the types that are generated from the schema are laxer."""
_EFFORTS = {None, *open_responses.ReasoningEffortEnum}
_DONE = b"[DONE]"


@cache
def adapter_of(kind: Any) -> TypeAdapter[Any]:
    """What validates values of a type. It takes a tenth of a second to make, so there is one for all tests."""
    return TypeAdapter(kind)


def check_response(encoded: bytes) -> dict[str, Any]:
    """Check a Response object, and return it."""
    adapter_of(Response).validate_json(encoded, strict=True)
    response = decode(encoded, type=dict[str, Any])
    if is_in_open_responses(response):
        adapter_of(open_responses.ResponseResource).validate_json(encoded, strict=True)
    _check_no_nulls(response["output"])
    return response


def is_in_open_responses(response: Mapping[str, Any]) -> bool:
    """Whether the schema of Open Responses covers what a response repeats of its request.

    It knows of no namespaces, only null for a JSON schema, and not each effort that OpenAI has.
    """
    choice = response["tool_choice"]
    chosen = choice.get("tools", ()) if isinstance(choice, dict) else ()
    return (
        all(tool["type"] == "function" for tool in (*response["tools"], *chosen))
        and response["text"]["format"]["type"] != "json_schema"
        and response["reasoning"]["effort"] in _EFFORTS
    )


def check_item(encoded: bytes) -> dict[str, Any]:
    """Check an item as a list of a response's input shows it, and return it."""
    adapter_of(ResponseItem).validate_json(encoded, strict=True)
    adapter_of(_ITEM).validate_json(encoded, strict=True)
    item = decode(encoded, type=dict[str, Any])
    _check_no_nulls([item])
    return item


def _check_no_nulls(items: Iterable[Mapping[str, Any]]) -> None:
    for item in items:
        assert not [name for name in _NEVER_NULL if name in item and item[name] is None], item


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
    if event["type"] not in NOT_IN_OPEN_RESPONSES and is_in_open_responses(event.get("response", _PLAIN)):
        adapter_of(getattr(open_responses, _OF_OPEN_RESPONSES[event["type"]])).validate_json(encoded, strict=True)
    _check_no_nulls([event["item"]] if "item" in event else event.get("response", {}).get("output", []))
    return event


# Answers of calls


def check_answer(method: str, path: str, status: int, media_type: str, body: bytes) -> None:
    """Check the answer of a call under ``/v1`` to be what others' types say, whatever the call."""
    path = path.partition("?")[0]
    if status >= 400:
        _check_error(body)
    elif media_type == "text/event-stream":
        _check_stream(body, chunks=path.endswith("/chat/completions"))
    elif body and method != "HEAD":
        _check_body(method, path, body)


def _check_error(body: bytes) -> None:
    told = decode(body, type=dict[str, Any])
    assert set(told) == {"error"}
    error = told["error"]
    assert set(error) - {"lastcall"} == {"message", "type", "param", "code"}
    adapter_of(open_responses.ErrorPayload).validate_python(error, strict=True)
    assert error["message"]
    assert error["code"]


def _check_stream(body: bytes, *, chunks: bool) -> None:
    for block in body.split(b"\n\n"):
        lines = [line for line in block.split(b"\n") if not line.startswith((b":", b"retry:"))]
        frame = b"\n".join(lines)
        data = frame.removeprefix(b"data: ")
        if frame in (b"", b"data: " + _DONE):
            continue
        if data.startswith(b'{"error":'):
            _check_error(data)
        elif chunks:
            adapter_of(ChatCompletionChunk).validate_json(data, strict=True)
        else:
            check_frame(frame + b"\n\n")


def _check_body(method: str, path: str, body: bytes) -> None:
    kind = next(kind for calls, kind in _KINDS.items() if re.fullmatch(calls, f"{method} {path}"))
    match kind:
        case "response":
            check_response(body)
        case "model list":
            told = decode(body, type=dict[str, Any])
            assert (set(told), told["object"]) == ({"object", "data"}, "list")
            adapter_of(list[Model]).validate_python(told["data"], strict=True)
        case "response deleted":
            told = decode(body, type=dict[str, Any])
            assert told == {"id": path.rpartition("/")[2], "object": "response", "deleted": True}
        case _:
            adapter_of(kind).validate_json(body, strict=True)
            items = decode(body, type=dict[str, Any]).get("data", []) if kind in _LISTS else []
            adapter_of(list[_ITEM]).validate_json(encode(items), strict=True)
            _check_no_nulls(items)


_LISTS = (ResponseItemList, ConversationItemList)
_KINDS: Mapping[str, Any] = {
    r"(POST /v1/responses(/[^/]+/cancel)?|GET /v1/responses/[^/]+)": "response",
    r"DELETE /v1/responses/[^/]+": "response deleted",
    r"GET /v1/responses/[^/]+/input_items": ResponseItemList,
    r"POST /v1/chat/completions": ChatCompletion,
    r"GET /v1/models": "model list",
    r"GET /v1/models/.+": Model,
    r"(GET|POST) /v1/conversations(/[^/]+)?": Conversation,
    r"DELETE /v1/conversations/[^/]+": ConversationDeletedResource,
    r"(GET|POST) /v1/conversations/[^/]+/items": ConversationItemList,
    r"GET /v1/conversations/[^/]+/items/[^/]+": ConversationItem,
    r"DELETE /v1/conversations/[^/]+/items/[^/]+": Conversation,
}
"""What each call answers, by a pattern of its method and its path. The SDK does not read what ``DELETE`` of a response
answers, and a page of models it makes itself."""
_PLAIN = {"tools": (), "tool_choice": "auto", "text": {"format": {"type": "text"}}, "reasoning": {"effort": None}}
