"""API keys in files change while processes serve, in each of them; and by a reload."""

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from bench.server_process import ServerProcess, python_command
from tests.process.lastcall import CAP_S, CONFIGURED_2, SERVE, open_lastcall, wait_gone

pytestmark = pytest.mark.parallel

OLD, NEW, NEWEST = "the-old-key-of-ann", "the-new-key-of-ann", "the-newest-key-of-ann"
CONFIG = '[[api_keys]]\nname = "ann"\nkey_file = "{keys}"\nmay = ["talk"]\n'


def replace(file: Path, text: str) -> None:
    other = file.with_name("other")
    other.write_text(text)
    other.rename(file)


async def statuses(server: ServerProcess, key: str) -> set[int]:
    """The statuses of twenty calls, each on a connection of its own, so that each process answers some of them."""
    address, limits = f"http://127.0.0.1:{server.port}", httpx.Limits(max_keepalive_connections=0)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=address, headers=headers, limits=limits, timeout=CAP_S) as client:
        return {(await client.get("/sessions")).status_code for _ in range(20)}


@pytest.mark.parametrize("workers", [0, 2])
async def test_a_key_is_rotated_in_each_process_and_masked_in_the_log(workers: int, tmp_path: Path) -> None:
    keys, config = tmp_path / "keys", tmp_path / "lastcall.toml"
    replace(keys, OLD)
    config.write_text(CONFIG.format(keys=keys))
    argv = python_command("-m", "service", "serve", *([f"--workers={workers}"] if workers else []))
    settings: dict[str, Any] = {"LASTCALL_CONFIG_FILE": config, "model_url": "scripted:"}
    async with open_lastcall(CONFIGURED_2 if workers else SERVE, tmp_path, argv=argv, **settings) as server:
        with trio.fail_after(3 * CAP_S):
            assert (await statuses(server, OLD), await statuses(server, NEW)) == ({200}, {401})
            replace(keys, NEW)
            await server.wait_logged("API keys have changed", times=max(workers, 1))
            assert (await statuses(server, OLD), await statuses(server, NEW)) == ({401}, {200})
            replace(keys, "short")
            await server.wait_logged("the changed API keys cannot be used", times=max(workers, 1))
            assert (await statuses(server, OLD), await statuses(server, NEW)) == ({401}, {200})
            replace(keys, NEWEST)
            if workers:
                server.signal_main(signal.SIGHUP)
                await server.wait_logged("reloaded: 2 new workers serve")
                await server.wait_logged('"shutdown report"', times=2)
                assert (await statuses(server, NEW), await statuses(server, NEWEST)) == ({401}, {200})
        server.signal_main(signal.SIGTERM)
        assert (await wait_gone(server)).exit_code == 0
        assert not any(key in server.log() for key in (OLD, NEW, NEWEST))
