"""Bind the listening sockets before the service opens, and know which of them the process was given.

A socket that the process was given (``--bind fd://3``, as by systemd) belongs to its giver.
"""

import socket
from collections.abc import Sequence

from hypercorn.config import Config

from service.errors import StartupError

_GIVEN = "lastcall_given"


def bind_addresses(config: Config) -> None:
    """Bind the addresses before anything else is opened, and leave the open sockets to hypercorn.

    hypercorn would find a taken port or a broken certificate too late, and report it in a traceback. It lets a second
    server take over the path of a Unix socket and, with more than one worker, share the first server's port.
    Proven by ``tests/hosting/listeners/test_bind.py``.

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


def given_sockets(config: Config) -> Sequence[bool]:
    """Return for each of hypercorn's listeners, in its order, whether its socket was given to the process."""
    noted: Sequence[bool] | None = getattr(config, _GIVEN, None)
    if noted is not None:
        return noted
    return [bind.startswith("fd://") for bind in (*config.bind, *(config.insecure_bind if config.ssl_enabled else ()))]


def note_given_sockets(config: Config) -> None:
    """Keep the result of :func:`given_sockets`, also for workers, before the other binds become descriptors too."""
    setattr(config, _GIVEN, given_sockets(config))
