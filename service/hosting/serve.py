"""``lastcall serve``: serves until it is told to stop, in one process or with workers."""

from collections.abc import Mapping
from functools import partial

import hypercorn.trio
import trio
from hypercorn.config import Config

from service.errors import StartupError
from service.hosting import master
from service.hosting.application import create_hosted_app
from service.hosting.hypercorn_config import BACKLOG
from service.hosting.listeners.bind import bind_addresses
from service.hosting.process.process_exit import ExitCode, say
from service.setting_sources import read_sources
from service.settings import Settings
from service.telemetry.logging import configure_logging


def serve(settings: Settings, *, workers: int = 0, overrides: Mapping[str, str] | None = None) -> int:
    """Serve until the process is told to stop. Returns the exit code, unless the process has exited with it already.

    Args:
        workers: How many worker processes serve; with 0 this process does.
        overrides: The settings of the command line.
    """
    configure_logging(settings)
    config = Config()
    config.worker_class = "trio"
    config.bind = [settings.bind]
    config.certfile, config.keyfile = settings.tls_certfile, settings.tls_keyfile
    config.workers = max(workers, 1)
    if workers:
        config.application_path = "service.asgi:app"
        config.backlog = BACKLOG
        master.run(settings, config)
    try:
        bind_addresses(config)
    except StartupError as error:
        say(str(error), level="error")
        return ExitCode.REFUSED
    app = create_hosted_app(lambda: settings, read_sources=partial(read_sources, **(overrides or {})))
    trio.run(partial(hypercorn.trio.serve, app, config, mode="asgi"))
    return 0
