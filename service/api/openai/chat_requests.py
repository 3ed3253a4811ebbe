"""The body of a chat completion's request, and the turn that it asks for.

The turn has all of the messages as its input: nothing of an earlier call is known.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, UnsetType

from service.api.http.strict_json import shown
from service.api.http.wire_types import NO_NUL, BodyPart, Metadata, ModelName, RequestBody, json_schema_format
from service.api.openai.errors import ParameterError
from service.api.openai.items import PARTS_MAX
from service.api.openai.signatures import upstream_of
from service.api.openai.unsupported import Refused, refuse_values, unsupported
from service.errors import InvalidRequestError
from service.ids import new_item_id
from service.models.client import FunctionTool, NamedFunction, Options, Role, TextFormat, ToolChoice, Tools
from service.sessions.commands import HISTORY_ITEMS_MAX, NewTurn
from service.steps import Steps
from service.storage.records import Item

STOPS_MAX = 4
_PARTS_IN_STEP = 500
TOOLS_MAX = 128
_Text = Annotated[str, Meta(extra_json_schema=NO_NUL)]
_Function = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
_CallId = Annotated[str, Meta(min_length=1, extra_json_schema=NO_NUL)]
_Stop = Annotated[str, Meta(min_length=1, max_length=512, extra_json_schema=NO_NUL)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_TokensMax = Annotated[int, Meta(ge=1, le=1_000_000_000)]
_False = Annotated[bool, Meta(extra_json_schema={"enum": [False]})]
_NO_EFFECT = "Accepted without effect."
_NoEffect = Annotated[str, Meta(max_length=512, description=_NO_EFFECT, extra_json_schema=NO_NUL)] | None


class TextPart(BodyPart, frozen=True, kw_only=True):
    """``{"type": "text", "text": "Hi"}``"""

    type: Literal["text"]
    text: _Text


class RepliedText(BodyPart, frozen=True, kw_only=True, tag="text", tag_field="type"):
    """``{"type": "text", "text": "Hello."}``"""

    text: _Text


class RepliedRefusal(BodyPart, frozen=True, kw_only=True, tag="refusal", tag_field="type"):
    """``{"type": "refusal", "refusal": "I cannot help with that."}``"""

    refusal: _Text


_Parts = Annotated[tuple[TextPart, ...], Meta(min_length=1, max_length=PARTS_MAX)]
_RepliedParts = Annotated[tuple[RepliedText | RepliedRefusal, ...], Meta(max_length=PARTS_MAX)]


class SystemMessage(BodyPart, frozen=True, kw_only=True, tag="system", tag_field="role"):
    """``{"role": "system", "content": "Be brief."}``"""

    content: _Text | _Parts
    name: _NoEffect = None


class DeveloperMessage(BodyPart, frozen=True, kw_only=True, tag="developer", tag_field="role"):
    """As one of the system: ``{"role": "developer", "content": "Be brief."}``"""

    content: _Text | _Parts
    name: _NoEffect = None


class UserMessage(BodyPart, frozen=True, kw_only=True, tag="user", tag_field="role"):
    """``{"role": "user", "content": "Hi"}``"""

    content: _Text | _Parts
    name: _NoEffect = None


class FunctionToCall(BodyPart, frozen=True, kw_only=True):
    """``{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}``"""

    name: _Function
    arguments: _Text


class EarlierCall(BodyPart, frozen=True, kw_only=True):
    """A call that the model has made: ``{"id": "call_6f…", "type": "function", "function": {"name": "f", …}}``"""

    id: _CallId
    type: Literal["function"]
    function: FunctionToCall
    extra_content: Annotated[dict[str, Any] | None, Meta(description="As the model server sent it.")] = None
    index: Annotated[int, Meta(ge=0, le=1 << 31, description="As chunks have it. Accepted without effect.")] | None = (
        None
    )


class AssistantMessage(BodyPart, frozen=True, kw_only=True, tag="assistant", tag_field="role"):
    """A reply of the model, as it was answered: ``{"role": "assistant", "content": "Hello."}``

    Reasoning in words is not sent to a model again.
    """

    content: _Text | _RepliedParts | None = None
    refusal: _Text | None = None
    tool_calls: Annotated[tuple[EarlierCall, ...], Meta(max_length=1024)] | None = None
    name: _NoEffect = None
    reasoning_content: Annotated[_Text | None, Meta(description=_NO_EFFECT)] = None
    annotations: Annotated[list[Any], Meta(max_length=1024, description=_NO_EFFECT)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(BodyPart, frozen=True, kw_only=True, tag="tool", tag_field="role"):
    """The result of a call: ``{"role": "tool", "tool_call_id": "call_6f…", "content": "4 °C"}``"""

    content: _Text | _Parts
    tool_call_id: _CallId
    name: _NoEffect = None


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class ChatFunction(BodyPart, frozen=True, kw_only=True):
    """``{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}``"""

    name: _Function
    description: _Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(BodyPart, frozen=True, kw_only=True):
    """``{"type": "function", "function": {"name": "get_weather"}}``"""

    type: Literal["function"]
    function: ChatFunction


class ChosenFunction(BodyPart, frozen=True, kw_only=True):
    """``{"name": "get_weather"}``"""

    name: str


class ChosenTool(BodyPart, frozen=True, kw_only=True):
    """``{"type": "function", "function": {"name": "get_weather"}}``"""

    type: Literal["function"]
    function: ChosenFunction


class TextResponse(BodyPart, frozen=True, kw_only=True, tag="text", tag_field="type"):
    """``{"type": "text"}``: the default."""


class JsonObjectResponse(BodyPart, frozen=True, kw_only=True, tag="json_object", tag_field="type"):
    """``{"type": "json_object"}``: some JSON object."""


class ResponseSchema(BodyPart, frozen=True, kw_only=True):
    """``{"name": "answer", "schema": {"type": "object"}, "strict": true}``"""

    name: _Function
    description: _Text | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class JsonSchemaResponse(BodyPart, frozen=True, kw_only=True, tag="json_schema", tag_field="type"):
    """``{"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}``"""

    json_schema: ResponseSchema


class ChatStreamOptions(BodyPart, frozen=True, kw_only=True):
    """``{"include_usage": true}``"""

    include_usage: Annotated[bool | None, Meta(description="Whether the last chunk tells the tokens.")] = None
    include_obfuscation: Annotated[bool | None, Meta(description=_NO_EFFECT)] = None


class CreateChatCompletion(RequestBody, frozen=True, kw_only=True):
    """``{"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "stream": true}``"""

    history: ClassVar[str] = "messages"

    @classmethod
    def check_given(cls, told: object) -> Steps[None]:
        """See :func:`refuse_unsupported`."""
        yield from refuse_unsupported(told)

    model: ModelName
    messages: Annotated[
        tuple[ChatMessage, ...],
        Meta(
            min_length=1,
            max_length=HISTORY_ITEMS_MAX,
            description="The whole conversation. The body may have `history_bytes_max` bytes.",
        ),
    ]
    stream: bool | None = None
    stream_options: Annotated[ChatStreamOptions | None, Meta(description="With `stream` only.")] = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_completion_tokens: _TokensMax | None = None
    max_tokens: Annotated[_TokensMax | None, Meta(description="The old name of `max_completion_tokens`.")] = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    stop: _Stop | Annotated[tuple[_Stop, ...], Meta(max_length=STOPS_MAX)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    reasoning_effort: Annotated[str, Meta(pattern=r"^[a-z]{1,32}$(?!\n)")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    response_format: TextResponse | JsonObjectResponse | JsonSchemaResponse | None = None
    tools: Annotated[tuple[ChatTool, ...], Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    n: Literal[1] | None = None
    store: _False | None = None
    metadata: Annotated[Metadata | None, Meta(extra_json_schema={"description": _NO_EFFECT})] = None
    user: _NoEffect = None
    safety_identifier: _NoEffect = None
    prompt_cache_key: _NoEffect = None
    prompt_cache_retention: _NoEffect = None
    prompt_cache_options: Annotated[dict[str, Any], Meta(max_length=16, description=_NO_EFFECT)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[tuple[Literal["text"], ...], Meta(max_length=1)] | None = None
    logprobs: _False | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Meta(max_length=0)] | None = None
    functions: Annotated[tuple[Any, ...], Meta(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    moderation: None = None


# What is not supported

_NO_AUDIO = "this server takes and makes texts only"
_OLD_FUNCTIONS = "it was replaced by `tools` and `tool_choice`"
_NO_LOGPROBS = "this server does not pass on the probabilities of tokens"
_REFUSED: Refused = {
    "audio": ((), _NO_AUDIO),
    "function_call": ((), _OLD_FUNCTIONS),
    "functions": (([],), _OLD_FUNCTIONS),
    "logit_bias": (({},), "tokens have other numbers in each model"),
    "logprobs": ((False,), _NO_LOGPROBS),
    "modalities": ((["text"], []), _NO_AUDIO),
    "moderation": ((), "this server does not judge texts"),
    "n": ((1,), "a completion has one choice; ask again for another"),
    "prediction": ((), "this server does not pass on a predicted reply"),
    "service_tier": (("auto", "default"), "this server has one tier"),
    "store": ((False,), "chat completions are not kept; the calls under /v1/responses keep what they answer"),
    "top_logprobs": ((0,), _NO_LOGPROBS),
    "web_search_options": ((), "this server searches nothing; give the model a function of yours in `tools`"),
}
"""Parameters that have no effect here that their callers would want: the values that are taken beside null, and why no
others are."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


def refuse_unsupported(told: object) -> Steps[None]:
    """Refuse by their names what this server does not support, in a body that is not converted yet.

    All else that is wrong is left to the conversion.

    Raises:
        ParameterError
    """
    if not isinstance(told, dict):
        return
    refuse_values(told, _REFUSED)
    for index, message in enumerate(_list_in(told, "messages")):
        yield
        yield from _refuse_in_message(message, f"messages[{index}]")
    for index, tool in enumerate(_list_in(told, "tools")):
        _refuse_type(tool, ("function",), f"tools[{index}]", "A tool")
    choice = told.get("tool_choice")
    _refuse_type(choice, ("function",), "tool_choice", "A choice of tools")
    _refuse_type(told.get("response_format"), ("text", "json_object", "json_schema"), "response_format", "A form")


def _refuse_in_message(message: object, place: str) -> Steps[None]:
    if not isinstance(message, dict):
        return
    role = message.get("role")
    if isinstance(role, str) and role not in _ROLES:
        raise ParameterError(
            f"A message of the role {shown(role)!r} is not supported.", param=f"{place}.role", code="unsupported_value"
        )
    for name, why in (("audio", _NO_AUDIO), ("function_call", _OLD_FUNCTIONS)):
        if message.get(name) is not None:
            raise unsupported(f"`{name}` of a message is not supported: {why}.", f"{place}.{name}")
    for index, part in enumerate(_list_in(message, "content")):
        if index % _PARTS_IN_STEP == _PARTS_IN_STEP - 1:
            yield
        kinds = ("text", "refusal") if role == "assistant" else ("text",)
        _refuse_type(part, kinds, f"{place}.content[{index}]", "Content")
    for index, call in enumerate(_list_in(message, "tool_calls")):
        if index % _PARTS_IN_STEP == _PARTS_IN_STEP - 1:
            yield
        _refuse_type(call, ("function",), f"{place}.tool_calls[{index}]", "A call")


def _refuse_type(part: object, taken: Sequence[str], place: str, what: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in taken:
        raise ParameterError(
            f"{what} of the type {shown(kind)!r} is not supported; supported is {' or '.join(taken)}.",
            param=f"{place}.type",
            code="unsupported_value",
        )


def _list_in(told: dict[str, object], name: str) -> list[object]:
    value = told.get(name)
    return value if isinstance(value, list) else []


# The turn


def turn_of(body: CreateChatCompletion, *, request_id: str | None) -> Steps[NewTurn]:
    """The turn that a request asks for.

    Raises:
        InvalidRequestError: Parts of the body contradict each other, or the conversation has no end to be answered.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("Without `stream` there is no stream to have options.", field="stream_options")
    tokens_max = body.max_completion_tokens or body.max_tokens
    if body.max_tokens not in (None, tokens_max):
        raise InvalidRequestError("This is another bound than `max_completion_tokens`.", field="max_tokens")
    return NewTurn(
        items=(yield from input_of(body.messages)),
        model=body.model,
        temperature=body.temperature,
        max_output_tokens=tokens_max,
        tools=_tools_of(body),
        options=_options_of(body),
        creates_session=True,
        session_is_new=True,
        ephemeral=True,
        request_id=request_id,
    )


def includes_usage(body: CreateChatCompletion) -> bool:
    """Whether the last chunk of a stream is to tell the tokens."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _options_of(body: CreateChatCompletion) -> Options:
    return Options(
        top_p=body.top_p,
        text_format=_format_of(body),
        reasoning_effort=body.reasoning_effort,
        verbosity=body.verbosity,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        stop=(body.stop,) if isinstance(body.stop, str) else body.stop or (),
        seed=body.seed,
    )


def _format_of(body: CreateChatCompletion) -> TextFormat | None:
    match body.response_format:
        case JsonSchemaResponse(json_schema=form):
            return json_schema_format(form)
        case JsonObjectResponse():
            return TextFormat(type="json_object")
        case _:
            return None


def _tools_of(body: CreateChatCompletion) -> Tools | UnsetType:
    tools = body.tools or ()
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequestError(f"There are two functions named {name!r}.", field=f"tools[{index}].function.name")
    choice: ToolChoice | None = None
    if isinstance(body.tool_choice, ChosenTool):
        choice = NamedFunction(body.tool_choice.function.name)
        if choice.name not in names:
            raise InvalidRequestError("This is none of the functions in `tools`.", field="tool_choice.function.name")
    else:
        choice = body.tool_choice
    if choice == "required" and not names:
        raise InvalidRequestError("A call is required, and `tools` has no function.", field="tool_choice")
    if not names:
        return UNSET
    functions = tuple(
        FunctionTool(
            name=tool.function.name,
            description=tool.function.description,
            parameters=tool.function.parameters,
            strict=tool.function.strict,
        )
        for tool in tools
    )
    return Tools(functions=functions, choice=choice, parallel=body.parallel_tool_calls)


def input_of(messages: Sequence[ChatMessage]) -> Steps[tuple[Item, ...]]:
    """The messages as items of an input.

    Raises:
        InvalidRequestError: There are too many calls; a call has two results; or nothing at the end waits for a reply.
    """
    items: list[Item] = []
    answered: set[str] = set()
    for index, message in enumerate(messages):
        yield
        place = f"messages[{index}]"
        if isinstance(message, ToolMessage):
            if message.tool_call_id in answered:
                raise InvalidRequestError("This is a second result of the same call.", field=f"{place}.tool_call_id")
            answered.add(message.tool_call_id)
        elif isinstance(message, AssistantMessage):
            answered.clear()
        items += _items_of(message, place)
        if len(items) > 2 * HISTORY_ITEMS_MAX:
            raise InvalidRequestError(
                f"These messages have more than {2 * HISTORY_ITEMS_MAX} texts and calls.", field="messages"
            )
    asked = next((item for item in reversed(items) if item.role != "system"), None)
    if asked is None or asked.role == "assistant":
        raise InvalidRequestError(
            "The model is to answer, so the last message must be one of the user or of a tool. Messages of the system "
            "may follow it.",
            field="messages",
        )
    return tuple(items)


def _items_of(message: ChatMessage, field: str) -> Iterator[Item]:
    match message:
        case SystemMessage(content=content) | DeveloperMessage(content=content):
            if text := _text_of(content):
                yield _message("system", text)
        case UserMessage(content=content):
            yield _message("user", _text_of(content))
        case ToolMessage(content=content, tool_call_id=call_id):
            yield Item(
                id=new_item_id("function_call_output"),
                type="function_call_output",
                role="user",
                text=_text_of(content),
                call_id=call_id,
            )
        case AssistantMessage():
            if text := _text_of(message.content or "") or message.refusal or "":
                yield _message("assistant", text)
            for index, call in enumerate(message.tool_calls or ()):
                place = f"{field}.tool_calls[{index}].extra_content"
                yield Item(
                    id=new_item_id("function_call"),
                    type="function_call",
                    role="assistant",
                    text=call.function.arguments,
                    call_id=call.id,
                    name=call.function.name,
                    upstream=upstream_of(call.extra_content, place),
                )


def _message(role: Role, text: str) -> Item:
    return Item(id=new_item_id("message"), role=role, text=text)


def _text_of(content: str | Sequence[TextPart | RepliedText | RepliedRefusal]) -> str:
    if isinstance(content, str):
        return content
    between = "\n" if content and isinstance(content[0], TextPart) else ""  # the parts of a reply are one text
    return between.join([it.refusal if isinstance(it, RepliedRefusal) else it.text for it in content])
