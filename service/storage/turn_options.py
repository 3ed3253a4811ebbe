"""What a turn's caller asked of the model beside the input, and what its face wants back: as JSON for every store that
has rows. It may be large, so it is apart from the fields that every reader of a turn needs."""

from collections.abc import Iterable
from typing import Any

import msgspec

from service.models.client import NO_OPTIONS, Options, Tools
from service.storage import rules
from service.storage.records import OnDisconnect, OnInterrupt, TurnRecord, TurnState


class _TurnOptions(msgspec.Struct, frozen=True, kw_only=True):
    tools: Tools | msgspec.UnsetType = msgspec.UNSET
    system_message: str | msgspec.UnsetType = msgspec.UNSET
    further: Options | msgspec.UnsetType = msgspec.UNSET
    face: dict[str, msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    on_interrupt: OnInterrupt | msgspec.UnsetType = msgspec.UNSET
    on_disconnect: OnDisconnect | msgspec.UnsetType = msgspec.UNSET
    attempt: int | msgspec.UnsetType = msgspec.UNSET
    may_title: bool | msgspec.UnsetType = msgspec.UNSET
    may_leave_out: bool | msgspec.UnsetType = msgspec.UNSET
    trace: str | msgspec.UnsetType = msgspec.UNSET


_decoder: msgspec.json.Decoder[_TurnOptions] = msgspec.json.Decoder(_TurnOptions)
_NOTHING_ASKED = _TurnOptions()


def options_json(turn: TurnRecord) -> bytes | None:
    """The options of a turn as JSON; None if it has none."""
    options = _TurnOptions(
        tools=turn.tools,
        system_message=msgspec.UNSET if turn.system_message is None else turn.system_message,
        further=msgspec.UNSET if turn.options == NO_OPTIONS else turn.options,
        face=turn.face,
        **({} if turn.on_interrupt == "fail" else _on_interrupt(turn)),
    )
    return None if options == _NOTHING_ASKED else msgspec.json.encode(options)


def _on_interrupt(turn: TurnRecord) -> dict[str, Any]:
    return {
        "on_interrupt": turn.on_interrupt,
        "on_disconnect": turn.on_disconnect,
        "attempt": turn.attempt,
        "may_title": msgspec.UNSET if turn.may_title else False,
        "may_leave_out": msgspec.UNSET if turn.may_leave_out else False,
        "trace": turn.trace or msgspec.UNSET,
    }


def first_waiting(open_turns: Iterable[tuple[str, int, TurnState, bytes | str | None]]) -> str | None:
    """The first turn that is suspended, or would be by a recovery from an owner that is gone.

    Args:
        open_turns: Id, owner, state and options of each.
    """
    for turn_id, owner, state, options in open_turns:
        if owner == rules.NOBODY or _may_resume(state, options):
            return turn_id
    return None


def _may_resume(state: TurnState, options: bytes | str | None) -> bool:
    """Whether an open turn with these options may have another attempt (:func:`~service.storage.rules.may_resume`)."""
    asked = options_of(options)
    return bool(asked) and rules.may_resume(state, asked["on_interrupt"], asked["attempt"])


TAIL_BYTES = 256
"""The last bytes of the options of a turn that outlives its process: they have the fields after ``face``."""
_ON_DISCONNECT = b'"on_disconnect":"'


def awaits_client(tails: Iterable[bytes | str | None]) -> bool:
    """Whether all of some suspended turns are cancelled without clients.

    Args:
        tails: The last bytes of their options, if they have some: the whole is as large as what a caller brings.
    """
    return not any(_runs_on(tail.encode() if isinstance(tail, str) else tail) for tail in tails if tail is not None)


def _runs_on(tail: bytes) -> bool:
    # Nothing that a caller has written follows this field, so its last name in the text is that of the field.
    _, name, rest = tail.rpartition(_ON_DISCONNECT)
    return bool(name) and rest.startswith(b'continue"')


def options_of(json: bytes | str | None) -> dict[str, Any]:
    """The fields of a :class:`~service.storage.records.TurnRecord` that are in its options."""
    if json is None:
        return {}
    options = _decoder.decode(json)
    return {
        "tools": options.tools,
        "options": options.further or NO_OPTIONS,
        "face": options.face,
        "system_message": None if options.system_message is msgspec.UNSET else options.system_message,
        "on_interrupt": options.on_interrupt or "fail",
        "on_disconnect": options.on_disconnect or "cancel",
        "attempt": options.attempt or 1,
        "may_title": options.may_title is not False,
        "may_leave_out": options.may_leave_out is not False,
        "trace": options.trace or "",
    }
