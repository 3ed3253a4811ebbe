"""Page cursors: a position in the order of a listing, as one opaque word.

A page cursor names the last row of its page by the row's place in the order, not by the number of rows before it.
So rows that come and go do not move the cursor, and the row itself may be gone.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime
from typing import Annotated, TypeVar

import msgspec

from service.errors import InvalidRequestError

P = TypeVar("P", "SessionPosition", "TurnPosition")


class SessionPosition(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A place among the sessions, which are ordered by creation and then by id."""

    created_at: Annotated[datetime, msgspec.Meta(tz=True)]
    id: str


class TurnPosition(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A place among the turns of a session: counted from 0 in the order of their acceptance."""

    ordinal: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


def encode_cursor(position: SessionPosition | TurnPosition) -> str:
    """The position as a word that is safe in a URL. The word does not depend on the time zone of the moment."""
    if isinstance(position, SessionPosition):
        position = SessionPosition(position.created_at.astimezone(UTC), position.id)
    return urlsafe_b64encode(msgspec.json.encode(position)).rstrip(b"=").decode()


def decode_session_cursor(cursor: str) -> SessionPosition:
    """Raises: InvalidRequestError (``after``), if the text is not a page cursor of a session listing."""
    return _decode(cursor, SessionPosition)


def decode_turn_cursor(cursor: str) -> TurnPosition:
    """Raises: InvalidRequestError (``after``), if the text is not a page cursor of a turn listing."""
    return _decode(cursor, TurnPosition)


def _decode(cursor: str, position_type: type[P]) -> P:
    try:
        json = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        position = msgspec.json.decode(json, type=position_type)
        # One position has one cursor: refuse other texts that decode to it (another zone, spare characters).
        if encode_cursor(position) != cursor:
            raise ValueError
    except (ValueError, OverflowError, msgspec.MsgspecError):
        raise InvalidRequestError("This cursor is not one that a listing here gave out.", field="after") from None
    return position
