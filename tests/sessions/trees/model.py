"""A simple model of sessions and their trees of turns: lists and dicts of plain values, where every answer is a scan.

The model has no tasks, no index and no counts of its own. A check raises the error with which the service refuses the
same call; a change is what the service does if no check refuses it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from service.errors import (
    HeadMovedError,
    InvalidRequestError,
    ItemNotFoundError,
    QueueFullError,
    SessionExistsError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.models.client import Usage
from service.sessions.commands import OnConflict
from service.sessions.turns.prompt import NOT_ANSWERED
from service.storage.records import Item, LeftOut, Siblings, TurnState

FUNCTION = "f"
"""The name of the function in all calls."""
QUEUED_TURNS_MAX = 2


@dataclass(frozen=True)
class Part:
    """An item of a turn without its id."""

    kind: Literal["user", "system", "output", "assistant", "call"]
    text: str
    call_id: str = ""

    @classmethod
    def of(cls, item: Item) -> "Part":
        match item.type:
            case "function_call":
                return cls("call", item.text, item.call_id)
            case "function_call_output":
                return cls("output", item.text, item.call_id)
            case _:
                return cls(item.role, item.text, item.call_id)

    @property
    def is_callers(self) -> bool:
        return self.kind in ("user", "system", "output")

    @property
    def prompt_bytes(self) -> int:
        name = FUNCTION if self.kind == "call" else ""
        return len((self.text + self.call_id + name).encode())


def turns_of(parts: Iterable[Part]) -> list[tuple[list[Part], list[Part]]]:
    """Cut a conversation into the inputs and outputs of turns."""
    turns: list[tuple[list[Part], list[Part]]] = []
    last: Part | None = None
    for part in parts:
        if last is None or (part.is_callers and not last.is_callers) or part.kind == last.kind == "assistant":
            turns.append(([], []))
        turns[-1][0 if part.is_callers else 1].append(part)
        last = part
    return turns


@dataclass(eq=False)
class ModelTurn:
    """A turn; ``rank`` says when it became a document for searches, ``kept`` what a crash leaves of the reply."""

    id: str
    parent: str | None
    said: list[Part]
    created: int
    state: TurnState = "queued"
    detail: str | None = None
    started: int | None = None
    ended: int | None = None
    replied: list[Part] = field(default_factory=list)
    usage: Usage | None = None
    kept: tuple[list[Part], Usage | None] = field(default_factory=lambda: ([], None))
    events_deleted: bool = False
    rank: int = 0

    @property
    def is_open(self) -> bool:
        return self.state in ("queued", "running")

    @property
    def parts(self) -> list[Part]:
        return self.said + self.replied

    @property
    def messages(self) -> list[Part]:
        """The messages in lists and counts. The reply of an open turn is not among them."""
        return self.said if self.is_open else self.parts

    @property
    def reply(self) -> str:
        return "" if self.state == "failed" else "".join(it.text for it in self.replied if it.kind == "assistant")

    @property
    def calls(self) -> list[str]:
        return [] if self.state == "failed" else [it.call_id for it in self.replied if it.kind == "call"]

    @property
    def in_prompts(self) -> list[Part]:
        """What the turn is in later prompts. The reply of a failed turn is not in them."""
        return self.said if self.is_open or self.state == "failed" else self.parts

    @property
    def searched(self) -> str:
        return " ".join(it.text for it in self.parts if it.kind in ("user", "system", "assistant"))


@dataclass(eq=False)
class ModelSession:
    id: str
    created: int
    idle_timeout_s: int
    used: int
    title: str | None = None
    title_rank: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    head: str | None = None
    turns: dict[str, ModelTurn] = field(default_factory=dict)
    spent: list[Usage] = field(default_factory=list)
    """What all turns have cost, the deleted ones among them."""

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    @property
    def open(self) -> list[ModelTurn]:
        return [turn for turn in self.turns.values() if turn.is_open]

    @property
    def message_count(self) -> int:
        return sum(len(turn.messages) for turn in self.turns.values())

    @property
    def tokens(self) -> tuple[int, int, int, int]:
        """Input, output, reasoning and cached tokens."""
        return (
            sum(it.input_tokens for it in self.spent),
            sum(it.output_tokens for it in self.spent),
            sum(it.reasoning_tokens for it in self.spent),
            sum(it.cached_tokens or 0 for it in self.spent),
        )

    def children(self, parent: str | None) -> list[ModelTurn]:
        return [turn for turn in self.turns.values() if turn.parent == parent]

    def siblings(self, turn: ModelTurn) -> Siblings:
        beside = self.children(turn.parent)
        return Siblings(beside.index(turn) + 1, len(beside))

    def path(self, turn_id: str | None) -> list[ModelTurn]:
        """The turns from the root to this one."""
        if turn_id is None:
            return []
        turn = self.turns[turn_id]
        return [*self.path(turn.parent), turn]

    def followers(self, turn: ModelTurn) -> list[ModelTurn]:
        """A turn and all that follow it."""
        return [turn, *(it for child in self.children(turn.id) for it in self.followers(child))]

    def prompt(self, turn: ModelTurn) -> list[str]:
        return prompt_of(self.path(turn.id))

    def size_in_prompts(self, turn_id: str) -> LeftOut:
        """The size of a path in prompts, in items and in bytes."""
        parts = [part for turn in self.path(turn_id) for part in turn.in_prompts]
        return LeftOut(len(parts), sum(part.prompt_bytes for part in parts))

    def answers(self, turn: ModelTurn, call_id: str) -> Iterator[tuple[ModelTurn, Part]]:
        """The outputs of a call: those that follow it up to the next reply, on each branch."""
        for child in self.children(turn.id):
            yield from ((child, it) for it in child.said if it.kind == "output" and it.call_id == call_id)
            if not (child.reply or child.calls):
                yield from self.answers(child, call_id)

    def check_turn(self, turn_id: str | None) -> None:
        if turn_id is not None and turn_id not in self.turns:
            raise TurnNotFoundError(turn_id)

    def check_ended(self, turns: Iterable[ModelTurn]) -> None:
        for turn in turns:
            if turn.is_open:
                raise TurnInProgressError(turn.id)


@dataclass
class _Side:
    """What one side of a conversation says until the other one does."""

    is_user: bool
    notes: list[str] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)


def prompt_of(path: Sequence[ModelTurn]) -> list[str]:
    """The prompt of the last turn of a path, one text for each item: ``u:`` the user, ``a:`` the assistant, ``s:``
    notes, ``call 1`` a call and ``1:`` its output."""
    system: list[str] = []
    waiting: list[str] = []
    sides: list[_Side] = []

    def side(*, is_user: bool) -> _Side:
        if not sides or sides[-1].is_user != is_user:
            sides.append(_Side(is_user))
        if is_user:
            sides[-1].notes += waiting
            waiting.clear()
        return sides[-1]

    for turn in path:
        for part in turn.said:
            match part.kind:
                case "user":
                    side(is_user=True).texts.append(part.text)
                case "output":
                    side(is_user=True).outputs[part.call_id] = part.text
                case _:
                    notes = system if not sides else sides[-1].notes if sides[-1].is_user else waiting
                    notes.append(part.text)
        if turn is not path[-1] and turn.reply:
            side(is_user=False).texts.append(turn.reply)
        if turn is not path[-1] and turn.calls:
            side(is_user=False).calls += turn.calls
    prompt = _told("s", system)
    calls: list[str] = []
    for it in sides:
        if it.is_user:
            late = [f"[Output of the call {name}]\n{text}" for name, text in it.outputs.items() if name not in calls]
            prompt += [f"{name}: {it.outputs.get(name, NOT_ANSWERED)}" for name in calls]
            prompt += _told("s", it.notes) + _told("u", [*late, *it.texts])
        else:
            prompt += _told("a", it.texts) + [f"call {name}" for name in it.calls]
        calls = it.calls
    return prompt


def _told(who: str, texts: Sequence[str]) -> list[str]:
    return [f"{who}: " + "\n\n".join(texts)] if texts else []


def has_words(text: str, query: str) -> bool:
    """Whether a text has all words of a query. Other scripts than Latin have no spaces between words."""
    return all(word in (text.casefold().split() if word.isascii() else text) for word in query.casefold().split())


@dataclass
class Model:
    sessions: dict[str, ModelSession] = field(default_factory=dict)
    """All sessions that were not deleted, those that have expired among them."""
    now: int = 0
    rank: int = 0

    # What there is

    def find(self, session_id: str) -> ModelSession | None:
        session = self.sessions.get(session_id)
        return session if session is not None and not self._has_expired(session) else None

    def session(self, session_id: str) -> ModelSession:
        session = self.find(session_id)
        if session is None:
            raise SessionNotFoundError(session_id)
        return session

    def visible(self, owner: str | None = None) -> list[ModelSession]:
        """The sessions of an owner, or of all, as they are listed."""
        found = (it for it in self.sessions.values() if not self._has_expired(it) and owner in (None, it.owner))
        return sorted(found, key=lambda it: (it.created, it.id), reverse=True)

    def _has_expired(self, session: ModelSession) -> bool:
        return not session.open and session.used + session.idle_timeout_s <= self.now

    def matches(self, session: ModelSession, query: str) -> tuple[int, set[str | None]]:
        """The newest documents of a session that have all words: their rank, and their turns, None for the title."""
        found: list[tuple[int, str | None]] = []
        if session.title is not None and has_words(session.title, query):
            found.append((session.title_rank, None))
        found += [(it.rank, it.id) for it in session.turns.values() if not it.is_open and has_words(it.searched, query)]
        newest = max((rank for rank, _ in found), default=0)
        return newest, {turn_id for rank, turn_id in found if rank == newest}

    # Sessions

    def check_create(self, session_id: str) -> None:
        if self.find(session_id) is not None:
            raise SessionExistsError(session_id)

    def create(self, session_id: str, idle_timeout_s: int, title: str | None) -> None:
        self.sessions[session_id] = session = ModelSession(session_id, self.now, idle_timeout_s, self.now)
        self._entitle(session, title)

    def patch(self, session: ModelSession, title: str | None, metadata: Mapping[str, str]) -> None:
        session.metadata, session.used = metadata, self.now
        if title != session.title:
            self._entitle(session, title)

    def _entitle(self, session: ModelSession, title: str | None) -> None:
        session.title, session.title_rank = title, self.next_rank()

    def check_move(self, session_id: str, head: str | None, seen: str | None) -> None:
        session = self.session(session_id)
        if seen != session.head:
            raise HeadMovedError(session.head)
        session.check_turn(head)
        session.check_ended([*session.path(head), *session.path(session.head)])

    def move(self, session: ModelSession, head: str | None) -> None:
        session.head, session.used = head, self.now

    def delete_expired(self) -> int:
        expired = [name for name, it in self.sessions.items() if self._has_expired(it)]
        for name in expired:
            del self.sessions[name]
        return len(expired)

    def check_fork(self, source_id: str, at: str | None, copy_id: str) -> None:
        source = self.session(source_id)
        source.check_turn(at)
        source.check_ended(source.path(source.head if at is None else at))
        self.check_create(copy_id)

    def fork(self, source: ModelSession, at: str | None, copy_id: str, turn_ids: Sequence[str]) -> None:
        """Copy a path. ``turn_ids`` are the ids of the copies."""
        path = source.path(source.head if at is None else at)
        assert len(turn_ids) == len(path)
        self.create(copy_id, source.idle_timeout_s, source.title)
        copy = self.sessions[copy_id]
        copy.metadata = source.metadata
        for turn, turn_id in zip(path, turn_ids, strict=True):
            copied = replace(turn, id=turn_id, parent=copy.head, said=[*turn.said], replied=[*turn.replied])
            copied.rank = self.next_rank()
            copy.turns[turn_id] = copied
            copy.head = turn_id
            copy.spent += [] if turn.usage is None else [turn.usage]

    # Turns

    def check_start(
        self, session_id: str, on_conflict: OnConflict, parent: str | None, *, is_named: bool
    ) -> Literal["branches", "follows"]:
        here = self.sessions.get(session_id)
        branches = is_named and not (here and any(turn.id == parent for turn in here.open))
        if not branches and here:
            self._check_following(here, on_conflict)
        session = self.session(session_id)
        session.check_turn(parent)
        if branches and any(turn.is_open for turn in session.path(parent)):
            self._check_following(session, on_conflict)
            return "follows"
        return "branches" if branches else "follows"

    def _check_following(self, session: ModelSession, on_conflict: OnConflict) -> None:
        if on_conflict == "reject":
            session.check_ended(session.open)
        if on_conflict == "queue" and sum(turn.state == "queued" for turn in session.open) >= QUEUED_TURNS_MAX:
            raise QueueFullError("full")

    def start(
        self, session: ModelSession, turn: ModelTurn, on_conflict: OnConflict, *, branches: bool
    ) -> list[ModelTurn]:
        """Accept a turn. Returns the turns that it ends."""
        superseded = [] if branches or on_conflict != "supersede" else session.open
        session.turns[turn.id] = turn
        session.head, session.used = turn.id, self.now
        if superseded:
            self.end(session, superseded, "cancelled", "superseded")
        if branches or session.open == [turn]:
            self._run(turn)
        return superseded

    def _run(self, turn: ModelTurn) -> None:
        turn.state, turn.started = "running", self.now

    def end(
        self,
        session: ModelSession,
        turns: Sequence[ModelTurn],
        state: TurnState,
        detail: str | None = None,
        *,
        rank: int = 0,
    ) -> ModelTurn | None:
        """End some turns at once. Returns the queued turn that starts then, if one does.

        Args:
            rank: That of turns of other sessions which end in the same moment.
        """
        rank = rank or self.next_rank()
        for turn in turns:
            turn.state, turn.detail, turn.ended, turn.rank = state, detail, self.now, rank
            session.spent += [] if turn.usage is None else [turn.usage]
            session.used = self.now
        if session.open and session.open[0].state == "queued" and state != "interrupted":
            self._run(session.open[0])
            return session.open[0]
        return None

    def crash(self, session: ModelSession, turns: Sequence[ModelTurn], *, rank: int) -> None:
        """End turns whose process is gone, with what the last checkpoint has of them."""
        for turn in turns:
            turn.replied, turn.usage = turn.kept
        self.end(session, turns, "interrupted", "crash", rank=rank)

    def check_retry(self, session_id: str, turn_id: str, on_conflict: OnConflict) -> Literal["branches", "follows"]:
        session = self.session(session_id)
        session.check_turn(turn_id)
        if not any(part.kind in ("user", "output") for part in session.turns[turn_id].said):
            raise InvalidRequestError("no input")
        return self.check_start(session_id, on_conflict, session.turns[turn_id].parent, is_named=True)

    def check_add(self, session_id: str, parent: str | None, *, is_named: bool) -> None:
        if not is_named and session_id in self.sessions:
            self.sessions[session_id].check_ended(self.sessions[session_id].open)
        session = self.session(session_id)
        session.check_turn(parent)
        session.check_ended(session.path(parent))

    def add(self, session: ModelSession, parent: str | None, parts: Sequence[Part], turn_ids: Sequence[str]) -> None:
        """Add turns that are complete at once. ``turn_ids`` are their ids."""
        for (said, replied), turn_id in zip(turns_of(parts), turn_ids, strict=True):
            turn = ModelTurn(turn_id, parent, said, self.now, "completed", ended=self.now, replied=replied)
            turn.rank = self.next_rank()
            session.turns[turn_id] = turn
            parent = session.head = turn_id
        session.used = self.now

    def say(self, turn: ModelTurn, part: Part, usage: Usage) -> None:
        """Add a piece of the reply: a call, or a text, which goes on from a text before it."""
        last = turn.replied[-1] if turn.replied else None
        if last is not None and last.kind == part.kind == "assistant":
            turn.replied[-1] = Part("assistant", last.text + part.text)
        else:
            turn.replied.append(part)
        turn.usage = usage

    # Deletions

    def check_delete_turn(self, session_id: str, turn_id: str) -> None:
        session = self.session(session_id)
        session.check_turn(turn_id)
        session.check_ended(session.followers(session.turns[turn_id]))

    def delete_turn(self, session: ModelSession, turn_id: str) -> None:
        turn = session.turns[turn_id]
        gone = {it.id for it in session.followers(turn)}
        session.turns = {name: it for name, it in session.turns.items() if name not in gone}
        session.head = turn.parent if session.head in gone else session.head

    def check_delete_item(self, session_id: str, turn_id: str, *, exists: bool) -> None:
        session = self.session(session_id)
        if not exists or turn_id not in session.turns:
            raise ItemNotFoundError("item")
        session.check_ended(session.followers(session.turns[turn_id]))

    def delete_item(self, session: ModelSession, turn_id: str, index: int) -> None:
        """Delete an item by its place in input and output."""
        turn = session.turns[turn_id]
        if index < len(turn.said):
            del turn.said[index]
            return
        part = turn.replied.pop(index - len(turn.said))
        turn.events_deleted = True
        if part.kind == "call":
            for child, answer in list(session.answers(turn, part.call_id)):
                child.said.remove(answer)

    def next_rank(self) -> int:
        self.rank += 1
        return self.rank
