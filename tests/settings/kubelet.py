"""The variables that a kubelet gives each pod of a namespace, and those of our manifest.

Source: Kubernetes, ``pkg/kubelet/envvars/envvars.go``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MANIFEST = Path(__file__).parent.parent.parent / "deploy/kubernetes.yaml"


@dataclass(frozen=True)
class Port:
    number: int
    protocol: str = "TCP"
    name: str = ""


def service_links(service: str, *ports: Port, cluster_ip: str = "10.96.12.7") -> dict[str, str]:
    """The variables that ``enableServiceLinks`` makes for one Service."""
    prefix = variable_name(service)
    host = f"[{cluster_ip}]" if ":" in cluster_ip else cluster_ip
    environ = {f"{prefix}_SERVICE_HOST": cluster_ip, f"{prefix}_SERVICE_PORT": str(ports[0].number)}
    for port in ports:
        if port.name:
            environ[f"{prefix}_SERVICE_PORT_{variable_name(port.name)}"] = str(port.number)
        url = f"{port.protocol.lower()}://{host}:{port.number}"
        environ.setdefault(f"{prefix}_PORT", url)
        of_port = f"{prefix}_PORT_{port.number}_{port.protocol}"
        environ |= {of_port: url, f"{of_port}_PROTO": port.protocol.lower()}
        environ |= {f"{of_port}_PORT": str(port.number), f"{of_port}_ADDR": cluster_ip}
    return environ


def variable_name(name: str) -> str:
    return name.upper().replace("-", "_")


def manifest_objects(kind: str) -> list[dict[str, Any]]:
    return [it for it in yaml.safe_load_all(MANIFEST.read_text()) if it["kind"] == kind]


def links_of_the_manifest() -> dict[str, str]:
    """The service links of all Services in the manifest."""
    environ: dict[str, str] = {}
    for service in manifest_objects("Service"):
        ports = [Port(it["port"], it.get("protocol", "TCP"), it.get("name", "")) for it in service["spec"]["ports"]]
        environ |= service_links(service["metadata"]["name"], *ports)
    return environ


def pod_of_the_manifest() -> dict[str, Any]:
    """The pod's specification in the manifest's one Deployment."""
    [deployment] = manifest_objects("Deployment")
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


def variables_of_the_pod() -> dict[str, str]:
    """The ``env`` of the pod's one container; ``secret`` stands for a value from a Secret."""
    [container] = pod_of_the_manifest()["containers"]
    return {it["name"]: it.get("value", "secret") for it in container["env"]}
