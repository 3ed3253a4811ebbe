"""The ids of OpenAI's API: other names of the ids of sessions, turns and items. Each id has one name in each direction.

=================  =====================================================================================
``resp_…``         a response: the turn ``turn_…`` with the same 32 digits
``conv_…``         a conversation: the session ``sess_…`` with the same 32 digits
``conv_-ID``       a conversation: the session whose public id is ``ID``, of any other form
``rs_…``           a reasoning item: ``msg_…`` inside of the service
``msg_…``          a message, and ``fc_…`` and ``fco_…`` a call and the output of a call, as inside
=================  =====================================================================================

Clients tell objects by these prefixes. No id is stored in this form.
"""

import re
from hashlib import sha256

from service.ids import is_item_id, is_session_id, is_turn_id
from service.storage.records import Item

RESPONSE_NAME = r"^resp_[0-9a-f]{32}$(?!\n)"
CONVERSATION_NAME = r"^conv_([0-9a-f]{32}|-[A-Za-z0-9_.-]{1,128})$(?!\n)"
ITEM_NAME = r"^(msg|rs|fc|fco)_[0-9a-f]{32}$(?!\n)"
FUNCTION_NAME_LENGTH_MAX = 64
_DIGEST_LENGTH = 8
_MADE_SESSION_ID = re.compile(r"sess_[0-9a-f]{32}")
"""The form of a session's id that this service has made, though a client may choose such an id, too."""


def response_id(turn_id: str) -> str:
    """``resp_0a…`` of ``turn_0a…``."""
    return f"resp_{turn_id.removeprefix('turn_')}"


def turn_id_of(name: str) -> str | None:
    """The turn's id of a response's; None if no response has an id of this form."""
    turn_id = f"turn_{name.removeprefix('resp_')}"
    return turn_id if name.startswith("resp_") and is_turn_id(turn_id) else None


def conversation_id(public: str) -> str:
    """``conv_6f…`` of ``sess_6f…``, and ``conv_-support-4711`` of ``support-4711``.

    Args:
        public: The session's public id.
    """
    if _MADE_SESSION_ID.fullmatch(public):
        return f"conv_{public.removeprefix('sess_')}"
    return f"conv_-{public}"


def public_session_id_of(name: str) -> str | None:
    """The session's public id of a conversation's; None if no conversation has an id of this form."""
    if not name.startswith("conv_"):
        return None
    rest = name.removeprefix("conv_")
    public = rest.removeprefix("-") if rest.startswith("-") else f"sess_{rest}"
    return public if is_session_id(public) and conversation_id(public) == name else None


def item_name(item: Item) -> str:
    """The id of an item as OpenAI's clients see it."""
    if item.type == "reasoning":
        return f"rs_{item.id.removeprefix('msg_')}"
    return item.id


def item_id_of(name: str) -> str | None:
    """The id inside of the service of an item's; None if no item has an id of this form.

    A message and a reasoning item with the same digits are not told apart here: the item's type tells.
    """
    item_id = f"msg_{name.removeprefix('rs_')}" if name.startswith("rs_") else name
    return item_id if is_item_id(item_id) else None


def flat_name(namespace: str, name: str) -> str:
    """The name of a function of a namespace for the model's server: ``files__read`` of ``read`` in ``files``.

    A name that would be too long is cut, and ends with a digest. The same names always give the same flat name, so
    that calls of earlier turns keep theirs.
    """
    flat = f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"
    if len(flat) <= FUNCTION_NAME_LENGTH_MAX:
        return flat
    digest = sha256(f"{namespace}/{name}".encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{flat[: FUNCTION_NAME_LENGTH_MAX - _DIGEST_LENGTH - 1]}_{digest}"
