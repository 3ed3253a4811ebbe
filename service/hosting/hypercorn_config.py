"""For hypercorn's command line: ``hypercorn --config python:service.hosting.hypercorn_config service.asgi:app``.

The module takes the address and the certificate from the settings, and makes :mod:`service.hosting.master` the master.
Both happen when the first name is read: hypercorn imports this module, lists its names and reads them all. An import
alone changes nothing. Reading the first name also makes a stop signal end the process with code 0, and holds SIGHUP
back, until the master handles them.
"""

from contextlib import ExitStack
from typing import Any

from service.hosting.process.early_stop import end_on_stop_signals

NAMES = ("worker_class", "bind", "certfile", "keyfile", "backlog")
"""The names that hypercorn copies into the configuration of its workers."""
BACKLOG = 1024
"""Clients that may wait during a reload. The kernel drops further ones, and they try again a second later."""

_installed = ExitStack()
_configuration: dict[str, Any] = {}


def __dir__() -> list[str]:
    return list(NAMES)


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _configuration:
        _installed.callback(end_on_stop_signals(hold_hangups=True))
        from service.hosting import master  # noqa: PLC0415  takes a moment, in which a stop signal may come

        settings = master.take_over(_installed)
        _configuration.update(
            worker_class="trio",
            bind=[settings.bind],
            certfile=settings.tls_certfile,
            keyfile=settings.tls_keyfile,
            backlog=BACKLOG,
        )
    return _configuration[name]
