"""nginx and HAProxy in front of replicas, with the configurations in ``deploy/``."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench.server_process import ROOT
from tests.clients.surroundings import free_port, open_process, program_path, wait_listening
from tests.cluster.calls import Address
from tests.cluster.cluster import Door

PROXIES = ("nginx", "haproxy")
START_S = 20
_FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def needed_program(name: str) -> str:
    """The path of a proxy. Without it the test is skipped, and in CI it fails."""
    path = program_path(name)
    if path is not None:
        return path
    words = f"there is no {name}: install the package to run the tests of deploy/"
    if "CI" in os.environ:
        pytest.fail(words, pytrace=False)
    pytest.skip(words)


@asynccontextmanager
async def open_front(name: str, servers: Sequence[Address], folder: Path) -> AsyncIterator[Door]:
    """Run a proxy in front of three servers."""
    program, port, log = needed_program(name), free_port(), folder / f"{name}.out"
    config = _config(name, servers, port, folder)
    async with open_process([program, *_options(name, config)], log=log):
        await wait_listening(port, log, within_s=START_S)
        yield Door("127.0.0.1", port)


def _config(name: str, servers: Sequence[Address], port: int, folder: Path) -> Path:
    """The file of ``deploy/``, with these addresses and, for nginx, folders that its user may write."""
    text = (ROOT / "deploy" / ("nginx.conf" if name == "nginx" else "haproxy.cfg")).read_text()
    changes = {f"10.0.0.{number}:8000": f"{it.host}:{it.port}" for number, it in enumerate(servers, 1)}
    if name == "nginx":
        changes["listen 80;"] = f"listen 127.0.0.1:{port};"
        changes["access_log off;"] = " ".join(f"{it}_temp_path {folder}/{it};" for it in _FOLDERS) + " access_log off;"
    else:
        changes["bind :80\n"] = f"bind 127.0.0.1:{port}\n"
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / f"{name}.conf"
    path.write_text(text)
    return path


def _options(name: str, config: Path) -> list[str]:
    if name == "haproxy":
        return ["-db", "-f", str(config)]
    own = f"daemon off; pid {config.parent}/nginx.pid;"
    return ["-p", str(config.parent), "-e", f"{config.parent}/nginx.log", "-g", own, "-c", str(config)]
