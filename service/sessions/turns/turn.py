"""A live turn: its state from its acceptance until its end is kept and told.

Its task is in :mod:`service.sessions.turns.turn_task`.
"""

from collections.abc import Sequence
from datetime import datetime
from math import inf
from types import TracebackType
from typing import Literal, Self

import msgspec
import trio

from service.errors import ModelError
from service.failure_codes import FailureCode
from service.freezes import Deadline, Lateness, look_for_freeze
from service.ids import new_message_id
from service.models.client import Finished, ModelClient, ModelEvent, ReasoningDelta, TextDelta
from service.sessions.events import outcome
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import Event, TurnDelta, TurnQueued, TurnReasoning, TurnStarted
from service.settings import Settings
from service.storage.records import Checkpoint, Item, LeftOut, TurnRecord, TurnState

OnDisconnect = Literal["cancel", "continue"]
RETURN_S = 5.0
"""How long a turn runs on whose client was cut off by another process of this service: some attempts of a client that
waits a second before each, as the streams ask of it."""


class Turn:
    """The state of a live turn, shared by its task and by those who observe or end it.

    Everything here is synchronous, so that a decision has no gap for another one.
    """

    def __init__(
        self,
        record: TurnRecord,
        *,
        client: ModelClient,
        system_message: str | None,
        on_disconnect: OnDisconnect,
        settings: Settings,
        request_id: str | None = None,
    ) -> None:
        self.log = EventLog(bytes_max=settings.log_bytes_max)
        self.ended = trio.Event()
        self.stored = False
        """Whether its end is in the store. Only says something once it has ended."""
        self.crashed = False
        """Whether something in this service broke while it ran."""
        self.client = client
        self.system_message = system_message
        self.request_id = request_id
        """What the log calls the request that asked for it."""
        self.was_queued = record.state == "queued"
        self.accepted_at = trio.current_time()
        self.started_at: float | None = None
        """When it began to run, on Trio's clock."""
        self.first_token_at: float | None = None
        """When the first events of the model came."""
        self.end: outcome.Outcome | None = None
        self.is_ending = False
        """Whether its end, once decided, is being kept and told, or has been."""
        self.stored_seq = 0
        """The seq up to which its events are in the store, by a checkpoint: the end brings only those after it."""
        self._settings = settings
        self._record = record
        self._on_disconnect = on_disconnect
        self._scope = trio.CancelScope()
        self._run_deadline = Deadline()
        self._abandoned_deadline = Deadline()
        self._return_deadline = -inf
        self._silence_deadline = Deadline()
        self._expected: tuple[FailureCode, float] = ("first_token_timeout", inf)
        self._watches = 0
        self._reply = _Text()
        self._reasoning = _Text()
        if record.state == "queued":
            self.append(TurnQueued(seq=1, session_id=record.session_id, turn_id=record.id))

    def __repr__(self) -> str:
        return f"<Turn {self.id} of {self.session_id}: {self.state}, seq {self.log.last_seq}>"

    @property
    def id(self) -> str:
        return self._record.id

    @property
    def session_id(self) -> str:
        return self._record.session_id

    @property
    def model(self) -> str:
        return self._record.model

    @property
    def state(self) -> TurnState:
        return self._record.state

    @property
    def running(self) -> bool:
        return self._record.state == "running"

    def record(self) -> TurnRecord:
        """The turn as it stands, with the reply so far, and whether the store has it so."""
        return msgspec.structs.replace(
            self._record,
            output=self._output(),
            last_seq=self.log.last_seq,
            stored=self.stored or not self.ended.is_set(),
        )

    async def wait_ended(self) -> TurnRecord:
        """Wait until the end is kept and told. Cancellation affects the caller alone."""
        await self.ended.wait()
        return self.record()

    # Its end

    def decide(self, end: outcome.Outcome) -> bool:
        """Decide how it ends. The first decision stands: False, and nothing happens, for a later one."""
        if self.end is not None:
            return False
        self.end = end
        return True

    def cut_short(self, end: outcome.Outcome) -> bool:
        """Decide how it ends and stop its work, from outside of its task."""
        if self._has_expired():
            self.decide_from_deadlines()  # a deadline that has passed came first
        decided = self.decide(end)
        if decided:
            self._scope.cancel()
        return decided

    # Who watches it

    def watch(self) -> "Watch":
        """Take an interest in it; the watch is to be released."""
        self._watches += 1
        self._set(self._abandoned_deadline, inf)
        return Watch(self)

    def unwatch(self, *, client_returns: bool) -> None:
        """One watch less; for :class:`Watch`."""
        now = trio.current_time()
        self._watches -= 1
        if client_returns:
            self._return_deadline = now + RETURN_S
        if self._watches or self._on_disconnect == "continue" or self.end is not None:
            return
        deadline = max(now + self._settings.disconnect_grace_s, self._return_deadline)
        if deadline <= now:
            self.cut_short(outcome.Cancelled("disconnected"))
        else:
            self._set(self._abandoned_deadline, deadline, timeout_s=deadline - now)

    # For its task

    def scope(self) -> trio.CancelScope:
        """What its work runs in: cancelled when its end is decided from outside, or at its deadlines."""
        return self._scope

    def start(self, now: datetime) -> None:
        """It runs from now on, and its deadline with it."""
        self._record = msgspec.structs.replace(self._record, state="running", started_at=now)
        timeout_s = self._settings.turn_timeout_s
        self.started_at = trio.current_time()
        self._set(self._run_deadline, self.started_at + timeout_s, timeout_s=timeout_s)
        self.append(
            TurnStarted(
                seq=self.log.last_seq + 1, session_id=self.session_id, turn_id=self.id, model=self._record.model
            )
        )

    def note_prompt(self, left_out: LeftOut | None) -> None:
        """It asks the model now, without what is left out."""
        self._record = msgspec.structs.replace(self._record, left_out=left_out)

    @property
    def text_length(self) -> int:
        """The code points of the reply so far."""
        return self._reply.length

    @property
    def has_output(self) -> bool:
        """Whether the model has sent something."""
        return bool(self._reply.length or self._reasoning.length)

    def expect_token(self, otherwise: Literal["first_token_timeout", "next_token_timeout"], *, within_s: float) -> None:
        """The model is to send something within so many seconds from now; the turn fails ``otherwise``."""
        if self._set(self._silence_deadline, trio.current_time() + within_s, timeout_s=within_s):
            self._expected = otherwise, within_s

    def take(self, events: Sequence[ModelEvent]) -> Finished | None:
        """Append what the model sent; the last event, if it is among them.

        Raises:
            ModelError: A bound is reached (``reply_too_large``, ``log_too_large``).
        """
        if self.first_token_at is None:
            self.first_token_at = trio.current_time()
        for event in events:
            seq = self.log.last_seq + 1
            match event:
                case TextDelta(text):
                    if self._reply.bytes + _utf8_length(text) > self._settings.reply_bytes_max:
                        raise ModelError(
                            "reply_too_large",
                            f"The reply is larger than {self._settings.reply_bytes_max} bytes (reply_bytes_max); "
                            "what came before is kept.",
                        )
                    self.append(TurnDelta(seq=seq, text=text))
                    self._reply.append(text)
                case ReasoningDelta(text):
                    self.append(TurnReasoning(seq=seq, text=text))
                    self._reasoning.append(text)
                case Finished():
                    return event
        return None

    def append(self, event: Event) -> None:
        """Append an event that is not the terminal one."""
        if not self.log.append(event):
            raise ModelError(
                "log_too_large",
                f"The events of this turn are larger than {self._settings.log_bytes_max} bytes (log_bytes_max); "
                "what came before is kept.",
            )

    def decide_from_deadlines(self) -> None:
        """Its work was stopped by a deadline of its own: decide by which."""
        first = self._scope.deadline
        if first == self._abandoned_deadline.at:
            self.decide(outcome.Cancelled("disconnected"))
        elif first == self._run_deadline.at:
            self.decide(
                outcome.failed(
                    "turn_timeout",
                    f"The turn took longer than {self._settings.turn_timeout_s:g} s (turn_timeout_s).",
                )
            )
        else:
            code, within_s = self._expected
            self.decide(outcome.failed(code, f"The model server sent nothing for {within_s:g} s ({code}_s)."))

    def checkpoint(self) -> Checkpoint | None:
        """What it grew by since the last checkpoint that was kept; None if by nothing, or its end is decided."""
        if self.end is not None or self.log.last_seq == self.stored_seq:
            return None
        return Checkpoint(
            session_id=self.session_id,
            turn_id=self.id,
            after=self.stored_seq,
            events=tuple(self.log.frames(after=self.stored_seq)),
            output=self._output(since_checkpoint=True),
            left_out=self._record.left_out,
        )

    def note_checkpoint(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is kept."""
        self.stored_seq = checkpoint.after + len(checkpoint.events)
        for item in checkpoint.output:
            text = self._reply if item.id == self._reply.id else self._reasoning
            text.kept += len(item.text)

    def finish(self, now: datetime) -> TurnRecord:
        """It is ending: write the decided end into the record and return it, ready to be kept."""
        assert self.end is not None, "a turn finished before its end was decided"
        self.is_ending = True
        changes = outcome.record_changes(self.end) | {"ended_at": now}
        return msgspec.structs.replace(self._record, output=self._output(), last_seq=self.log.last_seq + 1, **changes)

    def conclude(self, record: TurnRecord, *, stored: bool) -> None:
        """Tell the end to everybody: the last thing that happens to a turn."""
        assert self.end is not None
        self._record = record
        self.stored = stored
        self.log.close(self.terminal_event(stored=stored))
        self.ended.set()

    def terminal_event(self, *, stored: bool) -> Event:
        """The event that tells the end: the next one, or the last one of a log that is closed."""
        assert self.end is not None
        return outcome.terminal_event(
            self.end,
            seq=self.log.last_seq + (0 if self.log.closed else 1),
            text_length=self._reply.length,
            left_out=self._record.left_out,
            stored=stored,
        )

    def _set(self, deadline: Deadline, at: float, *, timeout_s: float = inf) -> bool:
        """Move one of its deadlines; False, and nothing happens, where one has passed: that is the one that ends it."""
        if self._has_expired():
            return False
        deadline.set(at, timeout_s=timeout_s)
        self._scope.deadline = min(self._run_deadline.at, self._silence_deadline.at, self._abandoned_deadline.at)
        return True

    def _has_expired(self) -> bool:
        """Whether a deadline has passed, or its work was stopped in another way."""
        if trio.current_time() >= self._scope.deadline:
            look_for_freeze()  # which may have been a moment ago: then that deadline moves
        return self._scope.cancel_called

    def note_late(self, lateness: Lateness) -> None:
        """The event loop was late: what the model has sent meanwhile is read before a deadline counts."""
        before, self._scope.deadline = self._scope.deadline, inf
        if not self._scope.cancel_called:  # looked at without a deadline, or one that has just passed would cancel it
            deadlines = (self._run_deadline, self._silence_deadline, self._abandoned_deadline)
            for deadline in deadlines:
                deadline.note_late(lateness)
            before = min(deadline.at for deadline in deadlines)
        self._scope.deadline = before

    def _output(self, *, since_checkpoint: bool = False) -> tuple[Item, ...]:
        output = []
        if reasoning := self._reasoning.join(after=self._reasoning.kept if since_checkpoint else 0):
            output.append(Item(id=self._reasoning.id, type="reasoning", role="assistant", text=reasoning))
        if reply := self._reply.join(after=self._reply.kept if since_checkpoint else 0):
            output.append(Item(id=self._reply.id, role="assistant", text=reply))
        return tuple(output)


class Watch:
    """An interest in a turn: a stream's or a waiting call's. Releasing twice is releasing once."""

    def __init__(self, turn: Turn | None) -> None:
        self._turn = turn

    def release(self, *, client_returns: bool = False) -> None:
        """Give it up. ``client_returns`` says that the client has not left: it is given :data:`RETURN_S` at least."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.unwatch(client_returns=client_returns)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class _Text:
    """A text that grows by pieces."""

    def __init__(self) -> None:
        self.id = new_message_id()
        self.length = 0
        self.bytes = 0
        self.kept = 0  # how much of its length is in a checkpoint
        self._pieces: list[str] = []

    def append(self, piece: str) -> None:
        self._pieces.append(piece)
        self.length += len(piece)
        self.bytes += _utf8_length(piece)

    def join(self, *, after: int = 0) -> str:
        text = "".join(self._pieces)
        self._pieces = [text]
        return text[after:]


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
