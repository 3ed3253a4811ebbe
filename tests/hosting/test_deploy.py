"""The files in ``deploy/`` start the service, or refuse the start, as described."""

import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import trio

from bench.server_process import ROOT
from service.storage.sqlite import open_sqlite_store
from tests.hosting.hosts import SERVE, open_host
from tests.settings.kubelet import MANIFEST, links_of_the_manifest, pod_of_the_manifest, variables_of_the_pod


def test_the_pod_gets_no_service_links() -> None:
    assert pod_of_the_manifest()["enableServiceLinks"] is False


async def test_a_pod_of_the_manifest_starts_with_service_links_too(tmp_path: Path) -> None:
    """An operator's own manifest may have service links, with Services of the same names."""
    links = links_of_the_manifest()
    assert "LASTCALL_PORT" in links, "the Service of the manifest is called something else: this test proves nothing"
    keys = tmp_path / "api-keys"
    keys.write_text("a-key-of-the-callers\n")
    here = {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_STORE_URL": f"sqlite:{tmp_path}/lastcall.db"}
    here |= {"LASTCALL_API_KEYS_FILE": str(keys)}
    pod = variables_of_the_pod() | links | here | {"LASTCALL_LOG_LEVEL": "debug", "LASTCALL_DRAIN_TIMEOUT_S": "0"}
    async with open_host(tmp_path, SERVE, **pod) as server:
        server.signal_main(signal.SIGTERM)
        with trio.fail_after(60):
            gone = await server.wait_gone()
    assert gone.exit_code == 0
    ignored_variables = [line for line in server.log().splitlines() if "service links" in line]
    assert len(ignored_variables) == 1
    assert '"level": "debug"' in ignored_variables[0]
    assert "LASTCALL_PORT" in ignored_variables[0]


def test_the_pod_finds_its_keys_where_the_manifest_puts_them() -> None:
    pod = pod_of_the_manifest()
    [mount] = [it for it in pod["containers"][0]["volumeMounts"] if it["name"] == "secrets"]
    assert variables_of_the_pod()["LASTCALL_API_KEYS_FILE"] == f"{mount['mountPath']}/api-keys"
    assert {"name": "secrets", "secret": {"secretName": "lastcall", "defaultMode": 0o440}} in pod["volumes"]
    made = next(line for line in MANIFEST.read_text().splitlines() if "create secret" in line)
    assert "secret generic lastcall --from-literal=api-keys=" in made


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_a_probe_bears_a_busy_server(probe: str) -> None:
    """Kubernetes' own timeout is one second, in which a loaded server may answer nothing."""
    asked = pod_of_the_manifest()["containers"][0][probe]
    assert asked["timeoutSeconds"] >= 5
    assert asked["failureThreshold"] >= 3
    assert asked["httpGet"]["path"] == ("/readyz" if probe == "readinessProbe" else "/healthz")


def unit(name: str) -> list[tuple[str, str]]:
    """The lines of a unit that set something."""
    lines = (ROOT / "deploy" / name).read_text().splitlines()
    return [
        (key, value) for key, equals, value in (it.partition("=") for it in lines if not it.startswith("#")) if equals
    ]


def test_the_unit_does_not_start_without_its_keys_and_its_model() -> None:
    service = unit("lastcall.service")
    assert ("LoadCredential", "api-keys:/etc/lastcall/api-keys") in service
    assert ("Environment", "LASTCALL_API_KEYS_FILE=%d/api-keys") in service
    assert [value for key, value in service if key == "EnvironmentFile"] == [
        "/etc/lastcall/settings"
    ]  # without a dash before the path


async def test_the_commands_of_the_backup_unit_keep_the_newest_fourteen(tmp_path: Path) -> None:
    """Run the commands as systemd would, with a state folder of the test in place of ``%S``."""
    store = tmp_path / "lastcall/lastcall.db"
    backups = tmp_path / "lastcall-backups"
    for folder in (store.parent, backups):
        folder.mkdir()
    async with open_sqlite_store(str(store)):
        pass
    for day in range(1, 15):
        (backups / f"2020-01-{day:02}T000000Z.db").touch()
    for command in [value for key, value in unit("lastcall-backup.service") if key == "ExecStart"]:
        typed = re.sub("%(.)", lambda match: {"%": "%", "S": str(tmp_path)}[match[1]], command)
        typed = typed.replace("/opt/lastcall/bin/lastcall", f"{sys.executable} -m service")
        await trio.run_process(shlex.split(typed), cwd=ROOT, capture_stdout=True)
    kept = sorted(it.name for it in backups.iterdir())
    assert (len(kept), kept[0]) == (14, "2020-01-02T000000Z.db")
    await trio.run_process(["cmp", "-n", "16", str(store), str(backups / kept[-1])])
