"""The prompt of a turn: a pure function of the session's path.

The system message, then the turns' messages. Roles always alternate, whatever became of the turns, because upstreams
refuse anything else:

- a completed turn contributes its input and its reply,
- a cancelled or interrupted one its input and its partial reply,
- one that the model refused for what it is (:attr:`~service.storage.records.TurnRecord.was_refused`) nothing: it would
  be refused again, and everything after it with it. Inputs without an answer that were in one message with it are
  suspected of the same, unless it was only too long: then it was tried without them,
- another failed one its input only; so does any turn whose reply is empty or white space, which some servers refuse to
  see again. Such an input has no answer and is merged into the next one, where each text stands once however often it
  was asked. Inputs that were rejected twice in a row, for a reason unknown here, are not sent a third time.

The oldest turns are left out: beyond a bound; where the model says that the prompt is too long for it
(:func:`shortened`); and where that is known from the turns before (:func:`_start_learned`).
"""

from collections.abc import Sequence

import msgspec

from service.errors import ModelError
from service.models.client import Message
from service.storage.records import LeftOut, TurnRecord

_SEPARATOR = "\n\n"
_ROOM_FOR_ERROR = 0.9
"""Tokens are not spread evenly over the bytes of a conversation."""
_TOKEN_BYTES = 3
"""What a token has at least, about: English text has four, Chinese three, digits two or three."""
_LEARNED_BYTES_MIN = 4096
"""A prompt below this is too long for no model; where one says so, too many tokens were asked for the reply."""
NOTHING = LeftOut()


class Prompt(msgspec.Struct, frozen=True):
    """What is sent, its size in bytes of UTF-8, and what of the conversation is not in it."""

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
        older: What the turns before ``path`` would contribute: they are left out anyway.
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
    """The prompt to try once more after a ``context_too_long``; None where there is nothing to leave out.

    Where the server says how many tokens it counted and how many it takes, as much of the conversation is kept as fits
    by that, less a tenth. Otherwise at most half of it, and no more than three bytes for each token that it takes.
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
    """The index of the first turn with which all that follow are within ``room`` bytes; the last turn always is."""
    start = len(path)
    for turn in reversed(path):
        room -= _size(turn)
        if room < 0 and start < len(path):
            break
        start -= 1
    return start


def _start_learned(path: Sequence[TurnRecord], older: LeftOut) -> int:
    """The index of the first turn that the same model can be expected to take, by what became of the turn before.

    What the turn before left out, and was answered without, stays out. Where it was too long all the same, or was not
    tried again, the prompt is at most half as large as that one was, or 4 KiB.
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
    """The index of the turn before which there are so many messages."""
    for index, turn in enumerate(path):
        if items <= 0:
            return index
        items -= turn.in_prompts.items
    return len(path)


def _size(turn: TurnRecord) -> int:
    """What it adds to a prompt in bytes, with separators that may not be needed."""
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
    """The inputs of turns without a reply, and of the one that follows them, as one message: each text once."""
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
