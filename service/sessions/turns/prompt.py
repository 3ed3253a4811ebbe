"""The prompt of a turn: a pure function of the session's path.

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

The oldest turns are left out in three cases: the prompt is larger than a bound; the model says that the prompt is too
long (:func:`shortened`); or earlier turns have shown that the prompt is too long (:func:`_start_learned`).
"""

from collections.abc import Sequence

import msgspec

from service.errors import ModelError
from service.models.client import Message
from service.storage.records import LeftOut, TurnRecord

_SEPARATOR = "\n\n"
_ROOM_FOR_ERROR = 0.9
"""A safety factor, because tokens are not spread evenly over the bytes of a conversation."""
_TOKEN_BYTES = 3
"""About the fewest bytes of a token: English text has four, Chinese three, digits two or three."""
_LEARNED_BYTES_MIN = 4096
"""No model is too small for this prompt. A model that says so was asked for too many tokens in the reply."""
NOTHING = LeftOut()


class Prompt(msgspec.Struct, frozen=True):
    """The messages that are sent, their size in bytes of UTF-8, and the part of the conversation that is left out."""

    messages: tuple[Message, ...]
    left_out: LeftOut | None

    @property
    def bytes(self) -> int:
        return sum(len(message.text.encode()) for message in self.messages)


def build_prompt(
    path: Sequence[TurnRecord], *, system_message: str | None, bytes_max: int, older: LeftOut = NOTHING
) -> Prompt:
    """The messages to send for the last turn of ``path`` (root first), which has no reply yet.

    Args:
        bytes_max: Bounds the UTF-8 bytes of all texts: whole turns are left out, oldest first, but never the last one.
        older: The size of the turns before ``path``, which are left out in any case.
    """
    system = [Message("system", system_message)] if system_message else []
    room = bytes_max - sum(len(message.text.encode()) for message in system)
    start = max(_start_within(path, room), _start_learned(path, older))
    left_out = sum((turn.in_prompts for turn in path[:start]), older)
    return Prompt((*system, *_alternate(path[start:])), left_out if left_out.items else None)


def shortened(
    refused: Prompt,
    refusal: ModelError,
    path: Sequence[TurnRecord],
    *,
    system_message: str | None,
    max_output_tokens: int | None,
    older: LeftOut = NOTHING,
) -> Prompt | None:
    """The shorter prompt to try after a ``context_too_long``; None if no further turn can be left out.

    If the server says how many tokens it counted and how many it takes, the new prompt has the same share of the old
    one, less a tenth. Otherwise the new prompt is at most half as large, with at most three bytes for each token that
    the server takes.
    """
    answer = max_output_tokens or 0
    keep = refused.bytes // 2
    if refusal.tokens_max is not None and refusal.tokens is not None:
        fits = max(refusal.tokens_max - answer, 0) / max(refusal.tokens - answer, 1)
        keep = int(refused.bytes * min(fits, 1) * _ROOM_FOR_ERROR)
    elif refusal.tokens_max is not None:
        keep = min(keep, refusal.tokens_max * _TOKEN_BYTES)
    shorter = build_prompt(path, system_message=system_message, bytes_max=keep, older=older)
    return None if shorter.left_out == refused.left_out else shorter


def _start_within(path: Sequence[TurnRecord], room: int) -> int:
    """The index of the first turn from which on all turns fit in ``room`` bytes; at most that of the last turn."""
    start = len(path)
    for turn in reversed(path):
        room -= _size(turn)
        if room < 0 and start < len(path):
            break
        start -= 1
    return start


def _start_learned(path: Sequence[TurnRecord], older: LeftOut) -> int:
    """The index of the first turn that the same model will probably take, judging by the turn before.

    Turns that the turn before left out stay out if the model answered that turn. If the prompt of the turn before was
    too long in the end, the new prompt is at most half as large, or 4 KiB.
    """
    for index in range(len(path) - 2, -1, -1):
        turn = path[index]
        if turn.model != path[-1].model:
            continue
        start = _start_after(path, turn.left_out.items - older.items) if turn.left_out is not None else 0
        if turn.reply:
            return min(start, index)
        if _was_too_long(turn):
            sent = sum(map(_size, path[start:index])) + sum(len(item.text.encode()) for item in turn.input)
            return _start_within(path, max(sent // 2, _LEARNED_BYTES_MIN))
    return 0


def _start_after(path: Sequence[TurnRecord], items: int) -> int:
    """The index of the first turn after the given number of messages."""
    for index, turn in enumerate(path):
        if items <= 0:
            return index
        items -= turn.in_prompts.items
    return len(path)


def _size(turn: TurnRecord) -> int:
    """The bytes that a turn adds to a prompt, with separators that may not be needed."""
    return turn.in_prompts.bytes + len(_SEPARATOR) * (1 + len(turn.input))


def _alternate(path: Sequence[TurnRecord]) -> list[Message]:
    messages: list[Message] = []
    unanswered: list[TurnRecord] = []
    for turn in path:
        if turn.was_refused:
            if not _was_too_long(turn):
                unanswered.clear()
            continue
        unanswered.append(turn)
        if turn.reply:
            messages += (Message("user", _merged(unanswered)), Message("assistant", turn.reply))
            unanswered.clear()
    if unanswered:
        messages.append(Message("user", _merged(unanswered)))
    return messages


def _merged(unanswered: Sequence[TurnRecord]) -> str:
    """The inputs of turns without a reply, and of the turn after them, as one message with each text once."""
    rejected = [index for index, turn in enumerate(unanswered) if _has_failed_with(turn, "upstream_rejected")]
    if len(rejected) > 1:
        unanswered = unanswered[rejected[-1] :]
    said = [_SEPARATOR.join(item.text for item in turn.input) for turn in unanswered]
    last = {text.strip(): index for index, text in enumerate(said)}
    return _SEPARATOR.join(
        text
        for index, text in enumerate(said)
        if last[text.strip()] == index and (text.strip() or index == len(said) - 1)
    )


def _was_too_long(turn: TurnRecord) -> bool:
    return _has_failed_with(turn, "context_too_long")


def _has_failed_with(turn: TurnRecord, code: str) -> bool:
    return turn.error is not None and turn.error.code == code
