"""The prompt of a turn: a pure function of the session's path.

The system message, then the turns' items, oldest left out beyond a bound. Roles always alternate,
whatever became of the turns, because upstreams refuse anything else:

- a completed turn contributes its input and its reply,
- a cancelled or interrupted one its input and its partial reply,
- a failed one its input only; so does any turn whose reply is empty. Such an input has no answer and
  is merged into the next one.
"""

from collections.abc import Iterable, Sequence

from service.models.client import Message
from service.storage.records import TurnRecord

_SEPARATOR = "\n\n"
_STATES_WITH_A_REPLY = ("completed", "cancelled", "interrupted")


def build_prompt(path: Sequence[TurnRecord], *, system_message: str | None, bytes_max: int) -> tuple[Message, ...]:
    """The messages to send for the last turn of ``path`` (root first), which has no reply yet.

    ``bytes_max`` bounds the UTF-8 bytes of all texts: whole turns are left out, oldest first, but
    never the last one.
    """
    system = [Message("system", system_message)] if system_message else []
    room = bytes_max - sum(len(message.text.encode()) for message in system)
    kept: list[tuple[str, str]] = []
    for turn in reversed(path):
        said, replied = _contribution(turn)
        room -= len(said.encode()) + len(_SEPARATOR) + len(replied.encode())
        if kept and room < 0:
            break
        kept.append((said, replied))
    return (*system, *_alternate(reversed(kept)))


def _contribution(turn: TurnRecord) -> tuple[str, str]:
    """What the user said and what the model replied, as far as it counts."""
    said = _SEPARATOR.join(item.text for item in turn.input)
    return said, turn.text if turn.state in _STATES_WITH_A_REPLY else ""


def _alternate(pairs: Iterable[tuple[str, str]]) -> list[Message]:
    messages: list[Message] = []
    unanswered: list[str] = []
    for said, replied in pairs:
        unanswered.append(said)
        if replied:
            messages += (Message("user", _SEPARATOR.join(unanswered)), Message("assistant", replied))
            unanswered.clear()
    if unanswered:
        messages.append(Message("user", _SEPARATOR.join(unanswered)))
    return messages
