"""Types of bodies and queries that all faces share."""

from typing import Annotated, Any, ClassVar, Protocol

import msgspec
from msgspec import Meta

from service.ids import ITEM_ID, OWNER_NAME, SESSION_ID, TURN_ID
from service.models.client import TextFormat
from service.steps import Steps

# Python's ``$`` also matches before a last line end, and JavaScript's does not; the lookahead makes them equal.
SESSION_ID_PATTERN = rf"^{SESSION_ID}$(?!\n)"
OWNER_NAME_PATTERN = rf"^{OWNER_NAME}$(?!\n)"
TURN_ID_PATTERN = rf"^{TURN_ID}$(?!\n)"
PARENT_PATTERN = rf"^({TURN_ID}|null)$(?!\n)"
ITEM_ID_PATTERN = rf"^{ITEM_ID}$(?!\n)"
SEQ_PATTERN = r"^[0-9]{0,15}$(?!\n)"
FUNCTION_PATTERN = r"^[A-Za-z0-9_-]{1,64}$(?!\n)"
EFFORT_PATTERN = r"^[a-z_]{1,32}$(?!\n)"
FORMS = {
    SESSION_ID_PATTERN: "1-128 of `A-Z a-z 0-9 _ . -`; not `.` or `..`, which a URL cannot contain",
    OWNER_NAME_PATTERN: "the name of an owner: 1-128 of `A-Z a-z 0-9 _ . ~ @ | : + = -`",
    TURN_ID_PATTERN: "the id of a turn: `turn_` and 32 of `0-9 a-f`",
    PARENT_PATTERN: "the id of a turn (`turn_` and 32 of `0-9 a-f`), or `null`",
    SEQ_PATTERN: "the id of an event: a whole number of at most 15 digits",
    FUNCTION_PATTERN: "the name of a function or a format: 1-64 of `A-Z a-z 0-9 _ -`",
    EFFORT_PATTERN: "a word: 1-32 of `a-z _`",
}
"""The patterns in words, for error messages."""
KINDS = {
    "input": ("message", "function_call_output"),
    "items": ("message", "function_call", "function_call_output"),
    "tools": ("function",),
    "tool_choice": ("function",),
    "text_format": ("json_schema", "json_object"),
}
"""What ``type`` may be in an object of these fields, for error messages."""
# Told to readers of the schema only: :mod:`service.api.http.strict_json` looks itself, and says it in words.
NO_NUL = {"pattern": r"^[^\x00]*$"}
SessionId = Annotated[str, Meta(pattern=SESSION_ID_PATTERN, description=f"{FORMS[SESSION_ID_PATTERN]}.")]
OwnerName = Annotated[str, Meta(pattern=OWNER_NAME_PATTERN)]
TurnId = Annotated[str, Meta(pattern=TURN_ID_PATTERN)]
ItemId = Annotated[str, Meta(pattern=ITEM_ID_PATTERN)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256, extra_json_schema=NO_NUL)]
Text = Annotated[
    str,
    Meta(min_length=1, description="At most `input_bytes_max` bytes of UTF-8, no NUL.", extra_json_schema=NO_NUL),
]
Temperature = Annotated[float, Meta(ge=0, le=2)]
MaxOutputTokens = Annotated[int, Meta(ge=1, le=1_000_000_000)]
MetadataValue = Annotated[str, Meta(max_length=512, extra_json_schema=NO_NUL)]
Metadata = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64, extra_json_schema=NO_NUL)], MetadataValue],
    Meta(max_length=16, description="At most 16 pairs, keys of 1-64 characters, values of at most 512."),
]
Limit = Annotated[
    int,
    Meta(
        ge=1,
        le=100,
        description="At most this many items on a page; fewer where they would be more than 1 MiB of JSON.",
    ),
]


class RequestBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a request.

    Attributes:
        bounds_each: Whether each object of a list may have ``input_bytes_max`` of texts, and not only the list.
        may_be_left_out: Whether a request without a body means all defaults.
        history: The name of the list that may bring a whole conversation: the body may have ``history_bytes_max``
            bytes. Empty for most.
    """

    bounds_each: ClassVar[bool] = False
    may_be_left_out: ClassVar[bool] = False
    history: ClassVar[str] = ""

    @classmethod
    def check_given(cls, told: object) -> Steps[None]:  # noqa: ARG003  for those that look at it
        """Refuse parts of the body in better words than the conversion would have. ``told`` is any JSON.

        Raises: InvalidRequestError
        """
        yield from ()


class BodyPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object within the body of a request."""


class Query(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The query string of a request. A parameter that was not given is UNSET, because "null" is a text here."""


class DescribedSchema(Protocol):
    """The part of a body that names the JSON schema of a reply's text."""

    @property
    def name(self) -> str: ...

    @property
    def schema(self) -> dict[str, Any] | None: ...

    @property
    def description(self) -> str | None: ...

    @property
    def strict(self) -> bool | None: ...


def json_schema_format(asked: DescribedSchema) -> TextFormat:
    """The form of a text that fits this schema."""
    return TextFormat(
        type="json_schema", name=asked.name, schema=asked.schema, description=asked.description, strict=asked.strict
    )
