"""Where open turns are. After a stop hundreds of callers ask at once: those that wait are answered by one statement."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from service.storage import rules
from service.storage.postgres.connections import Db
from service.storage.records import OpenTurn

_ASKED_MAX = 256
"""The most turns that one statement looks for."""
_FIND = (
    "SELECT s.id, t.id, t.owner, s.owner, o.fence, o.address "
    "FROM {s}.turns AS t JOIN {s}.sessions AS s ON s.key = t.session LEFT JOIN {s}.owners AS o ON o.fence = s.owner "
    "WHERE t.id = ANY(%s) AND t.owner IS NOT NULL AND s.deletion IS NULL"
)


class _Asked(msgspec.Struct, eq=False):
    """A caller's turn. The answer is kept here, so that it goes with its caller, who may leave before it comes."""

    session_id: str
    turn_id: str
    is_answered: bool = False
    answer: OpenTurn | None = None


class OpenTurns:
    """Looks for open turns, in the steps of one thread. A step has the answer for itself and for those that wait."""

    def __init__(self) -> None:
        self._asked: dict[_Asked, None] = {}

    @contextmanager
    def asking(self, session_id: str, turn_id: str, *, me: int) -> Iterator[Callable[[Db], OpenTurn | None]]:
        """The step that looks for a turn, for as long as its caller waits for it."""
        asked = _Asked(session_id, turn_id)
        self._asked[asked] = None
        try:
            yield lambda db: self._find(db, asked, me)
        finally:
            self._asked.pop(asked, None)

    def _find(self, db: Db, asked: _Asked, me: int) -> OpenTurn | None:
        if not asked.is_answered:
            # The event loop adds and removes meanwhile. An earlier step may have failed with what it took from here.
            some = {asked: None}
            with suppress(KeyError):
                while len(some) < _ASKED_MAX:
                    some[self._asked.popitem()[0]] = None
            rows = db.execute(_FIND, (list({it.turn_id for it in some}),)).fetchall()
            open_turns = {(row[0], row[1]): rules.open_turn_of(*row[2:], me=me) for row in rows}
            for it in some:
                it.answer = open_turns.get((it.session_id, it.turn_id))
                it.is_answered = True
        return asked.answer
