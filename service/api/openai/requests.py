"""The body of ``POST /v1/responses``, and the turn that it asks for.

Every parameter of OpenAI's API is supported, refused by its name, or accepted without effect; the table of them is in
``docs/openai.md``. Null stands for the default, and so do empty lists and objects.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, UnsetType

from service.api.http.strict_json import InputTooLargeError, shown
from service.api.http.wire_types import (
    NO_NUL,
    BodyPart,
    MaxOutputTokens,
    Metadata,
    ModelName,
    RequestBody,
    Temperature,
    json_schema_format,
)
from service.api.openai.echo import Echo
from service.api.openai.errors import ParameterError
from service.api.openai.ids import ITEM_NAME
from service.api.openai.items import CALL_ID_LENGTH_MAX, items_read, namespaces_in
from service.api.openai.references import NOTHING_FOUND, Found, with_found
from service.api.openai.tools import TOOLS_MAX, HostedTools, TakenTools, take_tools
from service.api.openai.unsupported import Refused, refuse_values, unsupported
from service.models.client import Options, TextFormat
from service.sessions.commands import HISTORY_ITEMS_MAX, NewTurn, text_input
from service.settings import Settings
from service.steps import Steps
from service.storage.records import IdempotencyKey, Item, OnInterrupt

_FormName = r"^[A-Za-z0-9_-]{1,64}$(?!\n)"
_NO_EFFECT = "Accepted without effect."
_Text = Annotated[str, Meta(extra_json_schema=NO_NUL)]
_Label = Annotated[str, Meta(max_length=512, description=_NO_EFFECT, extra_json_schema=NO_NUL)] | None
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Nothing = Annotated[None, Meta(description="Not supported: null only.")]
Includable = Literal[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""What may be included: encrypted reasoning, and parts of items that this server never has."""


def _object(required: tuple[str, ...], **properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": list(required)}


_STRING = {"type": "string"} | NO_NUL
_PARTS = {"type": "array", "items": _object(("type", "text"), type={"enum": ["input_text"]}, text=_STRING)}
_ITEMS_TAKEN = {
    "items": {
        "anyOf": [
            _object(
                ("role", "content"),
                type={"enum": ["message"]},
                role={"enum": ["user", "assistant", "system", "developer"]},
                content={"anyOf": [_STRING, _PARTS]},
            ),
            _object(
                ("type", "call_id", "output"),
                type={"enum": ["function_call_output"]},
                call_id=_STRING | {"minLength": 1, "maxLength": CALL_ID_LENGTH_MAX},
                output={"anyOf": [_STRING, _PARTS]},
            ),
            _object(
                ("type", "call_id", "name", "arguments"),
                type={"enum": ["function_call"]},
                call_id=_STRING | {"minLength": 1, "maxLength": CALL_ID_LENGTH_MAX},
                name={"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
                arguments=_STRING,
                extra_content={"type": "object"},
            ),
            _object(("type",), type={"enum": ["reasoning"]}, encrypted_content=_STRING),
            _object(("type", "id"), type={"enum": ["item_reference"]}, id={"type": "string", "pattern": ITEM_NAME}),
        ]
    }
}
"""What an item may be, for readers of the schema. :mod:`service.api.openai.items` reads it, and takes more fields."""
_TOOLS_TAKEN = {"items": _object(("type",), type={"type": "string", "minLength": 1, "maxLength": 64})}


class ConversationName(BodyPart, frozen=True, kw_only=True):
    """``{"id": "conv_6f…"}``"""

    id: str


class Reasoning(BodyPart, frozen=True, kw_only=True):
    """``{"effort": "low"}``"""

    effort: Annotated[str, Meta(pattern=r"^[a-z_]{1,32}$(?!\n)")] | None = None
    summary: Annotated[Literal["auto", "concise", "detailed"] | None, Meta(description=_NO_EFFECT)] = None
    generate_summary: Annotated[Literal["auto", "concise", "detailed"] | None, Meta(description=_NO_EFFECT)] = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class PlainText(BodyPart, frozen=True, kw_only=True, tag="text", tag_field="type"):
    """``{"type": "text"}``: the default."""


class JsonObject(BodyPart, frozen=True, kw_only=True, tag="json_object", tag_field="type"):
    """``{"type": "json_object"}``: some JSON object."""


class JsonSchema(BodyPart, frozen=True, kw_only=True, tag="json_schema", tag_field="type"):
    """``{"type": "json_schema", "name": "answer", "schema": {"type": "object"}, "strict": true}``"""

    name: Annotated[str, Meta(pattern=_FormName)]
    schema: dict[str, Any]
    description: _Text | None = None
    strict: bool | None = None


class TextConfig(BodyPart, frozen=True, kw_only=True):
    """``{"format": {"type": "text"}}``"""

    format: PlainText | JsonObject | JsonSchema | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(BodyPart, frozen=True, kw_only=True):
    """``{"include_obfuscation": false}``"""

    include_obfuscation: Annotated[bool | None, Meta(description=_NO_EFFECT)] = None


class PromptCacheOptions(BodyPart, frozen=True, kw_only=True):
    """``{"mode": "implicit"}``: model servers decide about their caches."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Annotated[str, Meta(max_length=64, extra_json_schema=NO_NUL)] | None = None
    prewarm: Annotated[bool, Meta(extra_json_schema={"enum": [False]})] | None = None
    comparison_response_id: _Nothing = None


class CreateResponse(RequestBody, frozen=True, kw_only=True):
    """``{"model": "scripted", "input": "What is a nursery?", "stream": true}``"""

    history: ClassVar[str] = "input"

    @classmethod
    def check_given(cls, told: object) -> Steps[None]:
        """See :func:`refuse_unsupported`."""
        yield
        refuse_unsupported(told)

    input: Annotated[
        Annotated[str, Meta(extra_json_schema=NO_NUL)]
        | Annotated[tuple[dict[str, Any], ...], Meta(max_length=HISTORY_ITEMS_MAX, extra_json_schema=_ITEMS_TAKEN)]
        | None,
        Meta(
            description="A text of the user, or items: the body may have `history_bytes_max` bytes. Without it the "
            "model answers the last item of the conversation, or of the previous response's."
        ),
    ] = None
    model: ModelName | None = None
    instructions: Annotated[_Text | None, Meta(description="For this response only.")] = None
    previous_response_id: str | None = None
    conversation: str | ConversationName | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = None
    store: Annotated[bool | None, Meta(description="true unless given.")] = None
    metadata: Metadata | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    max_output_tokens: MaxOutputTokens | None = None
    max_tool_calls: (
        Annotated[
            int, Meta(ge=1, le=1_000_000, description="Bounds the calls of hosted tools, of which there are none.")
        ]
        | None
    ) = None
    tools: Annotated[tuple[dict[str, Any], ...], Meta(max_length=TOOLS_MAX, extra_json_schema=_TOOLS_TAKEN)] | None = (
        None
    )
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[tuple[Includable, ...], Meta(max_length=64)] | None = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Meta(description="`disabled`: the response fails where the conversation is too long. `auto` unless given."),
    ] = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: _Label = None
    prompt_cache_key: _Label = None
    prompt_cache_retention: Annotated[Literal["in_memory", "24h"] | None, Meta(description=_NO_EFFECT)] = None
    prompt_cache_options: Annotated[PromptCacheOptions | None, Meta(description=_NO_EFFECT)] = None
    user: _Label = None
    client_metadata: Annotated[dict[str, Any], Meta(max_length=64, description=_NO_EFFECT)] | None = None
    access_programs: Annotated[dict[str, Any], Meta(max_length=0)] | None = None
    top_logprobs: Literal[0] | None = None
    context_management: Annotated[tuple[dict[str, Any], ...], Meta(max_length=0)] | None = None
    image: Annotated[dict[str, Any], Meta(max_length=0)] | None = None
    prompt: _Nothing = None
    background_options: Annotated[dict[str, Any], Meta(max_length=0)] | None = None
    moderation: _Nothing = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def conversation_name(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationName) else self.conversation


# What is not supported

_REFUSED: Refused = {
    "access_programs": (({},), "it is about models of OpenAI's own"),
    "background_options": (({},), "a background response runs at once"),
    "context_management": (
        ([],),
        "this server does not compact conversations; the oldest turns are left out if needed",
    ),
    "image": (({},), "this server takes and makes texts only"),
    "moderation": ((), "this server does not judge texts"),
    "prompt": ((), "templates are kept by OpenAI: send `instructions` and `input`"),
    "service_tier": (("auto", "default"), "this server has one tier"),
    "top_logprobs": ((0,), "this server does not pass on the probabilities of tokens"),
}
"""Parameters whose effect a caller would miss: the values that are taken beside null, and why no others are."""
_INCLUDED_LOGPROBS = "message.output_text.logprobs"


def refuse_unsupported(told: object) -> None:
    """Refuse by its name what this server does not support, in a body that is not converted yet.

    All else that is wrong is left to the conversion.

    Raises:
        ParameterError
    """
    if not isinstance(told, dict):
        return
    refuse_values(told, _REFUSED)
    include = told.get("include")
    if isinstance(include, list) and _INCLUDED_LOGPROBS in include:
        raise unsupported("This server does not pass on the probabilities of tokens.", "include")
    _refuse_within(told.get("reasoning"), "reasoning", {"mode": ("standard",), "context": ("auto",)})
    _refuse_within(
        told.get("prompt_cache_options"), "prompt_cache_options", {"prewarm": (False,), "comparison_response_id": ()}
    )


def _refuse_within(given: object, param: str, taken: Mapping[str, Sequence[object]]) -> None:
    if not isinstance(given, dict):
        return
    for name, values in taken.items():
        value = given.get(name)
        if value is not None and value not in values:
            raise unsupported(f"`{param}.{name}` is not supported with this value.", f"{param}.{name}")


# The turn


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for, apart from the place of the new turn in a tree."""

    items: tuple[Item, ...]
    taken: TakenTools
    echo: Echo
    options: Options


def read_request(
    body: CreateResponse, settings: Settings, *, hosted: HostedTools, found: Found = NOTHING_FOUND
) -> Steps[Asked]:
    """Read a request, apart from what it names in the store.

    Args:
        found: The items that its input refers to.

    Raises:
        InvalidRequestError: Parts of the body are wrong, or contradict each other.
        InputTooLargeError: The items that it refers to make it too large.
    """
    _check_agreement(body)
    taken = take_tools(body.tools or (), body.tool_choice, parallel=body.parallel_tool_calls, hosted=hosted)
    yield
    items = yield from _items_of(body, settings, found)
    return Asked(items=items, taken=taken, echo=_echo_of(body, taken, found), options=_options_of(body))


def _check_agreement(body: CreateResponse) -> None:
    """Refuse parameters that exclude each other. Raises: ParameterError."""
    if body.conversation is not None and body.previous_response_id is not None:
        raise ParameterError(
            "A response follows the conversation or a previous response: send one of `conversation` and "
            "`previous_response_id`.",
            param="previous_response_id",
            code="mutually_exclusive_parameters",
        )
    if body.background and not body.is_stored:
        raise ParameterError("A background response is stored: leave `store` out, or send true.", param="store")
    if body.stream_options is not None and not body.stream:
        raise ParameterError("Without `stream` there is no stream to have options.", param="stream_options")


def _items_of(body: CreateResponse, settings: Settings, found: Found) -> Steps[tuple[Item, ...]]:
    told = with_found(body.input, found) if found.items and isinstance(body.input, tuple) else body.input
    if not told or all(it is None for it in told):
        if body.conversation is None and body.previous_response_id is None:
            raise ParameterError(
                "Send an input; or name a conversation, or a previous response, that ends with what is to be answered.",
                param="input",
                code="missing_required_parameter",
            )
        return ()
    if isinstance(told, str):
        return text_input(told)
    items = yield from items_read(told, field="input")
    size = sum([item.prompt_bytes for item in items]) if found.items else 0  # the body is bounded itself
    if size > settings.history_bytes:
        raise InputTooLargeError(
            f"These texts have {size} bytes of UTF-8 together; at most {settings.history_bytes} are taken "
            "(history_bytes_max).",
            field="input",
        )
    _check_outputs(items)
    asked = next((item for item in reversed(items) if item.role != "system"), None)
    if asked is None or asked.role == "assistant":
        raise ParameterError(
            "The model is to answer, so the last item must be a message of the user or the output of a call. Messages "
            "of the system or a developer may follow it.",
            param="input",
        )
    return items


def _check_outputs(items: Sequence[Item]) -> None:
    """Refuse a second output of a call, which would not be told from the first one. Raises: ParameterError."""
    answered: set[str] = set()
    for item in items:
        if item.role == "assistant":
            answered.clear()
        elif item.call_id in answered:
            raise ParameterError(f"There is a second output of the call {shown(item.call_id)!r}.", param="input")
        elif item.call_id:
            answered.add(item.call_id)


def _options_of(body: CreateResponse) -> Options:
    text = body.text or TextConfig()
    return Options(
        top_p=body.top_p,
        text_format=_format_of(text),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        verbosity=text.verbosity,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
    )


def _format_of(text: TextConfig) -> TextFormat | None:
    match text.format:
        case JsonSchema() as form:
            return json_schema_format(form)
        case JsonObject():
            return TextFormat(type="json_object")
        case _:
            return None


def _echo_of(body: CreateResponse, taken: TakenTools, found: Found) -> Echo:
    brought = namespaces_in(body.input) if isinstance(body.input, tuple) else {}
    text = None if body.text is None else msgspec.to_builtins(body.text)
    reasoning = None if body.reasoning is None else msgspec.to_builtins(body.reasoning)
    return Echo(
        conversation=body.conversation is not None,
        previous_response_id=body.previous_response_id,
        store=body.is_stored,
        metadata=body.metadata or {},
        truncation=body.truncation or "auto",
        parallel_tool_calls=body.parallel_tool_calls is not False,
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=list(body.tools or ()),
        text=text,
        reasoning=reasoning,
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
        prompt_cache_retention=body.prompt_cache_retention,
        user=body.user,
        max_tool_calls=body.max_tool_calls,
        tools_left_out=taken.left_out,
        namespaces={**found.namespaces, **brought, **taken.namespaces},
        encrypted="reasoning.encrypted_content" in (body.include or ()),
    )


def turn_of(
    body: CreateResponse,
    asked: Asked,
    *,
    parent: str | None | UnsetType,
    made_session: str | None,
    request_id: str | None,
    key: IdempotencyKey | None,
    on_interrupt: OnInterrupt,
) -> NewTurn:
    """The turn of a request.

    Args:
        on_interrupt: What becomes of a response in the background if its process stops or dies. Another one ends with
            its process: its client waits for it, and asks again.
        parent: The turn that the new one follows: None for the first turn of a session that is made for it, UNSET for
            the head of a conversation.
        made_session: The public id of the session if that is made for it, or was for a response that it follows.
    """
    makes_session = parent is None
    return NewTurn(
        items=asked.items,
        answers_path=not asked.items,
        parent=parent,
        model=body.model,
        system_message=body.instructions or None,
        temperature=body.temperature,
        max_output_tokens=body.max_output_tokens,
        tools=asked.taken.tools,
        options=asked.options,
        face=msgspec.structs.replace(asked.echo, own_session=made_session).face(),
        ephemeral=not body.is_stored,
        may_title=made_session is None,
        may_leave_out=body.truncation != "disabled",
        background=bool(body.background),
        on_interrupt=on_interrupt if body.background else "fail",
        creates_session=makes_session,
        session_is_new=makes_session,
        request_id=request_id,
        key=key,
    )
