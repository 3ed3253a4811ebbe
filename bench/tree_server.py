"""A server for :mod:`bench.tree`: that of ``lastcall serve``, and an instrument of Trio that measures its steps.

A step is what a task does without letting others run. The instrument notes the time of each step of the tasks that look
at the live tree, and of each long step of the others. At ``SIGUSR1`` the server writes them to the file
``BENCH_STEPS``; times are ``time.monotonic()``, which all processes share.
"""

import gc
import os
import signal
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from bench.server_process import ServerFailedError, ServerProcess
from bench.watched_server import run_server

if TYPE_CHECKING:
    from quart import Quart

LONG_S = 0.001
"""Steps of other tasks that are shorter are not kept."""
STEPS_MAX_S = 120.0
"""How long a server may need to write its steps: some hundred thousand of them."""


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One step.

    Attributes:
        began_at: ``time.monotonic()``.
        ran_s: The processor time of the event loop's thread.
        took_s: The time, with what other processes and threads took meanwhile.
        collected_s: The part of it that the garbage collector took.
        is_of_tree: Whether the task looks at the live tree.
        task: Its name.
    """

    began_at: float
    ran_s: float
    took_s: float
    collected_s: float
    is_of_tree: bool
    task: str


class StepWatch(trio.abc.Instrument):
    """Measures the steps of all tasks of the event loop. It makes no objects that the garbage collector would count."""

    def __init__(self) -> None:
        self.extensions: dict[str, Any] = {}  # of the application; the service is there while it runs
        self._kept = array("d")
        self._tasks: list[str] = []
        self._began_at = self._ran_s = self._collected_s = self._collection_began_s = 0.0
        gc.callbacks.append(self._on_collection)

    def _on_collection(self, phase: str, _info: object) -> None:
        if phase == "start":
            self._collection_began_s = time.thread_time()
        else:
            self._collected_s += time.thread_time() - self._collection_began_s

    def before_task_step(self, _task: trio.lowlevel.Task) -> None:
        self._collected_s = 0.0
        self._began_at = time.monotonic()
        self._ran_s = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        ran_s = time.thread_time() - self._ran_s
        took_s = time.monotonic() - self._began_at
        service = self.extensions.get("lastcall")
        is_of_tree = task.name == "tree keeper" or (service is not None and task in service.tree.viewers)
        if is_of_tree or ran_s >= LONG_S or took_s >= LONG_S:
            self._kept.extend((self._began_at, ran_s, took_s, self._collected_s, is_of_tree))
            self._tasks.append(task.name)

    def steps(self) -> list[Step]:
        """All steps that were kept, in order."""
        numbers = iter(self._kept)
        times = zip(numbers, numbers, numbers, numbers, numbers, strict=True)
        return [
            Step(at, ran_s, took_s, collected_s, bool(of_tree), task)
            for (at, ran_s, took_s, collected_s, of_tree), task in zip(times, self._tasks, strict=True)
        ]


async def ask_steps(server: ServerProcess, path: Path) -> Sequence[Step]:
    """Ask a server, whose ``BENCH_STEPS`` is this path, for all steps so far.

    Raises:
        ServerFailedError: It has ended, or does not write them.
    """
    server.signal_main(signal.SIGUSR1)
    steps = trio.Path(path)
    with trio.move_on_after(STEPS_MAX_S):
        while not await steps.exists():  # another process's file sets no event
            if server.gone is not None:
                raise ServerFailedError("the server has ended", exit_code=server.gone.exit_code, log=server.log())
            await trio.sleep(0.05)
        return msgspec.json.decode(await steps.read_bytes(), type=list[Step])
    raise ServerFailedError("the server does not write its steps", exit_code=None, log=server.log())


def main() -> None:
    steps = StepWatch()

    def watch(app: "Quart", _port: int) -> Sequence[trio.abc.Instrument]:
        steps.extensions = app.extensions
        return [steps]

    def write(*_: object) -> None:
        path = Path(os.environ["BENCH_STEPS"])
        path.with_suffix(".part").write_bytes(msgspec.json.encode(steps.steps()))
        path.with_suffix(".part").rename(path)

    signal.signal(signal.SIGUSR1, write)
    run_server(watch)


if __name__ == "__main__":
    main()
