"""The files in ``deploy/`` for several replicas name settings, parts and addresses that fit together."""

import re
from configparser import ConfigParser
from typing import Any

import pytest
import yaml

from bench.server_process import ROOT
from service.setting_sources import read_sources
from service.settings import Settings

DEPLOY = ROOT / "deploy"
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes-replicas.yaml").read_text()))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
REPLICAS = ("replica-1", "replica-2", "replica-3")
GIVEN = {"POSTGRES_PASSWORD": "secret", "LASTCALL_API_KEYS": 20 * "k", "LASTCALL_MODEL": "m", "POD_IP": "10.1.2.3"}
GIVEN |= {"LASTCALL_MODEL_URL": "http://model/v1"}


def the(kind: str, name: str) -> dict[str, Any]:
    [found] = [it for it in OBJECTS if (it["kind"], it["metadata"]["name"]) == (kind, name)]
    return found


def pod(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = the("Deployment", name)["spec"]["template"]["spec"]
    return spec


def settings_of(variables: dict[str, str]) -> Settings:
    """Raises: SettingsError: A variable names no setting, or its value is refused."""
    given = {name: re.sub(r"\$[{(](\w+)(:\?)?[})]", lambda it: GIVEN[it[1]], text) for name, text in variables.items()}
    return read_sources({name: text for name, text in given.items() if not name.endswith("_API_KEYS_FILE")}).settings()


def test_the_pods_settings_are_settings() -> None:
    [container] = pod("lastcall")["containers"]
    settings = settings_of({it["name"]: it["value"] for it in container["env"] if "value" in it})
    assert settings.peer_url == "tls://10.1.2.3:7443"
    assert settings.store_url.startswith("postgresql://")
    assert pod("lastcall")["terminationGracePeriodSeconds"] >= settings.drain_timeout_s + 5 + 5
    ports = {it["name"]: it["containerPort"] for it in container["ports"]}
    assert settings.bind.endswith(f":{ports['http']}")
    assert settings.peer_bind is not None
    assert settings.peer_bind.endswith(f":{ports['peer']}")


@pytest.mark.parametrize("name", ["lastcall", "lastcall-pooler"])
def test_what_a_pod_mounts_and_what_selects_it_is_there(name: str) -> None:
    deployment, spec = the("Deployment", name)["spec"], pod(name)
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    [term] = spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["labelSelector"]["matchLabels"] == labels
    assert the("Service", name)["spec"]["selector"] == labels
    [container] = spec["containers"]
    mounted = {it["name"]: it["mountPath"] for it in container["volumeMounts"]}
    assert mounted.keys() == {it["name"] for it in spec["volumes"]}
    paths = [it["value"] for it in container.get("env", ()) if it["name"].endswith("FILE")]
    assert all(path.rpartition("/")[0] in mounted.values() for path in paths)
    served = {it["targetPort"] for it in the("Service", name)["spec"]["ports"]}
    assert served <= {it["name"] for it in container["ports"]}
    assert spec["enableServiceLinks"] is False


def test_a_deploy_and_a_drain_of_nodes_leave_replicas() -> None:
    assert the("Deployment", "lastcall")["spec"]["replicas"] >= 3
    assert the("Deployment", "lastcall")["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    budget = the("PodDisruptionBudget", "lastcall")["spec"]
    assert budget["maxUnavailable"] == 1
    selected = {"matchLabels": {"app": "lastcall"}}
    assert budget["selector"] == selected == the("NetworkPolicy", "lastcall")["spec"]["podSelector"]
    peers = the("NetworkPolicy", "lastcall")["spec"]["ingress"][1]
    assert peers == {"ports": [{"port": "peer", "protocol": "TCP"}], "from": [{"podSelector": selected}]}


def test_the_pooler_has_the_settings_that_the_docs_name() -> None:
    config = ConfigParser(interpolation=None)
    config.read_string(the("ConfigMap", "lastcall-pooler")["data"]["pgbouncer.ini"])
    docs = (ROOT / "docs/storage.md").read_text()
    for name in ("pool_mode", "query_wait_timeout", "query_timeout", "server_login_retry"):
        assert f"| `{name}` | `{config['pgbouncer'][name]}` |" in docs
    [container] = pod("lastcall")["containers"]
    [store_url] = [it["value"] for it in container["env"] if it["name"] == "LASTCALL_STORE_URL"]
    assert f"@lastcall-pooler:{config['pgbouncer']['listen_port']}/lastcall" in store_url
    assert "lastcall" in config["databases"]


@pytest.mark.parametrize("name", REPLICAS)
def test_the_replicas_of_the_compose_file_are_those_of_the_proxy(name: str) -> None:
    service = COMPOSE["services"][name]
    address = service["networks"]["replicas"]["ipv4_address"]
    assert f"server {name} {address}:8000" in (DEPLOY / "haproxy.cfg").read_text()
    settings = settings_of(service["environment"])
    assert settings.peer_url == f"tls://{address}:7443"
    assert int(service["stop_grace_period"].removesuffix("s")) >= settings.drain_timeout_s + 5
    assert service["image"] == COMPOSE["services"]["replica-1"]["image"]
    assert COMPOSE["services"]["database"]["environment"]["POSTGRES_USER"] == "lastcall"


def test_the_image_has_the_driver_of_postgresql() -> None:
    assert "--extra postgres" in (DEPLOY / "Containerfile").read_text()
