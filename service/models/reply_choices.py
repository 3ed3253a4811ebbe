"""Which choices of a chat completion are the reply. Pure.

A request asks for one reply, but some servers are set up to give several choices. The pieces of the choices alternate,
and only one choice may be kept. Other servers give one reply and count the index up with each piece (TGI until 2024,
Foundry Local until 2025) or with each block (reasoning 0, text 1). Such a count never goes back to an earlier index.
"""

from collections.abc import Sequence

from service.models.chat_chunks import Choice

_HELD_MAX = 8
"""How many pieces under other indexes than the first are held back until their kind is decided."""
_NONE = object()
"""A value that is no choice's index."""


class ReplyChoices:
    """The decision for one stream. Before the decision, pieces under other indexes than the first are held back."""

    def __init__(self) -> None:
        self.usual: object = _NONE
        """An index that needs no decision: a choice that stands alone in its chunk under it belongs to the reply."""
        self._first = 0
        self._last = 0
        self.has_begun = False
        """Whether the stream has had a choice."""
        self._others: set[int] | None = None  # the indexes that came beside the first
        self._held: list[Choice] = []
        self._is_one_reply: bool | None = None  # None before the decision

    @property
    def is_holding(self) -> bool:
        """Whether there are held pieces, which may or may not belong to the reply."""
        return bool(self._held)

    @property
    def holds_an_end(self) -> bool:
        """Whether a held piece has a finish reason."""
        return any(choice.finish_reason for choice in self._held)

    def admit(self, choices: Sequence[Choice], *, first_has_ended: bool) -> Sequence[Choice]:
        """Take a chunk's choices. Returns the new and the held choices that are known to belong to the reply.

        Args:
            first_has_ended: Whether an admitted piece had a finish reason.
        """
        if self._is_one_reply:
            return choices
        if not self.has_begun:
            self.has_begun = True
            self.usual = choices[0].index
            self._first = self._last = self._index(choices[0])
        if len({self._index(choice, position) for position, choice in enumerate(choices)}) > 1:
            self._decide(is_one_reply=False)
        if self._is_one_reply is None:
            return [admitted for choice in choices for admitted in self._consider(choice, first_has_ended)]
        return [choice for position, choice in enumerate(choices) if self._index(choice, position) == self._first]

    def end(self, *, first_has_ended: bool) -> Sequence[Choice]:
        """End the stream: the held choices that belong to the reply."""
        held = self._held
        ended = {self._index(choice) for choice in held if choice.finish_reason}
        self._decide(is_one_reply=len(ended) + first_has_ended < 2)
        return held if self._is_one_reply else []

    def _consider(self, choice: Choice, first_has_ended: bool) -> Sequence[Choice]:
        index, last = self._index(choice), self._last
        is_new = index != self._first and index not in (self._others or ())
        if is_new:
            self._others = self._others or set()
            self._others.add(index)
        self._last = index
        if index == self._first and (not self._held or not choice.says_something):
            return [choice]
        if (is_new and (index < last or first_has_ended)) or (not is_new and index != last and choice.says_something):
            self._decide(is_one_reply=False)
            return [choice] if index == self._first else []
        self._held.append(choice)
        self.usual = _NONE  # the next piece of the first choice may bring the decision
        if len(self._held) < _HELD_MAX:
            return []
        held = self._held
        self._decide(is_one_reply=True)
        return held

    def _decide(self, *, is_one_reply: bool) -> None:
        self._is_one_reply = is_one_reply
        self._held = []
        self.usual = _NONE if is_one_reply else self._first

    def _index(self, choice: Choice, position: int = 0) -> int:
        """The index of a choice. A choice without an index counts as the first; others beside it get other indexes."""
        return choice.index if isinstance(choice.index, int) else self._first - position
