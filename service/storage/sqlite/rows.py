"""Rows to records and back."""

from typing import Any

import msgspec

from service.models.client import Usage
from service.storage.item_json import items_of
from service.storage.moments import moment, time_of
from service.storage.records import Failure, Item, LeftOut, SessionRecord, TurnRecord
from service.storage.turn_options import options_json, options_of

Row = tuple[Any, ...]


class _SessionOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What turns of a session ask of the model if they name nothing else."""

    temperature: float | None = None
    max_output_tokens: int | None = None


_metadata: msgspec.json.Decoder[dict[str, str]] = msgspec.json.Decoder(dict[str, str])
_usage: msgspec.json.Decoder[Usage] = msgspec.json.Decoder(Usage)
_failure: msgspec.json.Decoder[Failure] = msgspec.json.Decoder(Failure)
_left_out: msgspec.json.Decoder[LeftOut] = msgspec.json.Decoder(LeftOut)
_session_options: msgspec.json.Decoder[_SessionOptions] = msgspec.json.Decoder(_SessionOptions)
_NO_OPTIONS = _SessionOptions()
_ids: msgspec.json.Decoder[frozenset[str]] = msgspec.json.Decoder(frozenset[str])

STAGED_MARK = "ahead"
"""The beginning of the mark of staged events, in a column whose other values are JSON. Kept files have this word."""


def as_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


SESSION_COLUMNS = (
    "key, id, created_at, last_accessed_at, expires_at, idle_timeout_s, head, message_count, open_turns, input_tokens, "
    "output_tokens, reasoning_tokens, cached_tokens, ephemeral"
)
SETTINGS_COLUMNS = "title, model, system_message, metadata, options, titled_at"


def session_of(row: Row, settings: Row) -> SessionRecord:
    """The record of a row of :data:`SESSION_COLUMNS` and its row of :data:`SETTINGS_COLUMNS`."""
    options = _NO_OPTIONS if settings[4] is None else _session_options.decode(settings[4])
    return SessionRecord(
        id=row[1],
        created_at=time_of(row[2]),
        last_accessed_at=time_of(row[3]),
        expires_at=time_of(row[4]),
        idle_timeout_s=row[5],
        head=row[6],
        message_count=row[7],
        open_turns=row[8],
        input_tokens=row[9],
        output_tokens=row[10],
        reasoning_tokens=row[11],
        cached_tokens=row[12],
        ephemeral=bool(row[13]),
        title=settings[0],
        model=settings[1],
        system_message=settings[2],
        temperature=options.temperature,
        max_output_tokens=options.max_output_tokens,
        metadata=_metadata.decode(settings[3]),
        titled_at=None if settings[5] is None else time_of(settings[5]),
    )


def settings_of(session: SessionRecord) -> tuple[object, ...]:
    """The values of :data:`SETTINGS_COLUMNS`."""
    options = _SessionOptions(temperature=session.temperature, max_output_tokens=session.max_output_tokens)
    return (
        session.title,
        session.model,
        session.system_message,
        as_json(session.metadata),
        None if options == _NO_OPTIONS else as_json(options),
        None if session.titled_at is None else moment(session.titled_at),
    )


TURN_COLUMNS = (
    "id, parent, state, model, created_at, input, output, temperature, max_output_tokens, "
    "background, started_at, ended_at, reason, error, finish_reason, usage, last_seq, left_out, options, "
    "events_deleted, deleted_items, ephemeral, "
    "CASE WHEN output_bytes IS NULL THEN NULL ELSE key END"
)
"""The columns of a record, in the views of turns: these know which items are deleted that a row has still."""
_DELETED_ITEMS = 20
PATH_COLUMNS = TURN_COLUMNS.replace("options", "NULL")
"""The columns of turns that are read for a prompt or for their messages: options may be larger than these are."""


def input_of(json: str, deleted_items: str | None) -> tuple[Item, ...]:
    """The input of a turn, by its columns ``input`` and ``deleted_items``."""
    items = items_of(json)
    if deleted_items is None:
        return items
    deleted = _ids.decode(deleted_items)
    return tuple(item for item in items if item.id not in deleted)


def has_lost_items(row: Row) -> bool:
    """Whether a row of :data:`TURN_COLUMNS` has items that are deleted: ``message_bytes`` counts them still."""
    return row[_DELETED_ITEMS] is not None


def turn_of(session_id: str, row: Row) -> tuple[TurnRecord, int | None]:
    """The record of a row of :data:`TURN_COLUMNS`; and the turn's key if the texts of its output are in pages."""
    turn = TurnRecord(
        id=row[0],
        session_id=session_id,
        parent=row[1],
        state=row[2],
        model=row[3],
        created_at=time_of(row[4]),
        input=input_of(row[5], row[_DELETED_ITEMS]),
        output=items_of(row[6]),
        temperature=row[7],
        max_output_tokens=row[8],
        background=bool(row[9]),
        started_at=None if row[10] is None else time_of(row[10]),
        ended_at=None if row[11] is None else time_of(row[11]),
        reason=row[12],
        error=None if row[13] is None else _failure.decode(row[13]),
        finish_reason=row[14],
        usage=None if row[15] is None else _usage.decode(row[15]),
        last_seq=row[16],
        left_out=None if row[17] is None else _left_out.decode(row[17]),
        events_deleted=bool(row[19]),
        ephemeral=bool(row[21]),
        **options_of(row[18]),
    )
    return turn, row[22]


def values_of(turn: TurnRecord) -> dict[str, object]:
    """The columns of a turn, by name; those of its events are those of an open turn."""
    in_prompts = turn.in_prompts
    options = options_json(turn)
    return {
        "id": turn.id,
        "parent": turn.parent,
        "state": turn.state,
        "model": turn.model,
        "created_at": moment(turn.created_at),
        "started_at": None if turn.started_at is None else moment(turn.started_at),
        "ended_at": None if turn.ended_at is None else moment(turn.ended_at),
        "temperature": turn.temperature,
        "max_output_tokens": turn.max_output_tokens,
        "background": int(turn.background),
        "reason": turn.reason,
        "error": None if turn.error is None else as_json(turn.error),
        "finish_reason": turn.finish_reason,
        "usage": None if turn.usage is None else as_json(turn.usage),
        "last_seq": turn.last_seq,
        "left_out": None if turn.left_out is None else as_json(turn.left_out),
        "options": None if options is None else options.decode(),
        "message_items": in_prompts.items,
        "message_bytes": in_prompts.bytes,
        "input": as_json(turn.input),
        "output": as_json(turn.output),
        "runs": None,
        "output_bytes": None,
        "text_length": None,
    }
