"""The Response object of a turn.

It has every field that OpenAI's SDKs and the Open Responses schema require; a turn that was made through another face
has their defaults. What really became of the turn is in ``lastcall``.

Source: https://www.openresponses.org/specification
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from service.api.openai.echo import Echo
from service.api.openai.ids import conversation_id, response_id
from service.api.openai.items import ShownItem, reasoning_before, shown_item, status_of
from service.ids import public_id
from service.models.client import NamedFunction, Tools, Usage
from service.storage.records import EndReason, LeftOut, TurnRecord, TurnState

ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ErrorCode = Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
IncompleteReason = Literal["max_output_tokens", "content_filter"]

_ERROR_CODES: Mapping[str, ErrorCode] = {
    "rate_limited": "rate_limit_exceeded",
    "context_too_long": "invalid_prompt",
    "content_filter": "invalid_prompt",
    "unsupported_content": "invalid_prompt",
    "parameter_refused": "invalid_prompt",
}
"""OpenAI's codes of the failures that are not ``server_error``: clients know only the codes of OpenAI's list."""
_INTERRUPTED = {
    "shutdown": "The server stopped before the response had a text. Send the request again.",
    "crash": "The server crashed before the response had a text. Send the request again.",
}
_PLAIN_TEXT = {"format": {"type": "text"}}
_SHOWN_TOOLS = ("function", "namespace")


class ResponseError(msgspec.Struct, frozen=True):
    """``{"code": "server_error", "message": "The model server failed."}``: the code that clients know."""

    code: ErrorCode
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    """``{"reason": "max_output_tokens"}``"""

    reason: IncompleteReason


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """``{"cached_tokens": 64, "cache_write_tokens": 0}``: model servers do not tell what they write to their caches."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """``{"reasoning_tokens": 12}``"""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the model server counted them.

    ``{"input_tokens": 9, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 13}``
    """

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> "ResponseUsage":
        cached = 0 if isinstance(usage.cached_tokens, UnsetType) else usage.cached_tokens
        return cls(
            input_tokens=usage.input_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=cached),
            output_tokens=usage.output_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
            total_tokens=usage.input_tokens + usage.output_tokens,
        )


class ConversationOf(msgspec.Struct, frozen=True):
    """``{"id": "conv_6f…"}``"""

    id: str


class ResponseTruth(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of the turn, in the words of the native API, which OpenAI's fields do not have.

    ``{"session_id": "sess_6f…", "turn_id": "turn_0a…", "state": "interrupted", "reason": "shutdown", "seq": 12}``

    ``code`` is that of a failed turn; ``seq`` counts the native events of an ended turn; ``left_out`` are the oldest
    messages, which did not go to the model; ``tools_left_out`` are tools of the request that this server does not have.
    ``stored`` is false while the store has not taken the end.
    """

    session_id: str
    turn_id: str
    state: TurnState
    reason: EndReason | None = None
    code: str | None = None
    param: str | None = None
    seq: int | None = None
    left_out: LeftOut | None = None
    tools_left_out: tuple[str, ...] = ()
    stored: bool = True


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """A response.

    ``{"id": "resp_0a…", "object": "response", "created_at": 1769851800, "completed_at": 1769851801, "status":
    "completed", "background": false, "error": null, "incomplete_details": null, "instructions": null,
    "max_output_tokens": null, "max_tool_calls": null, "model": "scripted", "output": [], "parallel_tool_calls": true,
    "previous_response_id": null, "prompt_cache_key": null, "reasoning": {"effort": null, "summary": null},
    "safety_identifier": null, "service_tier": "default", "store": true, "temperature": 1.0, "text": {"format": {"type":
    "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 1.0, "truncation": "auto", "usage":
    null, "user": null, "metadata": {}, "presence_penalty": 0.0, "frequency_penalty": 0.0, "conversation": null,
    "lastcall": {"session_id": "sess_6f…", "turn_id": "turn_0a…", "state": "completed", "seq": 3}}``
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: tuple[ShownItem, ...] = ()
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | UnsetType = UNSET
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: Annotated[tuple[dict[str, Any], ...], Meta(description="The functions that the model could call.")]
    top_logprobs: int = 0
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]
    presence_penalty: float
    frequency_penalty: float
    conversation: ConversationOf | None
    lastcall: ResponseTruth


class _End(NamedTuple):
    """How a turn's state is told."""

    status: ResponseStatus
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None


def response_of(turn: TurnRecord, *, encrypted: bool = False) -> Response:
    """The response of a turn as it stands, with the reply so far.

    Args:
        encrypted: Whether encrypted reasoning is shown, though the request did not ask for it.
    """
    echo = Echo.of_face(turn.face)
    status, error, incomplete_details = _end_of(turn)
    is_whole = status == "completed"
    output: list[ShownItem] = []
    for index, item in enumerate(turn.output):
        if echo.encrypted and (signed := reasoning_before(item)) is not None:
            output.append(signed)
        shown = shown_item(
            item,
            status=status_of(turn.output, index, is_open=turn.is_open, is_whole=is_whole),
            namespaces=echo.namespaces,
            encrypted=encrypted or echo.encrypted,
        )
        output.append(shown)
    response = _at_first(turn, echo, status)
    return msgspec.structs.replace(
        response,
        completed_at=int(turn.ended_at.timestamp()) if is_whole and turn.ended_at is not None else None,
        error=error,
        incomplete_details=incomplete_details,
        output=tuple(output),
        usage=None if turn.usage is None else ResponseUsage.of(turn.usage),
        lastcall=ResponseTruth(
            session_id=response.lastcall.session_id,
            turn_id=turn.id,
            state=turn.state,
            reason=turn.reason,
            code=None if turn.error is None else turn.error.code,
            param=None if turn.error is None else turn.error.param or None,
            seq=None if turn.is_open else turn.last_seq,
            left_out=turn.left_out,
            tools_left_out=echo.tools_left_out,
            stored=turn.stored,
        ),
    )


def response_at_first(turn: TurnRecord, status: Literal["queued", "in_progress"]) -> Response:
    """The response of a turn as it is told at its beginning: the same whenever it is told."""
    return _at_first(turn, Echo.of_face(turn.face), status)


def _at_first(turn: TurnRecord, echo: Echo, status: ResponseStatus) -> Response:
    is_foreign = turn.face is UNSET
    session_id = public_id(turn.session_id)
    options = turn.options
    return Response(
        id=response_id(turn.id),
        created_at=int(turn.created_at.timestamp()),
        status=status,
        background=turn.background,
        instructions=turn.system_message,
        max_output_tokens=turn.max_output_tokens,
        max_tool_calls=echo.max_tool_calls,
        model=turn.model,
        parallel_tool_calls=echo.parallel_tool_calls,
        previous_response_id=echo.previous_response_id,
        prompt_cache_key=echo.prompt_cache_key,
        prompt_cache_retention=echo.prompt_cache_retention or UNSET,
        reasoning={"effort": options.reasoning_effort, "summary": None} | _given(echo.reasoning),
        safety_identifier=echo.safety_identifier,
        service_tier=echo.service_tier,
        store=echo.store,
        temperature=_or(turn.temperature, 1.0),
        text=_PLAIN_TEXT | _given(echo.text),
        tool_choice=_choice_of(turn.tools) if is_foreign else echo.tool_choice,
        tools=tuple(_tools_of(turn.tools) if is_foreign else map(_shown_tool, filter(_is_shown, echo.tools))),
        top_p=_or(options.top_p, 1.0),
        truncation=echo.truncation,
        user=echo.user,
        metadata=echo.metadata,
        presence_penalty=_or(options.presence_penalty, 0.0),
        frequency_penalty=_or(options.frequency_penalty, 0.0),
        conversation=ConversationOf(conversation_id(session_id)) if echo.conversation or is_foreign else None,
        lastcall=ResponseTruth(
            session_id=session_id,
            turn_id=turn.id,
            state="queued" if status == "queued" else "running",
            tools_left_out=echo.tools_left_out,
        ),
    )


def _end_of(turn: TurnRecord) -> _End:
    """How the state of a turn is told, so that no client takes a reply that was cut off for a whole one.

    A foreground response that was cancelled is ``incomplete``: OpenAI's clients know ``cancelled`` of background
    responses alone, and openai-agents takes this status for a success.
    """
    match turn.state:
        case "queued":
            return _End("queued")
        case "running":
            return _End("in_progress")
        case "completed":
            if turn.finish_reason == "length":
                return _End("incomplete", incomplete_details=IncompleteDetails("max_output_tokens"))
            if turn.finish_reason == "content_filter":
                return _End("incomplete", incomplete_details=IncompleteDetails("content_filter"))
            return _End("completed")
        case "failed":
            code = "" if turn.error is None else turn.error.code
            message = "The response failed." if turn.error is None else turn.error.message
            return _End("failed", error=ResponseError(_ERROR_CODES.get(code, "server_error"), message))
        case "cancelled":
            return _End("cancelled" if turn.background else "incomplete")
        case "interrupted":
            if any(item.text for item in turn.output if item.type != "reasoning"):
                return _End("incomplete")
            message = _INTERRUPTED["crash" if turn.reason == "crash" else "shutdown"]
            return _End("failed", error=ResponseError("server_error", message))


def _or(number: float | None, default: float) -> float:
    return default if number is None else float(number)


def _given(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (fields or {}).items() if value is not None}


def _is_shown(tool: Mapping[str, Any]) -> bool:
    """Whether the model got to know a tool of the request, at least in part."""
    return tool.get("type") in _SHOWN_TOOLS


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with all fields that clients require; of a namespace what the model got to know."""
    if tool["type"] == "function":
        return {"description": None, "parameters": None, "strict": None} | tool
    functions = [inner for inner in tool["tools"] if inner["type"] == "function"]
    return tool | {"description": tool.get("description") or "", "tools": functions}


def _tools_of(tools: Tools | UnsetType) -> list[dict[str, Any]]:
    functions = () if isinstance(tools, UnsetType) else tools.functions
    return [_shown_tool({"type": "function", **msgspec.to_builtins(function)}) for function in functions]


def _choice_of(tools: Tools | UnsetType) -> Any:
    choice = None if isinstance(tools, UnsetType) else tools.choice
    if isinstance(choice, NamedFunction):
        return {"type": "function", "name": choice.name}
    return choice or "auto"
