"""Independent servers for the tests of the model clients; each starts once, at its first use."""

from collections.abc import Iterator

import pytest

from tests.upstreams.independent import running_fakellm, running_llmock


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
