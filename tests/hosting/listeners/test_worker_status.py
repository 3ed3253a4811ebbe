"""What workers show each other, with real processes: the kernel decides how long a lock is held."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from service.hosting.hypercorn.worker import HypercornMaster
from service.hosting.listeners.worker_status import Siblings, StatusBeacon, WorkerStatus, open_common_file

DESCRIPTORS = 10_000

SHOW = """
import os, resource, sys
from service.hosting.listeners.worker_status import StatusBeacon, WorkerStatus, open_common_file
beacon = StatusBeacon(open_common_file(sys.argv[1]))
for name in sys.argv[3:]:
    beacon.show(WorkerStatus[name])
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]) + 100,) * 2)
for _ in range(int(sys.argv[2])):
    os.dup(0)
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def common(tmp_path: Path) -> str:
    path = tmp_path / "status"
    path.touch()
    return str(path)


@contextmanager
def worker(common: str, *statuses: str, descriptors: int = 0) -> "Iterator[subprocess.Popen[bytes]]":
    """Another process that has shown these statuses, one after the other."""
    command = [sys.executable, "-c", SHOW, common, str(descriptors), *statuses]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.communicate()


@contextmanager
def beacon_on(common: str) -> Iterator[StatusBeacon]:
    file = open_common_file(common)
    assert file is not None
    try:
        yield StatusBeacon(file)
    finally:
        os.close(file)


def others(beacon: StatusBeacon) -> list[WorkerStatus]:
    return [status for status in WorkerStatus if beacon.another_is(status)]


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Inside, this process has no descriptor left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(it.name) for it in Path("/proc/self/fd").iterdir()) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


@contextmanager
def noting_opens() -> Iterator[list[str]]:
    """Note the files and folders that this process opens inside."""
    opened: list[str] = []

    def note(event: str, args: Any) -> None:
        if noting and event in {"open", "os.listdir", "os.scandir", "os.open"}:
            opened.append(str(args[0]))

    noting = True
    sys.addaudithook(note)
    yield opened
    noting = False


@pytest.mark.parametrize("status", WorkerStatus)
def test_another_process_shows_its_last_status(common: str, status: WorkerStatus) -> None:
    shown = [it.name for it in WorkerStatus if it <= status]
    with beacon_on(common) as beacon, worker(common, *shown) as other:
        beacon.show(WorkerStatus.DRAINING)  # one's own status does not count
        assert others(beacon) == [status]
        assert beacon.shows_any(other.pid)
        assert not beacon.shows_any(other.pid + 1)
        assert beacon.stops(other.pid) == (status in (WorkerStatus.DRAINING, WorkerStatus.LEAVING))
        assert not beacon.stops(other.pid + 1)


def test_a_look_opens_nothing_however_much_the_other_workers_have_open(common: str) -> None:
    with beacon_on(common) as beacon, worker(common, "SERVING", descriptors=DESCRIPTORS) as other:
        assert len(list(Path(f"/proc/{other.pid}/fd").iterdir())) > DESCRIPTORS
        with noting_opens() as opened, no_descriptors():
            opened.clear()
            assert others(beacon) == [WorkerStatus.SERVING]
            looked = list(opened)
    assert looked == []


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_worker_shows_nothing_also_before_anybody_has_waited_for_it(common: str, end: signal.Signals) -> None:
    with beacon_on(common) as beacon, worker(common, "SERVING") as other:
        other.send_signal(end)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert others(beacon) == []
        assert not beacon.shows_any(other.pid)


def test_of_several_workers_each_status_is_seen(common: str) -> None:
    with beacon_on(common) as beacon, ExitStack() as stack:
        for status in ("DRAINING", "SERVING", "SERVING", "LEAVING"):
            stack.enter_context(worker(common, status))
        assert others(beacon) == [WorkerStatus.SERVING, WorkerStatus.DRAINING, WorkerStatus.LEAVING]


def test_without_a_common_file_nothing_is_shown_or_seen() -> None:
    beacon = StatusBeacon(open_common_file("/nowhere"))
    beacon.show(WorkerStatus.SERVING)
    assert others(beacon) == []
    assert not beacon.shows_any(os.getpid())


def test_an_error_of_the_kernel_shows_nothing_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch, common: str) -> None:
    def refuse(*_: object, **_options: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with beacon_on(common) as beacon:
        monkeypatch.setattr("service.hosting.listeners.worker_status.lock", refuse)
        beacon.show(WorkerStatus.SERVING)


# hypercorn's own master

SPAWN = multiprocessing.get_context("spawn")


def show_and_wait(connection: Connection, stop_event: Any, *, shows: bool) -> None:
    master = HypercornMaster(os.getppid(), stop_event, sentinel=-1)
    if shows:
        StatusBeacon(master.open_status_file()).show(WorkerStatus.SERVING)
    connection.send(None)
    connection.recv()


def look_for_another(*, shows: bool) -> None:
    """As hypercorn's master does, start a process beside this one; write whether one starts, and whether one serves."""
    stop_event = SPAWN.Event()
    master = HypercornMaster(os.getpid(), stop_event, sentinel=-1)
    beacon = StatusBeacon(master.open_status_file())
    alone = master.another_starts(beacon)
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=show_and_wait, args=(theirs, stop_event), kwargs={"shows": shows})
    process.start()
    ours.recv()
    with no_descriptors():
        seen = master.another_starts(beacon), beacon.another_is(WorkerStatus.SERVING)
    ours.send(None)
    process.join()
    last = master.another_starts(beacon)
    del stop_event, master
    # The tracker would outlive this process for a moment.
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
    sys.stdout.write(f"{alone} {seen[0]} {seen[1]} {last}\n")


@pytest.mark.parametrize(("shows", "seen"), [(False, "False True False False\n"), (True, "False False True False\n")])
def test_workers_of_hypercorns_master_find_each_other_and_those_that_show_nothing_yet(
    *, shows: bool, seen: str
) -> None:
    """Their common file is the semaphore of hypercorn's event; a worker that imports yet is a child of the master."""
    program = (
        f"from tests.hosting.listeners.test_worker_status import look_for_another; look_for_another(shows={shows})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == seen


def test_a_master_that_has_died_starts_no_worker(common: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as master:
        siblings = Siblings(master.pid)
        master.communicate()
    with beacon_on(common) as beacon:
        assert not siblings.one_starts(beacon)
    assert siblings._list is not None
    os.close(siblings._list)
