"""Ids of sessions, turns, items, calls and requests: a prefix and 32 hexadecimal digits, mostly random.

The items of a reply have the digits of their turn and their place in it, so that an id alone leads to the item.

Ids of sessions are per owner: two owners may have sessions of the same id. Inside of the service a session's id is
the *scoped* one, ``OWNER/ID``; callers see the public one, ``ID``. Without an owner it is the public one inside, too.
"""

import re
import secrets
from typing import Literal

SESSION_ID = r"(?!\.{1,2}$)[A-Za-z0-9_.-]{1,128}"
"""The form of a session's id: a pattern for a whole text, for Python and JavaScript. A client may choose the id."""
OWNER_NAME = r"[A-Za-z0-9_.~@|:+=-]{1,128}"
"""The form of an owner's name: that of user ids and mail addresses, without the slash that ends it in a scoped id."""
TURN_ID = r"turn_[0-9a-f]{32}"
"""The form of a turn's id."""
REQUEST_ID = r"[A-Za-z0-9._~+/=:@-]{1,128}"
"""The form of a request's id: what gateways and tracers send, and nothing that needs quotes in a header or a log."""
_ITEM_PREFIXES = {"message": "msg", "reasoning": "msg", "function_call": "fc", "function_call_output": "fco"}
ITEM_ID = r"(msg|fc|fco)_[0-9a-f]{32}"
"""The form of an item's id."""


def new_session_id() -> str:
    return f"sess_{secrets.token_hex(16)}"


_PLACE_DIGITS = 4
"""The last digits of an id: those of a turn's are 0, and those of its reply's items their places from 1 on."""
_NO_PLACE = "0" * _PLACE_DIGITS
REPLY_ITEMS_MAX = 16**_PLACE_DIGITS - 1
"""The items of a reply whose ids lead to them."""


def new_turn_id() -> str:
    return f"turn_{secrets.token_hex(16 - _PLACE_DIGITS // 2)}{_NO_PLACE}"


def new_item_id(kind: Literal["message", "reasoning", "function_call", "function_call_output"]) -> str:
    """An id of a new item of this type."""
    return f"{_ITEM_PREFIXES[kind]}_{secrets.token_hex(16)}"


def reply_item_id(
    kind: Literal["message", "reasoning", "function_call", "function_call_output"], turn_id: str, index: int
) -> str:
    """The id of an item of a reply, by the id of its turn and its index in the reply."""
    digits = turn_id.removeprefix("turn_")
    if index >= REPLY_ITEMS_MAX or not digits.endswith(_NO_PLACE):  # a turn of an earlier version
        return new_item_id(kind)
    return f"{_ITEM_PREFIXES[kind]}_{digits[:-_PLACE_DIGITS]}{index + 1:0{_PLACE_DIGITS}x}"


def turn_id_of_item(item_id: str) -> str:
    """The id that the turn of an item has, if the item is one of a reply. Other items lead to no turn."""
    return f"turn_{item_id.partition('_')[2][:-_PLACE_DIGITS]}{_NO_PLACE}"


def new_message_id() -> str:
    return new_item_id("message")


def new_call_id() -> str:
    return f"call_{secrets.token_hex(16)}"


def new_request_id() -> str:
    return f"req_{secrets.token_hex(16)}"


def is_session_id(text: str) -> bool:
    """Whether a client may choose this id: 1 to 128 characters of ``[A-Za-z0-9_.-]``, except ``.`` and ``..``."""
    return re.fullmatch(SESSION_ID, text) is not None


def is_owner_name(text: str) -> bool:
    return re.fullmatch(OWNER_NAME, text) is not None


def scoped(owner: str, public: str) -> str:
    """The id inside of the service of an owner's session; ``owner`` is empty for sessions without an owner."""
    return f"{owner}/{public}" if owner else public


def public_id(session_id: str) -> str:
    """The id that callers see."""
    return session_id.rpartition("/")[2]


def owner_of(session_id: str) -> str:
    """The name of a session's owner; empty if the session has none."""
    return session_id.rpartition("/")[0]


def is_scoped_id(text: str) -> bool:
    """Whether a session may have this id inside of the service."""
    owner, slash, public = text.rpartition("/")
    return is_session_id(public) and (is_owner_name(owner) if slash else True)


def is_turn_id(text: str) -> bool:
    return re.fullmatch(TURN_ID, text) is not None


def is_item_id(text: str) -> bool:
    return re.fullmatch(ITEM_ID, text) is not None


def is_request_id(text: str) -> bool:
    """Whether a caller, or a model server, may name a request so: 1-128 of ``[A-Za-z0-9._~+/=:@-]``."""
    return re.fullmatch(REQUEST_ID, text) is not None
