"""Reasons to stop in different orders, and which of them is a second Ctrl+C."""

from types import SimpleNamespace

import pytest
import trio.testing

from service.hosting import stop_signals
from service.hosting.process.watchdog import Watchdog
from service.hosting.stop_signals import Notice
from service.settings import Settings
from service.shutdown import Shutdown


class Asleep(Watchdog):
    """A watchdog that would end this process too."""

    def start(self) -> None: ...


class Pressed(Shutdown):
    """Counts how often it is to hurry."""

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
    """A terminal's Ctrl+C reaches a worker twice, through its master too, and in any order. Numbers are seconds."""
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
    assert shutdown.noticed.is_set()
    assert shutdown.presses == presses


class Unstartable(Watchdog):
    """A watchdog that cannot be started, for whatever reason."""

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


async def test_a_notice_does_not_depend_on_the_watchdog() -> None:
    shutdown = Shutdown(Settings())
    with pytest.raises(RuntimeError, match="can't start"):
        Notice(shutdown, Unstartable(total_s=1)).tell("SIGTERM")
    await trio.testing.wait_all_tasks_blocked()
    assert shutdown.noticed.is_set()
