"""The effect of a turn's end on its session: the same for a normal end and for a recovery."""

from datetime import datetime, timedelta

import apsw

from service.storage.records import TurnRecord
from service.storage.sqlite.rows import moment

_END = (
    "UPDATE sessions SET open_turns = open_turns - 1, owner = CASE open_turns WHEN 1 THEN NULL ELSE owner END, "
    "message_count = message_count + :messages, input_tokens = input_tokens + :input_tokens, "
    "output_tokens = output_tokens + :output_tokens, last_accessed_at = :now, expires_at = :expires_at "
    "WHERE key = :session"
)


def count_end(db: apsw.Connection, turn: TurnRecord, now: datetime, *, session: int, idle_timeout_s: float) -> None:
    """Count the end: the session is used, has one open turn less, and its totals grow by the turn's."""
    db.execute(
        _END,
        {
            "session": session,
            "messages": int(bool(turn.text)),
            "input_tokens": turn.usage.input_tokens if turn.usage else 0,
            "output_tokens": turn.usage.output_tokens if turn.usage else 0,
            "now": moment(now),
            "expires_at": moment(now + timedelta(seconds=idle_timeout_s)),
        },
    )
