"""The server of ``lastcall serve`` in this process, with instruments of Trio that watch it."""

import socket
from collections.abc import Callable, Sequence
from functools import partial
from os import dup
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from quart import Quart


def run_server(
    watch: Callable[["Quart", int], Sequence[trio.abc.Instrument]], *, clock: trio.abc.Clock | None = None
) -> None:
    """Serve with the settings of the environment, until the process is told to stop.

    Args:
        watch: Makes the instruments. It gets the application and the port.
    """
    # Nothing of the service is loaded before the caller has prepared the process.
    import hypercorn.trio  # noqa: PLC0415
    from hypercorn.config import Config  # noqa: PLC0415

    from service.hosting.application import create_hosted_app  # noqa: PLC0415
    from service.hosting.listeners.bind import bind_addresses  # noqa: PLC0415
    from service.setting_sources import load_settings  # noqa: PLC0415
    from service.telemetry.logging import configure_logging  # noqa: PLC0415

    settings = load_settings()
    configure_logging(settings)
    config = Config()
    config.worker_class = "trio"
    config.bind = [settings.bind]
    bind_addresses(config)
    with socket.socket(fileno=dup(int(config.bind[0].removeprefix("fd://")))) as bound:
        port = bound.getsockname()[1]
    app = create_hosted_app(lambda: settings)
    trio.run(partial(hypercorn.trio.serve, app, config, mode="asgi"), clock=clock, instruments=watch(app, port))
