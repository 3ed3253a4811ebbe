"""The bodies of requests that start a turn, each with one example.

Texts are bounded further by ``input_bytes_max`` (see :mod:`service.api.http.request_body`).
"""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, UnsetType

from service.api.http.wire_types import (
    EFFORT_PATTERN,
    FORMS,
    FUNCTION_PATTERN,
    BodyPart,
    MaxOutputTokens,
    ModelName,
    RequestBody,
    SessionId,
    Temperature,
    Text,
    TurnId,
)
from service.api.http.wire_types import NO_NUL as _NO_NUL
from service.sessions.commands import INPUT_ITEMS_MAX, OnConflict
from service.storage.records import OnDisconnect, OnInterrupt

_OF_SESSION = Meta(description="The session's if left out.")


class NewMessage(BodyPart, frozen=True, kw_only=True, tag="message", tag_field="type"):
    """A text of the user in an input: ``{"type": "message", "text": "And tomorrow?"}``"""

    text: Text


class NewFunctionCallOutput(BodyPart, frozen=True, kw_only=True, tag="function_call_output", tag_field="type"):
    """The result of a call: ``{"type": "function_call_output", "call_id": "call_6f…", "output": "4 °C"}``"""

    call_id: Annotated[str, Meta(min_length=1, description="The `call_id` of the call.", extra_json_schema=_NO_NUL)]
    output: Annotated[
        str,
        Meta(
            description="The result, in any form that the model understands; it may be empty.",
            extra_json_schema=_NO_NUL,
        ),
    ]


NewItems = Annotated[
    tuple[NewMessage | NewFunctionCallOutput, ...],
    Meta(
        min_length=1,
        max_length=INPUT_ITEMS_MAX,
        description="All texts together have at most `input_bytes_max` bytes of UTF-8.",
    ),
]


class FunctionTool(BodyPart, frozen=True, kw_only=True, tag="function", tag_field="type"):
    """A function that the model may call; this service only passes the description to the model's server.

    ``{"type": "function", "name": "get_weather", "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}``
    """

    name: Annotated[str, Meta(pattern=FUNCTION_PATTERN, description=f"{FORMS[FUNCTION_PATTERN]}.")]
    description: Annotated[str, Meta(extra_json_schema=_NO_NUL)] | None = None
    parameters: Annotated[dict[str, Any], Meta(description="A JSON schema of the arguments.")] | None = None
    strict: Annotated[bool, Meta(description="Whether the arguments must fit the schema.")] | None = None


class FunctionChoice(BodyPart, frozen=True, kw_only=True, tag="function", tag_field="type"):
    """The function that the model must call: ``{"type": "function", "name": "get_weather"}``"""

    name: str


class JsonSchemaFormat(BodyPart, frozen=True, kw_only=True, tag="json_schema", tag_field="type"):
    """The text of the reply is JSON that fits a schema, by the model's server; this service does not check it.

    ``{"type": "json_schema", "name": "weather", "schema": {"type": "object", "properties": {"city":
    {"type": "string"}}, "required": ["city"], "additionalProperties": false}, "strict": true}``
    """

    name: Annotated[str, Meta(pattern=FUNCTION_PATTERN, description=f"{FORMS[FUNCTION_PATTERN]}.")]
    schema: Annotated[dict[str, Any], Meta(description="A JSON schema of the text.")]
    description: Annotated[str, Meta(extra_json_schema=_NO_NUL)] | None = None
    strict: Annotated[bool, Meta(description="Whether the text must fit the schema.")] | None = None


class JsonObjectFormat(BodyPart, frozen=True, kw_only=True, tag="json_object", tag_field="type"):
    """The text of the reply is a JSON object, by the model's server: ``{"type": "json_object"}``"""


TopP = Annotated[
    float, Meta(ge=0, le=1, description="Only the likeliest tokens, up to this share; left to the server if left out.")
]


TextFormat = Annotated[
    JsonSchemaFormat | JsonObjectFormat,
    Meta(description="The form of the reply's text: at most `input_bytes_max` bytes. A plain text if left out."),
]


ReasoningEffort = Annotated[
    str,
    Meta(
        pattern=EFFORT_PATTERN,
        description="How much the model thinks, like `low` or `high`, in the words of its server; left to the server "
        "if left out.",
    ),
]


_WITHOUT_CLIENTS = Meta(description="What happens when no client streams the turn or waits for it any more.")
_WITHOUT_PROCESS = Meta(
    description="What becomes of the turn if its process stops or dies before the turn's end: `fail` ends the turn as "
    "interrupted, `retry` has another process, or the next start, ask the model anew, and `continue` has the model go "
    "on after the text so far, where its server can. The setting `on_interrupt` if left out."
)
_AT_ONCE = Meta(description="Answer 202 at once; the turn runs also if no client waits for it.")


class StartTurn(RequestBody, frozen=True, kw_only=True):
    """``{"input": "What is a nursery?", "temperature": 0.2, "on_conflict": "queue"}``"""

    input: Annotated[
        Text | NewItems, Meta(description="A text of the user, or texts and the results of calls of the model.")
    ]
    parent: (
        Annotated[
            TurnId | None,
            Meta(description="The turn that this one follows: the head if left out, none if null."),
        ]
        | UnsetType
    ) = UNSET
    model: ModelName | None = None
    system_message: Annotated[
        Text | None, Meta(description="In place of the session's, for this turn only. Up to `input_bytes_max` bytes.")
    ] = None
    temperature: Annotated[Temperature | None, _OF_SESSION] = None
    max_output_tokens: Annotated[MaxOutputTokens | None, _OF_SESSION] = None
    tools: Annotated[
        tuple[FunctionTool, ...],
        Meta(
            max_length=128,
            description="Functions that the model may call and the client runs: at most `input_bytes_max` bytes.",
        ),
    ] = ()
    tool_choice: Annotated[
        Literal["auto", "none", "required"] | FunctionChoice | None,
        Meta(description="Whether the model calls a function; left to the model's server if left out."),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="Whether one reply may have several calls; left to the server if left out.")
    ] = None
    top_p: TopP | None = None
    text_format: TextFormat | None = None
    reasoning_effort: ReasoningEffort | None = None
    on_conflict: Annotated[
        OnConflict, Meta(description="What to do while another turn of the session is running or queued.")
    ] = "reject"
    on_disconnect: Annotated[OnDisconnect, _WITHOUT_CLIENTS] = "cancel"
    on_interrupt: Annotated[OnInterrupt, _WITHOUT_PROCESS] | UnsetType = UNSET
    background: Annotated[bool, _AT_ONCE] = False


class RetryTurn(RequestBody, frozen=True, kw_only=True):
    """``{"temperature": 1, "on_disconnect": "continue"}``: what is left out is as in the turn that is retried.

    null stands for what a new turn has without the field. The body may be left out.
    """

    may_be_left_out: ClassVar[bool] = True

    model: ModelName | None | UnsetType = UNSET
    system_message: Text | None | UnsetType = UNSET
    temperature: Temperature | None | UnsetType = UNSET
    max_output_tokens: MaxOutputTokens | None | UnsetType = UNSET
    tools: (
        Annotated[tuple[FunctionTool, ...], Meta(max_length=128, description="In place of the turn's; none if empty.")]
        | UnsetType
    ) = UNSET
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | None | UnsetType = UNSET
    parallel_tool_calls: bool | None | UnsetType = UNSET
    top_p: TopP | None | UnsetType = UNSET
    text_format: TextFormat | None | UnsetType = UNSET
    reasoning_effort: ReasoningEffort | None | UnsetType = UNSET
    on_conflict: Annotated[
        OnConflict, Meta(description="What to do if the retried turn waits for other turns to end.")
    ] = "reject"
    on_disconnect: Annotated[OnDisconnect, _WITHOUT_CLIENTS] = "cancel"
    on_interrupt: Annotated[OnInterrupt, _WITHOUT_PROCESS] | UnsetType = UNSET
    background: Annotated[bool, _AT_ONCE] = False


class Chat(RequestBody, frozen=True, kw_only=True):
    """``{"message": "Hi", "session_id": "me", "on_disconnect": "continue"}``"""

    message: Text
    session_id: Annotated[
        SessionId | None, Meta(description="Created if it does not exist; if left out, a new session is created.")
    ] = None
    on_disconnect: Annotated[
        OnDisconnect, Meta(description="What happens when no client streams the turn any more.")
    ] = "cancel"
    on_interrupt: Annotated[OnInterrupt, _WITHOUT_PROCESS] | UnsetType = UNSET
