"""What does steps with a client in ``clients/``: see ``client_driver.py``."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import trio

from tests.clients.client_driver import do_steps

Steps = Sequence[Mapping[str, Any]]
Results = Sequence[Mapping[str, Any]]
Drive = Callable[[str, Steps, Mapping[str, Any], Mapping[str, Any]], Awaitable[Results]]


async def on_trio(url: str, steps: Steps, bounds: Mapping[str, Any], options: Mapping[str, Any]) -> Results:
    return await do_steps(url, steps, bounds, options)


async def on_asyncio(url: str, steps: Steps, bounds: Mapping[str, Any], options: Mapping[str, Any]) -> Results:
    run = partial(anyio.run, do_steps, url, steps, bounds, options, backend="asyncio")
    return await trio.to_thread.run_sync(run, abandon_on_cancel=True)


DRIVERS: Mapping[str, Drive] = {"python-trio": on_trio, "python-asyncio": on_asyncio}


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
