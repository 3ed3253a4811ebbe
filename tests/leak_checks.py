"""A pytest plugin: a test that leaves something behind fails.

After each test, with its fixtures torn down and the garbage collected, there must be no new

* Trio system task. (Other tasks cannot outlive ``trio.run``: their nurseries wait for them.)
* async generator that was begun in the test and neither exhausted nor closed. Trio would close it quietly at the
  end of the run, at an arbitrary time.
* file descriptor: sockets, pipes, files.
* thread. Trio keeps the threads of ``to_thread`` for ten idle seconds and gives them their default name then; such an
  idle thread belongs to its cache and not to the test. One that still works for the test has another name and counts.
* child process, zombies included.

The warnings of a collected object (``ResourceWarning``, an exception in ``__del__``, a coroutine that was never
awaited) become errors in pytest; collecting it here blames the right test. Fixtures of a wider scope than a function
may keep resources: they are older than the look before the test.

A test that has failed already is not judged: its traceback keeps its objects alive.
"""

import gc
import inspect
import itertools
import re
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import AsyncGeneratorType
from typing import Any

import pytest
import trio
from trio.lowlevel import Task

SETTLE_S = 20.0
"""How long a thread or a process that is about to end may take to do so: on a busy machine it may stand still for some
seconds. Only a test that leaves something behind takes so long."""

FREEZE_EVERY = 50
"""After so many tests, live objects are frozen out of collections, which would cost ten times as much at the end."""

_STARTED = itertools.count(1)
FAILED = pytest.StashKey[bool]()
LEFT_IN_RUN = pytest.StashKey[list[str]]()


class EndOfRun(trio.abc.Instrument):
    """Finds the leftovers of a Trio run at the moment when its main task ends, before Trio cleans up."""

    def __init__(self, left: list[str]) -> None:
        self.left = left
        self.root = trio.lowlevel.current_root_task()
        self.main = _main_task()
        self.generators = _watch_async_generators()

    def task_exited(self, task: Task) -> None:
        if task is not self.main:
            return
        assert self.root is not None
        for nursery in self.root.child_nurseries:
            for child in nursery.child_tasks:
                if child is not task and child.name != "<TrioToken.run_sync_soon task>":
                    self.left.append(f"system task {child.name}")
        self.left += [f"async generator {it.__qualname__}" for it in self.generators if it.ag_frame is not None]


def _main_task() -> Task:
    task = trio.lowlevel.current_task()
    while task.parent_nursery is not None and task.parent_nursery.parent_task.parent_nursery is not None:
        task = task.parent_nursery.parent_task
    return task


def _watch_async_generators() -> "weakref.WeakSet[AsyncGeneratorType[Any, Any]]":
    """Note every async generator that begins from now on in this run, beside Trio's own bookkeeping."""
    seen: weakref.WeakSet[AsyncGeneratorType[Any, Any]] = weakref.WeakSet()
    begun_in_trio = sys.get_asyncgen_hooks().firstiter

    def begun(generator: AsyncGenerator[Any, Any]) -> None:
        assert isinstance(generator, AsyncGeneratorType)
        seen.add(generator)
        if begun_in_trio is not None:
            begun_in_trio(generator)

    sys.set_asyncgen_hooks(firstiter=begun)
    return seen


def _watched(test: Callable[..., Any], left: list[str]) -> Callable[..., Any]:
    @wraps(test)
    async def run_watched_test(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        trio.lowlevel.add_instrument(EndOfRun(left))
        await test(*args, **kwargs)

    return run_watched_test


# Outside pytest-trio's own wrapper of this hook, which replaces the test by a synchronous function.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    if isinstance(item, pytest.Function):
        left = item.stash.setdefault(LEFT_IN_RUN, [])
        hypothesis = getattr(item.obj, "hypothesis", None)
        if hypothesis is not None:
            if inspect.iscoroutinefunction(hypothesis.inner_test):
                hypothesis.inner_test = _watched(hypothesis.inner_test, left)
        elif inspect.iscoroutinefunction(item.obj):
            item.obj = _watched(item.obj, left)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or not report.passed
    return report


def pytest_collection_finish() -> None:
    """Freeze the objects of the imports: without them the collection after each test costs next to nothing."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """From time to time freeze the objects of caches. Here the previous test is gone with all its garbage."""
    if next(_STARTED) % FREEZE_EVERY == 0:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Generator[None]:
    descriptors = open_descriptors()
    threads = set(threading.enumerate())
    children = child_processes()
    yield
    gc.collect()
    if request.node.stash.get(FAILED, False):
        return
    left = list(request.node.stash.get(LEFT_IN_RUN, []))
    left += [f"thread {name}" for name in _settle(lambda: _busy_threads(threads))]
    left += [f"child process {child}" for child in _settle(lambda: child_processes() - children)]
    left += [f"descriptor {fd} of {kind}" for fd, kind in sorted(open_descriptors() - descriptors)]
    if left:
        pytest.fail("the test leaves behind: " + "; ".join(left), pytrace=False)


def open_descriptors() -> set[tuple[int, str]]:
    """The open file descriptors of this process, each with its target."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add((int(entry.name), str(entry.readlink())))
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return found


def child_processes() -> set[str]:
    """The children of this process, zombies included, as ``pid name``."""
    found = set()
    for children in Path("/proc/self/task").glob("*/children"):
        try:
            pids = children.read_text().split()
        except FileNotFoundError:  # a thread that has ended since it was listed
            continue
        for pid in pids:
            with suppress(FileNotFoundError, ProcessLookupError):
                found.add(f"{pid} {Path('/proc', pid, 'comm').read_text().strip()}")
    return found


def _busy_threads(before: set[threading.Thread]) -> set[str]:
    idle = re.compile(r"Trio thread \d+")
    return {it.name for it in threading.enumerate() if it not in before and not idle.fullmatch(it.name)}


def _settle(look: Callable[[], set[str]]) -> set[str]:
    deadline = time.monotonic() + SETTLE_S
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left
