"""A live turn: its state from the acceptance until the end is stored and published.

Its task is in :mod:`service.sessions.turns.turn_task`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from math import inf
from types import TracebackType
from typing import Self

import msgspec
import trio

from service.errors import ModelError, TurnMovedError
from service.long_texts import pieces_of
from service.models.client import (
    Finished,
    ModelClient,
    ModelEvent,
    ModelStream,
    Progress,
    TextDelta,
    Usage,
    total_usage,
)
from service.sessions.events import outcome
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import Event, TerminalEvent, TurnDelta, TurnQueued, TurnStarted
from service.sessions.events.kept_events import kind_of_pieces, opening_of
from service.sessions.turns.reply import Output, Reply, size_of
from service.sessions.turns.turn_deadlines import TurnDeadlines
from service.sessions.turns.turn_metrics import TurnMeter
from service.sessions.turns.turn_trace import TurnTrace
from service.settings import Settings
from service.steps import Steps
from service.storage.pieces import Run, last_seq
from service.storage.records import (
    Checkpoint,
    Item,
    LeftOut,
    OnDisconnect,
    Siblings,
    SuspendedTurn,
    TurnRecord,
    TurnState,
)
from service.storage.rules import is_handed_over, without_reply
from service.telemetry.metrics.metrics import Metrics

RETURN_S = 5.0
"""How long a turn runs on after another process of this service has cut off its client: enough for some attempts of a
client that waits a second before each, as the streams tell it to."""

CLIENT_RETURNS_S = 30.0
"""How long a turn whose process is gone waits for its client, once another process serves: longer than the pauses
between the attempts of clients."""


class Turn:
    """The state of a live turn, shared by its task, its readers and the calls that end it.

    All methods except :meth:`wait_ended` are synchronous, so that no second decision comes between the steps of one.

    Args:
        log: The log that :func:`restored_log` has made: the turn was adopted, with the output in ``record``. A turn
            that runs goes on after the last event of the log.
        metrics: Counts the turn.
    """

    attempts = 0
    """How often the model's server was asked, repetitions included."""
    trace: TurnTrace | None = None
    """The turn's span; None without traces. The end of the turn ends it."""
    error_for_log: str | None = None
    """Why the turn failed, without words of the model's server; None if it has not, or in the words of its end."""

    crashed = False
    """Whether a fault of this service ended the turn."""
    is_unreleased = False
    """Whether it was suspended, and the store has not taken that: it is still this process's there."""
    _drops_reply = False
    """Whether it is suspended without its reply."""

    def __init__(
        self,
        record: TurnRecord,
        *,
        client: ModelClient,
        system_message: str | None,
        on_disconnect: OnDisconnect,
        settings: Settings,
        may_title: bool = True,
        may_leave_out: bool = True,
        request_id: str | None = None,
        log: EventLog | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.log = EventLog(bytes_max=settings.log_bytes_max, turn_id=record.id) if log is None else log
        self.deadlines = TurnDeadlines()
        self.ended = trio.Event()
        self.stored = False
        """Whether the turn's end is in the store. Has a meaning only once the turn has ended."""
        self.is_lost = False
        """Whether the turn is not this process's any more, so that the store will never take its end."""
        self.is_elsewhere = False
        """Whether another process goes on with the turn, or has ended it, because it took this process for dead."""
        self.untold: TurnRecord | None = None
        """The end of a turn that was left because the store did not take this end."""
        self.path: Sequence[TurnRecord] | None = None
        """The turns for its prompt, if they came with the acceptance; its task takes them."""
        self.siblings = Siblings()
        """The turn's place among its siblings at its acceptance."""
        self.is_opening = False
        """Whether no turn before it on its path has a reply of a model. Has a meaning once it has begun to run."""
        self.may_title = may_title
        """Whether its end may give the session a title."""
        self.may_leave_out = may_leave_out
        """Whether its prompt may lack the oldest turns of the conversation."""
        self.client = client
        self.system_message = system_message
        self.request_id = request_id
        """What the log calls the request that asked for it."""
        self.was_queued = record.state == "queued"
        self.accepted_at = trio.current_time()
        self.started_at: float | None = None
        """When it began to run, on Trio's clock."""
        self._meter = TurnMeter(metrics or Metrics(), client.name)
        self.when_over: list[Callable[[], object]] = []
        """What is called when the turn has ended and no watch of it is left: gives back what is held for the turn,
        without a wait."""
        self.end: outcome.Outcome | outcome.Suspended | None = None
        self.ending = outcome.Ending()
        """What :attr:`end` is called."""
        self.is_ending = False
        """Whether the decided end is being stored and published, or was."""
        self.stored_seq = 0
        """The seq up to which checkpoints have stored the events; a store need not write these again at the end."""
        self._settings = settings
        self._record = record
        self._on_disconnect = on_disconnect
        self._return_deadline = -inf
        """Until when a client may come back, whoever leaves before: that of an adopted turn may be another one."""
        self._watches = self._readers = 0
        self._reply = Reply(self.log, record.id)
        self._spent: Usage | None = record.usage
        self._stream: ModelStream | None = None
        self.was_adopted = log is not None
        self._begin()

    def _begin(self) -> None:
        """Take over the output of earlier processes, and wait for their client; or begin."""
        record = self._record
        if self.was_adopted and self._on_disconnect == "cancel":
            returns_within_s = max(self._settings.disconnect_grace_s, CLIENT_RETURNS_S)
            self._return_deadline = trio.current_time() + returns_within_s
            self.deadlines.note_no_client(returns_within_s=returns_within_s)
        if not self.log.last_seq:
            if record.state == "queued":
                self.append(TurnQueued(seq=1, session_id=record.session_id, turn_id=record.id))
            return
        self.stored_seq = self.log.last_seq
        self._reply.restore(record.output)
        self._record = msgspec.structs.replace(record, output=(), usage=None, last_seq=0)

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
    def is_ephemeral(self) -> bool:
        return self._record.ephemeral

    @property
    def outlives(self) -> bool:
        """Whether the turn is to outlive its process."""
        return self._record.on_interrupt != "fail"

    @property
    def running(self) -> bool:
        return self._record.state == "running"

    @property
    def first_token_at(self) -> float | None:
        """When the first pieces of the model came, on Trio's clock."""
        return self._meter.first_token_at

    @property
    def is_suspended(self) -> bool:
        """Whether the turn was left to another process: its log is closed, and it has not ended."""
        return self.log.is_moved

    def record(self) -> TurnRecord:
        """The turn's record now, with the reply so far; ``stored`` says whether the store has this end."""
        return msgspec.structs.replace(
            self._record,
            output=self._record.output if self._has_ended else self._reply.items(),
            last_seq=self.log.last_seq,
            stored=self.stored or not self.ended.is_set(),
        )

    def record_at_first(self) -> TurnRecord:
        """The turn's record without the reply so far."""
        return self._record

    def text_pieces(self, item: int) -> Iterator[str]:
        """The text of an output item that does not grow any more, in pieces."""
        return pieces_of(self._record.output[item].text) if self._has_ended else self.log.text_pieces(item)

    @property
    def text_bytes_max(self) -> int:
        """No less than the size of the reply's texts."""
        return self.log.size

    def begun_items(self) -> tuple[Item, ...]:
        """The items of the reply that have begun so far, perhaps without their texts."""
        return self._record.output if self._has_ended else self._reply.changed_after(0)

    @property
    def _has_ended(self) -> bool:
        """Whether the record has the output. That of a turn which goes on elsewhere stays in the log."""
        return self.ended.is_set() and not self.is_suspended

    async def wait_ended(self) -> TurnRecord:
        """Wait until the end is stored and published. Cancellation affects the caller only.

        Raises:
            TurnMovedError: The turn was suspended: it goes on elsewhere.
        """
        await self.ended.wait()
        if self.is_suspended:
            raise TurnMovedError(session_id=self.session_id, turn_id=self.id)
        return self.record()

    def note_accepted(self) -> None:
        """Note that the turn was accepted: the metrics count its end from now on."""
        self._meter.is_accepted = True

    # Its end

    def decide(self, end: outcome.Outcome | outcome.Suspended) -> bool:
        """Decide how the turn ends. The first decision stands; a later call changes nothing and returns False."""
        if self.end is not None:
            return False
        self.end = end
        self.ending.name = outcome.name_of(end)
        return True

    def end_of_stop(self) -> outcome.Outcome | outcome.Suspended:
        """How the turn ends here if the process stops."""
        return outcome.Suspended() if is_handed_over(self._record) else outcome.Interrupted("shutdown")

    def cut_short(self, end: outcome.Outcome | outcome.Suspended) -> bool:
        """Decide how the turn ends, and stop its work. For callers outside of the turn's task."""
        if self.deadlines.have_stopped():
            self.decide(self.deadlines.end())  # the deadline was first
        decided = self.decide(end)
        if decided:
            self.deadlines.stop()
        return decided

    def begin_anew(self) -> bool:
        """Decide that the turn is suspended without its reply, so that its next attempt begins anew. Returns False, and
        decides nothing, if the turn has no attempt left."""
        if not is_handed_over(self._record):
            return False
        self._drops_reply = self.decide(outcome.Suspended())
        return True

    # Watches

    def watch(self) -> "Watch":
        """Take a watch of the turn, which the caller must release."""
        self._watches += 1
        self.deadlines.note_client()
        return Watch(self)

    def watch_as_asking(self) -> "Watch":
        """Take a watch of one who asks how the turn stands. The caller must release it with ``client_returns``.

        An adopted turn has lost its clients through this service, and the one who asks may be one of them: such a watch
        counts as a client. To any other turn the one who asks is nothing.
        """
        return self.watch() if self.was_adopted else Watch(None)

    def watch_as_reader(self) -> "Watch":
        """Take a watch of one who only reads: it does not count as a client. The caller must release it."""
        self._readers += 1
        return Watch(self, is_client=False)

    def unwatch(self, *, client_returns: bool) -> None:
        """Release one watch; called by :class:`Watch`."""
        now = trio.current_time()
        self._watches -= 1
        self._note_if_over()
        if client_returns:
            self._return_deadline = max(self._return_deadline, now + RETURN_S)
        if self._watches or self._on_disconnect == "continue" or self.end is not None:
            return
        returns_within_s = max(self._settings.disconnect_grace_s, self._return_deadline - now)
        if returns_within_s > 0:
            self.deadlines.note_no_client(returns_within_s=returns_within_s)
        else:
            self.cut_short(outcome.Cancelled("disconnected"))

    def unwatch_as_reader(self) -> None:
        """Release the watch of one who only reads; called by :class:`Watch`."""
        self._readers -= 1
        self._note_if_over()

    def _note_if_over(self) -> None:
        """A stream that is not read keeps the turn with its input, also after the end."""
        if self.ended.is_set() and not self._watches and not self._readers:
            for call in self.when_over:
                call()
            self.when_over.clear()

    # For its task

    def start(self, now: datetime) -> None:
        """It runs from now on, and its deadline with it, which counts from the first start, in whatever process."""
        first_at = self._record.started_at or now
        goes_on = self.was_adopted and self.running
        self._record = msgspec.structs.replace(self._record, state="running", started_at=first_at)
        self.started_at = trio.current_time()
        passed_s = max((now - first_at).total_seconds(), 0) if goes_on else 0
        self.deadlines.start(self._settings.turn_timeout_s, passed_s=passed_s)
        if goes_on:
            return
        if self.was_queued:
            self._meter.count_queued()
        self.append(
            TurnStarted(
                seq=self.log.last_seq + 1, session_id=self.session_id, turn_id=self.id, model=self._record.model
            )
        )

    def note_prompt(self, left_out: LeftOut | None) -> None:
        """Note the part of the conversation that the prompt leaves out."""
        self._record = msgspec.structs.replace(self._record, left_out=left_out)

    def note_stream(self, stream: ModelStream) -> None:
        """Note the model's stream, which counts the tokens, also of a reply that does not come to its end."""
        self._spent, self._stream = self.usage, stream

    def note_spent(self, usage: Usage | None) -> None:
        """Note what an upstream has counted for a reply that never began."""
        self._spent = total_usage(self._spent, usage)

    @property
    def usage(self) -> Usage | None:
        """What the upstream has counted so far, for all replies that were asked of it."""
        return total_usage(self._spent, None if self._stream is None else self._stream.usage)

    def text_so_far(self) -> Steps[str]:
        """The text after which the model goes on, empty if it begins: that of a reply which another process began."""
        texts = yield from self.log.joined_texts()
        return "".join([item.text for item in self._reply.items(texts) if item.type == "message"])

    @property
    def text_length(self) -> int:
        """The code points of the reply so far."""
        return self._reply.length

    @property
    def text_bytes(self) -> int:
        """The size of the reply so far that counts against ``reply_bytes_max``."""
        return self._reply.bytes

    @property
    def calls(self) -> int:
        """The number of calls of functions so far."""
        return self._reply.calls

    @property
    def has_output(self) -> bool:
        """Whether the model has sent a piece of an output item."""
        return self._reply.begun

    def take(self, events: Sequence[ModelEvent], *, now: float | None = None) -> Finished | None:
        """Append the model's events. Returns :class:`Finished` if it is among them.

        Args:
            now: The time, if the caller has just read it.

        Raises:
            ModelError: A bound is reached (``reply_too_large``, ``log_too_large``).
        """
        if now is None:
            now = trio.current_time()
        log, reply, bytes_max = self.log, self._reply, self._settings.reply_bytes_max
        try:
            for event in events:
                if isinstance(event, TextDelta):  # nearly all of them
                    text = event.text
                    size = len(text) if text.isascii() else len(text.encode())
                    if reply.bytes + size > bytes_max:
                        raise self._reply_too_large()
                    item = reply.index_of("message")
                    if not log.append(TurnDelta(seq=log.last_seq + 1, item=item, text=text), tells=False):
                        raise self._log_too_large()
                    reply.note_text(text, size)
                elif isinstance(event, Finished):
                    return event
                elif not isinstance(event, Progress):
                    self._take(event)
        finally:
            if pieces := log.tell_readers(now):  # once for all of these events
                self._meter.count_pieces(pieces, now)
        return None

    def _take(self, told: Output) -> None:
        size = size_of(told)
        if self._reply.bytes + size > self._settings.reply_bytes_max:
            raise self._reply_too_large()
        event = self._reply.event_of(told)
        if event is not None:
            self.append(event, tells=False)
        self._reply.note(told, event, size)

    def append(self, event: Event, *, tells: bool = True) -> None:
        """Append an event that is not the terminal event. Raises: ModelError (``log_too_large``).

        Args:
            tells: See :meth:`EventLog.append`.
        """
        if not self.log.append(event, tells=tells):
            raise self._log_too_large()

    def _reply_too_large(self) -> ModelError:
        return ModelError(
            "reply_too_large",
            f"The reply is larger than {self._settings.reply_bytes_max} bytes (reply_bytes_max); "
            "the part before that is kept.",
        )

    def _log_too_large(self) -> ModelError:
        return ModelError(
            "log_too_large",
            f"The events of this turn are larger than {self._settings.log_bytes_max} bytes (log_bytes_max); "
            "the text before that is kept.",
        )

    def checkpoint(self) -> Checkpoint | None:
        """The growth since the last stored checkpoint; None if there is none, or if the end is decided.

        A turn that waits has none: the stores keep no growth from before a turn's start.
        """
        if self.end is not None or not self.running or self.log.last_seq == self.stored_seq:
            return None
        return Checkpoint(
            session_id=self.session_id,
            turn_id=self.id,
            after=self.stored_seq,
            runs=tuple(self.log.runs(after=self.stored_seq)),
            text=self.log.text(after=self.stored_seq),
            items=self._reply.changed_after(self.stored_seq),
            left_out=self._record.left_out,
            usage=self.usage,
        )

    def note_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Note that the store has a checkpoint. Has no effect once the end has begun.

        The end may be partly in the store already, from an earlier seq on. A later attempt must name the same seq: it
        replaces all events after this seq.
        """
        if self.is_ending:
            return
        self.stored_seq = last_seq(checkpoint.runs, checkpoint.after)

    def suspended(self, texts: Mapping[int, str] | None = None) -> SuspendedTurn:
        """What the store keeps of the turn, for the process that goes on with it.

        Args:
            texts: The texts of the reply, if the caller has them.
        """
        record = msgspec.structs.replace(self._record, last_seq=self.log.last_seq, usage=self.usage)
        if self._drops_reply:
            return SuspendedTurn(turn=record, runs=without_reply(self.log.runs()))
        record = msgspec.structs.replace(record, output=self._reply.items(texts))
        return SuspendedTurn(turn=record, runs=tuple(self.log.runs()), after=self.stored_seq)

    def finish(self, now: datetime, texts: Mapping[int, str] | None = None) -> TurnRecord:
        """Begin the end: return the record with the decided end, ready for the store.

        Args:
            texts: The texts of the reply, if the caller has them.
        """
        assert self.end is not None, "a turn finished before its end was decided"
        assert not isinstance(self.end, outcome.Suspended), "a suspended turn has no end here"
        self.is_ending = True
        self._spent, self._stream = self.usage, None  # the turn may be kept until the store takes its end
        changes = outcome.record_changes(self.end) | {"ended_at": now, "usage": self.usage}
        output = self._reply.items(texts)
        if isinstance(self.end, outcome.Completed) and self.end.finish_reason in ("stop", "tool_calls"):
            output = tuple(msgspec.structs.replace(item, complete=True) for item in output)
        return msgspec.structs.replace(self._record, output=output, last_seq=self.log.last_seq + 1, **changes)

    def conclude(self, record: TurnRecord, *, stored: bool) -> None:
        """Publish the end to all readers and waiters: the last step of a turn."""
        assert self.end is not None
        assert not isinstance(self.end, outcome.Suspended), "a suspended turn has no end here"
        self._record = record
        self.stored = stored
        self._count_end(record, is_kept=stored or self.is_lost)
        self.log.close(self.terminal_event(stored=stored))
        self.ended.set()
        if self.trace is not None:
            self._end_trace(self.trace)
        self._note_if_over()

    def leave(self, untold: TurnRecord | None = None) -> None:
        """Close the log without a terminal event: the last step of a turn that goes on elsewhere.

        Args:
            untold: Its end, which the store has not taken yet: another process may tell another one. It is counted by
                :meth:`settle`, unless the turn is lost.
        """
        self.is_ending = True
        self.untold = untold
        self._spent, self._stream = self.usage, None
        if untold is None or self.is_lost:
            self._meter.count_leave(self.end)
        self.ending.name = outcome.name_of(outcome.Suspended())
        self.log.leave()
        self.ended.set()
        if self.trace is not None:
            self._end_trace(self.trace)
        self._note_if_over()

    def settle(self, *, is_kept: bool) -> None:
        """Count an end that was left untold, if this is one.

        Args:
            is_kept: Whether clients find it in the store from now on, or its session was deleted. Otherwise the store
                will never take it.
        """
        if self.untold is None:
            return
        if is_kept:
            self._count_end(self.untold, is_kept=True)
        else:
            self._meter.count_leave(self.end)

    def _count_end(self, record: TurnRecord, *, is_kept: bool) -> None:
        assert self.end is not None
        assert not isinstance(self.end, outcome.Suspended), "a suspended turn has no end here"
        self._meter.count_end(self.end, model=record.model, usage=record.usage, crashed=self.crashed, is_kept=is_kept)

    def take_trace(self, trace: TurnTrace) -> None:
        """Take the span of the turn, and keep its name for other processes, if the turn may go on there."""
        self.trace = trace
        if self.outlives and not self._record.trace:
            self._record = msgspec.structs.replace(self._record, trace=trace.traceparent)

    def _end_trace(self, trace: TurnTrace) -> None:
        counts = {"attempts": self.attempts, "events": self.log.last_seq, "text_length": self.text_length}
        trace.end(
            None if self.is_suspended else self.end,
            counts=counts | ({"calls": self.calls} if self.calls else {}),
            queued_until=self.started_at if self.was_queued else None,
            first_token_at=self.first_token_at,
        )

    def terminal_event(self, *, stored: bool) -> TerminalEvent:
        """The terminal event: the next event of an open log, or the last event of a closed log."""
        assert self.end is not None
        assert not isinstance(self.end, outcome.Suspended), "a suspended turn has no terminal event here"
        return outcome.terminal_event(
            self.end,
            seq=self.log.last_seq + (0 if self.log.closed else 1),
            text_length=self._reply.length,
            usage=self._record.usage,
            left_out=self._record.left_out,
            stored=stored,
        )


def restored_log(record: TurnRecord, runs: Sequence[Run], *, bytes_max: int) -> Steps[EventLog]:
    """The log of an adopted turn, with the events that earlier processes have sent and that count.

    Args:
        record: The turn, with its output so far.
        runs: The events; the texts of their pieces are those of the output.
    """
    log = EventLog(bytes_max=bytes_max, turn_id=record.id)
    yield from log.restore(
        runs,
        [item.text for item in record.output],
        event_of=partial(opening_of, record),
        kind_of=lambda item: kind_of_pieces(record.output[item]),
    )
    return log


class Watch:
    """The interest of a stream or a waiting call in a turn. Releasing it twice has no effect.

    Args:
        is_client: Whether the turn may end when all of these have left.
    """

    def __init__(self, turn: Turn | None, *, is_client: bool = True) -> None:
        self._turn = turn
        self._is_client = is_client

    def release(self, *, client_returns: bool = False) -> None:
        """Release the watch. With ``client_returns`` the turn waits at least :data:`RETURN_S` for its client."""
        turn, self._turn = self._turn, None
        if turn is None:
            return
        if self._is_client:
            turn.unwatch(client_returns=client_returns)
        else:
            turn.unwatch_as_reader()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
