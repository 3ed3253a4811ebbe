"""Checks that the API would take the values of an imported session."""

import re
from collections.abc import Iterator

import msgspec

from service.api.http.strict_json import check_texts, convert
from service.api.http.wire_types import RequestBody
from service.api.native.message_wire import AddMessages
from service.api.native.session_wire import CreateSession
from service.api.native.turn_requests import StartTurn
from service.cli.session_export import ExportedSession, not_exported, shown
from service.errors import InvalidRequestError
from service.ids import public_id
from service.sessions.commands import ADDED_ITEMS_MAX, INPUT_ITEMS_MAX
from service.settings import Settings
from service.storage.records import Item, TurnRecord

_SAID = ("input", "items")
"""The fields with what a caller said: OpenAI's API may have taken a whole conversation as one input."""


def check_bounds(whole: ExportedSession, settings: Settings) -> None:
    """Refuse values that the API would refuse. Raises: StartupError."""
    asked: list[tuple[str, type[RequestBody], dict[str, object]]] = [
        ("of the session", CreateSession, msgspec.structs.asdict(whole.session) | {"id": public_id(whole.session.id)})
    ]
    for turn in (it.turn for it in whole.turns if it.turn.input or it.turn.output):
        asked += [(f"of turn {shown(turn.id)}", kind, values) for kind, values in _given_by(turn)]
    for of, kind, values in asked:
        body = {name: values[name] for name in kind.__struct_fields__ if name in values}
        try:
            checked = convert(body, kind)
            for name in body:
                bytes_max = settings.history_bytes if name in _SAID else settings.input_bytes_max
                check_texts(getattr(checked, name), name, bytes_max=bytes_max, bounds_each=kind.bounds_each)
        except InvalidRequestError as error:
            name = re.split(r"[.\[]", error.field or "", maxsplit=1)[0]
            raise not_exported(f"{name} {shown(body.get(name))} {of}: {str(error).removesuffix('.')}") from None


def _asked_by(turn: TurnRecord) -> dict[str, object]:
    """The input and the options of a turn, as a caller of the API gives them. A deleted input counts as one."""
    tools = [{"type": "function", **msgspec.to_builtins(it)} for it in turn.tools.functions] if turn.tools else []
    asked: dict[str, object] = {"tools": tools, **msgspec.to_builtins(turn.options)}
    if all(item.type == "message" for item in turn.input) or _brings_history(turn):
        # Without separators: the API bounds the texts themselves.
        return {"input": "".join(item.text for item in turn.input) or "-", **asked}
    return {"input": [_as_given(item, with_role=False) for item in turn.input], **asked}


def _brings_history(turn: TurnRecord) -> bool:
    """Whether the input has items that the native API takes in added messages only, or more than it takes."""
    is_long = len(turn.input) > INPUT_ITEMS_MAX
    return is_long or any(item.role != "user" for item in turn.input)


def _as_given(item: Item, *, with_role: bool) -> dict[str, object]:
    """An item, as a caller of the API gives it."""
    if item.type == "function_call_output":
        return {"type": "function_call_output", "call_id": item.call_id, "output": item.text}
    if item.type == "function_call":
        return {"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": item.text}
    message: dict[str, object] = {"type": "message", "text": item.text or item.encrypted}
    return message | {"role": item.role} if with_role else message


def _given_by(turn: TurnRecord) -> Iterator[tuple[type[RequestBody], dict[str, object]]]:
    """The bodies of the native API's calls, with their types, in which a caller would give what a turn was given."""
    items = (*turn.input, *turn.output) if turn.was_added else turn.input if _brings_history(turn) else ()
    if not turn.was_added:
        yield StartTurn, msgspec.structs.asdict(turn) | _asked_by(turn)
    for start in range(0, len(items), ADDED_ITEMS_MAX):
        given = [_as_given(item, with_role=True) for item in items[start : start + ADDED_ITEMS_MAX]]
        yield AddMessages, {"items": given}
