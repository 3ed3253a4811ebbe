"""Variables that Kubernetes and Docker make of the name of a service are neither settings nor faults."""

import pytest

from service.errors import SettingsError
from service.setting_sources import ignored_variables, read_sources
from service.settings import Settings
from tests.settings.kubelet import Port, service_links

KUBERNETES = service_links("lastcall", Port(80, name="http"))


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        read_sources(environ).settings()
    return str(refused.value).splitlines()


@pytest.mark.parametrize(
    "environ",
    [
        KUBERNETES,
        service_links("lastcall", *(Port(number) for number in range(1, 100))),
        service_links("lastcall", Port(53, "UDP", "dns"), Port(132, "SCTP", "sig-2"), Port(65535, "TCP", "x")),
        service_links("lastcall", Port(80), cluster_ip="fd00::12:7"),
        service_links("lastcall-store-2", Port(5432, name="postgres")),
        {name: value for at in range(500) for name, value in service_links(f"lastcall-{at}", Port(at + 1)).items()},
    ],
)
def test_any_number_of_service_links_is_ignored(environ: dict[str, str]) -> None:
    assert read_sources(environ).settings() == Settings()
    assert ignored_variables(environ) == sorted(environ)


def test_settings_beside_service_links_are_read() -> None:
    assert read_sources(KUBERNETES | {"LASTCALL_STREAMS_MAX": "5"}).settings().streams_max == 5


def docker_link(alias: str, **environ: str) -> dict[str, str]:
    """The variables of ``docker run --link other:alias`` for a container with these variables and port 8000."""
    prefix, url = alias.upper().replace("-", "_"), "tcp://172.17.0.5:8000"
    port = {"": url, "_8000_TCP": url, "_8000_TCP_PROTO": "tcp", "_8000_TCP_PORT": "8000"}
    port |= {"_8000_TCP_ADDR": "172.17.0.5", "_8000_TCP_START": url, "_8000_TCP_PORT_START": "8000"}
    linked = {f"{prefix}_PORT{name}": value for name, value in port.items()}
    linked[f"{prefix}_NAME"] = f"/web-1/{alias}"
    return linked | {f"{prefix}_ENV_{name}": value for name, value in environ.items()}


@pytest.mark.parametrize("alias", ["lastcall", "lastcall-b"])
def test_docker_links_are_ignored(alias: str) -> None:
    environ = docker_link(alias, PATH="/bin", LASTCALL_BIND="0.0.0.0:8000", STREAMS_MAX="x")
    assert read_sources(environ).settings() == Settings()
    assert ignored_variables(environ) == sorted(environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LASTCALL_PORT", "8000"),
        ("LASTCALL_PORT", "http://10.0.0.1:80"),
        ("LASTCALL_PORTS", "tcp://10.0.0.1:80"),
        ("LASTCALL_HOST", "127.0.0.1"),
        ("LASTCALL_NAME", "lastcall"),
        ("LASTCALL_NAME", "/web/other"),
        ("LASTCALL_NAME", "/web/lastcall-b"),
        ("LASTCALL_ENV_PATH", "/bin"),
        ("LASTCALL_PORT_HTTP_TCP", "tcp://10.0.0.1:80"),
        ("LASTCALL_PORT_80", "tcp://10.0.0.1:80"),
        ("LASTCALL_PORT_80_HTTP", "tcp://10.0.0.1:80"),
        ("LASTCALL_SERVICE", "10.0.0.1"),
        ("LASTCALL_SERVICE_NAME", "10.0.0.1"),
        ("LASTCALL_SERVICE_HOSTS", "10.0.0.1"),
        ("LASTCALL_service_host", "10.0.0.1"),
    ],
)
def test_a_name_that_no_link_makes_is_refused_as_any_other_name(name: str, value: str) -> None:
    [said] = problems(KUBERNETES | {name: value})
    assert said.startswith(f"{name}: is not a setting")


def test_a_link_proves_nothing_about_other_names() -> None:
    linked = docker_link("lastcall-b")
    assert problems(linked | {"LASTCALL_B": "x", "LASTCALL_ENV_PATH": "/bin"}) == [
        "LASTCALL_B: is not a setting",
        "LASTCALL_ENV_PATH: is not a setting",
    ]


def test_name_of_a_setting_is_never_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Settings.model_fields, "service_host", Settings.model_fields["bind"])
    assert "LASTCALL_SERVICE_HOST" not in ignored_variables(KUBERNETES)
