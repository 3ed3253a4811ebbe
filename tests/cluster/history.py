"""What the clients of a cluster were told, in the order in which it was told: one fact a line, in a file.

A fact is written before the next request is sent that depends on it, so a history that ends early is still true.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Literal, TypeVar

import msgspec

TERMINAL = ("turn.completed", "turn.failed", "turn.cancelled", "turn.interrupted")
RESUMED = "turn.resumed"
PIECE = "turn.delta"

Call = Literal["create", "turn", "events", "wait", "cancel", "title", "delete", "read"]


class Failure(msgspec.Struct, frozen=True):
    """Why a turn has failed."""

    code: str


class Event(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """An event of a turn, as a client has it from a stream."""

    seq: int
    type: str
    text: str = ""
    text_length: int = -1
    reason: str = ""
    finish_reason: str = ""
    mode: str = ""
    attempt: int = 0
    error: Failure | None = None
    stored: bool = True

    @property
    def is_terminal(self) -> bool:
        return self.type in TERMINAL


class Fact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="fact"):
    """``at`` is ``time.monotonic()`` of the machine."""

    at: float = 0.0

    @property
    def is_acknowledgement(self) -> bool:
        """Whether a client was told that something new is kept."""
        return False


class Created(Fact, frozen=True, kw_only=True, tag="created"):
    """The answer to the creation of a session was 201."""

    session: str
    key: str = ""

    @property
    def is_acknowledgement(self) -> bool:
        return True


class Titled(Fact, frozen=True, kw_only=True, tag="titled"):
    """A title was sent, and the answer was 200; or the outcome is unknown (``is_known``)."""

    session: str
    title: str
    is_known: bool = True

    @property
    def is_acknowledgement(self) -> bool:
        return self.is_known


class Deleting(Fact, frozen=True, kw_only=True, tag="deleting"):
    """A deletion is going to be sent: from now on the session may be gone."""

    session: str


class Deleted(Fact, frozen=True, kw_only=True, tag="deleted"):
    """The answer to a deletion was 204, or 404 to its repetition."""

    session: str

    @property
    def is_acknowledgement(self) -> bool:
        return True


class Accepted(Fact, frozen=True, kw_only=True, tag="accepted"):
    """A client has the id of the turn that its request with this input has started. Inputs are never sent twice, but
    by repetitions with the same key."""

    session: str
    turn: str
    input: str
    key: str

    @property
    def is_acknowledgement(self) -> bool:
        return True


class Saw(Fact, frozen=True, kw_only=True, tag="saw"):
    """A client that follows a turn was sent an event. ``view`` is the client's way through the turn, across cuts."""

    view: int
    turn: str
    event: Event

    @property
    def is_acknowledgement(self) -> bool:
        return self.event.is_terminal and self.event.stored


class Lost(Fact, frozen=True, kw_only=True, tag="lost"):
    """A client was told that a crash took events (410 ``events_lost``): it shows the turn's text from now on."""

    view: int
    turn: str


class Done(Fact, frozen=True, kw_only=True, tag="done"):
    """A client that came back was told that there is nothing after the last event that it has (204)."""

    view: int
    turn: str
    seq: int


class Told(Fact, frozen=True, kw_only=True, tag="told"):
    """The answer to a wait, a cancel or a repetition: a turn that has ended."""

    call: Call
    turn: str
    state: str
    reason: str = ""
    text: str = ""
    stored: bool = True


class Refused(Fact, frozen=True, kw_only=True, tag="refused"):
    """An answer with an error."""

    call: Call
    session: str
    status: int
    code: str = ""
    retry_after: bool = False
    location: bool = False


class Unanswered(Fact, frozen=True, kw_only=True, tag="unanswered"):
    """No connection, or no whole answer."""

    call: Call
    session: str


class Paused(Fact, frozen=True, kw_only=True, tag="paused"):
    """The longest time without an event from the beginning of a view to its end, of a turn that ran meanwhile."""

    view: int
    turn: str
    longest_s: float


class GaveUp(Fact, frozen=True, kw_only=True, tag="gave up"):
    """A client has waited too long for an answer that must come."""

    call: Call
    session: str
    turn: str = ""


class Fault(Fact, frozen=True, kw_only=True, tag="fault"):
    """A fault began, which lasts until ``until``. ``target`` is a process, or ``database``, ``upstream``."""

    kind: str
    target: str
    until: float


class Exited(Fact, frozen=True, kw_only=True, tag="exited"):
    """A process of the service has ended. ``has_begun``: it had logged something."""

    process: str
    code: int
    cause: Literal["killed", "stopped", "itself"]
    has_begun: bool = True


class Logged(Fact, frozen=True, kw_only=True, tag="logged"):
    """A line of a process' log that should not be there."""

    process: str
    line: str


class Asked(Fact, frozen=True, kw_only=True, tag="asked"):
    """A call that the model server has got, as it noted it. ``closed_at`` is 0 for one that is still open."""

    input: str
    opened_at: float
    closed_at: float
    tokens: int


AnyFact = (
    Created
    | Titled
    | Deleting
    | Deleted
    | Accepted
    | Saw
    | Lost
    | Done
    | Told
    | Refused
    | Unanswered
    | Paused
    | GaveUp
    | Fault
    | Exited
    | Logged
    | Asked
)

F = TypeVar("F")

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyFact] = msgspec.json.Decoder(AnyFact)


class History:
    """The facts so far. ``file`` gets each of them, and outlives a harness that is killed."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self.facts: list[AnyFact] = []
        self._file = file

    def add(self, fact: AnyFact) -> None:
        if not fact.at:
            fact = msgspec.structs.replace(fact, at=time.monotonic())
        self.facts.append(fact)
        if self._file is not None:
            self._file.write(_encoder.encode(fact) + b"\n")

    def of(self, kind: type[F]) -> list[F]:
        """All facts of one kind."""
        return [fact for fact in self.facts if isinstance(fact, kind)]


def read_history(path: Path) -> Iterator[AnyFact]:
    """The facts of a file; a last line that is cut off is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _decoder.decode(line)


def text_of(events: Iterable[Event]) -> str:
    """The text that a client shows once it has these events."""
    text: list[str] = []
    for event in events:
        if event.type == PIECE:
            text.append(event.text)
        elif event.type == RESUMED or event.reason == "crash":
            text = ["".join(text)[: event.text_length]]
    return "".join(text)
