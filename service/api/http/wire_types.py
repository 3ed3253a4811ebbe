"""Types of bodies and queries that all faces share."""

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

# Told to readers of the schema only: :mod:`service.api.http.strict_json` looks itself, and says it in words.
NO_NUL = {"pattern": r"^[^\x00]*$"}
ModelName = Annotated[str, Meta(min_length=1, max_length=256, extra_json_schema=NO_NUL)]
Text = Annotated[
    str,
    Meta(min_length=1, description="At most `input_bytes_max` bytes of UTF-8, no NUL.", extra_json_schema=NO_NUL),
]
Temperature = Annotated[float, Meta(ge=0, le=2)]
MaxOutputTokens = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Metadata = Annotated[
    dict[
        Annotated[str, Meta(min_length=1, max_length=64, extra_json_schema=NO_NUL)],
        Annotated[str, Meta(max_length=512, extra_json_schema=NO_NUL)],
    ],
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
    """

    bounds_each: ClassVar[bool] = False
    may_be_left_out: ClassVar[bool] = False

    @classmethod
    def check_given(cls, told: object) -> None:
        """Refuse parts of the body in better words than the conversion would have. ``told`` is any JSON.

        Raises: InvalidRequestError
        """


class BodyPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object within the body of a request."""


class Query(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The query string of a request. A parameter that was not given is UNSET, because "null" is a text here."""
