"""What does steps with a client in ``clients/``: see ``client_driver.py``."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from subprocess import STDOUT

import anyio
import trio

from tests.clients.client_driver import Job, Results, do_jobs
from tests.node import NODE

Drive = Callable[[Sequence[Job]], Awaitable[Sequence[Results]]]
"""Does jobs at the same time, each with a client of its own."""


async def on_trio(jobs: Sequence[Job]) -> Sequence[Results]:
    return await do_jobs(jobs)


async def on_asyncio(jobs: Sequence[Job]) -> Sequence[Results]:
    run = partial(anyio.run, do_jobs, jobs, backend="asyncio")
    return await trio.to_thread.run_sync(run, abandon_on_cancel=True)


async def in_node(jobs: Sequence[Job]) -> Sequence[Results]:
    command = [NODE, str(Path(__file__).with_name("client_driver.mjs"))]
    asked = json.dumps([job.as_json() for job in jobs]).encode()
    done = await trio.run_process(command, stdin=asked, capture_stdout=True, stderr=STDOUT, check=False)
    assert done.returncode == 0, done.stdout.decode()
    results: Sequence[Results] = json.loads(done.stdout)
    return results


DRIVERS: Mapping[str, Drive] = {"python-trio": on_trio, "python-asyncio": on_asyncio, "node": in_node}


async def drive_all(run: Callable[[str, Drive], Awaitable[None]]) -> None:
    """Do the same with each driver, at the same time. An error says which driver it is of."""

    async def run_one(name: str, drive: Drive) -> None:
        try:
            await run(name, drive)
        except Exception as error:
            error.add_note(f"the driver: {name}")
            raise

    async with trio.open_nursery() as nursery:
        for name, drive in DRIVERS.items():
            nursery.start_soon(run_one, name, drive)
