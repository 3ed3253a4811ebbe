"""The prompt of a turn: a pure function of the session's path.

A path may have thousands of turns, so the work is done in steps: :mod:`service.steps`.

The prompt is the system message, then the turns' messages. The roles alternate in every case, because upstreams refuse
other prompts:

- A completed turn contributes its input and its reply.
- A cancelled or interrupted turn contributes its input and its partial reply.
- A turn whose input the model refused (:attr:`~service.storage.records.TurnRecord.was_refused`) contributes nothing:
  the model would refuse this input again, and all later prompts with it. Unanswered inputs that were in one message
  with it are dropped as well, unless the input was only too long: then the model was asked again without them.
- Another failed turn contributes its input only. So does a turn whose reply is empty or white space, because some
  servers refuse such a reply in a prompt. An input without an answer is merged into the next input; equal texts are
  merged into one. Inputs that were rejected twice in a row, for an unknown reason, are not sent a third time.

A system message among the inputs is a note, which a caller added to the conversation. It stays in its place, as near as
the order of the sides allows: before the user's text that it is beside or that comes next, and after outputs. A note
before everything else is a part of the system message. A note after everything else comes last.

Calls are a part of the reply, and their outputs a part of the next input. Upstreams refuse a prompt in which a call is
not followed by its output, or an output does not follow its call:

- Outputs follow their calls at once, in the order of the calls, before a text of the user.
- A call without an output gets :data:`NOT_ANSWERED` as its output.
- An output that does not follow its call becomes a text of the user: its call was in a failed turn, is on another path,
  or was followed by a text in place of the output.
- A call that was cut off, and the calls of a failed turn, are left out.

The oldest turns are left out in three cases: the prompt is larger than a bound; the model says that the prompt is too
long (:func:`shortened`); or earlier turns have shown that the prompt is too long (:func:`_start_learned`). Outputs are
left out together with their calls. If the prompt would then begin with calls, :data:`BEGINNING_LEFT_OUT` precedes them.
"""

from collections.abc import Iterator, Sequence

import msgspec

from service.errors import ModelError
from service.models.client import (
    EncryptedReasoning,
    FunctionCall,
    FunctionCallOutput,
    Message,
    PromptItem,
    Reasoning,
    is_signature,
)
from service.steps import Steps
from service.storage.records import Item, LeftOut, TurnRecord
from service.storage.rules import TURN_BYTES

NOT_ANSWERED = "[This call was not answered.]"
BEGINNING_LEFT_OUT = "[The beginning of this conversation is left out.]"
_LATE_OUTPUT = "[Output of the call {call_id}]\n{text}"
_SEPARATOR = "\n\n"
_ROOM_FOR_ERROR = 0.9
"""A safety factor, because tokens are not spread evenly over the bytes of a conversation."""
_TOKEN_BYTES = 3
"""About the fewest bytes of a token: English text has four, Chinese three, digits two or three."""
_LEARNED_BYTES_MIN = 4096
"""No model is too small for this prompt. A model that says so was asked for too many tokens in the reply."""
_ITEMS_IN_STEP = 64
"""The items of one input that are added in one step, which takes some hundred microseconds."""
NOTHING = LeftOut()


class Prompt(msgspec.Struct, frozen=True):
    """The items that are sent, and the part of the conversation that is left out."""

    items: tuple[PromptItem, ...]
    left_out: LeftOut | None


def prompt_of(
    path: Sequence[TurnRecord],
    *,
    system_message: str | None,
    bytes_max: int,
    older: LeftOut = NOTHING,
    learns: bool = True,
    prefix: str = "",
) -> Steps[Prompt]:
    """The items to send for the last turn of ``path`` (root first), which has no reply yet, or one that is cut off.

    Args:
        bytes_max: Bounds the UTF-8 bytes of all texts, with :data:`TURN_BYTES` for each turn: whole turns are left out,
            oldest first, but never the last one with an input, nor the turn whose calls this one answers.
        older: The size of the turns before ``path``, which are left out in any case.
        learns: Whether the prompts of earlier turns that were too long make this one shorter.
        prefix: The text so far of a reply that is to be continued. It is sent after these items, never left out.
    """
    room = bytes_max - len((system_message or "").encode()) - len(prefix.encode())
    brought: list[LeftOut] = []
    sizes: list[int] = []
    for turn in path:
        yield
        of_turn = turn.in_prompts
        brought.append(of_turn)
        sizes.append(_size(turn, of_turn))
    learned = (yield from _start_learned(path, older, brought, sizes)) if learns else 0
    answered = yield from _answered_turn(path)
    start = min(max(_start_within(sizes, room), learned), answered)
    left_out = older
    for of_turn in brought[:start]:
        yield
        left_out += of_turn
    sides = _Sides(model=path[-1].model)
    yield from sides.add_all(path[start:])
    if left_out.items:
        left_out += sides.leave_out_answers(keep=path[_asking_turn(path)])
    items = yield from sides.settle(system_message, is_whole=not left_out.items)
    return Prompt(items, left_out if left_out.items else None)


def has_outputs(path: Sequence[TurnRecord]) -> bool:
    """Whether the input to answer brings outputs of calls."""
    return any(item.type == "function_call_output" for item in path[_asking_turn(path)].input)


def has_question(path: Sequence[TurnRecord]) -> bool:
    """Whether the input to answer is there, or there is none: the last turn may have none of its own."""
    return _asks(path[_asking_turn(path)]) or any(turn.has_reply for turn in path[:-1])


def _asking_turn(path: Sequence[TurnRecord]) -> int:
    """The index of the turn whose input is to be answered; of the last turn if no input waits for an answer.

    This is the last turn that brings more than notes, but no turn before the last reply.
    """
    last = len(path) - 1
    for index in range(last, -1, -1):
        turn = path[index]
        if index < last and turn.has_reply:
            break
        if _asks(turn) and not turn.was_refused:
            return index
    return last


def _asks(turn: TurnRecord) -> bool:
    """Whether an input has more than notes of the system."""
    return any(item.role != "system" for item in turn.input)


class PathEnd:
    """Whether a path ends with something to answer: told of its turns one by one, from the last one on."""

    __slots__ = ("_rejected",)

    def __init__(self) -> None:
        self._rejected = 0

    def decide(self, turn: TurnRecord) -> bool | None:
        """Whether there is something to answer, if this turn decides it.

        What the model has refused, or was rejected twice for an unknown reason, is not sent again.
        """
        if turn.was_refused:
            return None if _was_too_long(turn) else False
        self._rejected += _has_failed_with(turn, "upstream_rejected")
        if turn.has_reply or self._rejected > 1:
            return False
        last = next((item for item in reversed(turn.input) if item.role != "system"), None)
        return None if last is None else _waits_for_reply(last)


def _answered_turn(path: Sequence[TurnRecord]) -> Steps[int]:
    """The index of the turn whose calls the input to answer answers; of this input's turn if it answers none there."""
    if not path:
        return -1
    last = _asking_turn(path)
    outputs = {item.call_id for item in path[last].input if item.type == "function_call_output"}
    if outputs:
        for index in range(last - 1, -1, -1):
            yield
            if path[index].has_reply:
                return index if outputs & {call.call_id for call in path[index].calls} else last
    return last


def shortened(
    refused: Prompt,
    refusal: ModelError,
    path: Sequence[TurnRecord],
    *,
    system_message: str | None,
    max_output_tokens: int | None,
    older: LeftOut = NOTHING,
    prefix: str = "",
) -> Steps[Prompt | None]:
    """The shorter prompt to try after a ``context_too_long``; None if no further turn can be left out.

    If the server says how many tokens it counted and how many it takes, the new prompt has the same share of the old
    one, less a tenth. Otherwise the new prompt is at most half as large, with at most three bytes for each token that
    the server takes.
    """
    answer = max_output_tokens or 0
    refused_bytes = (yield from size_of(refused)) + len(prefix.encode())
    keep = refused_bytes // 2
    if refusal.tokens_max is not None and refusal.tokens is not None:
        fits = max(refusal.tokens_max - answer, 0) / max(refusal.tokens - answer, 1)
        keep = int(refused_bytes * min(fits, 1) * _ROOM_FOR_ERROR)
    elif refusal.tokens_max is not None:
        keep = min(keep, refusal.tokens_max * _TOKEN_BYTES)
    shorter = yield from prompt_of(path, system_message=system_message, bytes_max=keep, older=older, prefix=prefix)
    return None if shorter.left_out == refused.left_out else shorter


def size_of(prompt: Prompt) -> Steps[int]:
    """The size by which prompts are bounded: the texts in UTF-8, and :data:`TURN_BYTES` for each turn."""
    size = 0
    is_users = False
    for item in prompt.items:
        yield
        was_users, is_users = is_users, item.role in ("user", "tool")
        size += len(item.text.encode()) + (TURN_BYTES if is_users and not was_users else 0)
        if isinstance(item, EncryptedReasoning):
            size += len(item.signed.encode())
    return size


def _start_within(sizes: Sequence[int], room: int) -> int:
    """The index of the first turn from which on all turns fit in ``room`` bytes; at most that of the last turn."""
    start = len(sizes)
    for size in reversed(sizes):
        room -= size
        if room < 0 and start < len(sizes):
            break
        start -= 1
    return start


def _start_learned(
    path: Sequence[TurnRecord], older: LeftOut, brought: Sequence[LeftOut], sizes: Sequence[int]
) -> Steps[int]:
    """The index of the first turn that the same model will probably take, judging by the turn before.

    Turns that the turn before left out stay out if the model answered that turn. If the prompt of the turn before was
    too long in the end, the new prompt is at most half as large, or 4 KiB.
    """
    for index in range(len(path) - 2, -1, -1):
        yield
        turn = path[index]
        if turn.model != path[-1].model or turn.was_added:
            continue
        start = _start_after(brought, turn.left_out.items - older.items) if turn.left_out is not None else 0
        if turn.has_reply:
            return min(start, index)
        if _was_too_long(turn):
            own = TURN_BYTES + sum(len(item.text.encode()) for item in turn.input)
            sent = sum(sizes[start:index]) + own
            return _start_within(sizes, max(sent // 2, _LEARNED_BYTES_MIN))
    return 0


def _start_after(brought: Sequence[LeftOut], items: int) -> int:
    """The index of the first turn after the given number of messages."""
    for index, of_turn in enumerate(brought):
        if items <= 0 or items < of_turn.items:  # fewer if only outputs of this turn were left out
            return index
        items -= of_turn.items
    return len(brought)


def _size(turn: TurnRecord, brought: LeftOut) -> int:
    """The size that a turn adds to a prompt, with separators and words of ours that may not be needed."""
    if not brought.items:
        return 0
    words = 0
    if turn.has_calls:
        outputs = sum(item.type == "function_call_output" for item in turn.input)
        words = len(NOT_ANSWERED) * len(turn.calls) + len(_LATE_OUTPUT) * outputs
    return TURN_BYTES + brought.bytes + len(_SEPARATOR) * (1 + len(turn.input)) + words


class _Side:
    """What the user, or the assistant, says until the other one does."""

    __slots__ = ("calls", "encrypted", "is_user", "notes", "outputs", "reasoning", "texts")

    def __init__(self, *, is_user: bool) -> None:
        self.is_user = is_user
        self.notes: list[str] = []
        self.texts: list[str] = []
        self.outputs: dict[str, Item] = {}
        self.calls: list[FunctionCall] = []
        self.encrypted: list[EncryptedReasoning] = []
        self.reasoning: list[str] = []


class _Sides:
    """A conversation as what its two sides say in turn.

    Args:
        model: The model that is asked. What only another model's server can read is not for it.
    """

    def __init__(self, *, model: str) -> None:
        self._model = model
        self._system: list[str] = []
        self._sides: list[_Side] = []
        self._notes: list[str] = []  # for the user's next saying
        self._encrypted: list[EncryptedReasoning] = []  # for the assistant's next saying
        self._reasoning: list[str] = []  # for the same

    def add_all(self, path: Sequence[TurnRecord]) -> Steps[None]:
        """Add the turns of a path, root first."""
        unanswered: list[TurnRecord] = []
        for turn in path:
            yield
            if turn.was_refused:
                if not _was_too_long(turn):
                    unanswered.clear()
                continue
            unanswered.append(turn)
            reply = turn.reply
            if reply or turn.calls:
                yield from self._add_inputs(unanswered)
                unanswered.clear()
                self._add_output(turn, reply)
        if unanswered:
            yield from self._add_inputs(unanswered)

    def _add_inputs(self, turns: Sequence[TurnRecord]) -> Steps[None]:
        """Add the inputs of turns without a reply, and of the turn after them, which has a reply or is the last one."""
        asked: list[tuple[TurnRecord, Sequence[Item]]] = []
        for turn in turns:
            history, own = _split_input(turn)
            if history:
                yield from self._ask(asked)
                asked = []
                for index, item in enumerate(history):
                    if index % _ITEMS_IN_STEP == 0:
                        yield
                    self._add_item(item, turn)
            asked.append((turn, own))
        yield from self._ask(asked)

    def _add_output(self, turn: TurnRecord, reply: str) -> None:
        for item in turn.output:
            if item.type != "message":
                self._add_item(item, turn)
        if reply:
            self._side(is_user=False).texts.append(reply)

    def leave_out_answers(self, *, keep: TurnRecord) -> LeftOut:
        """Leave out the outputs whose calls are left out: those before the first reply, but not those of ``keep``."""
        first = self._sides[0] if self._sides else None
        if first is None or not first.is_user:
            return NOTHING
        kept = {item.id for item in keep.input}
        outputs = [item for item in first.outputs.values() if item.id not in kept]
        for item in outputs:
            del first.outputs[item.call_id]
        if not first.outputs and not first.texts:
            self._system += first.notes
            del self._sides[0]
        return LeftOut(len(outputs), sum(item.prompt_bytes for item in outputs))

    def settle(self, system_message: str | None, *, is_whole: bool) -> Steps[tuple[PromptItem, ...]]:
        """The items in an order that every upstream takes.

        Args:
            is_whole: Whether no part of the conversation is left out.
        """
        items: list[PromptItem] = []
        system = _SEPARATOR.join([*([system_message] if system_message else []), *self._system])
        if system:
            items.append(Message("system", system))
        if not is_whole and self._sides and not self._sides[0].is_user:
            items.append(Message("user", BEGINNING_LEFT_OUT))
        calls: Sequence[FunctionCall] = ()
        for side in self._sides:
            yield
            if side.is_user:
                items += _answers(calls, side)
                calls = ()
            else:
                items += side.encrypted
                if side.calls and side.reasoning:
                    items.append(Reasoning(_SEPARATOR.join(side.reasoning)))
                if side.texts:
                    items.append(Message("assistant", _SEPARATOR.join(side.texts)))
                items += side.calls
                calls = side.calls
        last = _Side(is_user=True)
        last.notes += self._notes
        items += _answers(calls, last)
        return tuple(items)

    def _ask(self, asked: Sequence[tuple[TurnRecord, Sequence[Item]]]) -> Steps[None]:
        outputs: dict[str, Item] = {}
        for _, own in asked:
            yield
            for item in own:
                if item.type == "function_call_output":
                    outputs[item.call_id] = item
        text = yield from _merged(asked)
        if outputs or text is not None:
            side = self._side(is_user=True)
            side.outputs |= outputs
            if text is not None:
                side.texts.append(text)

    def _add_item(self, item: Item, turn: TurnRecord) -> None:
        upstream = item.upstream if turn.model == self._model else ""
        match item.type:
            case "function_call":
                if item.complete:
                    call = FunctionCall(item.call_id, item.name, item.text, upstream)
                    self._side(is_user=False).calls.append(call)
            case "function_call_output":
                self._side(is_user=True).outputs[item.call_id] = item
            case "reasoning":
                if turn.model == self._model:
                    if item.encrypted:
                        signed = item.text if is_signature(upstream) else ""
                        self._encrypted.append(EncryptedReasoning(item.encrypted, upstream, signed))
                    if item.text:
                        self._reasoning.append(item.text)
            case "message":
                if item.role != "system":
                    self._side(is_user=item.role != "assistant").texts.append(item.text)
                elif not self._sides:
                    self._system.append(item.text)
                elif self._sides[-1].is_user:
                    self._sides[-1].notes.append(item.text)
                else:
                    self._notes.append(item.text)

    def _side(self, *, is_user: bool) -> _Side:
        if not self._sides or self._sides[-1].is_user != is_user:
            self._sides.append(_Side(is_user=is_user))
        side = self._sides[-1]
        if is_user and self._notes:
            side.notes += self._notes
            self._notes.clear()
        if self._encrypted or self._reasoning:
            if not is_user:
                side.encrypted += self._encrypted
                side.reasoning += self._reasoning
            self._encrypted.clear()
            self._reasoning.clear()
        return side


def _answers(calls: Sequence[FunctionCall], side: _Side) -> Iterator[PromptItem]:
    """What the user says after these calls: the output of each call, then notes, then a text."""
    if not (calls or side.outputs):  # nearly always
        if side.notes:
            yield Message("system", _SEPARATOR.join(side.notes))
        if side.texts:
            yield Message("user", _SEPARATOR.join(side.texts))
        return
    called = {call.call_id for call in calls}
    for call_id in (call.call_id for call in calls):
        output = side.outputs.get(call_id)
        yield FunctionCallOutput(call_id, NOT_ANSWERED if output is None else output.text)
    late = [
        _LATE_OUTPUT.format(call_id=item.call_id, text=item.text)
        for item in side.outputs.values()
        if item.call_id not in called
    ]
    if side.notes:
        yield Message("system", _SEPARATOR.join(side.notes))
    if late or side.texts:
        yield Message("user", _SEPARATOR.join([*late, *side.texts]))


def _split_input(turn: TurnRecord) -> tuple[Sequence[Item], Sequence[Item]]:
    """The part of an input that is a conversation of its own, and the part that follows it and waits for a reply."""
    start = len(turn.input)
    while start and _waits_for_reply(turn.input[start - 1]):
        start -= 1
    return turn.input[:start], turn.input[start:]


def _waits_for_reply(item: Item) -> bool:
    return item.role == "user" and item.type in ("message", "function_call_output")


def _merged(asked: Sequence[tuple[TurnRecord, Sequence[Item]]]) -> Steps[str | None]:
    """The texts of turns without a reply, and of the turn after them, as one text with each of them once.

    None if there is no text, but only outputs.
    """
    if len(asked) == 1:  # nearly always
        texts = [item.text for item in asked[0][1] if item.type == "message"]
        return _SEPARATOR.join(texts) if texts else None
    rejected = [index for index, (turn, _) in enumerate(asked) if _has_failed_with(turn, "upstream_rejected")]
    if len(rejected) > 1:
        asked = asked[rejected[-1] :]
    said: list[str] = []
    for _, own in asked:
        yield
        if of_turn := [item.text for item in own if item.type == "message"]:
            said.append(_SEPARATOR.join(of_turn))
    last = {text.strip(): index for index, text in enumerate(said)}
    texts = []
    for index, text in enumerate(said):
        yield
        stripped = text.strip()
        if last[stripped] == index and (stripped or index == len(said) - 1):
            texts.append(text)
    return _SEPARATOR.join(texts) if said else None


def _was_too_long(turn: TurnRecord) -> bool:
    return _has_failed_with(turn, "context_too_long")


def _has_failed_with(turn: TurnRecord, code: str) -> bool:
    return turn.error is not None and turn.error.code == code
