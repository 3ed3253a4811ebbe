"""hypercorn's master, mended. What it returns and does as a process: ``test_exit_codes.py``."""

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
from hypercorn.config import Config

from service.hosting.master import AT_ONCE_MAX, DIED, REPLACEMENTS_MAX, REPLACEMENTS_WITHIN_S, Workers
from service.hosting.process.process_exit import say


def test_hypercorn_still_takes_these_names_from_its_module() -> None:
    assert {"_populate", "wait", "_join_exited"} <= set(hypercorn.run.run.__code__.co_names)


def ended(exit_code: int) -> BaseProcess:
    return cast("BaseProcess", SimpleNamespace(pid=1, exitcode=exit_code))


def living() -> BaseProcess:
    return ended(cast("int", None))


@pytest.fixture
def workers() -> Workers:
    made = Workers(stop_timeout_s=0)
    made._stop_event = multiprocessing.get_context("fork").Event()
    return made


def join(workers: Workers, exit_code: int) -> int:
    """A worker has ended so, while the service runs; what hypercorn is told. 0: to start another one."""
    return workers.join_exited([ended(exit_code)])


def test_hypercorns_own_join_still_forgets_the_code_by_its_second_call() -> None:
    """Fails when the master returns its workers' codes: then Workers can go, but for the replacing."""
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
def test_what_the_next_worker_would_die_of_too_ends_the_service(workers: Workers, exit_code: int) -> None:
    assert join(workers, exit_code) == exit_code
    assert workers._stop_event is not None
    assert workers._stop_event.is_set()


def test_workers_that_die_too_often_end_the_service(workers: Workers) -> None:
    assert [join(workers, -9) for _ in range(REPLACEMENTS_MAX + 1)] == [0] * REPLACEMENTS_MAX + [137]


def test_only_what_died_within_a_minute_counts(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3 * REPLACEMENTS_MAX):
        assert join(workers, -9) == 0
        now += REPLACEMENTS_WITHIN_S / REPLACEMENTS_MAX


def test_workers_that_stop_when_told_to_are_always_replaced(workers: Workers) -> None:
    """``--max-requests``."""
    assert [join(workers, 0) for _ in range(3 * REPLACEMENTS_MAX)] == [0] * 3 * REPLACEMENTS_MAX


def start_and_end(workers: Workers, *, max_requests: int | None = None) -> int:
    """A worker is started and ends at once with 0; what hypercorn is told."""
    config = Config.from_mapping(max_requests=max_requests)
    workers._start = lambda processes, *_: processes.append(ended(0))
    processes: list[BaseProcess] = []
    workers.populate(processes, config, cast("Any", None), cast("Any", None), stop_event_of(workers), cast("Any", None))
    return workers.join_exited(processes)


def stop_event_of(workers: Workers) -> Event:
    assert workers._stop_event is not None
    return workers._stop_event


def test_workers_that_end_at_once_again_and_again_end_the_service(workers: Workers) -> None:
    assert [start_and_end(workers) for _ in range(AT_ONCE_MAX + 1)] == [0] * AT_ONCE_MAX + [78]
    assert stop_event_of(workers).is_set()


def test_hypercorn_still_clears_its_event_when_a_reload_has_ended() -> None:
    """Fails when it does not: then reloads in quick succession would look like workers that end at once."""
    names = hypercorn.run.run.__code__.co_consts
    [reload] = [it for it in names if isinstance(it, CodeType) and it.co_name == "reload"]
    assert reload.co_names[:2] == ("set", "join")
    assert reload.co_names[-1] == "clear"


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
        assert join(workers, 0) == 0  # this one was started long ago


def test_a_stop_that_may_take_a_year_is_waited_for(workers: Workers) -> None:
    """poll(2) takes no more than 24 days at once."""
    workers._stop_timeout_s = 366 * 86_400
    with closing(multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.2,))) as process:
        process.start()
        stop_event_of(workers).set()
        assert workers.join_exited([ended(0), process]) == 0
        assert process.exitcode == 0


def test_a_worker_that_cannot_run_holds_up_a_reload_for_its_time_and_no_longer(workers: Workers) -> None:
    """hypercorn joins it in the handler of SIGHUP, where no SIGTERM would end it."""
    workers._stop_timeout_s = 0.1
    with closing(multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))) as process:

        def start(processes: list[BaseProcess], *_: object) -> None:
            process.start()
            os.kill(process.pid or 0, signal.SIGSTOP)
            processes.append(process)

        workers._start = cast("Any", start)
        nothing = cast("Any", None)
        workers.populate([], Config(), nothing, nothing, stop_event_of(workers), nothing)
        process.join()
        assert process.exitcode == -signal.SIGKILL


def test_what_the_master_says_waits_for_nobody(capfd: pytest.CaptureFixture[str]) -> None:
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
        say("nobody reads this")
    finally:
        os.dup2(kept, 2)
        for fd in (reader, writer, kept):
            os.close(fd)
