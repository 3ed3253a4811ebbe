"""The watchdog: ends the process when the shutdown's time is over, also if the event loop is blocked.

Four steps shortly before the total; each works in cases in which the step before cannot act:

1. a Python thread tells which tasks are left and where they wait. Works while the event loop is blocked;
2. :mod:`faulthandler` dumps the stack of every thread. A C thread: works while another thread holds the GIL;
3. a timer of the C library calls ``_exit(70)``. Works in all of these, and during finalisation;
4. the kernel's alarm kills with SIGALRM. Works where no thread can be started, which the other steps need.

Source: timer_create(2), ``SIGEV_THREAD``. faulthandler could end the process too, but with code 1 only
(https://docs.python.org/3/library/faulthandler.html#faulthandler.dump_traceback_later).
"""

import ctypes
import faulthandler
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import structlog
import trio

from service.hosting.process.process_exit import ExitCode

logger = structlog.get_logger("lastcall.watchdog")

TASKS_TOLD_MAX = 20
CLOCK_MONOTONIC = 1
SIGEV_THREAD = 2


class Watchdog:
    """The watchdog of one event loop. Once started, it cannot be stopped. Made inside that event loop.

    Args:
        total_s: The longest time of a shutdown. The process is gone by then.
    """

    def __init__(self, total_s: float) -> None:
        self._total_s = total_s
        self._root = trio.lowlevel.current_root_task()
        self._started = False

    def start(self) -> None:
        """Begin to count. Idempotent; may be called from any thread and from a signal handler."""
        if self._started:
            return
        self._started = True
        lead_s = min(0.2, self._total_s / 10)
        # The steps that end the process come first: if no more threads are allowed, the others cannot be started.
        can_exit = _exit_after(self._total_s - lead_s, ExitCode.WATCHDOG)
        signal.setitimer(signal.ITIMER_REAL, self._total_s)
        with suppress(RuntimeError):
            if sys.stderr is not None:
                faulthandler.dump_traceback_later(self._total_s - 2 * lead_s, exit=not can_exit, file=sys.stderr)
        telling = threading.Thread(
            target=self._tell_after, args=(self._total_s - 3 * lead_s,), name="watchdog", daemon=True
        )
        with suppress(RuntimeError):
            telling.start()

    def _tell_after(self, seconds: float) -> None:
        threading.Event().wait(seconds)
        logger.critical(
            "the shutdown did not end in time; ending the process",
            total_s=self._total_s,
            tasks=list(describe_tasks(self._root))[:TASKS_TOLD_MAX],
        )


def describe_tasks(task: trio.lowlevel.Task | None) -> Iterator[str]:
    """Yield a line for each task below ``task`` with the place where it waits. Any thread may call this."""
    if task is None:
        return
    for nursery in tuple(task.child_nurseries):
        for child in tuple(nursery.child_tasks):
            places = [
                f"{frame.f_code.co_name} ({frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno})"
                for frame, _ in child.iter_await_frames()
                if not frame.f_globals.get("__name__", "").startswith("trio.")
            ]
            if places:
                yield f"{child.name}: in {' > '.join(places[-3:])}"
            yield from describe_tasks(child)


def count_tasks(task: trio.lowlevel.Task, *, beside: trio.lowlevel.Task) -> int:
    """Return the number of tasks below ``task``, without ``beside`` and the tasks below ``beside``."""
    children = [child for nursery in task.child_nurseries for child in nursery.child_tasks if child is not beside]
    return len(children) + sum(count_tasks(child, beside=beside) for child in children)


class _SigEvent(ctypes.Structure):
    """``struct sigevent`` of glibc and musl: 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _ITimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


def _exit_after(seconds: float, code: int) -> bool:
    """Let the C library end the process later. Returns whether it will. It runs no Python, so it needs no GIL."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        event = _SigEvent(
            value=code, signo=0, notify=SIGEV_THREAD, function=ctypes.cast(libc._exit, ctypes.c_void_p).value
        )
        timer = ctypes.c_void_p()
        if libc.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) != 0:
            return False
        at = _ITimerSpec(value_s=int(seconds), value_ns=int(seconds % 1 * 1e9))
        return bool(libc.timer_settime(timer, 0, ctypes.byref(at), None) == 0)
    except (AttributeError, OSError):
        return False
