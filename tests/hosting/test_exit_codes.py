"""The exit codes of the command as started: each cell of the table in ``docs/shutdown.md``."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from bench.server_process import Gone, Launch, ServerFailedError, ServerProcess, open_server, python_command
from service.hosting.master import REPLACEMENTS_MAX
from tests.hosting.hosts import BARE, CONFIGURED, HOSTS, KEYED, SERVE, launch, open_host
from tests.kept_log import said_in
from tests.machine import Machine

CAP_S = 60
TIGHT: dict[str, Any] = {"cleanup_timeout_s": 0.2, "release_timeout_s": 0.2, "shutdown_timeout_s": 1}


async def stop(server: ServerProcess, number: int = signal.SIGTERM) -> Gone:
    server.signal_main(number)
    with trio.fail_after(CAP_S):
        return await server.wait_gone()


def as_hypercorn_returns(host: str, code: int) -> set[int]:
    """Bare hypercorn takes the code of the workers that remain once the first has ended: 0, or by chance ``code``."""
    if host not in BARE or host == "hypercorn-0":
        return {code}
    return {0} if host == "hypercorn-1" else {0, code}


@pytest.mark.parametrize("host", HOSTS)
async def test_a_clean_stop_is_0(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host) as server:
        gone = await stop(server)
    assert gone.exit_code == 0
    assert "Traceback" not in server.log()
    assert "leaked" not in server.log()


@pytest.mark.parametrize("host", HOSTS)
async def test_a_crash_of_a_supervisor_is_71(tmp_path: Path, host: str) -> None:
    trigger = tmp_path / "crash"
    async with open_host(tmp_path, host, broken="crashing", CRASH=trigger) as server:
        trigger.touch()
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code in as_hypercorn_returns(host, 71)
    assert "a supervisor broke" in server.log()
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("host", [SERVE, "configured-1"])
async def test_an_error_of_a_task_beside_the_service_is_71(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host, broken="failing_beside") as server:
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code == 71
    assert "not thought of" in server.log()
    assert "Traceback" not in server.log()


@pytest.mark.serial
@pytest.mark.parametrize(
    ("how", "host"),
    [
        *(("holding_the_gil", host) for host in HOSTS),
        ("hanging", SERVE),
        ("blocking", SERVE),
        ("blocking", "hypercorn-1"),
        ("blocking_without_threads", SERVE),
    ],
)
async def test_the_watchdog_is_70_and_says_where(tmp_path: Path, machine: Machine, host: str, how: str) -> None:
    async with open_host(tmp_path, host, broken=how, HELD=tmp_path / "held", **TIGHT) as server:
        signalled = server.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code in as_hypercorn_returns(host, 70)
    assert f"{how} (apps.py" in server.log() or f"in {how}" in server.log()
    assert machine.free_s(signalled, gone.at) < 2  # the total bound is 1 s


@pytest.mark.serial
@pytest.mark.parametrize("host", [SERVE, "hypercorn-0", "configured-1"])
async def test_the_watchdog_needs_no_event_loop_to_be_started(tmp_path: Path, machine: Machine, host: str) -> None:
    trigger = tmp_path / "block"
    async with open_host(tmp_path, host, broken="blocked_before", BLOCK=trigger, **TIGHT) as server:
        trigger.touch()
        with trio.fail_after(CAP_S):
            await server.wait_logged("blocked")
        signalled = server.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code == 70
    assert "in block" in server.log()
    assert machine.free_s(signalled, gone.at) < 2


@pytest.mark.parametrize("host", HOSTS)
async def test_faults_during_the_shutdown_are_75(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host, broken="faulty") as server:
        gone = await stop(server)
    assert gone.exit_code in as_hypercorn_returns(host, 75)
    assert "a fault on the way down" in server.log()


@pytest.mark.parametrize("host", [SERVE, "configured-1"])
async def test_a_task_that_is_left_is_a_fault(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host, broken="leaving_a_task", release_timeout_s=1) as server:
        gone = await stop(server)
    assert gone.exit_code == 75
    assert "1 tasks were left" in server.log()


async def start_that_fails(folder: Path, host: str, *options: str, **changes: object) -> ServerFailedError:
    with pytest.raises(ServerFailedError) as failed:
        async with open_host(folder, host, *options, **changes):  # type: ignore[arg-type]
            pass
    return failed.value


@pytest.mark.parametrize("host", HOSTS)
async def test_a_failed_start_is_78_and_one_line(tmp_path: Path, host: str) -> None:
    failed = await start_that_fails(tmp_path, host, broken="refusing")
    assert failed.exit_code in as_hypercorn_returns(host, 78)
    assert "the store cannot be opened" in said_in(failed.log)
    assert "Traceback" not in failed.log


@pytest.mark.parametrize("host", HOSTS)
async def test_a_failed_start_is_78_and_one_line_for_any_text_of_its_reason(tmp_path: Path, host: str) -> None:
    failed = await start_that_fails(tmp_path, host, broken="refusing_in_bytes")
    assert failed.exit_code in as_hypercorn_returns(host, 78)
    assert r"the store \udcff cannot be opened" in said_in(failed.log)
    assert "Traceback" not in failed.log
    assert "Lifespan error" not in failed.log


@pytest.mark.parametrize(
    ("broken", "said"),
    [("without_threads()", '"can\'t start new thread"'), ("without_settings()", "'not thought of'")],
)
@pytest.mark.parametrize("host", ["hypercorn-1", "configured-1"])
async def test_a_start_that_breaks_before_the_service_is_opened_is_78_and_one_line(
    tmp_path: Path, host: str, broken: str, said: str
) -> None:
    failed = await start_that_fails(tmp_path, host, broken=broken)
    assert failed.exit_code in as_hypercorn_returns(host, 78)
    assert f"RuntimeError({said})" in said_in(failed.log)
    assert "Traceback" not in failed.log


_FEWER_AT_ONCE = """
import sys
from hypercorn.__main__ import main
from service.hosting import master
master.AT_ONCE_S, master.AT_ONCE_MAX = 3600, 2
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("host", CONFIGURED[1:])
async def test_workers_that_end_at_once_are_not_replaced_for_ever(tmp_path: Path, host: str) -> None:
    """Of a master that takes any start for one at once: on a busy machine it may be long."""
    usual = launch(host, broken="ending_at_once()", store_url=f"sqlite:{tmp_path}/lastcall.db")
    options = usual.argv[usual.argv.index("hypercorn") + 1 :]
    given = Launch(python_command("-c", _FEWER_AT_ONCE, *options), env=usual.env, workers=usual.workers)
    with pytest.raises(ServerFailedError) as failed:
        async with open_server(given, log_path=tmp_path / "server.log", start_timeout_s=CAP_S):
            pytest.fail("it serves")
    assert failed.value.exit_code == 78
    assert failed.value.log.count("giving up") == 1
    assert "Traceback" not in failed.value.log


@pytest.mark.parametrize("host", [SERVE, "hypercorn-0", "hypercorn-1", "configured-0", "configured-1"])
async def test_settings_in_a_file_whose_name_is_not_utf_8_are_78_and_one_line(tmp_path: Path, host: str) -> None:
    failed = await start_that_fails(tmp_path, host, LASTCALL_CONFIG_FILE="/nowhere/\udcff.toml")
    assert failed.exit_code in as_hypercorn_returns(host, 78)
    assert r"LASTCALL_CONFIG_FILE names /nowhere/\udcff.toml, which is not there" in said_in(failed.log)
    assert "Traceback" not in failed.log


@pytest.mark.parametrize("host", HOSTS)
async def test_bad_settings_are_78_and_one_line(tmp_path: Path, host: str) -> None:
    failed = await start_that_fails(tmp_path, host, drain_timeout_s="soon")
    assert failed.exit_code in as_hypercorn_returns(host, 78)
    assert "drain_timeout_s" in failed.log.lower()
    assert "Traceback" not in failed.log


@pytest.mark.parametrize("host", [SERVE, "hypercorn-0", "hypercorn-1", "configured-1"])
async def test_a_stand_in_that_was_not_named_is_78_and_one_line(tmp_path: Path, host: str) -> None:
    failed = await start_that_fails(tmp_path, host, **KEYED | {"model_url": ""})
    assert failed.exit_code in as_hypercorn_returns(host, 78)
    [told] = [line for line in said_in(failed.log) if "LASTCALL_MODEL_URL" in line]
    assert told.startswith("model_url should be set")
    assert "Traceback" not in failed.log


async def test_another_worker_class_is_refused_with_a_word_of_help(tmp_path: Path) -> None:
    failed = await start_that_fails(tmp_path, "hypercorn-0", "--worker-class", "asyncio")
    assert failed.exit_code == 78
    assert "--worker-class trio" in failed.log
    assert "Traceback" not in failed.log


@pytest.mark.parametrize("host", HOSTS)
async def test_a_port_that_is_taken_is_78_and_one_line_where_our_code_runs_first(tmp_path: Path, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        failed = await start_that_fails(tmp_path, host, *(["--bind", address] if host != SERVE else []), bind=address)
    assert failed.exit_code == (1 if host in BARE else 78)
    assert ("Traceback" in failed.log) == (host in BARE)
    assert "Address already in use" in failed.log


async def test_an_address_that_is_not_utf_8_is_78_and_one_line(tmp_path: Path) -> None:
    failed = await start_that_fails(tmp_path, "configured-1", "--bind", "\udcff:80")
    assert failed.exit_code == 78
    assert said_in(failed.log)[0].startswith(r"Cannot listen on \udcff:80: ")
    assert "Traceback" not in failed.log


@pytest.mark.parametrize("host", CONFIGURED[2:])
async def test_a_port_that_another_service_of_several_workers_has_is_78_too(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host) as server:
        address = f"127.0.0.1:{server.port}"
        second = tmp_path / "second"
        second.mkdir()
        failed = await start_that_fails(second, host, "--bind", address)
        gone = await stop(server)
    assert (failed.exit_code, gone.exit_code) == (78, 0)
    assert said_in(failed.log) == [f"Cannot listen on {address}: Address already in use"]
    assert len(failed.log.splitlines()) == 1


@pytest.mark.parametrize("host", [SERVE, *CONFIGURED[1:3]])
async def test_a_unix_socket_that_is_taken_is_78_and_one_line(tmp_path: Path, host: str) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "socket"))
        taken.listen()
        bind = f"unix:{tmp_path}/socket"
        options = ["--bind", bind] if host != SERVE else []
        failed = await start_that_fails(tmp_path, host, *options, bind=bind, **KEYED)
    assert failed.exit_code == 78
    assert said_in(failed.log) == [f"Cannot listen on {bind}: another server answers there"]
    assert len(failed.log.splitlines()) == 1


@pytest.mark.removal
@pytest.mark.parametrize("host", BARE[1:])
async def test_a_killed_worker_of_bare_hypercorn_ends_the_service_with_0(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host) as server:
        os.kill(server.workers()[0], signal.SIGKILL)
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code == 0


async def served(server: ServerProcess, workers: int) -> None:
    """Wait until, since the start, so many workers have logged that they serve."""
    with trio.fail_after(CAP_S):
        while server.log().count('"serving"') < workers:  # noqa: ASYNC110
            await trio.sleep(0.02)


@pytest.mark.parametrize("host", CONFIGURED[1:])
async def test_a_killed_worker_is_replaced_with_our_config(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host) as server:
        before = server.workers()
        await served(server, len(before))
        os.kill(before[0], signal.SIGKILL)
        await served(server, len(before) + 1)
        assert set(before[1:]) < set(server.workers())
        gone = await stop(server)
    assert gone.exit_code == 0
    assert "SIGKILL" in server.log()


@pytest.mark.parametrize("host", CONFIGURED[1:])
async def test_workers_that_are_killed_again_and_again_end_the_service_with_137(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host) as server:
        before = len(server.workers())
        for number in range(REPLACEMENTS_MAX + 1):
            await served(server, before + number)
            os.kill(server.workers()[-1], signal.SIGKILL)
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code == 137
    assert server.log().count("another one takes its place") == REPLACEMENTS_MAX
    assert "giving up" in server.log()
    assert "Traceback" not in server.log()


@pytest.mark.removal
@pytest.mark.parametrize("host", BARE[1:3])
async def test_a_refused_start_ends_the_service_of_bare_hypercorn_with_0(tmp_path: Path, host: str) -> None:
    trigger = tmp_path / "refuse"
    async with open_host(tmp_path, host, broken="refusing_at_times", REFUSE=trigger) as server:
        trigger.touch()
        os.kill(server.workers()[0], signal.SIGTERM)
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code in as_hypercorn_returns(host, 78)


@pytest.mark.parametrize("host", CONFIGURED[1:3])
async def test_a_refused_start_is_tried_again_with_our_config_once_something_has_served(
    tmp_path: Path, host: str
) -> None:
    trigger = tmp_path / "refuse"
    async with open_host(tmp_path, host, broken="refusing_at_times", REFUSE=trigger) as server:
        before = server.workers()
        await served(server, len(before))
        trigger.touch()
        os.kill(before[0], signal.SIGKILL)
        with trio.fail_after(CAP_S):
            await server.wait_logged("the next start is tried in 1 s")
        assert set(before[1:]) <= set(server.workers())
        trigger.unlink()
        await served(server, len(before) + 1)
        gone = await stop(server)
    assert gone.exit_code == 0
    assert "the disk is full" in said_in(server.log())
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("host", CONFIGURED[1:3])
async def test_a_stop_while_no_start_succeeds_is_0(tmp_path: Path, host: str) -> None:
    trigger = tmp_path / "refuse"
    async with open_host(tmp_path, host, broken="refusing_at_times", REFUSE=trigger) as server:
        await served(server, len(server.workers()))
        trigger.touch()
        for worker in server.workers():
            os.kill(worker, signal.SIGKILL)
        with trio.fail_after(CAP_S):
            await server.wait_logged("the next start is tried in 1 s")
        gone = await stop(server)
    assert gone.exit_code == 0
    assert "no worker serves until then, and clients wait" in server.log()


@pytest.mark.parametrize("host", [SERVE, "hypercorn-0", "configured-0"])
async def test_a_killed_single_process_is_minus_9(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host) as server:
        gone = await stop(server, signal.SIGKILL)
    assert gone.exit_code == -signal.SIGKILL


@pytest.mark.parametrize("host", [SERVE, "hypercorn-0", "configured-0"])
async def test_a_single_process_that_cannot_run_ends_when_killed(tmp_path: Path, host: str) -> None:
    """A stopped process runs no code of ours, so only SIGKILL ends it."""
    async with open_host(tmp_path, host, **TIGHT) as server:
        server.signal_main(signal.SIGSTOP)
        server.signal_main(signal.SIGTERM)
        with trio.move_on_after(2) as bound:
            await server.wait_gone()
        assert bound.cancelled_caught
        gone = await stop(server, signal.SIGKILL)
    assert gone.exit_code == -signal.SIGKILL


@pytest.mark.parametrize("host", BARE[1:])
async def test_a_worker_that_cannot_run_holds_bare_hypercorn_until_it_is_killed(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host, **TIGHT) as server:
        halted = server.workers()[0]
        os.kill(halted, signal.SIGSTOP)
        server.signal_main(signal.SIGTERM)
        with trio.move_on_after(2) as bound:
            await server.wait_gone()
        assert bound.cancelled_caught
        os.kill(halted, signal.SIGKILL)
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code == 0


@pytest.mark.parametrize("host", CONFIGURED[1:])
async def test_a_worker_that_cannot_run_is_killed_by_our_master(tmp_path: Path, host: str) -> None:
    """All workers are stopped before the notice."""
    async with open_host(tmp_path, host, **TIGHT) as server:
        for worker in server.workers():
            os.kill(worker, signal.SIGSTOP)
        gone = await stop(server)
    assert gone.exit_code == 70
