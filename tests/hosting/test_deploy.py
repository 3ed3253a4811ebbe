"""What is in ``deploy/`` starts, or does not start, as it says."""

import signal
from pathlib import Path

import trio

from bench.server_process import ROOT
from tests.hosting.hosts import SERVE, open_host
from tests.settings.kubelet import links_of_the_manifest, pod_of_the_manifest, variables_of_the_pod


def test_the_pod_gets_no_service_links() -> None:
    assert pod_of_the_manifest()["enableServiceLinks"] is False


async def test_a_pod_of_the_manifest_starts_with_service_links_too(tmp_path: Path) -> None:
    """As with a manifest of one's own, whose Services are called the same."""
    links = links_of_the_manifest()
    assert "LASTCALL_PORT" in links, "the Service of the manifest is called something else: this test proves nothing"
    here = {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_STORE_URL": f"sqlite:{tmp_path}/lastcall.db"}
    pod = variables_of_the_pod() | links | here | {"LASTCALL_LOG_LEVEL": "debug", "LASTCALL_DRAIN_TIMEOUT_S": "0"}
    async with open_host(tmp_path, SERVE, **pod) as server:
        server.signal_main(signal.SIGTERM)
        with trio.fail_after(20):
            gone = await server.wait_gone()
    assert gone.exit_code == 0
    passed_over = [line for line in server.log().splitlines() if "service links" in line]
    assert len(passed_over) == 1
    assert '"level": "debug"' in passed_over[0]
    assert "LASTCALL_PORT" in passed_over[0]


def test_the_unit_does_not_start_without_its_secrets() -> None:
    unit = (ROOT / "deploy/lastcall.service").read_text().splitlines()
    files = [line for line in unit if line.startswith("EnvironmentFile=")]
    assert files == ["EnvironmentFile=/etc/lastcall/secrets"]  # with a dash before the path it may be missing
