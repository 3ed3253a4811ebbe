"""The bodies and queries of calls about sessions, each with one example."""

from typing import Annotated, Self, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from service.api.http.wire_types import NO_NUL as _NO_NUL
from service.api.http.wire_types import (
    Limit,
    MaxOutputTokens,
    Metadata,
    MetadataValue,
    ModelName,
    OwnerName,
    Query,
    RequestBody,
    SessionId,
    Temperature,
    Text,
    TurnId,
)
from service.api.native.paging_wire import After, Time
from service.ids import public_id
from service.storage.records import Match, Page, SessionRecord, SessionStatus

Title = Annotated[str, Meta(max_length=200, extra_json_schema=_NO_NUL)]
_OF_TURNS = Meta(description="Of turns that name none; left to the model's server if null.")


IdleTimeout = Annotated[float, Meta(ge=1, le=31_536_000, description="Seconds without use until the session expires.")]


class CreateSession(RequestBody, frozen=True, kw_only=True):
    """``{"id": "support-4711", "system_message": "Be brief.", "metadata": {"team": "blue"}}``"""

    id: SessionId | None = None
    owner: Annotated[
        OwnerName | None, Meta(description="Needs a key that may `administer`; the key's own name if left out.")
    ] = None
    title: Title | None = None
    model: ModelName | None = None
    system_message: Text | None = None
    temperature: Annotated[Temperature | None, _OF_TURNS] = None
    max_output_tokens: Annotated[MaxOutputTokens | None, _OF_TURNS] = None
    metadata: Metadata = {}  # noqa: RUF012  the fields of a Struct are no class attributes
    idle_timeout_s: IdleTimeout | None = None


class ForkSession(RequestBody, frozen=True, kw_only=True):
    """``{"at": "turn_0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19", "id": "support-4711-again"}``"""

    at: Annotated[TurnId | None, Meta(description="The last turn to copy: the head if left out.")] = None
    id: SessionId | None = None


class UpdateSession(RequestBody, frozen=True, kw_only=True):
    """``{"title": "Refund for order 4711", "model": null}``: fields that are left out do not change.

    null clears ``title``, ``model``, ``system_message``, ``temperature`` and ``max_output_tokens``.

    ``{"head": "turn_0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19", "seen_head": "turn_7f3e…"}``: shows another branch.
    """

    title: Title | None | UnsetType = UNSET
    model: ModelName | None | UnsetType = UNSET
    system_message: Text | None | UnsetType = UNSET
    temperature: Annotated[Temperature | None, _OF_TURNS] | UnsetType = UNSET
    max_output_tokens: Annotated[MaxOutputTokens | None, _OF_TURNS] | UnsetType = UNSET
    metadata: Annotated[Metadata, Meta(extra_json_schema={"description": "Replaces all pairs."})] | UnsetType = UNSET
    idle_timeout_s: IdleTimeout | UnsetType = UNSET
    head: (
        Annotated[TurnId | None, Meta(description="The turn that the next turn is to follow; none if null.")]
        | UnsetType
    ) = UNSET
    seen_head: (
        Annotated[
            TurnId | None, Meta(description="The head that the client has seen: if it is another one, nothing changes.")
        ]
        | UnsetType
    ) = UNSET


class SessionUsage(msgspec.Struct, frozen=True):
    """All turns, as the upstreams counted.

    ``{"input_tokens": 120, "output_tokens": 340, "reasoning_tokens": 200, "cached_tokens": 64}``

    ``reasoning_tokens`` are part of ``output_tokens``, ``cached_tokens`` of ``input_tokens``. Turns that ended early
    count with what was counted by then.
    """

    input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cached_tokens: int


def _whole(number: float) -> float:
    """Return a whole number as an int, so that JSON shows ``1800`` and not ``1800.0``."""
    return int(number) if number.is_integer() else number


class FoundBy(msgspec.Struct, frozen=True, kw_only=True):
    """``{"turn_id": "turn_0a…", "snippet": "…where is Lisbon? In Portugal…"}``"""

    turn_id: Annotated[str | None, Meta(description="The turn with the words; null: they are in the title.")]
    snippet: Annotated[str, Meta(description="The text around a word of the query: at most 202 characters.")]


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A session.

    ``{"id": "sess_6f…", "created_at": "2026-01-31T09:30:00Z", "last_accessed_at": "2026-01-31T09:31:07.25Z",
    "updated_at": "2026-01-31T09:31:07.25Z", "expires_at": "2026-01-31T10:01:07.25Z", "idle_timeout_s": 1800,
    "title": null, "model": null,
    "system_message": "Be brief.", "temperature": null, "max_output_tokens": null, "metadata": {},
    "status": "idle", "head": "turn_0a…", "message_count": 2,
    "usage": {"input_tokens": 12, "output_tokens": 34, "reasoning_tokens": 0, "cached_tokens": 0}}``
    """

    id: str
    created_at: Time
    last_accessed_at: Time
    updated_at: Annotated[
        Time,
        Meta(description="When something that PATCH can change did, a turn began or ended, or messages were added."),
    ]
    expires_at: Time
    idle_timeout_s: float
    title: str | None
    model: str | None
    system_message: str | None
    temperature: float | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    status: SessionStatus
    head: str | None
    message_count: Annotated[int, Meta(description="The messages of all turns, also on other branches.")]
    usage: SessionUsage
    owner: Annotated[str, Meta(description="Whose session it is. Only there if it has an owner.")] | UnsetType = UNSET
    match: Annotated[FoundBy, Meta(description="Where the words of `q` are. Only there in a search.")] | UnsetType = (
        UNSET
    )

    @classmethod
    def of_match(cls, match: Match) -> Self:
        found_by = FoundBy(turn_id=match.turn_id, snippet=match.snippet)
        return msgspec.structs.replace(cls.of(match.session), match=found_by)

    @classmethod
    def of(cls, record: SessionRecord) -> Self:
        return cls(
            id=public_id(record.id),
            created_at=record.created_at,
            last_accessed_at=record.last_accessed_at,
            updated_at=record.updated_at,
            expires_at=record.expires_at,
            idle_timeout_s=_whole(record.idle_timeout_s),
            title=record.title,
            model=record.model,
            system_message=record.system_message,
            temperature=None if record.temperature is None else _whole(record.temperature),
            max_output_tokens=record.max_output_tokens,
            metadata=record.metadata,
            status=record.status,
            head=record.head,
            message_count=record.message_count,
            usage=SessionUsage(
                input_tokens=record.input_tokens,
                output_tokens=record.output_tokens,
                reasoning_tokens=record.reasoning_tokens,
                cached_tokens=record.cached_tokens,
            ),
            owner=record.owner or UNSET,
        )


class SessionsQuery(Query, frozen=True, kw_only=True):
    """``?limit=50&status=running&count=true``, ``?q=lisbon+flight&metadata.team=blue``"""

    limit: Limit = 20
    after: After | UnsetType = UNSET
    status: SessionStatus | UnsetType = UNSET
    count: Annotated[
        bool, Meta(description="Whether to add the exact count of all pages; not with `q` or `metadata`.")
    ] = False
    q: Annotated[
        str,
        Meta(
            description="Only sessions that have all of these words in the title, or in the messages of an ended turn."
        ),
    ] = ""
    metadata: Annotated[
        dict[
            Annotated[str, Meta(min_length=1, max_length=64, extra_json_schema={"pattern": r"^[^\[\]\x00]*$"})],
            MetadataValue,
        ],
        Meta(
            max_length=16,
            description="Only sessions with these pairs: `metadata.key=value`, also for a key with brackets; or "
            "`metadata[key]=value`.",
        ),
    ] = {}  # noqa: RUF012  the fields of a Struct are no class attributes


class SessionList(msgspec.Struct, frozen=True, kw_only=True):
    """``{"data": [{"id": "sess_6f…", …}], "next": null, "count": 1}``: newest first; no ``next`` on the last page."""

    data: tuple[Session, ...]
    next: str | None
    count: int | UnsetType = UNSET
    partial: Annotated[
        bool | UnsetType,
        Meta(description="With `q` or `metadata`: whether sessions may be missing on this page. `next` goes on."),
    ] = UNSET

    @classmethod
    def of(cls, page: Page[msgspec.Raw], *, count: int | UnsetType = UNSET, partial: bool | UnsetType = UNSET) -> Self:
        return cls(data=cast("tuple[Session, ...]", page.data), next=page.next, count=count, partial=partial)
