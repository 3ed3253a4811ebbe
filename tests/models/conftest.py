"""Independent servers for the tests of the model clients; each starts once, at its first use."""

from collections.abc import Iterator

import pytest

from tests.models.replies import Reading
from tests.models.upstream import Wire
from tests.upstreams.independent import running_fakellm, running_llmock


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that opens an upstream runs without TLS and with it, with replies that are received and relayed."""
    if {"open_upstream", "open_pair", "open_transport"} & set(metafunc.function.__code__.co_names):
        metafunc.fixturenames.append("wire")
        metafunc.parametrize("wire", ["plain", "TLS", "plain, relayed", "TLS, relayed"], indirect=True)


@pytest.fixture
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wire, "has_tls", "TLS" in request.param)
    monkeypatch.setattr(Reading, "relays", "relayed" in request.param)


@pytest.fixture(scope="session")
def fakellm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_fakellm(tmp_path_factory.mktemp("fakellm"), FAKELLM_CONFIG) as url:
        yield url


@pytest.fixture(scope="session")
def llmock_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_llmock(tmp_path_factory.mktemp("llmock")) as url:
        yield url


FAKELLM_CONFIG = """\
version: 1
rules:
  - name: unicode
    when: {messages_contain: "in every script"}
    respond: {content: "Grüße 你好 👩‍👩‍👧 مرحبا"}
"""
