"""The code that a worker of our master runs. The master's side: :mod:`service.hosting.worker_process`.

The worker handles signals before it imports anything that takes a moment, so this module imports nothing of that kind.
"""

import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Protocol

from service.hosting.process.early_stop import end_on_stop_signals

if TYPE_CHECKING:
    from hypercorn.config import Config, Sockets

HELD_BACK = (signal.SIGINT, signal.SIGHUP)
"""The signals that a worker starts with blocked: a terminal sends them to all processes, and the master decides."""


class _Duplicate(Protocol):
    def detach(self) -> int: ...


@dataclass(frozen=True)
class SharedFile:
    """A descriptor that a worker gets as a number of its own."""

    descriptor: int

    def __reduce__(self) -> tuple[object, ...]:
        return _descriptor_of, (DupFd(self.descriptor),)


def _descriptor_of(given: "_Duplicate") -> int:
    return given.detach()


def run_worker(config: "Config", sockets: "Sockets", connection: Connection, status_file: int) -> None:
    """Serve until the master or a signal says that the worker is to stop."""
    end_on_stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    import hypercorn.utils  # noqa: PLC0415  as the module says
    from hypercorn.trio.run import trio_worker  # noqa: PLC0415

    from service.hosting.hypercorn.worker import link_to_master  # noqa: PLC0415
    from service.hosting.master_link import MasterLink  # noqa: PLC0415
    from service.hosting.process.process_exit import refuse_to_start, tell_refusals_to  # noqa: PLC0415

    master = MasterLink(os.getppid(), connection, status_file)
    tell_refusals_to(master.tell_refused)
    link_to_master(config, master)
    try:
        hypercorn.utils.load_application(config.application_path, config.wsgi_max_body_size)
    except Exception as error:  # noqa: BLE001  whatever the application's import raises
        refuse_to_start(error)
    trio_worker(config, sockets)
