"""Rows of turns to records and back. A statement names the table ``t``."""

from collections.abc import Iterator, Sequence

import msgspec

from service.models.client import FinishReason, Usage
from service.storage.item_json import items_of
from service.storage.moments import moment, time_of
from service.storage.postgres.rows import Row
from service.storage.records import EndReason, Failure, Item, LeftOut, TurnRecord
from service.storage.rules import NOBODY
from service.storage.turn_options import options_json, options_of

_ROWS_AT_ONCE = 1000
_BYTES_AT_ONCE = 2 * 1024 * 1024


class TurnSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The small fields of a turn that no statement looks at.

    Attributes:
        text_length: The code points of the reply of a turn whose texts are in pages.
        kept: The seq of the last event of such a turn.
    """

    model: str
    temperature: float | None = None
    max_output_tokens: int | None = None
    background: bool = False
    reason: EndReason | None = None
    error: Failure | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    left_out: LeftOut | None = None
    text_length: int = 0
    kept: int = 0


_settings: msgspec.json.Decoder[TurnSettings] = msgspec.json.Decoder(TurnSettings)

PATH_COLUMNS = (
    "t.id, t.parent, t.state, t.created_at, t.started_at, t.ended_at, t.last_seq, t.ephemeral, t.events_deleted, "
    f"t.settings, t.input, t.output, CASE WHEN (t.owner IS NULL OR t.owner = {NOBODY}) "
    "AND t.runs IS NULL THEN t.key END"
)
"""The columns of turns that are read for a prompt or for their messages: options may be larger than these are."""
TURN_COLUMNS = f"{PATH_COLUMNS}, t.options"
"""The columns of a whole record."""
COLUMNS = len(PATH_COLUMNS.split(", "))
"""The number of the columns of :data:`PATH_COLUMNS`."""


def turn_of(session_id: str, row: Row, *, with_options: bool = True) -> tuple[TurnRecord, int | None]:
    """The record of a row of :data:`TURN_COLUMNS`; and the turn's key if the texts of its output are in pages.

    Args:
        with_options: Whether the row has the column of the options.
    """
    settings = _settings.decode(row[9])
    turn = TurnRecord(
        id=row[0],
        session_id=session_id,
        parent=row[1],
        state=row[2],
        created_at=time_of(row[3]),
        started_at=None if row[4] is None else time_of(row[4]),
        ended_at=None if row[5] is None else time_of(row[5]),
        last_seq=row[6],
        ephemeral=row[7],
        events_deleted=row[8],
        model=settings.model,
        temperature=settings.temperature,
        max_output_tokens=settings.max_output_tokens,
        background=settings.background,
        reason=settings.reason,
        error=settings.error,
        finish_reason=settings.finish_reason,
        usage=settings.usage,
        left_out=settings.left_out,
        input=items_of(row[10]),
        output=items_of(row[11]),
        **options_of(row[13] if with_options else None),
    )
    return turn, row[12]


def values_of(turn: TurnRecord) -> dict[str, object]:
    """The columns of a turn, by name, but not those of its place in the tree and those of its output and events."""
    in_prompts = turn.in_prompts
    options = options_json(turn)
    return {
        "id": turn.id,
        "parent": turn.parent,
        "state": turn.state,
        "created_at": moment(turn.created_at),
        "started_at": None if turn.started_at is None else moment(turn.started_at),
        "ended_at": None if turn.ended_at is None else moment(turn.ended_at),
        "last_seq": turn.last_seq,
        "message_items": in_prompts.items,
        "message_bytes": in_prompts.bytes,
        "messages": turn.message_count,
        "text_bytes": turn.text_bytes + len(options or b""),
        "ephemeral": turn.ephemeral,
        "events_deleted": turn.events_deleted,
        "options": options,
        "input": json_of(turn.input),
    }


def settings_json(turn: TurnRecord, *, text_length: int = 0, kept: int = 0) -> bytes:
    settings = TurnSettings(
        model=turn.model,
        temperature=turn.temperature,
        max_output_tokens=turn.max_output_tokens,
        background=turn.background,
        reason=turn.reason,
        error=turn.error,
        finish_reason=turn.finish_reason,
        usage=turn.usage,
        left_out=turn.left_out,
        text_length=text_length,
        kept=kept,
    )
    return msgspec.json.encode(settings)


def settings_of(json: bytes) -> TurnSettings:
    return _settings.decode(json)


def json_of(items: Sequence[Item]) -> bytes:
    return msgspec.json.encode(items)


def parts(turns: Sequence[TurnRecord], *, bytes_max: int = _BYTES_AT_ONCE) -> Iterator[slice]:
    """The places of the turns that one statement writes, so that no statement has very many texts."""
    first = size = 0
    for place, turn in enumerate(turns):
        size += turn.text_bytes
        if place > first and (size > bytes_max or place - first == _ROWS_AT_ONCE):
            yield slice(first, place)
            first, size = place, turn.text_bytes
    if turns:
        yield slice(first, len(turns))
