"""What only a call's model server reads, on its way through clients that bring their history with them.

Some servers refuse a call in a prompt without fields that they sent with it: Gemini its ``thought_signature``, in
``extra_content``. A stored call keeps them (``upstream`` of an item). A client that stores the history itself has to
bring them back, and clients bring back different things:

- A call shows ``extra_content``, as Gemini's own API for OpenAI's clients does. Clients with OpenAI's SDKs send it
  back, because these keep fields that they do not know.
- Other clients keep the fields that they know, which are all that OpenAI's API needs for such a history: the encrypted
  content of reasoning. So a response that was asked for encrypted content has an item of reasoning before such a call,
  with nothing but the sealed fields of the call.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import msgspec
from msgspec import UNSET, UnsetType

from service.api.openai.errors import ParameterError
from service.storage.records import Item

_SEAL = "lc1."
"""What encrypted reasoning begins with that has passed through this service: it carries its server's fields, too."""


class _CallFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of a call that only its server knows."""

    extra_content: dict[str, msgspec.Raw]


class _Sealed(msgspec.Struct, frozen=True, array_like=True):
    """Encrypted reasoning and its server's fields; or the fields of the call that follows, and no reasoning."""

    text: str
    upstream: dict[str, msgspec.Raw] = {}
    calls: dict[str, _CallFields] = {}


class Unsealed(NamedTuple):
    """Encrypted reasoning as its server sent it, and its server's fields as JSON; and the JSON of fields of calls."""

    text: str
    upstream: str = ""
    calls: Mapping[str, str] = {}


def sealed_reasoning(item: Item) -> str:
    """Encrypted reasoning for a client, which only gives it back: without more fields it is as the server sent it."""
    if not item.upstream and not item.encrypted.startswith(_SEAL):
        return item.encrypted
    return _sealed((item.encrypted, msgspec.Raw(item.upstream.encode() or b"{}")))


def sealed_call(call: Item) -> str:
    """The fields of a call that only its server knows, for a client that only gives them back; empty without any."""
    if extra_content_of(call) is UNSET:
        return ""
    return _sealed(("", {}, {call.call_id: msgspec.Raw(call.upstream.encode())}))


def unsealed(content: str, field: str) -> Unsealed:
    """What encrypted content holds that a client gives back. Raises: ParameterError."""
    if not content.startswith(_SEAL):
        return Unsealed(content)
    try:
        sealed = msgspec.json.decode(base64.urlsafe_b64decode(content.removeprefix(_SEAL)), type=_Sealed)
        upstream = msgspec.json.encode(sealed.upstream).decode() if sealed.upstream else ""
        calls = {name: msgspec.json.encode(fields).decode() for name, fields in sealed.calls.items()}
    except (binascii.Error, msgspec.MsgspecError, ValueError, RecursionError):
        raise ParameterError(
            "This encrypted content is not as this server gave it out: send it unchanged.",
            param=field,
            code="invalid_encrypted_content",
        ) from None
    return Unsealed(sealed.text, upstream, calls)


def extra_content_of(call: Item) -> dict[str, Any] | UnsetType:
    """``extra_content`` of a call for JSON, as its server sent it; UNSET if there is none."""
    if not call.upstream:
        return UNSET
    try:
        fields = msgspec.json.decode(call.upstream, type=_CallFields)
        compact = msgspec.json.format(msgspec.json.encode(fields.extra_content), indent=-1)
    except (msgspec.MsgspecError, RecursionError):
        return UNSET  # it is no object, as which clients know it
    return cast("dict[str, Any]", msgspec.Raw(compact)) if fields.extra_content else UNSET


def upstream_of(extra_content: object, field: str) -> str:
    """The fields of a call that a client brings back, as JSON. Raises: ParameterError."""
    if extra_content is None:
        return ""
    if not isinstance(extra_content, dict):
        raise ParameterError("Expected an object.", param=field, code="invalid_type")
    try:
        return msgspec.json.encode({"extra_content": extra_content}).decode() if extra_content else ""
    except UnicodeEncodeError:
        raise ParameterError("A text may not have half of a surrogate pair.", param=field) from None


def _sealed(parts: tuple[object, ...]) -> str:
    return _SEAL + base64.urlsafe_b64encode(msgspec.json.encode(parts)).decode()
