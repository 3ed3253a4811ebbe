"""Serving for a developer: the server is started again whenever the code or the settings file changes.

The parent process only waits, for a signal or for a fifth of a second, and then reads the change times of some fifty
files. This costs less than a watcher with threads, and signals need not interrupt anything.
Each server stops by its normal shutdown, so its streams get their final events before the next server starts.
"""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import service
from service.hosting.process.process_exit import ExitCode, say
from service.settings import Settings
from service.telemetry.logging import configure_logging

POLL_INTERVAL_S = 0.2
STOP_SLACK_S = 2.0
"""Time that a server may take beyond its own bound on a shutdown, before it is killed."""
STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
PR_SET_PDEATHSIG = 1


def serve_and_reload(settings: Settings, *, config_file: Path, arguments: Iterable[str] = ()) -> int:
    """Serve until SIGINT or SIGTERM, with a new server after each change. Returns the exit code of the process.

    A server that ends by itself with a fault is started again after the next change, so a developer can read and
    correct the fault. A server that is refused at the first start (its port is taken, say) ends the process.

    Args:
        settings: Give the bound on a shutdown; each server reads its settings again.
        config_file: Watched together with the package.
        arguments: The arguments of ``lastcall serve`` for each server.
    """
    configure_logging(settings)
    command = [sys.executable, "-m", "service", "serve", *arguments]
    with _blocked(STOP_SIGNALS | {signal.SIGCHLD}) as mask:
        seen, changed = _changed_at(config_file), False  # before the start: a change meanwhile is not lost
        server: subprocess.Popen[bytes] | None = _start(command, mask)
        while True:
            signalled = signal.sigtimedwait(STOP_SIGNALS | {signal.SIGCHLD}, POLL_INTERVAL_S)
            if signalled is not None and signalled.si_signo in STOP_SIGNALS:
                return _stop(server, settings, hurry_on=signal.SIGINT)
            if server is not None and (code := server.poll()) is not None:
                if code == 0 or (code == ExitCode.REFUSED and not changed):
                    return code
                say(f"the server ended with code {code}; it starts again when a file changes")
                server = None
            if (now := _changed_at(config_file)) != seen:
                say(f"{min(str(path) for path, _ in now ^ seen)} changed, starting anew", level="info")
                seen, changed = now, True
                _stop(server, settings)
                stopping = signal.sigpending() & STOP_SIGNALS  # the next round of the loop handles the signal
                server = None if stopping else _start(command, mask)


def _start(command: list[str], mask: Iterable[int]) -> "subprocess.Popen[bytes]":
    """Start a server in its own process group: after a Ctrl+C only this process tells the server to stop."""

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a kill of this process stops the server too

    return subprocess.Popen(command, process_group=0, preexec_fn=prepare)  # noqa: PLW1509, S603  no threads here


def _stop(
    server: "subprocess.Popen[bytes] | None", settings: Settings, *, hurry_on: signal.Signals = signal.SIGCHLD
) -> int:
    """Stop a server within its bound; a ``hurry_on`` signal makes the stop shorter. Returns the process's exit code."""
    if server is None:
        return 0
    server.terminate()
    for _ in range(round((settings.shutdown_total_s + STOP_SLACK_S) / POLL_INTERVAL_S)):
        if server.poll() is not None:
            # SIGTERM may end the server during its start, before it handles signals: that counts as a clean stop.
            return 0 if server.returncode == -signal.SIGTERM else server.returncode
        signalled = signal.sigtimedwait({signal.SIGCHLD, hurry_on}, POLL_INTERVAL_S)
        if signalled is not None and signalled.si_signo == signal.SIGINT:
            server.send_signal(signal.SIGINT)
    server.kill()
    server.wait()
    return ExitCode.WATCHDOG


def _changed_at(config_file: Path) -> frozenset[tuple[Path, int]]:
    """Return each watched file with the time of its last change."""
    found = set()
    package = Path(service.__file__).parent
    for path in (*package.rglob("*.py"), *(package / "console").iterdir(), config_file):
        try:
            found.add((path, path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue
    return frozenset(found)


@contextmanager
def _blocked(signals: Iterable[int]) -> Iterator[Iterable[int]]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
