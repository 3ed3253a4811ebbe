"""For hypercorn's command line: ``hypercorn --config python:service.hosting.hypercorn_config service.asgi:app``.

Takes the address and the certificate from our settings, and has our master run. That happens when the first name is
read: hypercorn imports this module, asks it for its names and reads them all. An import alone changes nothing.
"""

from contextlib import ExitStack
from typing import Any

from service.hosting import master

NAMES = ("worker_class", "bind", "certfile", "keyfile", "accesslog", "backlog")
"""All that hypercorn is to copy into the configuration that it sends to its workers."""
BACKLOG = 1024
"""Clients that wait during a reload; beyond that the kernel drops them, and they try again a second later."""

_installed = ExitStack()
_configuration: dict[str, Any] = {}


def __dir__() -> list[str]:
    return list(NAMES)


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _configuration:
        settings = master.take_over(_installed)
        _configuration.update(
            worker_class="trio",
            bind=[settings.bind],
            certfile=settings.tls_certfile,
            keyfile=settings.tls_keyfile,
            accesslog="-" if settings.access_log == "on" else None,
            backlog=BACKLOG,
        )
    return _configuration[name]
