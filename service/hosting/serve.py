"""``lastcall serve``: one process that serves until it is told to stop."""

from functools import partial

import hypercorn.trio
import trio
from hypercorn.config import Config

from service.errors import StartupError
from service.hosting.application import create_hosted_app
from service.hosting.listeners.bind import bind_addresses
from service.hosting.process.process_exit import ExitCode, say
from service.settings import Settings
from service.telemetry.logging import configure_logging


def serve(settings: Settings) -> int:
    """Serve until the process is told to stop. Returns the exit code, unless the process has exited with it already."""
    configure_logging(settings)
    config = Config()
    config.worker_class = "trio"
    config.bind = [settings.bind]
    config.certfile, config.keyfile = settings.tls_certfile, settings.tls_keyfile
    config.accesslog = "-" if settings.access_log == "on" else None
    try:
        bind_addresses(config)
    except StartupError as error:
        say(str(error), level="error")
        return ExitCode.REFUSED
    app = create_hosted_app(lambda: settings)
    trio.run(partial(hypercorn.trio.serve, app, config, mode="asgi"))
    return 0
