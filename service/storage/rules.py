"""What every store decides in the same way, as pure functions on records.

A store that keeps whole records applies these functions to them. A store that computes in statements takes the numbers
from here (:class:`Counts`, :func:`expires_at`) and adds them in its statement.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from hashlib import blake2b

import msgspec

from service.errors import (
    HeadMovedError,
    PreconditionFailedError,
    SessionNotFoundError,
    TurnNotFoundError,
)
from service.models.client import NO_OPTIONS, Usage
from service.storage.pieces import CALL, QUEUED, STARTED, Resumed, Run, last_seq, resumed_run, run_of
from service.storage.records import (
    SEQ_AFTER_CRASH,
    AdoptedTurn,
    EndResult,
    Item,
    OnInterrupt,
    OpenTurn,
    Owner,
    SessionPatch,
    SessionRecord,
    SessionStatus,
    TurnRecord,
    TurnState,
    count_messages,
    cut_off,
    text_length,
)


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What a turn adds to the counts and totals of its session."""

    open_turns: int = 0
    message_count: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            open_turns=self.open_turns + other.open_turns,
            message_count=self.message_count + other.message_count,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
        )


# Sessions


def is_visible(session: SessionRecord, now: datetime, *, is_deleted: bool) -> bool:
    """Whether the session exists for its readers. ``is_deleted``: whether it is marked as deleted."""
    return not is_deleted and not session.has_expired(now)


def keeps_its_id(session: SessionRecord, now: datetime, *, is_deleted: bool) -> bool:
    """Whether no other session may take the session's id: it exists, or its deletion is not finished."""
    return is_deleted or not session.has_expired(now)


def is_listed(
    session: SessionRecord, status: SessionStatus | None, owner: str | None, metadata: Mapping[str, str]
) -> bool:
    """Whether a listing with these filters has the session; None and no pairs stand for all sessions."""
    return (
        not session.ephemeral
        and owner in (None, session.owner)
        and status in (None, session.status)
        and all(session.metadata.get(name) == value for name, value in metadata.items())
    )


def expires_at(last_accessed_at: datetime, idle_timeout_s: float) -> datetime:
    """When a session expires that was last used at this time."""
    return last_accessed_at + timedelta(seconds=idle_timeout_s)


def used(session: SessionRecord, now: datetime) -> SessionRecord:
    """The session with its deadline moved: it was used at ``now``."""
    return msgspec.structs.replace(session, last_accessed_at=now, expires_at=expires_at(now, session.idle_timeout_s))


def patched(session: SessionRecord, patch: SessionPatch, now: datetime) -> SessionRecord:
    """The session with the changes of a patch, which is a use: a new idle timeout counts from ``now``."""
    return used(msgspec.structs.replace(session, **changes_of(patch)), now)


def is_titled(kept: SessionRecord, session: SessionRecord, now: datetime, *, is_deleted: bool) -> bool:
    """Whether the session in the store is the one for which a title was written, and no later one of its id."""
    return is_visible(kept, now, is_deleted=is_deleted) and kept.created_at == session.created_at


def titled(session: SessionRecord, title: str | None, usage: Usage | None, now: datetime) -> SessionRecord:
    """The session with a title that was written for it, unless it has one; and with what that cost. It was not used."""
    session = _with_counts(session, counts_of_usage(usage))
    if title is None or session.title is not None:
        return session
    return msgspec.structs.replace(session, title=title, titled_at=now)


def changes_of(patch: SessionPatch) -> dict[str, object]:
    """The fields that a patch sets."""
    fields = msgspec.structs.asdict(patch)
    return {name: fields[name] for name in fields if name != "seen_head" and fields[name] is not msgspec.UNSET}


PATCHED_FIELDS = tuple(
    name for name in SessionPatch.__struct_fields__ if name in SessionRecord.__struct_fields__ and name != "head"
)
"""The fields of a session that only a patch can set: a new field of patches is among them by itself. Each turn sets the
head, too, so a change of the head depends on ``seen_head`` instead."""
_REVISION_BYTES = 16


def revision_of(session: SessionRecord) -> str:
    """The revision of a session: a text that changes with :data:`PATCHED_FIELDS`, and with nothing else."""
    values = [getattr(session, name) for name in PATCHED_FIELDS]
    return blake2b(msgspec.json.encode(values, order="deterministic"), digest_size=_REVISION_BYTES).hexdigest()


def has_settings(session: SessionRecord) -> bool:
    """Whether a session was given anything beside its turns and its idle timeout."""
    return any(getattr(session, name) not in (None, {}) for name in PATCHED_FIELDS if name != "idle_timeout_s")


def check_revision(session: SessionRecord, revisions: Collection[str] | None) -> None:
    """Check that a session has one of these revisions; None stands for all. Raises: PreconditionFailedError."""
    if revisions is None:
        return
    revision = revision_of(session)
    if revision not in revisions:
        raise PreconditionFailedError(revision)


# Idempotency keys

KEY_KEPT_S = 24 * 3600
"""How long a key is kept at least after what it made is gone."""


def forgotten_until(now: datetime) -> datetime:
    """The latest moment of a deletion that is so long ago that the key is forgotten."""
    return now - timedelta(seconds=KEY_KEPT_S)


# Turns

NOBODY = 0
"""In place of the owner of suspended turns, in a store that several processes share: no owner has this fence."""


def others_of(owner: int | None, *, besides: int) -> int | None:
    """The fence of another owner of a session's open turns; None if they are this one's, or nobody's."""
    return None if owner in (None, NOBODY, besides) else owner


def open_turn_of(owner: int, owner_of_session: int, fence: int | None, address: str | None, *, me: int) -> OpenTurn:
    """Where an open turn is, as ``me`` sees it.

    Args:
        owner: Whose the turn is, or :data:`NOBODY`.
        owner_of_session: Whose the open turns of its session are, or :data:`NOBODY`.
        fence: That owner, if the store knows it; None otherwise.
        address: The owner's address.
    """
    if fence is not None and fence != me:
        return OpenTurn(owner=Owner(fence=fence, address=address))
    return OpenTurn(is_suspended=owner == NOBODY and owner_of_session in (NOBODY, me))


def check_head(session: SessionRecord, head: str | None | msgspec.UnsetType) -> None:
    """Check the head by which a caller chose a turn's parent. Raises: HeadMovedError."""
    if head is not msgspec.UNSET and head != session.head:
        raise HeadMovedError(session.head)


INSTEAD_OF_MOVING = "move the head later"
INSTEAD_OF_ADDING = "name an ended turn as the parent"
NEVER_STARTED_MAX = 1000
"""How far up a path a step looks for an open turn, past turns that ended before they started; then it looks no further,
and the last of them counts as open: each of these turns came while a turn before it was open."""


def find_open(path_down: Iterable[tuple[str, TurnState, datetime | int | None]]) -> str | None:
    """The open turn on a path, if there is one. A turn that has started, or is complete, has only ended turns above it.

    Args:
        path_down: The turns from the last one to the root: id, state and ``started_at`` of each.
    """
    for looked_at, (turn_id, state, started_at) in enumerate(path_down):
        if state in ("queued", "running") or looked_at == NEVER_STARTED_MAX:
            return turn_id
        if started_at is not None or state == "completed":
            break
    return None


def check_first_turn(session: SessionRecord, turn: TurnRecord, head: str | None | msgspec.UnsetType) -> None:
    """Check a turn that is accepted together with its session. Raises: TurnNotFoundError, HeadMovedError."""
    if turn.parent is not None:
        raise TurnNotFoundError(turn.parent)
    check_head(session, head)


def counts_of_begin(turn: TurnRecord) -> Counts:
    """What the acceptance of a turn adds: an open turn, and the messages of its input unless they will be removed."""
    return Counts(open_turns=1, message_count=0 if turn.ephemeral else count_messages(turn.input))


def counts_of_end(turn: TurnRecord) -> Counts:
    """What the end of a turn adds: its reply in messages and calls, and its usage; there is one open turn less."""
    messages = 0 if turn.ephemeral else count_messages(turn.output)
    return Counts(open_turns=-1, message_count=messages) + counts_of_usage(turn.usage)


def counts_of_usage(usage: Usage | None) -> Counts:
    """What an upstream's counts add to the totals of a session."""
    if usage is None:
        return Counts()
    return Counts(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        cached_tokens=usage.cached_tokens or 0,
    )


def begun(session: SessionRecord, turn: TurnRecord, now: datetime) -> SessionRecord:
    """The session after the acceptance of a turn."""
    head = session.head if turn.ephemeral else turn.id
    return used(msgspec.structs.replace(_with_counts(session, counts_of_begin(turn)), head=head), now)


def ended(session: SessionRecord, turn: TurnRecord, now: datetime) -> SessionRecord:
    """The session after the end of a turn; ``turn`` is the ended turn."""
    return used(_with_counts(session, counts_of_end(turn)), now)


def with_added(session: SessionRecord, turns: Sequence[TurnRecord], now: datetime) -> SessionRecord:
    """The session after turns that are complete at once were added. The last one is the head."""
    counts = [count for turn in turns for count in (counts_of_begin(turn), counts_of_end(turn))]
    return used(msgspec.structs.replace(_with_counts(session, sum(counts, Counts())), head=turns[-1].id), now)


INSTEAD_OF_DELETING = "delete this later"
PATHS_LOOKED_AT_MAX = 2000
"""The most turns of the paths to open turns that a deletion of an item looks at. A longer path counts as one on which
the item is."""


def without_items(turn: TurnRecord, item_ids: Collection[str]) -> TurnRecord:
    """The turn without some items. Its events would tell the deleted part of its reply, so they are deleted as well."""
    output = tuple(item for item in turn.output if item.id not in item_ids)
    return msgspec.structs.replace(
        turn,
        input=tuple(item for item in turn.input if item.id not in item_ids),
        output=output,
        events_deleted=turn.events_deleted or len(output) < len(turn.output),
    )


def emptied(turn: TurnRecord) -> TurnRecord:
    """The turn without all that its caller, its model and its face said. Its place, its end and its usage stay."""
    return msgspec.structs.replace(
        turn,
        input=(),
        output=(),
        system_message=None,
        tools=msgspec.UNSET,
        options=NO_OPTIONS,
        face=msgspec.UNSET,
        events_deleted=True,
    )


def answers_to(call: Item, turn: TurnRecord) -> list[str]:
    """The ids of the items in a turn's input that are outputs of a call."""
    return [item.id for item in turn.input if item.type == "function_call_output" and item.call_id == call.call_id]


def with_deleted(session: SessionRecord, *, messages: int, head: str | None) -> SessionRecord:
    """The session after a deletion of some messages, which is no use of it. Tokens were used and stay counted."""
    return msgspec.structs.replace(session, message_count=session.message_count - messages, head=head)


def events_at_once(output: Sequence[Item]) -> list[Run]:
    """The events of a turn whose output came at once: its start, then each item; a text in pieces of a bounded length.

    The terminal event is not among them.
    """
    runs = [Run(STARTED)]
    for index, item in enumerate(output):
        if item.type == "function_call":
            runs.append(Run(CALL - index))
        lengths = [PIECE_LENGTH_MAX] * (len(item.text) // PIECE_LENGTH_MAX)
        if rest := len(item.text) % PIECE_LENGTH_MAX:
            lengths.append(rest)
        if lengths:
            runs.append(run_of(index, lengths))
    return runs


def with_totals(session: SessionRecord, turns: Sequence[TurnRecord]) -> SessionRecord:
    """The session with the counts and totals of these turns, all of which count as ended."""
    counts = (counts for turn in turns for counts in (counts_of_begin(turn), counts_of_end(turn)))
    return with_counts(session, sum(counts, Counts()))


def with_counts(session: SessionRecord, counts: Counts) -> SessionRecord:
    """The session with these counts and totals in place of its own."""
    return msgspec.structs.replace(session, **msgspec.structs.asdict(counts))


def _with_counts(session: SessionRecord, counts: Counts) -> SessionRecord:
    return msgspec.structs.replace(
        session,
        open_turns=session.open_turns + counts.open_turns,
        message_count=session.message_count + counts.message_count,
        input_tokens=session.input_tokens + counts.input_tokens,
        output_tokens=session.output_tokens + counts.output_tokens,
        reasoning_tokens=session.reasoning_tokens + counts.reasoning_tokens,
        cached_tokens=session.cached_tokens + counts.cached_tokens,
    )


def started(turn: TurnRecord, now: datetime) -> TurnRecord:
    """The turn after its start. A turn that is not queued stays as it is."""
    return msgspec.structs.replace(turn, state="running", started_at=now) if turn.state == "queued" else turn


def crashed(turn: TurnRecord, items: Iterable[Item], growth: Iterable[tuple[int, str]], now: datetime) -> TurnRecord:
    """The end of an open turn whose owner is gone, with the output of its checkpoints.

    Args:
        items: The items of the checkpoints, in their order.
        growth: The texts of the checkpoints' pieces, each with the index of its item.
    """
    return msgspec.structs.replace(
        turn,
        state="interrupted",
        reason="crash",
        ended_at=now,
        last_seq=seq_after_crash(turn.attempt),
        output=tuple(map(cut_off, with_texts(joined(items), growth))),
    )


ATTEMPTS_MAX = 3
"""The attempt whose crash interrupts a turn, because the turn may be the cause; so does a crash in a later one."""
HANDED_OVER_ATTEMPTS_MAX = 8
"""How many processes may run a turn one after the other if each stops in order, as in a rolling restart of replicas."""


def resumes(turn: TurnRecord) -> bool:
    """Whether an open turn may have another attempt if its process dies. A queued turn has had none yet."""
    return may_resume(turn.state, turn.on_interrupt, turn.attempt)


def may_resume(state: TurnState, on_interrupt: OnInterrupt, attempt: int) -> bool:
    """:func:`resumes` of the fields that it looks at."""
    return on_interrupt != "fail" and (state == "queued" or attempt < ATTEMPTS_MAX)


def is_handed_over(turn: TurnRecord) -> bool:
    """Whether an open turn may have another attempt if its process stops in order."""
    return turn.on_interrupt != "fail" and (turn.state == "queued" or turn.attempt < HANDED_OVER_ATTEMPTS_MAX)


def awaits_client(turn: TurnRecord) -> bool:
    """Whether a turn that no process runs goes on only with a client."""
    return turn.is_open and turn.on_interrupt != "fail" and turn.on_disconnect == "cancel"


def seq_after_crash(attempt: int) -> int:
    """A seq that is higher than any that was sent up to the end of this attempt.

    An attempt sends fewer events than :data:`~service.storage.records.SEQ_AFTER_CRASH`, and after a crash the next one
    begins above this seq.
    """
    return SEQ_AFTER_CRASH * (attempt + 1 if attempt > 1 else 1)


def released(turn: TurnRecord, items: Iterable[Item], growth: Iterable[tuple[int, str]]) -> TurnRecord:
    """An open turn whose owner is gone, as a suspended one, with the output of its checkpoints.

    ``items`` and ``growth`` are as for :func:`crashed`.
    """
    output = with_texts(joined(items), growth)
    seq = turn.last_seq if turn.state == "queued" else SEQ_AFTER_CRASH * (turn.attempt + 1)
    return msgspec.structs.replace(turn, last_seq=seq, output=output)


def resumed(turn: TurnRecord, runs: Sequence[Run], *, continues: bool) -> AdoptedTurn:
    """A suspended turn after its adoption, with the event of its resumption.

    The model goes on after a text. Where the reply ended in something else, in reasoning or in white space, the next
    attempt begins anew. So it does where the reply has a call, whole or not: what the model goes on from is a text.

    Args:
        turn: The turn with its output so far.
        runs: The events that are kept.
        continues: Whether the turn's model can go on after a text.
    """
    if turn.state == "queued":
        return AdoptedTurn(turn=turn, runs=tuple(runs))
    seq, attempt = turn.last_seq + 1, turn.attempt + 1
    if continues and turn.on_interrupt == "continue" and _goes_on(turn.output):
        kept, output = list(runs), turn.output
        event = Resumed(seq, attempt, "continue", text_length(output))
    else:
        # Without a checkpoint before a crash there are no events: how the turn started is known all the same.
        kept, output = list(without_reply(runs) if runs else _start_of(turn)), ()
        event = Resumed(seq, attempt, "retry")
    adopted = msgspec.structs.replace(turn, attempt=attempt, last_seq=seq, output=output)
    return AdoptedTurn(turn=adopted, runs=(*kept, resumed_run(event)))


def without_reply(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The events of a turn that has started, without those of its reply."""
    return tuple(run for run in runs if run.item in (QUEUED, STARTED)) or (Run(STARTED),)


def _start_of(turn: TurnRecord) -> tuple[Run, ...]:
    """The events of a turn up to its start. One that starts at once does so at the moment of its acceptance."""
    return (Run(STARTED),) if turn.started_at == turn.created_at else (Run(QUEUED), Run(STARTED))


def as_adopted(
    turn: TurnRecord, runs: Sequence[Run], items: Iterable[Item], growth: Iterable[tuple[int, str]]
) -> AdoptedTurn:
    """A turn that its owner has adopted already, as it is: the answer to that adoption may have been lost.

    ``runs`` are the events that are kept, ``items`` and ``growth`` as for :func:`crashed`.
    """
    output = with_texts(joined(items), growth)
    return AdoptedTurn(turn=msgspec.structs.replace(turn, output=output, last_seq=last_seq(runs)), runs=tuple(runs))


def _goes_on(output: Sequence[Item]) -> bool:
    """Whether a model may go on after an output: it ends in a text, and has no call."""
    ends_in_text = bool(output) and output[-1].type == "message" and bool(output[-1].text.strip())
    return ends_in_text and not any(item.type == "function_call" for item in output)


def check_takes_turns(session: SessionRecord) -> None:
    """Check that a session takes another turn, or a fork. Raises: SessionNotFoundError: It is ephemeral."""
    if session.ephemeral:
        raise SessionNotFoundError(session.id)


def result_of_late_end(kept: TurnRecord | None, end: TurnRecord) -> EndResult:
    """What becomes of an end if the turn is not open, or not this owner's; ``kept`` is the turn in the store.

    An ephemeral turn that is gone has had its end.
    """
    if kept is None and end.ephemeral:
        return EndResult.ALREADY_KEPT
    return EndResult.ALREADY_KEPT if kept == msgspec.structs.replace(end, stored=True) else EndResult.LOST


def joined(pieces: Iterable[Item]) -> tuple[Item, ...]:
    """Items from their pieces: a piece with a known id continues its item, a piece with a new id begins one.

    Encrypted reasoning is in one piece, which need not be the first one of its item.
    """
    items: dict[str, Item] = {}
    texts: dict[str, list[str]] = {}
    for piece in pieces:
        if piece.id not in items or piece.encrypted:
            items[piece.id] = piece
        texts.setdefault(piece.id, []).append(piece.text)
    return tuple(msgspec.structs.replace(item, text="".join(texts[name])) for name, item in items.items())


def with_texts(items: Sequence[Item], growth: Iterable[tuple[int, str]]) -> tuple[Item, ...]:
    """The items with more text at their ends; each text comes with the index of its item."""
    texts = [[item.text] for item in items]
    for index, text in growth:
        texts[index].append(text)
    return tuple(
        msgspec.structs.replace(item, text="".join(parts)) if len(parts) > 1 else item
        for item, parts in zip(items, texts, strict=True)
    )


def without_texts(items: Iterable[Item]) -> tuple[Item, ...]:
    """The items, each without its text."""
    return tuple(msgspec.structs.replace(item, text="") for item in items)


PIECE_LENGTH_MAX = 4096
"""The most code points in one event of a turn whose output came at once."""


TURN_BYTES = 128
"""What each turn counts in a prompt besides its messages, about as much as in a request. So turns are bounded, too."""


SHORT_PATH_TURNS = 64
"""The most turns of a session in which the acceptance of a turn returns the turn's path."""
SHORT_PATH_BYTES = 64 * 1024
"""The most bytes of messages on such a path, besides those of the turn itself."""


class PathBound:
    """Decides, from the last turn to the root, which turns of a path stay within ``bytes_max``: always the last one.

    Each turn counts with its messages and :data:`TURN_BYTES`.
    """

    def __init__(self, bytes_max: int | None) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._has_taken = False

    def takes(self, size: int) -> bool:
        """Whether the next turn, with messages of ``size`` bytes, belongs to them. After a False there are no more."""
        self._bytes += size + TURN_BYTES
        if self._has_taken and self._bytes_max is not None and self._bytes > self._bytes_max:
            return False
        self._has_taken = True
        return True
