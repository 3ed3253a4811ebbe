"""A turn's task: it runs the turn to its end, in the session's task or in a child of it.

Every turn ends with one terminal event, for every cause in the same order: the first cause decides, synchronously; the
connection to the upstream closes; the end is stored; the terminal event is appended; the streams end. A turn that goes
on elsewhere has no end here: its growth is stored, and the streams end without a terminal event.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

import structlog
import trio

from service.clock import Clock
from service.errors import ModelError, SessionNotFoundError, StoreError, TurnNotFoundError
from service.freezes import extended_when_late
from service.models.client import NO_TOOLS, CallNotes, ModelEvent, ModelRequest, ModelStream
from service.sessions.events import outcome
from service.sessions.turns.prompt import NOTHING, Prompt, has_outputs, has_question, prompt_of, shortened
from service.sessions.turns.turn import Turn
from service.sessions.turns.turn_log import log_end
from service.sessions.turns.turn_trace import CallTrace
from service.settings import Settings
from service.steps import in_steps
from service.stop_state import Phase, StopState
from service.storage.records import EndResult, LeftOut, TurnRecord
from service.storage.standing import Standing
from service.storage.store import Store
from service.storage.store_deadline import answered_within
from service.telemetry.log_context import add_to_log_context
from service.telemetry.refusal_log import causes_of

logger = structlog.get_logger("lastcall.turn")

UNTOLD_MAX_S = 60.0
"""How long an end waits for a store that does not take it, where another process may tell another end."""
RETRY_S = 1.0
"""The pause between two attempts, where no beat tells that the store is back."""


class Suspend(Protocol):
    """Suspends a turn whose work has stopped: :meth:`~service.sessions.active.suspensions.Suspensions.suspend`."""

    async def __call__(self, turn: Turn, *, within_s: float) -> None: ...


async def run_turn(
    turn: Turn,
    *,
    wait_to_start: Callable[[], Awaitable[None]],
    may_leave: Callable[[], bool],
    default_end: Callable[[Turn], outcome.Outcome | outcome.Suspended],
    suspend: Suspend,
    store: Store,
    stop: StopState,
    clock: Clock,
    settings: Settings,
) -> None:
    """Run a turn to its end. A failure becomes the turn's terminal event and ends no other turn.

    Returns when the turn has ended, or was suspended. Cancellation from above decides ``default_end(turn)``, and this
    end is still stored and published, within ``cleanup_timeout_s``.

    Args:
        wait_to_start: Returns when the turn may start. Branches start at once, others after all earlier turns.
        may_leave: Whether the turn may leave its session for a while without its end.
        suspend: Gives a turn to the store that goes on elsewhere, and closes its log, within so many seconds.
    """
    try:
        with turn.deadlines.at_work() as scope:
            await wait_to_start()
            await _reply(turn, may_leave=may_leave, store=store, clock=clock, settings=settings)
        if scope.cancelled_caught:
            turn.decide(turn.deadlines.end())
    except Exception as error:  # noqa: BLE001  the edge of a turn
        _decide_failed(turn, error, settings)
    finally:
        turn.decide(default_end(turn))
        await end_turn(  # noqa: ASYNC102  shielded inside, but for the wait for a database that is away
            turn, suspend=suspend, store=store, stop=stop, clock=clock, within_s=settings.cleanup_timeout_s
        )


async def end_turn(
    turn: Turn, *, suspend: Suspend, store: Store, stop: StopState, clock: Clock, within_s: float
) -> bool:
    """Store and publish the decided end, or suspend the turn, as was decided.

    Returns False, and does nothing, if another task does so or has done so.

    Where this process has its turns on a lease, another one may have ended the turn. So an end that the store has not
    taken waits for the store, up to :data:`UNTOLD_MAX_S`, but not in a stop. Then it is published only if this process
    is certain of its turns; else the turn is left without an end, and so it is once this process has lost its turns.
    The end of a turn that outlives its process waits on any store, and is published only once the store has it: if this
    process stops before, another one runs the turn again, and tells its end.
    So is a turn that outlives its process, on any store, if another process goes on with it: that one tells its end.

    Args:
        within_s: How long the store may take. An end that is not stored by then is published as not stored.
    """
    if turn.is_ending:
        return False
    turn.is_ending = True
    if isinstance(turn.end, outcome.Suspended) and not turn.is_elsewhere:
        await suspend(turn, within_s=within_s)
        return True
    if turn.is_elsewhere or store.standing.is_lost:
        turn.is_lost = True
        _leave_untold(turn)
        return True
    texts = None
    with trio.CancelScope(deadline=trio.current_time() + within_s, shield=True):
        texts = await in_steps(turn.log.joined_texts())
    record = turn.finish(clock(), texts)

    async def keep() -> bool:
        # Shielded: every end is stored and published, also the end that a cancellation caused.
        with (
            trio.CancelScope(deadline=trio.current_time() + within_s, shield=True) as scope,
            extended_when_late(scope, timeout_s=within_s),
        ):
            return await _keep(turn, record, store=store, clock=clock)
        return False

    stored = await keep()
    try:
        if (store.standing.has_lease or turn.outlives) and not (stored or turn.is_lost):
            stored = await _wait_kept(turn, keep, standing=store.standing, stop=stop)
    finally:
        _publish(turn, record, stored=stored, standing=store.standing)
    return True


async def _wait_kept(turn: Turn, keep: Callable[[], Awaitable[bool]], *, standing: Standing, stop: StopState) -> bool:
    """Wait until the store takes an end, or will never take it. Returns whether it did."""
    logger.warning("the end of a turn waits for the store", turn_id=turn.id)
    with trio.move_on_after(UNTOLD_MAX_S), stop.until(Phase.INTERRUPTING):
        while not turn.is_lost:
            if standing.has_lease:
                await standing.wait_beat()
            else:
                await trio.sleep(RETRY_S)
            if standing.is_lost:
                return False
            if await keep():
                return True
    return not (standing.is_lost or turn.is_lost) and await keep()


def _publish(turn: Turn, record: TurnRecord, *, stored: bool, standing: Standing) -> None:
    """Publish an end; or leave the turn without one, where another process may have told another end."""
    is_gone = turn.is_lost and not standing.is_lost  # with its session, say
    turn.is_lost = turn.is_lost or (standing.is_lost and not stored)
    may_be_told_unkept = standing.is_certain and not turn.outlives
    if stored or (not turn.is_elsewhere and (is_gone or may_be_told_unkept)):
        turn.conclude(record, stored=stored)
        log_end(turn)
    else:
        _leave_untold(turn, record)


def _leave_untold(turn: Turn, record: TurnRecord | None = None) -> None:
    turn.leave(record)
    logger.warning("the end of a turn is not told: it may have another one", turn_id=turn.id, is_lost=turn.is_lost)


def lose(turn: Turn) -> None:
    """Stop the work of a turn that is not this process's any more.

    Another process has ended it in the store as ``interrupted``; or goes on with it if it outlives its process, and
    then the end is told there.
    """
    if turn.cut_short(outcome.Suspended() if turn.outlives else outcome.Interrupted("crash")):
        turn.is_lost = turn.is_elsewhere = turn.outlives
        logger.warning(
            "a turn belongs to this process no longer, because another one took this process for dead: its work is "
            "stopped",
            session_id=turn.session_id,
            turn_id=turn.id,
        )


async def _reply(turn: Turn, *, may_leave: Callable[[], bool], store: Store, clock: Clock, settings: Settings) -> None:
    """Take the model's whole reply, and decide the end.

    A prompt that is too long for the model is tried once more without the oldest turns, within the same deadlines,
    unless the turn is to have the whole conversation. If the model's server refuses to go on with a reply, the turn is
    suspended without the reply: its next attempt begins anew. Where other turns wait for its end it fails instead.
    """
    was_queued = not turn.running
    turn.start(clock())
    with answered_within(settings.store_timeout_s):
        if was_queued and not await store.start_turn(turn.id, now=clock()):
            lose(turn)
            return
        path = await _read_path(turn, store, settings)
        older = await _measure_older(path, store)
    turn.is_opening = bool(path) and _is_opening(path)
    prefix = await in_steps(turn.text_so_far()) if turn.was_adopted else ""
    prompt = await in_steps(
        prompt_of(
            path,
            system_message=turn.system_message,
            bytes_max=settings.prompt_bytes_max_of(turn.model),
            older=older,
            learns=turn.may_leave_out,
            prefix=prefix,
        )
    )
    _check_whole(turn, prompt)
    turn.deadlines.expect_token("first_token_timeout", within_s=settings.first_token_timeout_s)
    asked = _Asked(path, prompt, prefix)
    del path, prompt  # they may be large, and a reply long
    refusal = await _ask(turn, asked, settings=settings)
    if refusal is not None and refusal.code == "context_too_long" and turn.may_leave_out:
        assert asked.prompt is not None
        shorter = await in_steps(
            shortened(
                asked.prompt,
                refusal,
                asked.path,
                system_message=turn.system_message,
                max_output_tokens=turn.record().max_output_tokens,
                older=older,
                prefix=prefix,
            )
        )
        if shorter is not None:
            logger.info("too long for the model: asking again without the oldest turns", turn_id=turn.id)
            asked = _Asked((), shorter, prefix)
            del shorter
            refusal = await _ask(turn, asked, settings=settings)
    if refusal is not None:
        _begin_anew(turn, refusal, may_leave=may_leave)


def _begin_anew(turn: Turn, refusal: ModelError, *, may_leave: Callable[[], bool]) -> None:
    """Suspend a turn without its reply, which the model's server refuses to go on with.

    Raises:
        ModelError: The refusal, if it is of another kind, or if the turn may not be suspended.
    """
    if refusal.code == "context_too_long" or not (may_leave() and turn.begin_anew()):
        raise refusal
    logger.warning(
        "the model server refuses to go on with a reply (continuation): the reply begins anew",
        session_id=turn.session_id,
        turn_id=turn.id,
        upstream=turn.client.name,
        code=refusal.code,
    )


def _check_whole(turn: Turn, prompt: Prompt) -> None:
    """Refuse a prompt without the oldest turns, if the turn does not allow it. Raises: ModelError."""
    left_out = prompt.left_out
    if left_out is not None and not turn.may_leave_out:
        raise ModelError(
            "context_too_long",
            f"The conversation is too long for this server (prompt_bytes_max): its oldest {left_out.items} items, with "
            f"{left_out.bytes} bytes, would have to be left out, and the request does not allow that.",
        )


def _is_opening(path: Sequence[TurnRecord]) -> bool:
    """Whether the last turn of a path is the first one that a model answers; added turns do not count."""
    earlier = path[:-1]
    return path[0].parent is None and not any(it.state == "completed" and not it.was_added for it in earlier)


async def _read_path(turn: Turn, store: Store, settings: Settings) -> Sequence[TurnRecord]:
    """The turns for the prompt. The input to answer is among them, and if it brings outputs of calls, these calls are.

    Each of the two may be larger than a prompt. So up to two further reads are made, one for the input and one for the
    turn of the calls: each reads as much more as a turn can have. There are no more of them, because between an input
    and the calls may be very many turns without a reply; then the outputs go to the model as texts.
    """
    bytes_max = settings.prompt_bytes_max_of(turn.model)
    path, turn.path = turn.path, None
    if path is None:
        path = await store.read_path(turn.session_id, turn.id, bytes_max=bytes_max)
    for lacks_it in (_lacks_question, _lacks_calls):
        if path and path[0].parent is not None and lacks_it(path):
            bytes_max += settings.reply_bytes_max + max(settings.input_bytes_max, settings.history_bytes)
            longer = await store.read_path(turn.session_id, turn.id, bytes_max=bytes_max)
            path = longer or path  # it is empty if the session is deleted meanwhile
    return path


def _lacks_question(path: Sequence[TurnRecord]) -> bool:
    """Whether the turn with the input to answer is too far up to be there."""
    return not has_question(path)


def _lacks_calls(path: Sequence[TurnRecord]) -> bool:
    """Whether the input brings outputs of calls, and the turn of the calls is too far up to be there.

    This turn is the last one with a reply.
    """
    return has_outputs(path) and not any(turn.has_reply for turn in path[:-1])


async def _measure_older(path: Sequence[TurnRecord], store: Store) -> LeftOut:
    """The size of the turns that are too far back to be read."""
    if not path or path[0].parent is None:
        return NOTHING
    return await store.measure_path(path[0].session_id, path[0].parent)


class _Asked:
    """A prompt, the turns of which it was made, and the text after which the model goes on, until the model has begun
    its output."""

    __slots__ = ("path", "prefix", "prompt")

    def __init__(self, path: Sequence[TurnRecord], prompt: Prompt, prefix: str) -> None:
        self.path = path
        self.prefix = prefix
        self.prompt: Prompt | None = prompt

    def drop(self) -> None:
        """Hold the prompt no longer: the model will not be asked again."""
        self.path, self.prompt = (), None


async def _ask(turn: Turn, asked: _Asked, *, settings: Settings) -> ModelError | None:
    """Take the model's reply to a prompt.

    Returns the error of a prompt that is too long, or of a refusal to go on with a reply, and decides nothing then.
    """

    def take(events: Sequence[ModelEvent]) -> bool:
        """Take events of the model, and return whether the turn goes on."""
        if turn.end is not None:
            return False  # another caller has decided the end meanwhile
        now = trio.current_time()
        finished = turn.take(events, now=now)
        if asked.prompt is not None and turn.has_output:
            asked.drop()
        if finished is not None:
            turn.decide(outcome.Completed(finished.finish_reason))
        turn.deadlines.expect_token("next_token_timeout", within_s=settings.next_token_timeout_s, now=now)
        return turn.end is None

    call = None if turn.trace is None else turn.trace.begin_call(turn.record_at_first())
    notes = call or CallNotes()
    notes.find_deadline = partial(_find_deadline, turn)
    stream: ModelStream | None = None
    failure: ModelError | None = None
    try:
        async with turn.client.stream(_request(turn, asked, notes)) as stream:
            turn.note_stream(stream)
            try:
                if turn.end is None:
                    await stream.relay(take)
            except Exception as error:
                if _may_be_asked_again(turn, asked, error):
                    raise
                _decide_failed(turn, error, settings)  # decided now: until the client has closed a deadline may pass
    except ModelError as error:
        failure = error
        turn.note_spent(error.usage)
        if not _may_be_asked_again(turn, asked, error):
            raise
        return error
    finally:
        turn.attempts += 1 + notes.repeats
        if call is not None:
            _end_call(turn, call, stream, failure)
    return None


def _find_deadline(turn: Turn) -> str | None:
    """The code of the deadline that has ended a turn's work; None if something else has."""
    end = _end_so_far(turn)
    return outcome.code_of(end) if isinstance(end, outcome.Failed) else None


def _end_so_far(turn: Turn) -> outcome.Outcome | outcome.Suspended | None:
    """The end of a turn's work: the decided one, or that of the deadline which has stopped the work just now."""
    if turn.end is None and turn.deadlines.have_stopped():
        return turn.deadlines.end()
    return turn.end


def _end_call(turn: Turn, call: CallTrace, stream: ModelStream | None, failure: ModelError | None) -> None:
    call.end(
        _end_so_far(turn) if failure is None else turn.end,
        error=None if failure is None else failure.code,
        first_at=turn.first_token_at,
        usage=stream.usage if stream is not None else None if failure is None else failure.usage,
    )


def _request(turn: Turn, asked: _Asked, notes: CallNotes) -> ModelRequest:
    assert asked.prompt is not None
    turn.note_prompt(asked.prompt.left_out)
    record = turn.record()
    return ModelRequest(
        model=record.model,
        prompt=asked.prompt.items,
        temperature=record.temperature,
        max_output_tokens=record.max_output_tokens,
        tools=record.tools or NO_TOOLS,
        options=record.options,
        prefix=asked.prefix,
        notes=notes,
    )


def _may_be_asked_again(turn: Turn, asked: _Asked, error: Exception) -> bool:
    """Whether the prompt is too long for the model, or its server refuses to go on with a reply, and the model may be
    asked again: no piece of a reply was sent."""
    if not isinstance(error, ModelError) or turn.has_output:
        return False
    return error.code == "context_too_long" or (bool(asked.prefix) and error.may_be_continuation)


def _decide_failed(turn: Turn, error: Exception, settings: Settings) -> None:
    if isinstance(error, ModelError):
        _decide_upstream_failed(turn, error, settings)
        return
    if isinstance(error, StoreError):
        add_to_log_context(cause=causes_of(error))  # for the line of the turn's end
        turn.decide(outcome.failed(error.code, str(error)))
        return
    logger.error("turn crashed", session_id=turn.session_id, turn_id=turn.id, exc_info=error)
    turn.crashed = True
    turn.decide(outcome.internal_error())


def _decide_upstream_failed(turn: Turn, error: ModelError, settings: Settings) -> None:
    """Decide that the upstream failed. The log gets the upstream's words only where the settings say so."""
    message = error.message if settings.upstream_words == "log" else str(error)
    if not turn.decide(outcome.failed(error.code, message, param=error.parameter)):
        return
    turn.error_for_log = error.message
    if error.upstream_words and settings.upstream_words != "caller":
        logger.warning(
            "the upstream's own words",
            session_id=turn.session_id,
            turn_id=turn.id,
            code=error.code,
            upstream_words=error.upstream_words,
        )


async def _keep(turn: Turn, record: TurnRecord, *, store: Store, clock: Clock) -> bool:
    """Store an end, with the events that the store does not have yet. Returns whether the store took it.

    If the turn is not this process's any more, notes whether another process goes on with it, or has done so.
    """
    try:
        result = await store.end_turn(record, runs=turn.log.runs(), now=clock(), after=turn.stored_seq)
        turn.is_lost = result is EndResult.LOST
        if turn.is_lost and turn.outlives:
            turn.is_elsewhere = True  # also if the store does not answer this
            turn.is_elsewhere = await _is_there(turn, store, clock)
        return result.is_kept
    except StoreError as error:
        logger.warning("the end of a turn was not stored", turn_id=turn.id, error=str(error), cause=causes_of(error))
    except Exception:
        logger.exception("storing the end of a turn failed", turn_id=turn.id)
    return False


async def _is_there(turn: Turn, store: Store, clock: Clock) -> bool:
    """Whether the store has a turn: its session was not deleted. Raises: StoreError."""
    try:
        await store.get_turn(turn.session_id, turn.id, now=clock(), with_texts=False)
    except (SessionNotFoundError, TurnNotFoundError):
        return False
    return True
