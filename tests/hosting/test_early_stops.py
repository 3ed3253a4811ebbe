"""A stop at any moment of a start, also before the service handles signals: code 0, and nothing is killed."""

import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from bench.server_process import Launch, ServerProcess, python_command
from service.__main__ import _becomes_master
from tests.hosting.hosts import SERVE, launch

CAP_S = 60
SHORT = {"cleanup_timeout_s": 0.1, "release_timeout_s": 0.1, "shutdown_timeout_s": 0.5, "drain_timeout_s": 0}
"""Bounds of a stop that are shorter than an import."""

BLOCKING_IMPORT = """
import os, sys, time

class Blocking:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["BLOCK_AT"] and os.environ["BLOCK_IN"] == role:
            os.write(2, b"blocked\\n")
            for _ in range(30_000):
                if not os.path.exists(os.environ["GO_ON"]):
                    time.sleep(0.02)

role = "worker" if "--multiprocessing-fork" in sys.orig_argv else "main"
if "resource_tracker" not in " ".join(sys.orig_argv):
    sys.meta_path.insert(0, Blocking())
"""

WORKERS = {"serve-2": ("-m", "service", "serve", "--workers", "2")}


def launched(folder: Path, host: str, *, role: str, module: str, **bounds: Any) -> ServerProcess:
    """Start a host whose main process, or whose workers, hang at the import of a module."""
    (folder / "sitecustomize.py").write_text(BLOCKING_IMPORT)
    settings: dict[str, Any] = (bounds or SHORT) | {"store_url": f"sqlite:{folder}/lastcall.db"}
    settings |= {"PYTHONPATH": folder, "GO_ON": folder / "go-on", "BLOCK_AT": module, "BLOCK_IN": role}
    started = launch(SERVE if host in WORKERS else host, **settings)
    argv = python_command(*WORKERS[host]) if host in WORKERS else started.argv
    return ServerProcess(Launch(argv, env=started.env), folder / "server.log")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("host", "role", "module"),
    [
        (SERVE, "main", "service.settings"),
        (SERVE, "main", "quart_trio"),
        ("serve-2", "main", "service.hosting.peer_listener"),
        ("serve-2", "worker", "hypercorn.config"),
        ("serve-2", "worker", "quart_trio"),
        ("configured-2", "main", "service.settings"),
        ("configured-2", "worker", "hypercorn.config"),
        ("configured-2", "worker", "service.asgi"),
    ],
)
async def test_a_signal_during_an_import_ends_the_start_with_0(
    tmp_path: Path, host: str, role: str, module: str, number: int
) -> None:
    server = launched(tmp_path, host, role=role, module=module)
    with trio.fail_after(CAP_S):
        await server.wait_logged("blocked", times=2 if role == "worker" else 1)
        server.signal_main(number)
        gone = await server.wait_gone()
    assert gone.exit_code == 0
    assert gone.strays == ()
    assert server.log() == "blocked\n" * (2 if role == "worker" else 1)


async def test_a_signal_to_the_whole_group_during_the_imports_of_the_workers_ends_with_0(tmp_path: Path) -> None:
    """As from systemd, or by Ctrl+C."""
    server = launched(tmp_path, "configured-2", role="worker", module="service.asgi")
    with trio.fail_after(CAP_S):
        await server.wait_logged("blocked", times=2)
        server.signal_group(signal.SIGINT)
        gone = await server.wait_gone()
    assert gone.exit_code == 0
    assert server.log() == "blocked\n" * 2


@pytest.mark.parametrize(
    ("host", "module"), [("serve-2", "service.hosting.peer_listener"), ("configured-2", "service.settings")]
)
async def test_a_reload_during_the_imports_of_a_master_does_not_end_it(tmp_path: Path, host: str, module: str) -> None:
    server = launched(tmp_path, host, role="main", module=module, drain_timeout_s=0)  # it will have served
    with trio.fail_after(CAP_S):
        await server.wait_logged("blocked")
        server.signal_main(signal.SIGHUP)
        server.signal_main(signal.SIGHUP)
        (tmp_path / "go-on").touch()
        await server.wait_logged('"serving"', times=2)
        server.signal_main(signal.SIGTERM)
        gone = await server.wait_gone()
    assert gone.exit_code == 0
    assert gone.strays == ()
    assert "reloaded: " not in server.log()


async def test_a_hangup_during_the_imports_of_a_single_process_ends_it_once_it_is_known_to_be_no_master(
    tmp_path: Path,
) -> None:
    server = launched(tmp_path, "configured-0", role="main", module="service.settings")
    with trio.fail_after(CAP_S):
        await server.wait_logged("blocked")
        server.signal_main(signal.SIGHUP)
        (tmp_path / "go-on").touch()
        gone = await server.wait_gone()
    assert gone.exit_code == -signal.SIGHUP
    assert '"serving"' not in server.log()


@pytest.mark.parametrize(
    ("arguments", "becomes"),
    [
        ((), False),
        (("--bind", "127.0.0.1:0"), False),
        (("--workers", "2"), True),
        (("--workers=2", "--bind=127.0.0.1:0"), True),
        (("--w", "2"), True),
        (("--workers", "2", "--reload"), False),
        (("--rel", "--work=2"), False),
    ],
)
def test_only_serve_with_workers_becomes_a_master(arguments: tuple[str, ...], *, becomes: bool) -> None:
    assert _becomes_master(arguments) is becomes
