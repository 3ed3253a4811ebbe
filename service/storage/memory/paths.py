"""The paths of turns in memory: from a turn up to the first one of its session."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from service.steps import Steps
from service.storage import rules
from service.storage.memory.kept import KeptSession, KeptTurns
from service.storage.records import LeftOut, TurnRecord


class Paths:
    """Reads the store's sessions and turns."""

    def __init__(self, sessions: Mapping[str, KeptSession], turns: KeptTurns) -> None:
        self._sessions = sessions
        self._turns = turns

    def short(self, session: KeptSession, turn: TurnRecord, bytes_max: int | None) -> Sequence[TurnRecord] | None:
        """The path to a turn that has just begun; None if it is too long for one step of the event loop."""
        if len(session.turns) > rules.SHORT_PATH_TURNS:
            return None
        bound, down, read = rules.PathBound(bytes_max), [turn], 0
        bound.takes(turn.message_bytes)
        for earlier in self.down(turn.session_id, turn.parent):
            size = earlier.message_bytes
            if not bound.takes(size):
                break
            read += size
            if read > rules.SHORT_PATH_BYTES:
                return None
            down.append(earlier)
        return down[::-1]

    def newest(self, session_id: str, turn_id: str, bytes_max: int | None) -> Steps[list[TurnRecord]]:
        """The newest turns of a path that a :class:`~service.storage.rules.PathBound` takes, root first.

        Empty if the session is removed meanwhile, as in other stores.
        """
        session = self._sessions.get(session_id)
        edits = session.edits if session is not None else 0
        bound = rules.PathBound(bytes_max)
        newest: list[TurnRecord] = []
        for turn in self.down(session_id, turn_id):
            if not bound.takes(0 if bytes_max is None else turn.message_bytes):
                break
            newest.append(turn)
            yield
            if self._sessions.get(session_id) is not session:
                return []
            if session is not None and session.edits != edits:  # turns or items were deleted meanwhile: anew
                return (yield from self.newest(session_id, turn_id, bytes_max))
        newest.reverse()
        return newest

    def down(self, session_id: str, turn_id: str | None) -> Iterator[TurnRecord]:
        """The turns of a path, from the newest one to the root."""
        next_id = turn_id
        while next_id is not None:
            turn = self._turns.find(next_id)
            if turn is None or turn.record.session_id != session_id:
                return
            yield turn.record
            next_id = turn.record.parent


def found(path_down: Iterable[TurnRecord], missing: set[str]) -> Steps[set[str]]:
    """Those of the ids that are on a path, which are taken out of ``missing``."""
    found: set[str] = set()
    for turn in path_down:
        yield
        if not missing:
            break
        if turn.id in missing:
            missing.remove(turn.id)
            found.add(turn.id)
    return found


def measured(path: Sequence[TurnRecord]) -> Steps[LeftOut]:
    """How much a path is in a prompt."""
    measured = LeftOut()
    for turn in path:
        yield
        measured += turn.in_prompts
    return measured
