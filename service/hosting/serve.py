"""``lastcall serve``: one process that serves until it is told to stop."""

import socket
from functools import partial

import hypercorn.trio
import trio
from hypercorn.config import Config

from service.errors import StartupError
from service.hosting.application import create_hosted_app
from service.hosting.listeners.listeners import note_given_sockets
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
        take_addresses(config)
    except StartupError as error:
        say(str(error), level="error")
        return ExitCode.REFUSED
    app = create_hosted_app(lambda: settings)
    trio.run(partial(hypercorn.trio.serve, app, config, mode="asgi"))
    return 0


def take_addresses(config: Config) -> None:
    """Bind the addresses before anything else is opened, and leave the open sockets to hypercorn.

    hypercorn would find a taken port or a broken certificate too late, and report it in a traceback. It lets a second
    server take over the path of a Unix socket and, with more than one worker, share the first server's port.
    Proven by ``tests/hosting/test_serve.py``.

    Raises:
        StartupError: An address is taken, forbidden or does not exist; or the certificate cannot be used.
    """
    try:
        config.create_ssl_context()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise StartupError(
            f"The certificate {config.certfile} and its key {config.keyfile} cannot be used: {error}"
        ) from error
    binds = [*config.bind, *config.insecure_bind]
    for bind in binds:
        if bind.startswith("unix:") and _is_answered(bind.removeprefix("unix:")):
            raise StartupError(f"Cannot listen on {bind}: another server answers there")
    workers, config.workers = config.workers, 1  # with several, hypercorn would set SO_REUSEPORT
    try:
        sockets = config.create_sockets()
    except OSError as error:
        raise StartupError(f"Cannot listen on {', '.join(binds)}: {error.strerror}") from error
    except (ValueError, TypeError) as error:  # not a valid host, port or path
        raise StartupError(f"Cannot listen on {', '.join(binds)}: {error}") from error
    finally:
        config.workers = workers
    note_given_sockets(config)
    secure, insecure = (
        [f"fd://{sock.detach()}" for sock in group] for group in (sockets.secure_sockets, sockets.insecure_sockets)
    )
    config.bind, config.insecure_bind = (secure, insecure) if config.ssl_enabled else (insecure, [])


def _is_answered(path: str) -> bool:
    """Whether a server listens at this path; its file alone may be left of an old server."""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(path)
        except BlockingIOError:  # a server listens, and its backlog is full
            return True
        except (OSError, ValueError):  # ValueError: not a valid path
            return False
        return True
