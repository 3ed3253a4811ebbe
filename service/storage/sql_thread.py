"""A thread with its own connection to a database, which runs steps in batches, in the order of their arrival.

The thread is a daemon, so that a disk or a network that hangs cannot keep the process from ending.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
from anyio.lowlevel import EventLoopToken, current_token

from service.errors import StoreError

D = TypeVar("D")
"""The connection, as the steps see it."""
A = TypeVar("A")
T = TypeVar("T")

CLAIMED_GRACE_S = 0.25
"""How long a cancelled caller waits for a step that has begun, so that the step is usually done when it leaves."""

STEPS_MAX = 20_000
"""Bound on the steps that wait. While a disk hangs, the steps whose callers have left are among them."""
PAUSE_S = 0.01
"""The shortest pause between two calls of ``run_housekeeping`` without a step: for other processes that wait for the
lock."""


class Joined(Generic[D, A, T]):
    """A call that several steps make together, if they are in one transaction.

    Args:
        make: The call for all of them: called with an argument of each, it returns a result for each. Steps with equal
            ones go together.
        argument: That of one step.
    """

    def __init__(self, make: Callable[[D, Sequence[A]], Sequence[T]], argument: A) -> None:
        self.make = make
        self.argument = argument

    def __call__(self, db: D) -> T:
        (result,) = self.make(db, [self.argument])
        return result


class Step(Generic[D, T]):
    """One step, from its submission to its outcome. Belongs to the caller until a thread claims it.

    Attributes:
        makes_space: Whether the step must succeed on a full disk, because it frees space for other steps.
        shares: Whether the step may be in one transaction with steps that other callers wait for.
    """

    def __init__(self, call: Callable[[D], T], *, makes_space: bool = False, shares: bool = False) -> None:
        self.done = anyio.Event()
        self.makes_space = makes_space
        self.shares = shares
        self.error: Exception | None = None
        self._call: Callable[[D], T] | None = call
        self._result: T | None = None
        self._ticket = [None]
        self._commit_ticket = [None]

    def claim(self) -> bool:
        """Claim the step, to run or to drop it. True for the first claim only."""
        return _take(self._ticket)

    def claim_commit(self) -> bool:
        """Claim the step's commit, to make it or to forbid it. True for the first claim only."""
        return _take(self._commit_ticket)

    @property
    def is_given_up(self) -> bool:
        """Whether the commit was claimed. Before the thread of the step claims it: whether it is forbidden."""
        return not self._commit_ticket

    def give_back(self) -> None:
        """Undo the claim of a step that has left nothing behind, so that another thread may claim it."""
        self._ticket.append(None)

    def drop(self) -> bool:
        """Claim the step, so that it never begins, and let go of what it would write. False if a thread claimed it."""
        if not self.claim():
            return False
        self._call = None
        return True

    def run(self, db: D) -> None:
        """Run the step, which the caller has claimed. Raises: The errors of the step."""
        assert self._call is not None, "a dropped step never runs"
        self._result = self._call(db)

    @property
    def joined(self) -> Joined[D, Any, T] | None:
        """The call, if several steps may make it together."""
        return self._call if isinstance(self._call, Joined) else None

    def take(self, result: T) -> None:
        """Take the result of a call that several steps have made together."""
        self._result = result

    def outcome(self) -> T:
        """Raises: The step's error."""
        if self.error is not None:
            raise self.error
        return self._result  # type: ignore[return-value]


def run_together(db: D, steps: Iterable[Step[D, Any]]) -> None:
    """Run claimed steps in their order; those that make a call together in one call. Raises: The errors of a step."""
    for make, some in groupby(steps, lambda step: None if step.joined is None else step.joined.make):
        if make is None:
            for step in some:
                step.run(db)
            continue
        alike = [(step, step.joined.argument) for step in some if step.joined is not None]
        for (step, _), result in zip(alike, make(db, [argument for _, argument in alike]), strict=True):
            step.take(result)


class Batches(Protocol[D]):
    """The work of a thread with its connection. All methods are called in the thread."""

    def open(self) -> None: ...

    def run(self, arriving: Iterator[Step[D, Any]]) -> Iterable[Sequence[Step[D, Any]]]:
        """Run waiting steps, at least one. Gives the steps that have their outcomes, each once, as soon as they do."""
        ...

    def run_housekeeping(self, *, idle: bool) -> float | None:
        """Do work between batches; ``idle`` if no step waits. Returns after which time without a step there is more of
        this work, in seconds; None if there is no more."""
        ...

    def close(self) -> None: ...


class SqlThread(Generic[D]):
    """The thread's side in the event loop. Usable once :meth:`open` has returned.

    Args:
        on_left: Called in the event loop, with a step that a thread has claimed, when its caller leaves.
    """

    def __init__(
        self, name: str, batches: Batches[D], *, on_left: Callable[[Step[D, Any]], None] | None = None
    ) -> None:
        self._batches = batches
        self._on_left = on_left
        self._queue: SimpleQueue[Step[D, Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._opened = anyio.Event()
        self._ended = anyio.Event()
        self._closing = False
        self._handing_over = threading.Lock()
        """Held while the end is put into the queue: nothing may follow it."""
        self._error: Exception | None = None
        self._token: EventLoopToken = current_token()

    async def open(self) -> None:
        """Start, and wait for the connection. Raises: What opening it raised."""
        self._thread.start()
        await self._opened.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error

    async def call(self, call: Callable[[D], T], *, makes_space: bool = False, shares: bool = False) -> T:
        """Run a step and wait for its outcome.

        After a cancellation before the step has begun, the step never begins; a step that has begun is completed.

        Raises:
            StoreError: The store is closed, or too many steps wait.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        if self._closing:
            raise StoreError("The store is closed.", retry_after_s=None)
        if self._queue.qsize() >= STEPS_MAX:
            raise StoreError(f"The store does not answer, and {STEPS_MAX} steps wait for it already.")
        step = Step(call, makes_space=makes_space, shares=shares)
        self._queue.put(step)
        try:
            await step.done.wait()
        except BaseException:
            if not step.drop():
                with anyio.move_on_after(CLAIMED_GRACE_S, shield=True):
                    await step.done.wait()
                if self._on_left is not None and not step.done.is_set():
                    self._on_left(step)
            raise
        return step.outcome()

    async def close(self) -> None:
        """Finish the submitted steps and close the connection. May be cancelled, and called again."""
        if self._thread.ident is None or self._error is not None:
            return
        with self._handing_over:
            self._closing = True
            self._queue.put(None)
        await self._ended.wait()
        self._thread.join()

    def hand_over(self, step: Step[D, Any]) -> bool:
        """Take a step over from another thread, which has claimed it and calls this. False if this thread takes no more
        steps."""
        with self._handing_over:
            if self._closing or self._queue.qsize() >= STEPS_MAX:
                return False
            step.give_back()
            self._queue.put(step)
            return True

    # In the thread

    def _work(self) -> None:
        try:
            try:
                self._batches.open()
            except Exception as error:  # noqa: BLE001  raised by open()
                self._error = error
                self._set_events(self._opened)
                return
            try:
                self._set_events(self._opened)
                self._work_through_steps()
            finally:
                self._batches.close()
                self._set_events(self._ended)
        except RuntimeError:
            # The event loop is gone, and with it all callers.
            return

    def _work_through_steps(self) -> None:
        # No name here keeps a step: a step that is done belongs to its caller alone, with its result.
        pause_s: float | None = PAUSE_S
        while True:
            try:
                arriving = self._wait_for_steps(timeout_s=max(pause_s, PAUSE_S) if pause_s else None)
            except Empty:
                pause_s = self._batches.run_housekeeping(idle=True)
                continue
            if arriving is None:
                return
            self._run_steps(arriving)
            pause_s = self._batches.run_housekeeping(idle=False)

    def _wait_for_steps(self, *, timeout_s: float | None) -> Iterator[Step[D, Any]] | None:
        """Return the waiting steps; None at the end. Raises: Empty."""
        first = self._queue.get(timeout=timeout_s)
        return None if first is None else self._arriving(first)

    def _run_steps(self, arriving: Iterator[Step[D, Any]]) -> None:
        for done in self._batches.run(arriving):
            self._set_events(*(step.done for step in done))
            del done

    def _arriving(self, first: Step[D, Any]) -> Iterator[Step[D, Any]]:
        """The waiting steps, without those whose callers have left."""
        step: Step[D, Any] | None = first
        while step is not None:
            if step.claim():
                yield step
            try:
                step = self._queue.get_nowait()
            except Empty:
                return
        self._queue.put(None)  # the next round meets the end again

    def _set_events(self, *events: anyio.Event) -> None:
        anyio.from_thread.run_sync(_set_all, events, token=self._token)


def _take(ticket: list[None]) -> bool:
    try:
        ticket.pop()
    except IndexError:
        return False
    return True


def _set_all(events: Sequence[anyio.Event]) -> None:
    for event in events:
        event.set()
