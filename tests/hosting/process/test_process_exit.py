"""The fast exit of a process, compared with Python's own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from bench.server_process import Launch, ServerProcess, open_server, python_command
from tests.hosting.hosts import SERVE, launch, open_host

CAP_S = 60
PROGRAM = """
import os, sys, time
import service.asgi
from service.hosting.process.process_exit import leave_at_exit
if sys.argv[1] == "short":
    leave_at_exit(0)
os.write(1, b"%d" % time.process_time_ns())
"""
MASTER = """
import os, sys
from hypercorn.__main__ import main

class Last:
    def __del__(self, write=os.write):
        write(2, b"finalised\\n")

last = Last()
sys.exit(main(sys.argv[1:]))
"""


def end_ns(way: str) -> int:
    """The processor time from a program's last statement to the end of its process."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, way], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        last = int(process.stdout.read())
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return int((used.ru_utime + used.ru_stime) * 1e9) - last


@pytest.mark.removal
def test_an_interpreter_still_takes_long_to_shut_down() -> None:
    """This test fails once Python's own exit is as fast as ours; then leave_at_exit is no longer needed."""
    plain, short = (min(end_ns(way) for _ in range(3)) for way in ("plain", "short"))
    assert plain > 3 * short, f"{plain / 1e6:.1f} ms and {short / 1e6:.1f} ms"


LOGGING = """
import sys
import structlog
from service.hosting.process.process_exit import leave
from service.settings import Settings
from service.telemetry.logging import configure_logging
configure_logging(Settings(log_format="json"))
for number in range(1000):
    structlog.get_logger("lastcall").warning("more than a pipe takes at once, in all", number=number)
print("logged", flush=True)
leave(0)
"""


def test_the_log_is_written_also_if_its_reader_comes_late() -> None:
    with subprocess.Popen([sys.executable, "-c", LOGGING], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"logged\n"
        lines = process.stderr.read().splitlines()
    assert len(lines) == 1000
    assert process.returncode == 0


async def stop(server: ServerProcess) -> None:
    server.signal_main(signal.SIGTERM)
    with trio.fail_after(CAP_S):
        gone = await server.wait_gone()
    assert gone.exit_code == 0


@pytest.mark.parametrize("host", [SERVE, "hypercorn-0", "hypercorn-1"])
async def test_a_process_that_has_reported_is_not_finalised(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host, broken="telling_its_finalisation") as server:
        await stop(server)
    assert '"shutdown report"' in server.log()
    assert "finalised" not in server.log()


async def test_a_master_with_our_configuration_is_not_finalised_either(tmp_path: Path) -> None:
    ours = launch("configured-1")
    argv = python_command("-c", MASTER, *ours.argv[ours.argv.index("hypercorn") + 1 :])
    async with open_server(Launch(argv, env=ours.env), log_path=tmp_path / "log") as server:
        await stop(server)
    assert '"shutdown report"' in server.log()
    assert "finalised" not in server.log()
