"""The master's decisions, on workers and a clock that are set by hand. As a process: ``test_exit_codes.py``, and
``tests/process/test_reload.py``."""

import errno
import inspect
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import hypercorn.run
import msgspec
import pytest
from hypercorn.config import Config, Sockets

from service.cluster.workers import KnownWorker
from service.hosting import master, start_pause, worker_process
from service.hosting.master import (
    AT_ONCE_MAX,
    AT_ONCE_S,
    DIED,
    REPLACEMENTS_MAX,
    REPLACEMENTS_WITHIN_S,
    START_MAX_S,
    STOP_SLACK_S,
    WAIT_MAX_S,
    Workers,
)
from service.hosting.master_link import Message
from service.hosting.process.process_exit import ExitCode, say
from service.hosting.start_pause import FIRST_S, MAX_S
from service.hosting.worker_main import SharedFile
from service.hosting.worker_process import WorkerProcess, start_worker
from tests.kept_log import FORMATS, Format, kept_log

REFUSED = ExitCode.REFUSED
STOP_TIMEOUT_S = 5.0


@pytest.mark.removal
def test_hypercorns_own_join_still_forgets_the_code_by_its_second_call() -> None:
    """This test fails once the master returns its workers' codes; then ours is only needed for the replacing."""
    processes: Any = [SimpleNamespace(exitcode=71, join=lambda: None)]
    assert hypercorn.run._join_exited(processes) == 71
    assert hypercorn.run._join_exited(processes) == 0


@pytest.mark.removal
def test_a_reload_of_hypercorn_still_ends_the_old_workers_first() -> None:
    """This test fails once hypercorn's reload starts new workers first, or waits elsewhere than in its handler."""
    reload = inspect.getsource(hypercorn.run.run).partition("def reload")[2].partition("def shut")[0]
    assert re.findall(r"shutdown_event\.set|process\.join\(\)|shutdown_event\.clear|_populate", reload) == [
        "shutdown_event.set",
        "process.join()",
        "shutdown_event.clear",
    ]


class FakeWorker(WorkerProcess):
    """A worker without a process."""

    def __init__(self, pid: int, *, generation: int, stop_within_s: float) -> None:
        self.fake = SimpleNamespace(pid=pid, exitcode=None, kill=self._kill, terminate=self._terminate)
        self.signals: list[str] = []
        self.told: list[str] = []
        self.told_of_workers: list[str] = []
        super().__init__(cast("Any", self.fake), cast("Any", None), generation=generation, stop_within_s=stop_within_s)

    def _kill(self) -> None:
        self.signals.append("SIGKILL")

    def _terminate(self) -> None:
        self.signals.append("SIGTERM")

    def _tell(self, text: str) -> None:
        (self.told_of_workers if text.startswith("workers ") else self.told).append(text)

    def release(self) -> None:
        del self.fake.pid  # as a process that is closed

    def serve(self) -> None:
        self.has_begun = True
        self._note(Message.SERVING, f"@{self.pid}")

    def end(self, code: int) -> None:
        self.fake.exitcode = code


class Service:
    """A master whose workers and whose clock are set by hand.

    Args:
        room: How many workers can be started in all; for a further one the system has no process.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, workers: int = 2, room: int = 1_000_000) -> None:
        self.now = 1000.0
        self.room = room
        self.started: list[FakeWorker] = []
        clock = SimpleNamespace(monotonic=lambda: self.now)
        for module in (master, start_pause, worker_process):
            monkeypatch.setattr(module, "time", clock)
        config = Config.from_mapping(workers=workers)
        self.workers = Workers(
            config, Sockets([], [], []), stop_timeout_s=STOP_TIMEOUT_S, start=cast("Any", self._start)
        )
        self.advance()

    def _start(self, _config: Config, *_: object, generation: int, stop_within_s: float) -> WorkerProcess:
        if len(self.started) >= self.room:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        worker = FakeWorker(len(self.started), generation=generation, stop_within_s=stop_within_s)
        # The master counts a worker as serving when it reads the worker's message.
        worker.take_messages = lambda: None  # type: ignore[method-assign]
        self.started.append(worker)
        return worker

    def advance(self, by_s: float = 0.0) -> None:
        self.now += by_s
        self.workers.advance()

    def serve(self, *workers: FakeWorker) -> None:
        """Have workers tell that they serve; without one, all that start."""
        for worker in workers or [it for it in self.started if it.end_by is None and it.exit_code is None]:
            worker.take_messages = worker.serve  # type: ignore[method-assign]
        self.advance()

    def end(self, worker: FakeWorker, code: int, *, after_s: float = AT_ONCE_S + 1) -> None:
        self.now += after_s
        worker.end(code)
        self.advance()

    def reload(self) -> None:
        self.workers._reload_wanted = True
        self.advance()

    def finish_reload(self) -> None:
        """Have the new workers serve, which start one after the other."""
        self.serve()
        self.serve()

    @property
    def alive(self) -> int:
        return sum(worker.exit_code is None for worker in self.started)

    @property
    def is_stopping(self) -> bool:
        return self.workers._stopping

    @property
    def code(self) -> int:
        return self.workers._code

    def starts_after(self, pause_s: float) -> bool:
        """Whether the next start comes after exactly this time, within 10 ms."""
        before = len(self.started)
        self.advance(pause_s - 0.01)
        too_early = len(self.started) > before
        self.advance(0.02)
        return not too_early and len(self.started) > before


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    service = Service(monkeypatch)
    yield service
    os.close(service.workers._status_file.descriptor)


@pytest.fixture
def serving(service: Service) -> Service:
    service.serve()
    return service


# Ends of workers


@pytest.mark.parametrize("exit_code", [0, -9, *DIED])
def test_a_worker_that_stopped_or_died_is_replaced(service: Service, exit_code: int) -> None:
    service.end(service.started[0], exit_code)
    assert len(service.started) == 3
    assert not service.is_stopping


@pytest.mark.parametrize(
    ("exit_code", "how"),
    [
        (-9, "by SIGKILL"),
        (-40, "by signal 40"),  # a real-time signal
        (-64, "by SIGRTMAX"),
        (70, "with code 70"),
    ],
)
def test_the_log_says_how_a_worker_died_also_where_its_signal_has_no_name(
    serving: Service, capfd: pytest.CaptureFixture[str], exit_code: int, how: str
) -> None:
    serving.end(serving.started[0], exit_code)
    assert f"worker 0 ended {how}, another one takes its place" in capfd.readouterr().err
    assert len(serving.started) == 3


@pytest.mark.parametrize("exit_code", [128, 193, 255])
def test_a_code_above_those_of_the_signals_is_a_start_that_failed(service: Service, exit_code: int) -> None:
    """As 255, where Python was removed and the new process cannot run it."""
    service.serve()
    service.end(service.started[0], exit_code)
    assert len(service.started) == 2
    assert service.starts_after(FIRST_S)
    for pause_s in (2, 4, 8, 16, MAX_S, MAX_S):
        service.end(service.started[-1], exit_code, after_s=1)
        assert service.starts_after(pause_s)
    assert not service.is_stopping


@pytest.mark.parametrize("exit_code", [1, 71, 78, 255])
def test_a_fault_that_the_next_worker_would_have_too_ends_the_service(service: Service, exit_code: int) -> None:
    service.end(service.started[0], exit_code)
    assert service.is_stopping
    assert service.code == exit_code


def test_workers_that_die_too_often_end_the_service(service: Service) -> None:
    for _ in range(REPLACEMENTS_MAX + 1):
        assert not service.is_stopping
        service.end(service.started[-1], -9, after_s=1)
    assert service.is_stopping
    assert service.code == 137


def test_only_workers_that_died_within_a_minute_count(service: Service) -> None:
    for _ in range(3 * REPLACEMENTS_MAX):
        service.end(service.started[-1], -9, after_s=REPLACEMENTS_WITHIN_S / REPLACEMENTS_MAX)
    assert not service.is_stopping


def test_workers_that_end_at_once_again_and_again_end_the_service(service: Service) -> None:
    for _ in range(AT_ONCE_MAX + 1):
        assert not service.is_stopping
        service.end(service.started[-1], 0, after_s=1)
    assert service.is_stopping
    assert service.code == 78


def test_workers_that_end_at_once_together_end_the_service_once(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(AT_ONCE_MAX):
        service.end(service.started[-1], 0, after_s=0.1)
    for worker in service.started:
        worker.end(0)
    service.advance()
    assert (service.is_stopping, service.code) == (True, 78)
    assert capfd.readouterr().err.count("giving up") == 1


def test_only_ends_at_once_in_a_row_count(service: Service) -> None:
    for _ in range(3):
        for _ in range(AT_ONCE_MAX):
            service.end(service.started[-1], 0, after_s=1)
        service.end(service.started[-1], 0)
    assert not service.is_stopping


def test_a_crash_ends_the_service_after_any_time(serving: Service) -> None:
    serving.end(serving.started[0], ExitCode.CRASHED)
    assert serving.is_stopping
    assert serving.code == ExitCode.CRASHED


# What workers tell


@pytest.fixture
def linked() -> Iterator[tuple[WorkerProcess, Connection]]:
    """A worker without a process, and its end of the link."""
    ours, theirs = Pipe()
    yield WorkerProcess(cast("Any", None), ours, generation=0, stop_within_s=STOP_TIMEOUT_S), theirs
    for end in (ours, theirs):
        end.close()


@pytest.mark.parametrize("line", [b"", b" ", b"telemetry on", b"BEGUN 3", b"\xff\xfe 1", b"begun\n3"])
def test_words_that_this_master_does_not_know_are_passed_over(
    linked: tuple[WorkerProcess, Connection], line: bytes
) -> None:
    """A worker that is newer than the master may tell more."""
    worker, end = linked
    end.send_bytes(line)
    end.send_bytes(b"serving @7")
    worker.take_messages()
    assert (worker.has_begun, worker.serves, worker.peer_address) == (False, True, "@7")


@pytest.mark.parametrize("rest", ["", "soon", "3 s", "nan", "inf", "-inf", "-1", "1e999", "\udcff"])
def test_a_bound_on_the_stop_that_is_no_time_leaves_the_master_s_own(
    linked: tuple[WorkerProcess, Connection], rest: str
) -> None:
    worker, end = linked
    end.send_bytes(f"begun {rest}".encode(errors="surrogateescape"))
    worker.take_messages()
    assert (worker.has_begun, worker.stop_within_s) == (True, STOP_TIMEOUT_S)
    end.send_bytes(b"begun 2.5")
    worker.take_messages()
    assert worker.stop_within_s == 2.5


# Refused starts


@pytest.mark.parametrize("exit_code", [1, REFUSED])
def test_once_something_has_served_a_refused_start_is_tried_again_after_a_pause(
    serving: Service, capfd: pytest.CaptureFixture[str], exit_code: int
) -> None:
    serving.end(serving.started[0], -9)
    serving.started[2].refusal = "the disk is full"
    serving.end(serving.started[2], exit_code)
    assert serving.starts_after(FIRST_S)
    assert not serving.is_stopping
    said = capfd.readouterr().err
    assert f"could not start (code {exit_code:d}: the disk is full); the next start is tried in 1 s" in said
    assert "1 of 2 workers serve on" in said


def test_pauses_grow_up_to_a_bound_until_a_worker_serves(serving: Service) -> None:
    serving.end(serving.started[0], -9)
    for pause_s in (1, 2, 4, 8, 16, MAX_S, MAX_S):
        serving.end(serving.started[-1], REFUSED)
        assert serving.starts_after(pause_s)
    serving.serve()
    serving.end(serving.started[-1], -9)
    serving.end(serving.started[-1], REFUSED)
    assert serving.starts_after(FIRST_S)


def test_workers_that_are_refused_together_begin_one_pause_and_one_line(
    serving: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    for worker in serving.started[:2]:
        worker.end(-9)
    serving.advance()
    for worker in serving.started[2:]:
        worker.end(REFUSED)
    serving.advance()
    assert serving.starts_after(FIRST_S)
    assert len(serving.started) == 6
    assert capfd.readouterr().err.count("could not start") == 1


def test_a_reload_ends_the_pause(serving: Service) -> None:
    """An operator reloads once the fault is corrected."""
    serving.end(serving.started[0], -9)
    serving.end(serving.started[2], REFUSED)
    assert len(serving.started) == 3
    serving.reload()
    assert len(serving.started) == 4


def test_workers_that_end_at_once_are_slowed_down_once_something_has_served(
    serving: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(AT_ONCE_MAX + 1):
        serving.end(serving.started[-1], 0, after_s=1)
    assert serving.starts_after(FIRST_S)
    assert "workers end at once, 11 times in a row; the next start is tried in 1 s" in capfd.readouterr().err


# Starts for which the system has no process

NO_PROCESS = r"no process can be started for a worker ([Errno 11] Resource temporarily unavailable)"


@pytest.mark.parametrize("room", [0, 1])
def test_a_first_start_without_a_process_ends_the_service(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], room: int
) -> None:
    service = Service(monkeypatch, room=room)
    assert service.is_stopping
    assert service.code == REFUSED
    assert f"{NO_PROCESS}, giving up" in capfd.readouterr().err
    assert len(service.started) == room
    os.close(service.workers._status_file.descriptor)


def test_once_something_has_served_a_start_without_a_process_is_tried_again_after_a_pause(
    serving: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    serving.room = 2
    serving.end(serving.started[0], -9)
    assert f"{NO_PROCESS}; the next start is tried in 1 s, 1 of 2 workers serve on" in capfd.readouterr().err
    assert serving.workers._next_look_s() == pytest.approx(FIRST_S)
    serving.advance(FIRST_S + 0.01)
    assert "the next start is tried in 2 s" in capfd.readouterr().err
    serving.room = 3
    assert serving.starts_after(2)
    assert not serving.is_stopping


@pytest.mark.parametrize("new", [0, 1])
def test_a_reload_without_a_process_for_a_new_worker_fails_and_the_old_ones_serve_on(
    serving: Service, capfd: pytest.CaptureFixture[str], new: int
) -> None:
    serving.room = 2 + new
    serving.reload()
    serving.serve()
    [line] = capfd.readouterr().err.splitlines()
    assert f"the reload failed, 2 old workers serve on: {NO_PROCESS}" in line
    assert [worker.told for worker in serving.started] == [[], [], ["leave @0 @1"]][: 2 + new]
    for worker in serving.started[2:]:
        serving.end(worker, 0, after_s=1)
    serving.room = 10
    serving.advance(10 * MAX_S)
    assert len(serving.started) == 2 + new
    assert not serving.is_stopping
    serving.reload()
    serving.finish_reload()
    assert all(worker.told for worker in serving.started[:2])


def test_new_workers_that_start_together_end_if_there_is_no_process_for_another_one(service: Service) -> None:
    """The reload comes before anything serves."""
    service.room = 3
    service.reload()
    assert [worker.signals for worker in service.started] == [[], [], ["SIGTERM"]]
    assert not service.is_stopping


def test_an_old_worker_that_is_missing_after_a_reload_without_a_process_is_started_after_a_pause(
    serving: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    serving.started[0].wants_successor = True
    serving.room = 2
    serving.reload()
    failed, pause = capfd.readouterr().err.splitlines()
    assert "the reload failed, 2 old workers serve on" in failed
    assert "the next start is tried in 1 s, 2 of 2 workers serve on" in pause
    serving.room = 3
    assert serving.starts_after(FIRST_S)


def test_a_reload_that_is_wanted_during_one_without_a_process_begins_at_once(serving: Service) -> None:
    def fail(*_: object, **_options: object) -> NoReturn:
        serving.workers._reload_wanted = True
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    serving.workers._start = fail
    serving.reload()
    assert serving.workers._next_look_s() <= 0.001


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_a_start_without_a_process_leaves_no_descriptor_and_no_blocked_signal(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("multiprocessing.util.spawnv_passfds", fail)
    monkeypatch.setattr("multiprocessing.resource_tracker.getfd", lambda: 2)
    file = SharedFile(os.memfd_create("status"))
    before, blocked = open_files(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    failed, sockets = 0, before
    try:
        start_worker(Config(), Sockets([], [], []), file, generation=0, stop_within_s=STOP_TIMEOUT_S)
    except OSError as error:
        failed, sockets = error.errno or 0, open_files("socket:")
    assert failed == number
    assert sockets == [name for name in before if name.startswith("socket:")]
    assert open_files() == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked
    os.close(file.descriptor)


def open_files(kind: str = "") -> list[str]:
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the folder's own descriptor
            names.append(str(link.readlink()))
    return sorted(name for name in names if name.startswith(kind))


# Reloads


def test_a_reload_tells_no_old_worker_to_leave_before_all_new_ones_serve(
    serving: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    serving.reload()
    old = serving.started[:2]
    assert len(serving.started) == 3
    serving.serve(serving.started[2])
    new = serving.started[2:]
    assert len(new) == 2
    assert not any(worker.told for worker in old)
    serving.serve(new[1])
    assert [worker.told for worker in old] == [["leave @2 @3"]] * 2
    assert not any(worker.told for worker in new)
    assert "reloaded: 2 new workers serve, 2 old ones drain" in capfd.readouterr().err
    for worker in old:
        serving.end(worker, 0, after_s=0.1)
    assert len(serving.started) == 4
    assert not serving.is_stopping


@pytest.mark.parametrize("code", [0, 1, REFUSED, -9, ExitCode.CRASHED], ids=str)
def test_a_new_worker_that_cannot_start_leaves_the_old_ones_serving(
    serving: Service, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    serving.reload()
    other = serving.started[2]
    serving.serve(other)
    refused = serving.started[3]
    refused.refusal = "no such setting"
    serving.end(refused, code, after_s=1)
    [line] = capfd.readouterr().err.splitlines()
    shown = 137 if code < 0 else code
    assert f"the reload failed, 2 old workers serve on: worker 3 could not start (code {shown:d}: no such" in line
    assert other.told == ["leave @0 @1"]
    assert not any(worker.told for worker in serving.started[:2])
    serving.end(other, 0, after_s=1)
    serving.advance(10 * MAX_S)
    assert len(serving.started) == 4
    assert not serving.is_stopping
    serving.reload()
    serving.finish_reload()
    assert all(worker.told for worker in serving.started[:2])


@pytest.mark.parametrize("code", [1, REFUSED, 255, -9, *DIED, ExitCode.CRASHED], ids=str)
def test_a_new_worker_that_serves_and_ends_before_the_others_serve_fails_its_reload(
    serving: Service, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    serving.reload()
    first = serving.started[2]
    serving.serve(first)
    second = serving.started[3]
    serving.end(first, code, after_s=1)
    [line] = capfd.readouterr().err.splitlines()
    shown = 137 if code < 0 else code
    assert f"the reload failed, 2 old workers serve on: worker 2 ended with code {shown:d} after it had served" in line
    assert second.signals == ["SIGTERM"]
    serving.end(second, -15, after_s=0.1)
    serving.advance(10 * MAX_S)
    assert len(serving.started) == 4
    assert not any(worker.told for worker in serving.started[:2])
    assert not serving.is_stopping


@pytest.mark.parametrize("code", [1, -9, ExitCode.CRASHED], ids=str)
def test_new_workers_that_serve_and_end_together_fail_their_reload_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    service = Service(monkeypatch, workers=3)
    service.serve()
    service.reload()
    service.serve()
    service.serve()
    for worker in service.started[3:5]:
        worker.end(code)
    service.advance()
    service.end(service.started[5], -15)
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert len(service.started) == 6
    assert not service.is_stopping
    os.close(service.workers._status_file.descriptor)


def test_a_new_worker_that_is_told_to_stop_before_the_others_serve_is_replaced(serving: Service) -> None:
    """By an operator, with SIGTERM: it ends with 0."""
    serving.reload()
    serving.serve(serving.started[2])
    serving.end(serving.started[2], 0)
    serving.finish_reload()
    assert len(serving.started) == 5
    assert [bool(worker.told) for worker in serving.started] == [True, True, False, False, False]


def test_new_workers_that_are_refused_together_fail_their_reload_in_one_line(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    """The reload comes before anything serves; then the new workers start together."""
    service.reload()
    assert len(service.started) == 4
    for worker in service.started[2:]:
        worker.end(REFUSED)
    service.advance()
    service.advance(10 * MAX_S)
    assert len(service.started) == 4
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_new_worker_that_never_serves_fails_its_reload_after_a_bound(
    serving: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    serving.reload()
    other = serving.started[2]
    serving.serve(other)
    hanging = serving.started[3]
    serving.advance(START_MAX_S - 0.1)
    assert not hanging.signals
    assert serving.workers._next_look_s() == pytest.approx(0.1)
    serving.advance(0.1)
    assert "the reload failed, 2 old workers serve on: worker 3 does not serve after 60 s" in capfd.readouterr().err
    assert hanging.signals == ["SIGTERM"]
    assert other.told == ["leave @0 @1"]
    serving.advance(STOP_TIMEOUT_S + STOP_SLACK_S)
    assert hanging.signals == ["SIGTERM", "SIGKILL"]


def test_a_first_start_has_no_bound_and_does_not_keep_the_master_busy(service: Service) -> None:
    """A recovery may be long."""
    service.advance(START_MAX_S + 1)
    assert service.workers._next_look_s() == WAIT_MAX_S
    service.advance(10 * START_MAX_S)
    assert not any(worker.signals for worker in service.started)
    assert not service.is_stopping


def test_a_start_is_late_only_a_while_after_another_worker_serves(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = service.started
    service.advance(START_MAX_S + 30)
    service.serve(first)
    service.advance(START_MAX_S - 0.1)
    assert not second.signals
    assert service.workers._next_look_s() == pytest.approx(0.1)
    service.advance(0.1)
    assert second.signals == ["SIGTERM"]
    assert "worker 1 does not serve after 60 s; the next start is tried in 1 s" in capfd.readouterr().err


def test_a_late_start_from_before_a_reload_does_not_fail_it(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    service.serve(service.started[0])
    service.advance(START_MAX_S - 1)
    service.reload()
    service.advance(2)
    assert service.workers._next_look_s() == pytest.approx(START_MAX_S - 2)
    service.serve(service.started[2])
    service.serve(service.started[3])
    said = capfd.readouterr().err
    assert "reloaded: 2 new workers serve, 2 old ones drain" in said
    assert "failed" not in said


def test_a_second_reload_waits_for_the_first(serving: Service) -> None:
    serving.reload()
    serving.reload()
    serving.reload()
    assert len(serving.started) == 3
    serving.finish_reload()
    serving.advance()
    assert len(serving.started) == 5
    assert [bool(worker.told) for worker in serving.started] == [True, True, False, False, False]
    serving.finish_reload()
    assert [bool(worker.told) for worker in serving.started] == [True] * 4 + [False, False]


def test_a_reload_that_follows_a_failed_one_begins_at_once(serving: Service) -> None:
    serving.reload()
    serving.reload()
    serving.end(serving.started[2], REFUSED, after_s=0.1)
    serving.advance()
    assert len(serving.started) == 4


def test_reloads_while_old_workers_drain_keep_the_processes_bounded(serving: Service) -> None:
    for _ in range(10):
        serving.reload()
        serving.finish_reload()
        assert serving.alive <= 6
    drained = [worker for worker in serving.started if worker.told]
    for worker in drained:
        worker.end(0)
    serving.advance()
    serving.finish_reload()
    assert serving.alive <= 6
    assert serving.workers._generation == 3


def test_an_old_worker_that_does_not_end_is_killed(serving: Service) -> None:
    serving.reload()
    serving.started[0].stop_within_s = 30  # its settings allow a longer drain than those of the master
    serving.finish_reload()
    serving.advance(STOP_TIMEOUT_S + STOP_SLACK_S)
    assert [worker.signals for worker in serving.started[:2]] == [[], ["SIGKILL"]]
    serving.advance(30)
    assert serving.started[0].signals == ["SIGKILL"]
    for worker in serving.started[:2]:
        worker.end(-9)
    serving.advance()
    assert len(serving.started) == 4
    assert not serving.is_stopping


def test_an_old_worker_that_dies_during_a_reload_is_not_replaced(serving: Service) -> None:
    serving.reload()
    serving.end(serving.started[0], -9)
    serving.finish_reload()
    assert len(serving.started) == 4


def test_a_fault_of_a_worker_that_was_told_to_leave_ends_nothing(
    serving: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    serving.reload()
    serving.finish_reload()
    serving.end(serving.started[0], ExitCode.CRASHED)
    assert not serving.is_stopping
    assert "worker 0 ended with code 71, after it was told to end" in capfd.readouterr().err


def test_a_reload_during_the_first_start_replaces_the_workers_that_start(service: Service) -> None:
    service.reload()
    service.serve(*service.started[2:])
    assert [worker.told for worker in service.started[:2]] == [["leave @2 @3"]] * 2
    assert [worker.signals for worker in service.started[:2]] == [["SIGTERM"]] * 2


def test_a_worker_with_enough_requests_leaves_once_another_one_serves(serving: Service) -> None:
    full = serving.started[0]
    full.wants_successor = True
    serving.advance()
    assert len(serving.started) == 3
    assert not full.told
    serving.serve(serving.started[2])
    assert full.told == ["leave @1 @2"]
    serving.end(full, 0, after_s=1)
    assert len(serving.started) == 3


def test_a_worker_with_enough_requests_serves_on_while_no_other_one_starts(serving: Service) -> None:
    full = serving.started[0]
    full.wants_successor = True
    serving.advance()
    serving.end(serving.started[2], REFUSED)
    assert not full.told
    assert serving.starts_after(FIRST_S)
    serving.serve(serving.started[3])
    assert full.told


def test_workers_with_few_requests_to_answer_replace_each_other_without_a_gap(serving: Service) -> None:
    """Each of them has answered enough before the next one serves."""
    for _ in range(10):
        for worker in serving.started:
            worker.wants_successor = True
        serving.advance()
        serving.serve(serving.started[-1])
        active = serving.workers._active
        assert sum(worker.serves for worker in active) == 2
        for worker in serving.started:
            if worker.told and worker.exit_code is None:
                serving.end(worker, 0, after_s=1)
        assert serving.alive <= 6
    assert sum(bool(worker.told) for worker in serving.started) >= 10


# Stops


def stop(service: Service) -> int:
    service.workers._stopping = True
    service.workers._stop()
    return service.code


def test_a_stop_during_the_pause_starts_nothing_and_returns_0(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(monkeypatch, workers=1)
    service.serve()
    service.end(service.started[0], -9)
    service.end(service.started[1], REFUSED)
    service.now += 2 * FIRST_S
    assert stop(service) == 0
    assert len(service.started) == 2
    os.close(service.workers._status_file.descriptor)


def test_a_start_that_is_refused_during_the_stop_does_not_change_its_code(serving: Service) -> None:
    serving.started[0].end(REFUSED)
    serving.started[1].end(ExitCode.FAULTS)
    assert stop(serving) == ExitCode.FAULTS


def test_workers_that_do_not_handle_signals_yet_are_ended_by_a_stop_without_a_fault(service: Service) -> None:
    for worker in service.started:
        worker.fake.terminate = partial(worker.end, -15)
    assert stop(service) == 0


def test_a_start_goes_on_through_a_stop_while_clients_wait_for_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a worker that has read its settings can answer them, with 503."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        service.workers._sockets = Sockets([], [listener], [])
        first, second = service.started

        def wait(_for_s: float) -> None:
            if not first.has_begun:
                assert not first.signals
                first.has_begun = True
            else:
                second.end(0)
                first.end(0)

        monkeypatch.setattr(service.workers, "_wait", wait)
        assert stop(service) == 0
        assert not first.signals


def test_a_stop_kills_the_workers_that_are_late_and_returns_70(
    serving: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for worker in serving.started:
        worker.fake.join = partial(worker.end, -9)

    def wait(for_s: float) -> None:
        serving.now += for_s

    monkeypatch.setattr(serving.workers, "_wait", wait)
    before = serving.now
    assert stop(serving) == ExitCode.WATCHDOG
    assert serving.now - before == pytest.approx(STOP_TIMEOUT_S + STOP_SLACK_S)


def test_a_stop_that_may_take_a_year_is_waited_for(serving: Service) -> None:
    """poll(2) takes no more than 24 days at once."""
    serving.workers._workers.clear()
    reader, writer = os.pipe()
    os.close(writer)
    try:
        serving.workers._woken_by = reader
        serving.workers._wait(366 * 86_400)
    finally:
        serving.workers._woken_by = -1
        os.close(reader)


# What the master says


def test_the_master_s_lines_do_not_wait_for_a_reader(capfd: pytest.CaptureFixture[str]) -> None:
    say("one\ntwo \udcff")
    assert capfd.readouterr().err == "lastcall: one\nlastcall: two \\udcff\n"
    reader, writer = os.pipe()
    kept = os.dup(2)
    try:
        os.dup2(writer, 2)
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        say("this has no reader")
    finally:
        os.dup2(kept, 2)
        for fd in (reader, writer, kept):
            os.close(fd)


@pytest.mark.parametrize("log_format", FORMATS)
def test_the_master_s_lines_have_the_form_of_the_log(capfd: pytest.CaptureFixture[str], log_format: Format) -> None:
    with kept_log(log_format):
        say("one\ntwo \udcff \x1b[2J", level="error")
    first, second = capfd.readouterr().err.splitlines()
    if log_format == "json":
        line = json.loads(first)
        assert (line["message"], line["level"], line["pid"]) == ("one", "error", os.getpid())
        assert json.loads(second)["message"] == "two \udcff \x1b[2J"
    else:
        assert "[error    ] one" in first
        assert f"pid={os.getpid()}" in first
        assert "two \\udcff \\x1b[2J" in second


# What operators ask and see


def test_a_worker_that_is_asked_for_a_drain_has_the_whole_service_stop(service: Service) -> None:
    service.serve()
    first, second = service.started
    first._note(Message.DRAIN, "admin drain")
    service.advance()
    assert service.is_stopping
    for worker in (first, second):
        worker.tell_stop(slack_s=1, reason=service.workers._stop_reason)
        assert worker.told == ["stop admin drain"]


@pytest.mark.parametrize("code", [0, ExitCode.FAULTS], ids=str)
def test_a_worker_that_is_asked_for_a_drain_and_ends_in_one_round_has_the_whole_service_stop(
    serving: Service, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    first, _ = serving.started
    first.take_messages = partial(first._note, Message.DRAIN, "admin drain")  # type: ignore[method-assign]
    serving.end(first, code)
    assert serving.is_stopping
    assert serving.workers._stop_reason == "admin drain"
    assert serving.code == code, "as of each worker that ends in the stop"
    assert len(serving.started) == 2
    assert capfd.readouterr().err == ""


def test_workers_are_told_of_each_other_when_something_changes(service: Service) -> None:
    first, second = service.started
    assert first.told_of_workers == []
    service.serve()

    def last(worker: FakeWorker) -> list[tuple[int, str, str]]:
        told = msgspec.json.decode(worker.told_of_workers[-1].removeprefix("workers "), type=list[KnownWorker])
        return [(it.pid, it.status, it.address) for it in told]

    assert last(first) == last(second) == [(0, "serving", "@0"), (1, "serving", "@1")]
    told = len(first.told_of_workers)
    service.advance()
    assert len(first.told_of_workers) == told, "nothing has changed"
    service.reload()
    service.finish_reload()
    assert [status for _, status, _ in last(first)] == ["draining", "draining", "serving", "serving"]
