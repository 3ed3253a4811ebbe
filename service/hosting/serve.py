"""Our own way in: one process that serves until it is told to stop."""

import ssl
from functools import partial

import hypercorn.trio
import trio
from hypercorn.config import Config

from service.errors import StartupError
from service.hosting.application import create_hosted_app
from service.settings import Settings
from service.telemetry.logging import configure_logging


def serve(settings: Settings) -> int:
    """Serve until the process is told to stop. Returns its exit code, unless it has left with it already.

    Raises:
        StartupError: The address cannot be had, or the certificate cannot be used.
    """
    configure_logging(settings)
    config = Config()
    config.bind = [settings.bind]
    config.certfile, config.keyfile = settings.tls_certfile, settings.tls_keyfile
    config.worker_class = "trio"
    check_certificate(config)
    config.bind = take_addresses(config)
    app = create_hosted_app(lambda: settings)
    trio.run(partial(hypercorn.trio.serve, app, config, mode="asgi"))
    return 0


def check_certificate(config: Config) -> None:
    """Raises: StartupError. hypercorn would notice only when everything else is open, with a traceback."""
    try:
        config.create_ssl_context()
    except (OSError, ssl.SSLError) as error:
        raise StartupError(
            f"The certificate {config.certfile} or its key {config.keyfile} cannot be used: {error}"
        ) from error


def take_addresses(config: Config) -> list[str]:
    """Bind the addresses before anything is opened, and give them back in hypercorn's form for open sockets.

    Raises:
        StartupError: An address is taken, not ours or not there.
    """
    try:
        sockets = config.create_sockets()
    except OSError as error:
        raise StartupError(f"Cannot listen on {', '.join(config.bind)}: {error.strerror}") from error
    return [f"fd://{sock.detach()}" for sock in [*sockets.secure_sockets, *sockets.insecure_sockets]]
