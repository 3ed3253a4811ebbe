"""Rows to records and back."""

from datetime import timedelta
from typing import Any

import msgspec

from service.storage.moments import MICROSECOND, moment, time_of
from service.storage.records import SessionRecord

Row = tuple[Any, ...]


def idle_us_of(session: SessionRecord) -> int:
    """The column ``idle_us`` of a session, by which statements compute what :func:`~service.storage.rules.expires_at`
    does."""
    return timedelta(seconds=session.idle_timeout_s) // MICROSECOND


class _SessionSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fields of a session that no query asks for."""

    idle_timeout_s: float
    title: str | None = None
    titled_at: int | None = None
    model: str | None = None
    system_message: str | None = None
    temperature: float | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}


_session_settings: msgspec.json.Decoder[_SessionSettings] = msgspec.json.Decoder(_SessionSettings)

SESSION_COLUMNS = (
    "key, id, created_at, last_accessed_at, expires_at, ephemeral, head, open_turns, message_count, input_tokens, "
    "output_tokens, reasoning_tokens, cached_tokens, settings"
)
SESSION_WIDTH = len(SESSION_COLUMNS.split(", "))


def session_of(row: Row) -> SessionRecord:
    """The record of a row that begins with :data:`SESSION_COLUMNS`."""
    settings = _session_settings.decode(row[13])
    return SessionRecord(
        id=row[1],
        created_at=time_of(row[2]),
        last_accessed_at=time_of(row[3]),
        expires_at=time_of(row[4]),
        ephemeral=row[5],
        head=row[6],
        open_turns=row[7],
        message_count=row[8],
        input_tokens=row[9],
        output_tokens=row[10],
        reasoning_tokens=row[11],
        cached_tokens=row[12],
        idle_timeout_s=settings.idle_timeout_s,
        title=settings.title,
        titled_at=None if settings.titled_at is None else time_of(settings.titled_at),
        model=settings.model,
        system_message=settings.system_message,
        temperature=settings.temperature,
        max_output_tokens=settings.max_output_tokens,
        metadata=settings.metadata,
    )


def settings_of(session: SessionRecord) -> bytes:
    """The column ``settings`` of a session."""
    return msgspec.json.encode(
        _SessionSettings(
            idle_timeout_s=session.idle_timeout_s,
            title=session.title,
            titled_at=None if session.titled_at is None else moment(session.titled_at),
            model=session.model,
            system_message=session.system_message,
            temperature=session.temperature,
            max_output_tokens=session.max_output_tokens,
            metadata=session.metadata,
        )
    )
