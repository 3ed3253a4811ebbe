"""A pytest plugin: which tests run beside others, and which run alone.

With several workers (pytest-xdist, ``-n``) a test runs beside others, unless it is marked ``serial``: those come last,
and each of them has the machine for itself. So the measurement does not include the cost of other tests.

A test that is marked ``long`` is among the first to begin: at the end of a run it would keep one worker busy alone.

Two markers, which most tests get from their directory:

* ``processes``: the test starts processes. A test that does so without the marker fails. ``just quick`` leaves out the
  tests that have it.
* ``serial``: the test measures time, or loads the whole machine. A new test in ``tests/process`` counts as one; if
  it asserts nothing about time, it is marked ``parallel`` instead.
"""

import fcntl
import os
import resource
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROCESSES = ("bench", "cli", "console", "docs", "hosting", "process")
"""The directories whose tests start processes."""
SERIAL = ("process",)
"""The directories whose tests measure time, unless they are marked ``parallel``."""
WORKERS_MAX = 4
"""Bound of ``-n auto``: with more workers most of the time goes into the serial tests, and a container often has fewer
cores than it shows."""

_LOCK = pytest.StashKey[int]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """The number of workers that ``-n auto`` stands for. With None pytest-xdist decides."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return min(len(os.sched_getaffinity(0)), WORKERS_MAX)


@pytest.hookimpl(tryfirst=True)  # must run before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        directories = item.path.relative_to(item.config.rootpath).parts[1:-1]
        if not directories:
            continue
        if directories[0] in PROCESSES:
            item.add_marker(pytest.mark.processes)
        if directories[0] in SERIAL and item.get_closest_marker("parallel") is None:
            item.add_marker(pytest.mark.serial)
    items.sort(key=lambda item: (_is_serial(item), item.get_closest_marker("long") is None))


def _is_serial(item: pytest.Item) -> bool:
    return item.get_closest_marker("serial") is not None


# Alone


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        # The temporary directories of a run's workers lie beside each other.
        workers: Path = session.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
        session.config.stash[_LOCK] = os.open(workers / "serial.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)


@pytest.hookimpl(
    wrapper=True, tryfirst=True
)  # outside faulthandler's wrapper: a test that waits for the lock does not hang
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with _machine(item):
        return (yield)


@contextmanager
def _machine(item: pytest.Item) -> Iterator[None]:
    """Reserve the machine: for a serial test alone, for other tests together with those of other workers."""
    lock = item.config.stash.get(_LOCK, None)
    if lock is None:  # there are no other workers
        yield
        return
    fcntl.flock(lock, fcntl.LOCK_EX if _is_serial(item) else fcntl.LOCK_SH)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


# Reports


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, object, object]:
    """Escape lone surrogates in what a worker reports: pytest-xdist stops the whole run at the first one."""
    return _encodable((yield))


def _encodable(data: object) -> object:
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode()
    if isinstance(data, dict):
        return {_encodable(key): _encodable(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(map(_encodable, data))
    return data


# Check of the marker


@pytest.fixture(autouse=True)
def _starts_processes_only_with_the_marker(request: pytest.FixtureRequest) -> Generator[None]:
    before = _page_faults_of_children()
    yield
    if request.node.get_closest_marker("processes") is None and _page_faults_of_children() != before:
        pytest.fail("the test starts a process: mark it with pytest.mark.processes", pytrace=False)


def _page_faults_of_children() -> int:
    """The page faults of all children that have ended. There is no process without one."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
