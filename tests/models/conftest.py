"""Independent servers for the tests of the model clients; each starts once, at its first use."""

from collections.abc import Iterator

import pytest

from service.models import openai_compatible
from tests.models.replies import Reading
from tests.models.upstream import WAIT_S, Wire
from tests.upstreams.independent import running_fakellm, running_llmock


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that opens an upstream runs without TLS and with it, with replies that are received and relayed."""
    if {"open_upstream", "open_pair", "open_transport"} & set(metafunc.function.__code__.co_names):
        metafunc.fixturenames.append("wire")
        metafunc.parametrize("wire", ["plain", "TLS", "plain, relayed", "TLS, relayed"], indirect=True)


@pytest.fixture(autouse=True)
def _clients_wait(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients wait for the rest of an answer as long as a test may take.

    The servers here are tasks beside the client. So a pause of this process between two pieces of an answer would look
    like a server that stops within its answer, for which a client waits for a moment only. A test of such a wait sets
    the wait itself, or has a clock of its own.
    """
    if not {"autojump_clock", "mock_clock"} & set(request.fixturenames):
        for name in ("_REUSE_TIMEOUT_S", "_USAGE_TIMEOUT_S", "_ERROR_BODY_TIMEOUT_S", "_IDLE_EXPIRY_S"):
            monkeypatch.setattr(openai_compatible, name, WAIT_S)


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
