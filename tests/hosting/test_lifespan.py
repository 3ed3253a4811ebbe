"""The lifespan: hypercorn's behaviour when one ends early, and the service's lifespan in a real process."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from quart_trio import QuartTrio

from bench.server_process import Gone, Launch, ServerFailedError, ServerProcess, open_server
from tests.hosting.conftest import Serve
from tests.hosting.hosts import SERVE, launch, open_host

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CAP_S = 60


def an_app(lifespan: Any) -> QuartTrio:
    app = QuartTrio("test")
    app.asgi_lifespan_class = lambda *_: lifespan  # type: ignore[assignment]

    @app.get("/")
    async def index() -> str:
        return "here"

    return app


async def crashes(receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    raise RuntimeError("the tree broke")


async def returns_early(receive: Any, send: Any) -> None:
    await receive()


@pytest.mark.removal
@pytest.mark.parametrize("lifespan", [crashes, returns_early])
async def test_hypercorn_still_serves_on_without_its_lifespan(serve: Serve, lifespan: Any) -> None:
    """This test fails once hypercorn stops without its lifespan; then Hosting need not end the process itself."""
    async with serve(an_app(lifespan)) as server:
        with trio.fail_after(10):
            async with await server.connect() as stream:
                await stream.send_all(GET)
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")


async def run(
    folder: Path, host: str, number: int, *, after: str, broken: str | None = None
) -> tuple[ServerProcess, Gone]:
    """Start the host, signal it once its log has the text ``after``, and wait for its end."""
    server = ServerProcess(launch(host, broken=broken), folder / f"{host}.log")
    with trio.fail_after(CAP_S):
        while after not in server.log():  # noqa: ASYNC110
            await trio.sleep(0.01)
        server.signal_main(number)
        gone = await server.wait_gone()
    return server, gone


@pytest.mark.parametrize("host", [SERVE, "hypercorn-0", "hypercorn-1"])
async def test_a_signal_during_the_start_ends_it_cleanly(tmp_path: Path, host: str) -> None:
    server, gone = await run(tmp_path, host, signal.SIGTERM, after="opening", broken="slow_to_open")
    assert gone.exit_code == 0
    assert '"shutdown report"' in server.log()
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("host", ["hypercorn-1", "configured-1", "configured-2"])
async def test_clients_that_wait_for_a_start_that_is_given_up_get_503(tmp_path: Path, host: str) -> None:
    """Clients that connect while no worker serves wait for the next ones: in a reload of hypercorn's own master, and
    where workers of ours have died."""
    slow = tmp_path / "slow"
    async with open_host(tmp_path, host, broken="slow_to_open_again", SLOW=slow) as server:
        with trio.fail_after(CAP_S):
            await server.wait_logged('"serving"', times=int(host[-1]))
            slow.touch()
            if host == "hypercorn-1":
                server.signal_main(signal.SIGHUP)
            else:
                for worker in server.workers():
                    os.kill(worker, signal.SIGKILL)
            await server.wait_logged("opening", times=int(host[-1]))
            clients = [await trio.open_tcp_stream("127.0.0.1", server.port) for _ in range(10)]
            for client in clients:
                await client.send_all(GET)
            server.signal_main(signal.SIGTERM)
            for client in clients:
                answer = b"".join([part async for part in client])
                assert answer.startswith(b"HTTP/1.1 503")
                assert b"connection: close" in answer
                await client.aclose()
            gone = await server.wait_gone()
    assert gone.exit_code == 0, server.log()


async def test_started_and_stopped_again_and_again_nothing_is_left(tmp_path: Path) -> None:
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        server, gone = await run(folder, SERVE, signal.SIGTERM if number % 2 else signal.SIGINT, after="serving")
        assert gone.exit_code == 0
        assert not gone.strays
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_no_signal_kills_the_process_between_the_notice_and_its_exit(tmp_path: Path, number: int) -> None:
    async with open_host(tmp_path, SERVE) as server:
        with trio.fail_after(CAP_S):
            while server.gone is None:
                try:
                    server.signal_main(number)
                except ServerFailedError:  # it has ended
                    break
                await trio.sleep(0.001)
            gone = await server.wait_gone()
    assert gone.exit_code == 0


@pytest.mark.parametrize("host", [SERVE, "hypercorn-0"])
async def test_a_process_that_serves_alone_says_that_sighup_is_no_reload(tmp_path: Path, host: str) -> None:
    async with open_host(tmp_path, host) as server:
        with trio.fail_after(CAP_S):
            await server.wait_logged('"serving"')
            server.signal_main(signal.SIGHUP)
            gone = await server.wait_gone()
    assert gone.exit_code == 0
    assert server.log().count("lastcall serve --workers 1") == 1


async def test_a_server_that_stops_by_itself_stops_the_service(tmp_path: Path) -> None:
    async with open_host(tmp_path, SERVE, broken="under_a_server_that_stops") as server:
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code == 0
    assert '"reason": "hypercorn stops"' in server.log()


@pytest.mark.removal
async def test_hypercorn_alone_dies_of_sigterm(tmp_path: Path) -> None:
    """This test fails once hypercorn handles SIGTERM with --workers 0; then the notice needs one source less."""
    ours = launch("hypercorn-0")
    server = ServerProcess(Launch([*ours.argv[:-1], "tests.hosting.apps:plain"], env=ours.env), tmp_path / "plain.log")
    with trio.fail_after(CAP_S):
        await server.wait_listening()
        server.signal_main(signal.SIGTERM)
        gone = await server.wait_gone()
    assert gone.exit_code == -signal.SIGTERM


@pytest.mark.parametrize("host", [SERVE, "hypercorn-0"])
async def test_under_nohup_the_end_of_the_terminal_does_not_end_the_server(tmp_path: Path, host: str) -> None:
    ours = launch(host)
    async with open_server(Launch(["nohup", *ours.argv], env=ours.env), log_path=tmp_path / "nohup.log") as server:
        with trio.fail_after(CAP_S):
            await server.wait_logged('"serving"')
            server.signal_main(signal.SIGHUP)
            await trio.sleep(0.3)
            server.signal_main(signal.SIGTERM)
            gone = await server.wait_gone()
    assert gone.exit_code == 0
    assert '"reason": "SIGTERM"' in server.log()


async def test_timeouts_of_hypercorns_configuration_do_not_count(tmp_path: Path) -> None:
    config = tmp_path / "hypercorn.toml"
    config.write_text("startup_timeout = 0.05\nshutdown_timeout = 0.05\n")
    async with open_host(tmp_path, "hypercorn-1", "--config", str(config), broken="slow_at_both_ends") as server:
        server.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert gone.exit_code == 0
    assert "Traceback" not in server.log()
    assert '"shutdown report"' in server.log()


@pytest.mark.parametrize("host", ["hypercorn-1", "configured-2"])
async def test_the_banner_knows_which_address_speaks_tls(tmp_path: Path, host: str) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    issued = trustme.CA().issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    options = ("--certfile", str(certificate), "--keyfile", str(key), "--insecure-bind", "127.0.0.1:0")
    async with open_host(tmp_path, host, *options) as server:
        with trio.fail_after(CAP_S):
            await server.wait_logged('"serving"')
        [served, *_] = [json.loads(line) for line in server.log().splitlines() if '"serving"' in line]
        assert [url.split(":")[0] for url in served["urls"]] == ["https", "http"]
        assert f"https://127.0.0.1:{server.port}/chat" in served["attempt"]
