"""The steps of a history, and the histories that are generated.

A number picks a turn of the session: 0 is the newest one, the last numbers are turns that are gone, or of other
sessions.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import msgspec
from hypothesis import strategies as st

from service.ids import scoped
from service.sessions.commands import OnConflict

OWNERS = ("ann", "bob")
NAMES = ("a", "b")
SESSION_IDS = [scoped(owner, name) for owner in OWNERS for name in NAMES]
"""Two owners have sessions of the same public ids."""
WORDS = ("ape", "bee", "Cat", "日本", "ape bee")
TITLES = ("dog", "elk dog", "日本", "ape")
QUERIES = ("ape", "bee", "cat", "日本", "本", "ape bee", "bee cat", "dog", "elk", "none")
TEAMS: list[dict[str, str]] = [{}, {"team": "red"}, {"team": "blue"}]

Place = Literal["head", "root"] | tuple[Literal["after", "beside"], int]
"""Where a new turn is: after the head, which is not named; first; or at a turn that is picked."""


class Create(msgspec.Struct, frozen=True):
    session_id: str
    idle_timeout_s: int
    title: str | None


class Patch(msgspec.Struct, frozen=True):
    session_id: str
    title: str | None
    metadata: dict[str, str]


class Move(msgspec.Struct, frozen=True):
    """Moves the head. A stale caller has seen another head."""

    session_id: str
    turn: int | None
    is_stale: bool


class Start(msgspec.Struct, frozen=True):
    """A turn: a further one, an edit or a branch. With ``answers`` it brings the outputs of its parent's calls.

    ``replies`` are the first words of the reply, if the turn runs at once.
    """

    session_id: str
    words: str
    place: Place
    on_conflict: OnConflict
    answers: bool
    replies: str | None


class Retry(msgspec.Struct, frozen=True):
    session_id: str
    turn: int
    on_conflict: OnConflict
    replies: str | None


class Say(msgspec.Struct, frozen=True):
    """A piece of the reply of a running turn: words, or a call."""

    running: int
    words: str | None


class Finish(msgspec.Struct, frozen=True):
    running: int
    fails: bool


class Cancel(msgspec.Struct, frozen=True):
    session_id: str
    turn: int


class Exchange(NamedTuple):
    """What is added: up to five items, in this order."""

    note: bool
    answer: bool
    asks: str | None
    replies: str | None
    calls: bool


class Add(msgspec.Struct, frozen=True):
    session_id: str
    exchanges: tuple[Exchange, ...]
    place: Place


class DeleteTurn(msgspec.Struct, frozen=True):
    session_id: str
    turn: int


class DeleteItem(msgspec.Struct, frozen=True):
    session_id: str
    turn: int
    item: int


class Fork(msgspec.Struct, frozen=True):
    session_id: str
    turn: int | None
    name: str


class DeleteSession(msgspec.Struct, frozen=True):
    session_id: str


class Wait(msgspec.Struct, frozen=True):
    seconds: int


class Sweep(msgspec.Struct, frozen=True):
    pass


class Checkpoint(msgspec.Struct, frozen=True):
    """Keeps the replies so far in the store."""


class Restart(msgspec.Struct, frozen=True):
    worker: int


class Crash(msgspec.Struct, frozen=True):
    """A worker dies, or all of them, perhaps just after a checkpoint.

    If the others do not notice it, the next step meets its turns.
    """

    worker: int | None
    is_kept: bool
    is_noticed: bool


Step = (
    Create
    | Patch
    | Move
    | Start
    | Retry
    | Say
    | Finish
    | Cancel
    | Add
    | DeleteTurn
    | DeleteItem
    | Fork
    | DeleteSession
    | Wait
    | Sweep
    | Checkpoint
    | Restart
    | Crash
)
MEETS_CRASHED = (Start, Retry, Add, Move, DeleteTurn, DeleteItem)
"""The steps that end the turns of a dead worker themselves, before all else."""

T = TypeVar("T")


def _weighted(*choices: tuple[int, st.SearchStrategy[T]]) -> st.SearchStrategy[T]:
    """One of these, each as often as its number says. ``one_of`` would count each part of a nested choice."""
    return st.sampled_from([strategy for weight, strategy in choices for _ in range(weight)]).flatmap(lambda it: it)


any_session = st.sampled_from(SESSION_IDS)
session_ids = _weighted((7, st.just(SESSION_IDS[0])), (3, any_session))
picks = _weighted((3, st.integers(0, 4)), (1, st.integers(0, 15)))
few = st.integers(0, 2)
words = st.sampled_from(WORDS)
replies = st.none() | words
titles = st.none() | st.sampled_from(TITLES)
conflicts: st.SearchStrategy[OnConflict] = st.sampled_from(["queue", "queue", "reject", "supersede"])
picked_places = st.tuples(st.sampled_from(["after", "beside"]), picks)
places: st.SearchStrategy[Place] = _weighted((2, st.just("head")), (1, st.just("root")), (4, picked_places))  # type: ignore[arg-type]
exchanges = st.builds(
    Exchange,
    note=st.sampled_from([False, False, False, True]),
    answer=st.sampled_from([False, False, False, True]),
    asks=st.none() | words,
    replies=st.none() | words,
    calls=st.booleans(),
)
steps: st.SearchStrategy[Step] = _weighted(
    (6, st.builds(Start, session_ids, words, places, conflicts, st.booleans(), replies)),
    (5, st.builds(Say, few, st.none() | words | words)),
    (3, st.builds(Finish, few, st.sampled_from([False, False, True]))),
    (5, st.builds(Add, session_ids, st.lists(exchanges, min_size=1, max_size=3).map(tuple), places)),
    (4, st.builds(Retry, session_ids, picks, conflicts, replies)),
    (3, st.builds(Cancel, session_ids, picks)),
    (3, st.builds(Move, session_ids, st.none() | picks, st.sampled_from([False, False, False, True]))),
    (4, st.builds(DeleteTurn, session_ids, picks)),
    (6, st.builds(DeleteItem, session_ids, picks, st.integers(0, 5))),
    (3, st.builds(Fork, session_ids, st.none() | picks, st.sampled_from(NAMES))),
    (3, st.builds(Patch, session_ids, titles, st.sampled_from(TEAMS))),
    (2, st.builds(Create, any_session, st.sampled_from([30, 300]), titles)),
    (1, st.builds(DeleteSession, any_session)),
    (2, st.builds(Wait, st.sampled_from([10, 40, 400]))),
    (1, st.just(Sweep())),
    (1, st.just(Checkpoint())),
    (1, st.builds(Restart, few)),
    (4, st.builds(Crash, st.sampled_from([None, 0, 1, 2]), st.booleans(), st.sampled_from([True, False, False]))),
)
histories = st.lists(st.tuples(steps, few), min_size=15, max_size=40)
"""Steps, each with the worker that its first call reaches."""

BEGINNING: Sequence[Step] = (
    *(Create(session_id, 300, None) for session_id in SESSION_IDS[::2]),
    Add(
        SESSION_IDS[0], (Exchange(False, False, "ape", "bee", True), Exchange(False, True, "Cat", "ape", False)), "head"
    ),
)
"""The first steps of each history: in an empty service most calls are refused."""
