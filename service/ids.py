"""Ids of sessions, turns and messages: a prefix and 128 random bits."""

import re
import secrets

_CHOSEN_SESSION_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def new_session_id() -> str:
    return f"sess_{secrets.token_hex(16)}"


def new_turn_id() -> str:
    return f"turn_{secrets.token_hex(16)}"


def new_message_id() -> str:
    return f"msg_{secrets.token_hex(16)}"


def is_session_id(text: str) -> bool:
    """Whether a client may choose this id: 1-128 of ``[A-Za-z0-9_.-]``."""
    return _CHOSEN_SESSION_ID.fullmatch(text) is not None
