"""Creations of sessions with turns: hidden, in steps that hold the write lock for a short time; the last one shows all.

A hidden session is as that of a fork (:mod:`service.storage.sqlite.forks`).
"""

from collections.abc import Collection, Sequence
from datetime import datetime

import apsw
import msgspec

from service.storage.records import IdempotencyKey, SessionRecord, TurnRecord
from service.storage.sqlite import idempotency, removals, sessions, turns


class Creation(msgspec.Struct, frozen=True, kw_only=True):
    """A session to be created with turns that are complete at once.

    Attributes:
        terms: Those of each turn.
        hidden_id: The id of the session while it is hidden.
    """

    session: SessionRecord
    added: Sequence[TurnRecord]
    terms: Sequence[Collection[str]]
    hidden_id: str
    key: IdempotencyKey | None


class Progress(msgspec.Struct, frozen=True):
    """The progress of a creation: the key of the session, and how many turns it has."""

    session: int
    turns: int


def build(
    db: apsw.Connection, creation: Creation, progress: Progress | None, *, fence: int, now: datetime
) -> Progress | None:
    """Do one step of a creation. None once the session is shown.

    Raises:
        RepeatedError: Another creation with the same key was faster.
        SessionExistsError
    """
    session, added = creation.session, creation.added
    idempotency.check(db, creation.key, now)
    in_the_way = sessions.find_expired(db, session.id, now)
    if progress is None:
        begun = sessions.insert_hidden(db, session, creation.hidden_id, turns_begun=len(added), fence=fence)
        progress = Progress(begun, 0)
    keys = turns.insert_some(db, progress.session, 0, added, creation.terms, done=progress.turns)
    progress = Progress(progress.session, progress.turns + len(keys))
    if progress.turns < len(added):
        return progress
    if in_the_way is not None:
        removals.hide(db, in_the_way)
    sessions.show(db, progress.session, session.id)
    idempotency.keep(db, creation.key, session=progress.session, session_id=session.id)
    return None
