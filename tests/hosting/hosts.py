"""The hosts: every way to start the server, for these tests, with a broken Lastcall where one is named."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.server_process import Launch, ServerProcess, open_server, python_command

SERVE = "serve"
BARE = ("hypercorn-0", "hypercorn-1", "hypercorn-2", "hypercorn-4")
CONFIGURED = ("configured-0", "configured-1", "configured-2", "configured-4")
HOSTS = (SERVE, *BARE, *CONFIGURED)
START_S = 50
"""Bound of a start, also of one that fails repeatedly. Not a promise: other tests run on the same machine."""

_SERVE_BROKEN = """
import sys
from tests.hosting import apps
from service.cli.main import main
apps.broken(apps.{broken})
sys.exit(main(["serve"]))
"""


KEYED = {"api_keys": "open-sesame-open-sesame", "model_url": "scripted:"}
"""Settings of a server that asks for a key."""


def command(host: str, *options: str, broken: str | None = None) -> list[str]:
    """The command that starts this host."""
    if host == SERVE:
        if broken:
            return python_command("-c", _SERVE_BROKEN.format(broken=broken))
        return python_command("-m", "service", "serve")
    way, workers = host.split("-")
    app = f"tests.hosting.apps:broken({broken})" if broken else "service.asgi:app"
    config = ["--config", "python:service.hosting.hypercorn_config"] if way == "configured" else []
    bind = ["--bind", "127.0.0.1:0"] if "--bind" not in options else []
    return python_command("-m", "hypercorn", "-k", "trio", *config, *bind, "-w", workers, *options, app)


def launch(host: str, *options: str, broken: str | None = None, **settings: object) -> Launch:
    """The launch of this host with these settings.

    The default is a store in memory, no drain, and bounds of a stop that no pause of the machine reaches.
    """
    env = {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_LOG_FORMAT": "json", "LASTCALL_DRAIN_TIMEOUT_S": "0"}
    env |= {"LASTCALL_STORE_URL": "memory:", "LASTCALL_CLEANUP_TIMEOUT_S": "10", "LASTCALL_RELEASE_TIMEOUT_S": "10"}
    env |= {name if name.isupper() else f"LASTCALL_{name.upper()}": str(value) for name, value in settings.items()}
    return Launch(
        command(host, *options, broken=broken), env=env, workers=1 if host == SERVE else max(int(host[-1]), 1)
    )


@asynccontextmanager
async def open_host(
    folder: Path, host: str, *options: str, broken: str | None = None, **settings: object
) -> AsyncIterator[ServerProcess]:
    """Start this host and wait until it listens."""
    if host[-1] in "24":  # several workers
        settings = {"store_url": f"sqlite:{folder}/lastcall.db"} | settings
    started = launch(host, *options, broken=broken, **settings)
    async with open_server(started, log_path=folder / f"{host}.log", start_timeout_s=START_S) as server:
        yield server
