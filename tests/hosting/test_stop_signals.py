"""Signs of a stop in different orders, and which of them counts as a second Ctrl+C."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import trio.testing
from structlog.testing import capture_logs

from service.hosting import stop_signals
from service.hosting.process.watchdog import Watchdog
from service.hosting.stop_signals import HANGUP_ENDS_IT, Notice
from service.settings import Settings
from service.shutdown import Shutdown
from service.stop_state import Phase


class Asleep(Watchdog):
    """A watchdog that never starts: a real one would end the test's process too."""

    def start(self) -> None: ...


class Pressed(Shutdown):
    """Counts the calls of ``hurry``."""

    presses = 0

    def hurry(self) -> None:
        self.presses += 1


MASTER = "the master stops or reloads"


@pytest.mark.parametrize(
    ("signs", "presses"),
    [
        (["SIGINT", 0.02, MASTER], 0),
        ([MASTER, 0.02, "SIGINT"], 0),
        (["SIGINT", 0.2, "SIGINT"], 0),
        (["SIGINT", 0.3, "SIGINT"], 1),
        ([MASTER, 0.02, "SIGINT", 0.3, "SIGINT"], 1),
        (["SIGTERM", 0.3, "SIGINT"], 1),
        (["SIGTERM", 0.3, "SIGTERM"], 0),
        (["SIGINT", 0.3, "the master died"], 0),
    ],
    ids=str,
)
async def test_only_an_interrupt_that_comes_later_is_a_second_press(
    monkeypatch: pytest.MonkeyPatch, signs: list[str | float], presses: int
) -> None:
    """A terminal's Ctrl+C reaches a worker directly and through its master, in any order. Numbers are seconds."""
    now = 1000.0
    monkeypatch.setattr(stop_signals, "time", SimpleNamespace(monotonic=lambda: now))
    shutdown = Pressed(Settings())
    told = Notice(shutdown, Asleep(total_s=1))
    for sign in signs:
        if isinstance(sign, str):
            told.tell(sign)
        else:
            now += sign
        await trio.testing.wait_all_tasks_blocked()
    assert shutdown.phase >= Phase.LAME_DUCK
    assert shutdown.presses == presses


async def test_a_stop_after_a_reload_takes_back_that_others_serve() -> None:
    shutdown = Shutdown(Settings())
    leaves = True
    told = Notice(shutdown, Asleep(total_s=1), is_replaced=lambda: leaves)
    told.tell("the master reloads")
    await trio.testing.wait_all_tasks_blocked()
    assert shutdown.is_replaced
    leaves = False
    told.tell("the master stops")
    await trio.testing.wait_all_tasks_blocked()
    assert not shutdown.is_replaced


@pytest.mark.parametrize(
    ("signs", "explains", "lines"),
    [(["SIGHUP", "SIGHUP"], True, 1), (["SIGHUP"], False, 0), (["SIGTERM", "SIGHUP"], True, 0)],
)
async def test_only_a_hangup_that_ends_the_service_is_explained(signs: list[str], explains: bool, lines: int) -> None:
    shutdown = Shutdown(Settings())
    told = Notice(shutdown, Asleep(total_s=1), explain_hangup=explains)
    with capture_logs() as logged:
        for sign in signs:
            told.tell(sign)
        await trio.testing.wait_all_tasks_blocked()
    assert [line["event"] for line in logged] == lines * [HANGUP_ENDS_IT]
    assert shutdown.phase >= Phase.LAME_DUCK


WITH_A_TERMINAL = """
import os
import pty
from service.hosting.stop_signals import has_terminal
os.setsid()
before = has_terminal()
_, slave = pty.openpty()
os.close(os.open(os.ttyname(slave), os.O_RDWR))  # the first terminal that a session's leader opens is its own
print(before, has_terminal())
"""


def test_a_process_knows_its_controlling_terminal() -> None:
    said = subprocess.run(
        [sys.executable, "-c", WITH_A_TERMINAL], capture_output=True, text=True, timeout=30, check=True
    )
    assert said.stdout == "False True\n"


class Unstartable(Watchdog):
    """A watchdog whose start fails."""

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


async def test_the_watchdog_counts_before_the_event_loop_can_see_the_notice() -> None:
    """From the notice on the event loop may hold the GIL, and the thread that tells it would not run again."""
    shutdown = Shutdown(Settings())
    seen: list[Phase] = []

    class Recording(Watchdog):
        def start(self) -> None:
            seen.append(shutdown.phase)

    Notice(shutdown, Recording(total_s=1)).tell("the master stops")
    assert seen == [Phase.SERVING]


async def test_a_notice_does_not_depend_on_the_watchdog() -> None:
    shutdown = Shutdown(Settings())
    with pytest.raises(RuntimeError, match="can't start"):
        Notice(shutdown, Unstartable(total_s=1)).tell("SIGTERM")
    await trio.testing.wait_all_tasks_blocked()
    assert shutdown.phase >= Phase.LAME_DUCK
