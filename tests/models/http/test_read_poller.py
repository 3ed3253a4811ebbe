"""The poller: whose function it calls, when, and when no more."""

import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path

import pytest
import trio

from service.freezes import FreezeWatch, current_watch, watch_for_freezes
from service.models.http.read_poller import CALLS_MAX, ReadPoller, open_read_poller
from service.steps import STEP_S

WAIT_S = 60


@pytest.fixture
async def poller() -> AsyncIterator[ReadPoller]:
    with trio.fail_after(WAIT_S):
        async with open_read_poller() as opened:
            assert opened is not None
            yield opened


class Reader:
    """A task that has the poller call it, over a pair of sockets."""

    def __init__(self, poller: ReadPoller) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.read: list[bytes] = []
        self.is_over = False
        self.scope = trio.CancelScope()
        self._poller = poller

    def take(self) -> bool:
        self.read.append(self.ours.recv(100))
        return self.read[-1] != b"."

    async def run(self) -> None:
        with self.scope:
            await self._poller.call_while_readable(self.ours.fileno(), self.take)
            self.is_over = True

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def reader(poller: ReadPoller) -> Reader:
    return Reader(poller)


async def wait_read(reader: Reader, count: int) -> None:
    while len(reader.read) < count:  # noqa: ASYNC110  the function that is under test sets no event
        await trio.lowlevel.checkpoint()


async def test_a_function_is_called_for_all_that_comes_until_it_wants_no_more(reader: Reader) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        for count, piece in enumerate((b"a", b"b"), start=1):
            reader.theirs.send(piece)
            await wait_read(reader, count)
        assert not reader.is_over
        reader.theirs.send(b".")
    assert reader.is_over
    reader.theirs.send(b"c")
    await trio.testing.wait_all_tasks_blocked()
    assert reader.read == [b"a", b"b", b"."]
    reader.close()


async def test_the_end_of_the_other_side_is_something_to_read(reader: Reader) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        reader.theirs.close()
        await wait_read(reader, 1)
        nursery.cancel_scope.cancel()
    assert reader.read[0] == b""
    reader.close()


async def test_a_cancelled_task_is_not_called_again_and_its_socket_can_wait_anew(reader: Reader) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        await trio.testing.wait_all_tasks_blocked()
        reader.scope.cancel()
    reader.theirs.send(b"a")
    await trio.testing.wait_all_tasks_blocked()
    assert not reader.read
    reader.theirs.send(b".")
    reader.scope = trio.CancelScope()
    reader.take = lambda: not reader.read.append(reader.ours.recv(100))  # type: ignore[method-assign,func-returns-value]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        await wait_read(reader, 1)
        nursery.cancel_scope.cancel()
    assert reader.read == [b"a."]
    reader.close()


async def test_a_task_that_is_cancelled_by_an_earlier_function_of_the_step_is_not_called(poller: ReadPoller) -> None:
    readers = [Reader(poller), Reader(poller)]
    for reader, other in zip(readers, reversed(readers), strict=True):

        def take(reader: Reader = reader, other: Reader = other) -> bool:
            reader.read.append(reader.ours.recv(100))
            other.scope.cancel()
            return False

        reader.take = take  # type: ignore[method-assign]
        reader.theirs.send(b"a")
    async with trio.open_nursery() as nursery:
        for reader in readers:
            nursery.start_soon(reader.run)
    assert sorted(len(reader.read) for reader in readers) == [0, 1]
    for reader in readers:
        reader.close()


async def test_a_function_may_cancel_its_own_task(reader: Reader) -> None:
    def take() -> bool:
        reader.read.append(reader.ours.recv(100))
        reader.scope.cancel()
        return False

    reader.take = take  # type: ignore[method-assign]
    reader.theirs.send(b"a")
    await reader.run()
    assert reader.read == [b"a"]
    assert not reader.is_over
    reader.close()


async def test_an_error_is_raised_in_its_own_task_only(poller: ReadPoller, reader: Reader) -> None:
    failing = Reader(poller)

    def fail() -> bool:
        raise ZeroDivisionError

    failing.take = fail  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        failing.theirs.send(b"a")
        with pytest.raises(ZeroDivisionError):
            await failing.run()
        reader.theirs.send(b".")
    assert reader.is_over
    reader.close()
    failing.close()


async def test_a_function_is_called_with_the_context_variables_of_its_task(reader: Reader) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="of no task")
    seen: list[str] = []

    def take() -> bool:
        seen.append(variable.get())
        return False

    reader.take = take  # type: ignore[method-assign]
    variable.set("of the task")
    reader.theirs.send(b"a")
    await reader.run()
    assert seen == ["of the task"]
    reader.close()


async def test_what_the_system_cannot_wait_for_is_left_to_the_caller(poller: ReadPoller, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        await poller.call_while_readable(file.fileno(), lambda: pytest.fail("called"))


class Rounds(trio.abc.Instrument):
    """Counts the rounds of the event loop, and asks the watch in each of them how long the steps took."""

    def __init__(self, watch: FreezeWatch) -> None:
        self.count = 0
        self.steps_took_s: list[float] = []
        self._watch = watch

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1
        self.steps_took_s.append(self._watch.steps_took_s)


async def test_other_tasks_get_a_turn_between_many_functions_and_these_count_as_one_delay() -> None:
    """A round of the event loop is short then. It is the whole delay that says whether the event loop is busy."""
    now = [0.0]
    called_in: list[int] = []
    with ExitStack() as stack, watch_for_freezes(clock=lambda: now[0], cpu_clock=lambda: now[0]):
        watch = current_watch()
        assert watch is not None
        rounds = Rounds(watch)
        trio.lowlevel.add_instrument(rounds)
        stack.callback(trio.lowlevel.remove_instrument, rounds)

        def take() -> bool:
            now[0] += 0.001
            called_in.append(rounds.count)
            return False

        async with open_read_poller() as poller, trio.open_nursery() as nursery:
            assert poller is not None
            for _ in range(2 * CALLS_MAX):
                reader = Reader(poller)
                stack.callback(reader.close)
                reader.take = take  # type: ignore[method-assign]
                reader.theirs.send(b"a")
                nursery.start_soon(reader.run)
    assert len(called_in) == 2 * CALLS_MAX
    assert max(Counter(called_in).values()) <= CALLS_MAX, "too many functions were called in one step"
    assert max(rounds.steps_took_s) == pytest.approx(0.001 * 2 * CALLS_MAX)


async def test_functions_that_take_long_are_called_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full event loop has much to read on each socket. All sockets are read before one is read again."""
    now = [0.0]
    monkeypatch.setattr("service.models.http.read_poller.time.perf_counter", lambda: now[0])
    called: list[tuple[int, int]] = []
    rounds = Rounds(FreezeWatch(counts_frozen_time=lambda: False, clock=lambda: now[0], cpu_clock=lambda: now[0]))
    count = 5
    with ExitStack() as stack:
        trio.lowlevel.add_instrument(rounds)
        stack.callback(trio.lowlevel.remove_instrument, rounds)
        async with open_read_poller() as poller, trio.open_nursery() as nursery:
            assert poller is not None
            for number in range(count):
                reader = Reader(poller)
                stack.callback(reader.close)

                def take(number: int = number) -> bool:  # reads nothing, so that there is always something to read
                    now[0] += STEP_S
                    called.append((number, rounds.count))
                    return len(called) < 3 * count - number

                reader.take = take  # type: ignore[method-assign]
                reader.theirs.send(b"a")
                nursery.start_soon(reader.run)
    numbers, in_rounds = zip(*called, strict=True)
    assert all(sorted(numbers[at : at + count]) == list(range(count)) for at in (0, count))
    assert max(Counter(in_rounds).values()) == 1
