"""Ids of sessions, turns, messages and requests: a prefix and 128 random bits."""

import re
import secrets

SESSION_ID = r"(?!\.{1,2}$)[A-Za-z0-9_.-]{1,128}"
"""The form of a session's id: a pattern for a whole text, for Python and JavaScript. A client may choose the id."""
TURN_ID = r"turn_[0-9a-f]{32}"
"""The form of a turn's id."""
REQUEST_ID = r"[A-Za-z0-9._~+/=:@-]{1,128}"
"""The form of a request's id: what gateways and tracers send, and nothing that needs quotes in a header or a log."""
_MESSAGE_ID = re.compile(r"msg_[0-9a-f]{32}")


def new_session_id() -> str:
    return f"sess_{secrets.token_hex(16)}"


def new_turn_id() -> str:
    return f"turn_{secrets.token_hex(16)}"


def new_message_id() -> str:
    return f"msg_{secrets.token_hex(16)}"


def new_request_id() -> str:
    return f"req_{secrets.token_hex(16)}"


def is_session_id(text: str) -> bool:
    """Whether a client may choose this id: 1 to 128 characters of ``[A-Za-z0-9_.-]``, except ``.`` and ``..``."""
    return re.fullmatch(SESSION_ID, text) is not None


def is_turn_id(text: str) -> bool:
    return re.fullmatch(TURN_ID, text) is not None


def is_message_id(text: str) -> bool:
    return _MESSAGE_ID.fullmatch(text) is not None


def is_request_id(text: str) -> bool:
    """Whether a caller, or a model server, may name a request so: 1-128 of ``[A-Za-z0-9._~+/=:@-]``."""
    return re.fullmatch(REQUEST_ID, text) is not None
