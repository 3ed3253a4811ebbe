"""An exported session: its form, and the checks before a store imports it."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import msgspec

from service.errors import StartupError
from service.ids import is_item_id, is_scoped_id, is_turn_id, public_id, scoped
from service.json_words import in_json_words
from service.storage.records import Item, SessionRecord, TurnRecord
from service.storage.rules import expires_at, with_totals

FORMAT = 1
"""The version of the form of an exported session."""
COUNT_MAX = 10**12
"""The most events or tokens of one turn, so that sums fit in every store."""
TOTAL_MAX = 10**18
"""The most tokens of one session."""
TOKENS_OF_LATER_VERSIONS = ("reasoning_tokens", "cached_tokens")
"""The totals of a session that exports of earlier versions do not have."""
TOKENS = ("input_tokens", "output_tokens", *TOKENS_OF_LATER_VERSIONS)

_SHOWN_MAX = 80
"""Characters of a wrong value that are shown."""


class ExportedTurn(msgspec.Struct, frozen=True):
    """A turn and its events, each as the text of a frame of the native API's streams."""

    turn: TurnRecord
    events: tuple[str, ...]


class ExportedSession(msgspec.Struct, frozen=True, kw_only=True):
    """A whole session: ``{"format": 1, "session": {"id": …}, "turns": [{"turn": {…}, "events": ["id: 1…"]}]}``."""

    format: int = FORMAT
    session: SessionRecord
    turns: tuple[ExportedTurn, ...]


def read_exported(exported: bytes) -> ExportedSession:
    """Read an exported session, and check that a store could have it. The turns are checked separately.

    Raises:
        StartupError: The text is no such session, or its format is unknown; one line names the wrong value.
    """
    try:
        whole = msgspec.json.decode(exported, type=ExportedSession)
    except RecursionError:
        raise not_exported("it is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise not_exported(in_json_words(" ".join(str(error).split()))) from None
    if whole.format != FORMAT:
        raise StartupError(f"This session was exported in format {shown(whole.format)}; this version knows {FORMAT}.")
    for problem in _problems(whole, msgspec.json.decode(exported)):
        raise not_exported(problem)
    return whole


def not_exported(problem: str) -> StartupError:
    return StartupError(f"This is not an exported session: {problem}.")


def shown(value: object) -> str:
    """A wrong value on one line, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}…"


def owned_by(whole: ExportedSession, owner: str) -> ExportedSession:
    """The session as another owner's; ``owner`` is empty for a session without one. Its events name public ids."""
    session_id = scoped(owner, public_id(whole.session.id))
    turns = [ExportedTurn(msgspec.structs.replace(it.turn, session_id=session_id), it.events) for it in whole.turns]
    return ExportedSession(session=msgspec.structs.replace(whole.session, id=session_id), turns=tuple(turns))


def without_open_turns(whole: ExportedSession) -> ExportedSession:
    """The session without its open turns; a turn that followed an open turn follows the ended turn before it."""
    stand_ins: dict[str | None, str | None] = {None: None}
    kept: list[ExportedTurn] = []
    for it in whole.turns:
        turn = it.turn
        parent = stand_ins[turn.parent]
        stand_ins[turn.id] = parent if turn.is_open else turn.id
        if not turn.is_open:
            kept.append(ExportedTurn(msgspec.structs.replace(turn, parent=parent), it.events))
    session = msgspec.structs.replace(whole.session, head=stand_ins[whole.session.head])
    totals = with_totals(session, [it.turn for it in kept])
    # What was used for a title, or for turns that were deleted, is in no turn. Earlier versions lack some totals.
    tokens = {name: max(getattr(session, name), getattr(totals, name)) for name in TOKENS}
    return ExportedSession(session=msgspec.structs.replace(totals, **tokens), turns=tuple(kept))


def _problems(whole: ExportedSession, given: object) -> Iterator[str]:
    session = whole.session
    yield from _unknown(given, msgspec.to_builtins(whole, enc_hook=_decoded), "")
    if not is_scoped_id(session.id):
        yield f"its id {shown(session.id)} is not a valid session id"
    yield from _problems_of_times(session, "of the session")
    if session.ephemeral:
        yield "the session was made for a turn that is not kept (ephemeral)"
    turns: set[str] = set()
    items: set[str] = set()
    for it in whole.turns:
        turn = it.turn
        of = f"of turn {shown(turn.id)}"
        if not is_turn_id(turn.id):
            yield f"the id {shown(turn.id)} is not a valid turn id"
        if turn.id in turns:
            yield f"turn {shown(turn.id)} is in it twice"
        if turn.session_id != session.id:
            yield f"the session {shown(turn.session_id)} {of} is not {shown(session.id)}"
        if turn.parent is not None and turn.parent not in turns:
            yield f"the parent {shown(turn.parent)} {of} is not a turn before it"
        turns.add(turn.id)
        yield from _problems_of_items((*turn.input, *turn.output), items, of)
        yield from _problems_of_times(turn, of)
        yield from _problems_of_counts(turn, of)
    if session.head is not None and session.head not in turns:
        yield f"the head {shown(session.head)} of the session is not one of its turns"


def problems_of_totals(whole: ExportedSession) -> Iterator[str]:
    """Check the counts of a session against its turns; open turns count with their inputs.

    Tokens stay counted when their turns are deleted, so a session may have used more than its turns.
    """
    session = whole.session
    opened = [it.turn for it in whole.turns if it.turn.is_open]
    # What an open turn has used so far counts at its end.
    turns = [msgspec.structs.replace(it.turn, usage=None) if it.turn.is_open else it.turn for it in whole.turns]
    totals = with_totals(session, turns)
    totals = msgspec.structs.replace(totals, open_turns=len(opened))
    for name in ("open_turns", "message_count"):
        if getattr(session, name) != getattr(totals, name):
            yield f"{name} {shown(getattr(session, name))} of the session is not {getattr(totals, name)}"
    for name in TOKENS:
        least = 0 if name in TOKENS_OF_LATER_VERSIONS else getattr(totals, name)
        if not least <= getattr(session, name) <= TOTAL_MAX:
            told = shown(getattr(session, name))
            yield f"{name} {told} of the session is not between {least} and {TOTAL_MAX}"
    try:
        deadline = expires_at(session.last_accessed_at, session.idle_timeout_s)
    except (OverflowError, ValueError):
        deadline = None
    if session.expires_at != deadline:
        told = shown(session.expires_at.isoformat())
        yield f"expires_at {told} of the session is not idle_timeout_s after last_accessed_at"


def _decoded(value: object) -> object:
    """What a turn's face keeps, as JSON values."""
    if isinstance(value, msgspec.Raw):
        return msgspec.json.decode(value)
    raise NotImplementedError


def _unknown(given: object, read: object, at: str) -> Iterator[str]:
    """The fields that this version does not know, and that an import would lose."""
    if isinstance(given, dict) and isinstance(read, dict):
        for name, value in given.items():
            if name in read:
                yield from _unknown(value, read[name], f"{at}.{name}" if at else name)
            else:
                yield f"{at}.{shown(name)} is not known to this version"
    elif isinstance(given, list) and isinstance(read, list | tuple):
        for index, (of_given, of_read) in enumerate(zip(given, read, strict=True)):
            yield from _unknown(of_given, of_read, f"{at}[{index}]")


def _problems_of_items(items: Sequence[Item], seen: set[str], of: str) -> Iterator[str]:
    for item in items:
        if not is_item_id(item.id):
            yield f"the id {shown(item.id)} {of} is not a valid item id"
        if item.id in seen:
            yield f"item {shown(item.id)} {of} is in it twice"
        seen.add(item.id)


def _problems_of_times(record: SessionRecord | TurnRecord, of: str) -> Iterator[str]:
    for name, value in msgspec.structs.asdict(record).items():
        if isinstance(value, datetime) and not _has_a_place_in_time(value):
            yield f"{name} {shown(value.isoformat())} {of} has no zone, or is out of range"
    if isinstance(record, TurnRecord) and not record.is_open and record.ended_at is None:
        yield f"ended_at null {of} is no time, and it is {record.state}"


def _has_a_place_in_time(value: datetime) -> bool:
    try:
        return value.tzinfo is not None and value.astimezone(UTC) is not None
    except OverflowError:
        return False


def _problems_of_counts(turn: TurnRecord, of: str) -> Iterator[str]:
    counts = {"last_seq": turn.last_seq}
    if turn.usage is not None:
        counts |= {name: it for name, it in msgspec.structs.asdict(turn.usage).items() if it is not msgspec.UNSET}
    if turn.left_out is not None:
        counts |= {"left_out.items": turn.left_out.items, "left_out.bytes": turn.left_out.bytes}
    for name, count in counts.items():
        if not 0 <= count <= COUNT_MAX:
            yield f"{name} {shown(count)} {of} is not between 0 and {COUNT_MAX}"
