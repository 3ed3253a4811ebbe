"""The corrections of hypercorn's master. Its exit codes and its behaviour as a process: ``test_exit_codes.py``."""

import inspect
import json
import multiprocessing
import os
import signal
import time
from contextlib import closing, suppress
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from types import CodeType, SimpleNamespace
from typing import Any, cast

import hypercorn.run
import pytest
from hypercorn.config import Config, Sockets

from service.hosting import master, start_pause
from service.hosting.hypercorn.worker import Worker
from service.hosting.master import AT_ONCE_MAX, AT_ONCE_S, DIED, REPLACEMENTS_MAX, REPLACEMENTS_WITHIN_S, Workers
from service.hosting.process.process_exit import ExitCode, say
from service.hosting.start_pause import FIRST_S, MAX_S
from tests.kept_log import FORMATS, Format, kept_log


def test_hypercorn_still_takes_these_names_from_its_module() -> None:
    assert {"_populate", "wait", "_join_exited"} <= set(hypercorn.run.run.__code__.co_names)


def ended(exit_code: int) -> BaseProcess:
    return cast("BaseProcess", SimpleNamespace(pid=1, exitcode=exit_code, join=lambda: None))


def living() -> BaseProcess:
    return ended(cast("int", None))


FORK = multiprocessing.get_context("fork")


@pytest.fixture
def workers() -> Workers:
    made = Workers(stop_timeout_s=0)
    made._stop_event = FORK.Event()
    return made


def populate(workers: Workers, processes: list[BaseProcess], config: Config | None = None) -> None:
    """Call ``populate`` as hypercorn does, once a round."""
    workers.populate(
        processes, config or Config(), cast("Any", None), Sockets([], [], []), stop_event_of(workers), FORK
    )


def join(workers: Workers, exit_code: int) -> int:
    """A worker has ended with this code while the service runs. Returns hypercorn's code; 0: replace the worker."""
    return workers.join_exited([ended(exit_code)])


@pytest.mark.removal
def test_hypercorns_own_join_still_forgets_the_code_by_its_second_call() -> None:
    """This test fails once the master returns its workers' codes; then Workers is only needed for the replacing."""
    processes = [ended(71)]
    cast("SimpleNamespace", processes[0]).join = lambda: None
    assert hypercorn.run._join_exited(processes) == 71
    assert hypercorn.run._join_exited(processes) == 0


@pytest.mark.parametrize("exit_code", [0, -9, *DIED])
def test_a_worker_that_stopped_or_died_is_replaced(workers: Workers, exit_code: int) -> None:
    processes = [ended(exit_code), alive := living()]
    assert workers.join_exited(processes) == 0
    assert processes == [alive]
    assert workers._stop_event is not None
    assert not workers._stop_event.is_set()


@pytest.mark.parametrize("exit_code", [1, 71, 78])
def test_a_fault_that_the_next_worker_would_have_too_ends_the_service(workers: Workers, exit_code: int) -> None:
    assert join(workers, exit_code) == exit_code
    assert workers._stop_event is not None
    assert workers._stop_event.is_set()


def test_workers_that_die_too_often_end_the_service(workers: Workers) -> None:
    assert [join(workers, -9) for _ in range(REPLACEMENTS_MAX + 1)] == [0] * REPLACEMENTS_MAX + [137]


def test_only_workers_that_died_within_a_minute_count(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3 * REPLACEMENTS_MAX):
        assert join(workers, -9) == 0
        now += REPLACEMENTS_WITHIN_S / REPLACEMENTS_MAX


def test_workers_that_stop_when_told_to_are_always_replaced(workers: Workers) -> None:
    """With ``--max-requests`` hypercorn tells workers to stop."""
    assert [join(workers, 0) for _ in range(3 * REPLACEMENTS_MAX)] == [0] * 3 * REPLACEMENTS_MAX


def start_and_end(workers: Workers, *, max_requests: int | None = None) -> int:
    """Start a worker that ends at once with 0, and return the code that hypercorn is told."""
    config = Config.from_mapping(max_requests=max_requests)
    workers._start = lambda processes, *_: processes.append(ended(0))
    processes: list[BaseProcess] = []
    populate(workers, processes, config)
    return workers.join_exited(processes)


def stop_event_of(workers: Workers) -> Event:
    assert workers._stop_event is not None
    return workers._stop_event


def test_workers_that_end_at_once_again_and_again_end_the_service(workers: Workers) -> None:
    assert [start_and_end(workers) for _ in range(AT_ONCE_MAX + 1)] == [0] * AT_ONCE_MAX + [78]
    assert stop_event_of(workers).is_set()


def test_hypercorn_still_clears_its_event_when_a_reload_has_ended() -> None:
    """This test fails once hypercorn does not clear it; then quick reloads look like workers that end at once."""
    names = hypercorn.run.run.__code__.co_consts
    [reload] = [it for it in names if isinstance(it, CodeType) and it.co_name == "reload"]
    assert reload.co_names[:2] == ("set", "join")
    assert reload.co_names[-1] == "clear"


@pytest.mark.removal
def test_a_reload_of_hypercorn_still_waits_without_a_bound() -> None:
    """This test fails once hypercorn's reload has a bound, or waits elsewhere; then Workers._join is not needed."""
    assert "process.join()" in inspect.getsource(hypercorn.run.run).partition("def reload")[2].partition("def shut")[0]


def test_workers_with_few_requests_to_answer_may_end_at_once(workers: Workers) -> None:
    assert {start_and_end(workers, max_requests=1) for _ in range(3 * AT_ONCE_MAX)} == {0}


def test_workers_that_are_reloaded_may_end_at_once(workers: Workers) -> None:
    for _ in range(3 * AT_ONCE_MAX):
        stop_event_of(workers).set()
        stop_event_of(workers).clear()
        assert start_and_end(workers) == 0


def test_only_ends_at_once_in_a_row_count(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3):
        assert {start_and_end(workers) for _ in range(AT_ONCE_MAX)} == {0}
        assert join(workers, 0) == 0  # this worker was started long ago


class Rounds:
    """hypercorn's loop over its workers, as ``hypercorn.run.run`` has it, on a clock that is set by hand."""

    def __init__(self, workers: Workers, monkeypatch: pytest.MonkeyPatch, *, count: int) -> None:
        self.now = 1000.0
        self.started = 0
        self.processes: list[BaseProcess] = []
        self._workers = workers
        self._config = Config.from_mapping(workers=count)
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(master, "time", clock)
        monkeypatch.setattr(start_pause, "time", clock)
        workers._start = cast("Any", self._start)
        self.begin()

    def _start(self, processes: list[BaseProcess], *_: object) -> None:
        missing = self._config.workers - len(processes)
        self.started += missing
        processes += [living() for _ in range(missing)]

    def begin(self) -> int:
        """Begin a round, and return how many workers it starts."""
        before = self.started
        populate(self._workers, self.processes, self._config)
        return self.started - before

    def serve(self) -> None:
        """A worker tells that it serves."""
        cast("Any", Worker).count_serving(SimpleNamespace(config=self._config))

    def end(self, exit_code: int) -> int:
        """End a worker after a while, and return the code that hypercorn is told for the round."""
        self.now += AT_ONCE_S + 1
        cast("SimpleNamespace", self.processes[0]).exitcode = exit_code
        return self._workers.join_exited(self.processes)

    def waits(self, for_s: float) -> bool:
        """Whether the next start comes after exactly this time, within 10 ms."""
        self.now += for_s - 0.01
        too_early = self.begin()
        self.now += 0.02
        return not too_early and self.begin() > 0


REFUSED = ExitCode.REFUSED


@pytest.mark.parametrize("exit_code", [1, REFUSED])
def test_once_something_has_served_a_refused_start_is_tried_again_after_a_pause(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], exit_code: int
) -> None:
    rounds = Rounds(workers, monkeypatch, count=2)
    rounds.serve()
    assert rounds.end(-9) == 0
    assert rounds.begin() == 1
    assert rounds.end(exit_code) == 0
    assert len(rounds.processes) == 1
    assert rounds.waits(FIRST_S)
    assert not stop_event_of(workers).is_set()
    said = capfd.readouterr().err
    assert f"could not start (code {exit_code:d}); the next start is tried in 1 s" in said


def test_a_crash_ends_the_service_after_any_time(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(workers, monkeypatch, count=2)
    rounds.serve()
    monkeypatch.setattr(workers, "_join_all", list[BaseProcess].clear)
    assert rounds.end(ExitCode.CRASHED) == ExitCode.CRASHED
    assert stop_event_of(workers).is_set()


def test_pauses_grow_up_to_a_bound_until_a_worker_serves(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(workers, monkeypatch, count=1)
    rounds.serve()
    for pause_s in (1, 2, 4, 8, 16, MAX_S, MAX_S):
        assert rounds.end(REFUSED) == 0
        assert rounds.waits(pause_s)
    rounds.serve()
    assert rounds.end(REFUSED) == 0
    assert rounds.waits(FIRST_S)


def test_workers_that_are_refused_together_begin_one_pause_and_one_line(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rounds = Rounds(workers, monkeypatch, count=4)
    rounds.serve()
    for process in rounds.processes:
        cast("SimpleNamespace", process).exitcode = REFUSED
    assert workers.join_exited(rounds.processes) == 0
    assert rounds.processes == []
    assert rounds.waits(FIRST_S)
    assert rounds.started == 8
    assert capfd.readouterr().err.count("could not start") == 1


def test_a_reload_ends_the_pause(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator reloads once the fault is corrected."""
    rounds = Rounds(workers, monkeypatch, count=1)
    rounds.serve()
    for _ in range(2):
        assert rounds.end(REFUSED) == 0
        assert rounds.begin() == 0
        stop_event_of(workers).set()
        stop_event_of(workers).clear()
        assert rounds.begin() == 1


def test_a_stop_during_the_pause_starts_nothing_and_returns_0(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = Rounds(workers, monkeypatch, count=1)
    rounds.serve()
    assert rounds.end(REFUSED) == 0
    stop_event_of(workers).set()
    rounds.now += 2 * FIRST_S
    assert rounds.begin() == 0
    workers.wait([])
    assert workers.join_exited(rounds.processes) == 0


def test_a_start_that_is_refused_during_the_stop_does_not_change_its_code(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = Rounds(workers, monkeypatch, count=1)
    rounds.serve()
    stop_event_of(workers).set()
    assert rounds.end(REFUSED) == 0
    rounds.processes = [ended(ExitCode.FAULTS)]
    assert workers.join_exited(rounds.processes) == ExitCode.FAULTS


def test_workers_that_end_at_once_are_slowed_down_once_something_has_served(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rounds = Rounds(workers, monkeypatch, count=1)
    rounds.serve()
    assert rounds.end(0) == 0
    for _ in range(AT_ONCE_MAX):
        assert rounds.begin() == 1
        rounds.now -= AT_ONCE_S + 1
        assert rounds.end(0) == 0
    assert rounds.begin() == 1
    rounds.now -= AT_ONCE_S + 1
    assert rounds.end(0) == 0
    assert rounds.waits(FIRST_S)
    assert "workers end at once, 11 times in a row; the next start is tried in 1 s" in capfd.readouterr().err


def test_the_reloader_learns_when_the_pause_is_over(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """hypercorn's ``--reload`` waits with a timeout, and starts workers only once the wait returns a sentinel."""
    rounds = Rounds(workers, monkeypatch, count=1)
    rounds.serve()
    assert rounds.end(REFUSED) == 0
    assert rounds.begin() == 0
    assert workers.wait([], 0) == []
    rounds.now += FIRST_S
    assert workers.wait([], 0) != []


def test_a_worker_of_another_master_has_no_count_to_tell() -> None:
    cast("Any", Worker).count_serving(SimpleNamespace(config=Config()))


def test_a_stop_that_may_take_a_year_is_waited_for(workers: Workers) -> None:
    """poll(2) takes no more than 24 days at once."""
    workers._stop_timeout_s = 366 * 86_400
    with closing(FORK.Process(target=time.sleep, args=(0.2,))) as process:
        process.start()
        stop_event_of(workers).set()
        assert workers.join_exited([ended(0), process]) == 0
        assert process.exitcode == 0


def test_a_worker_that_cannot_run_holds_up_a_reload_for_its_time_and_no_longer(workers: Workers) -> None:
    """hypercorn joins the worker in the handler of SIGHUP, where no SIGTERM would end the join."""
    workers._stop_timeout_s = 0.1
    with closing(FORK.Process(target=time.sleep, args=(1000,))) as process:

        def start(processes: list[BaseProcess], *_: object) -> None:
            process.start()
            os.kill(process.pid or 0, signal.SIGSTOP)
            processes.append(process)

        workers._start = cast("Any", start)
        populate(workers, [])
        process.join()
        assert process.exitcode == -signal.SIGKILL


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
