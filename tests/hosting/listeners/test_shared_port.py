"""A port that the master shares is that of the settings at its start, and no worker serves it in another's place."""

import os
import socket

import pytest
from hypercorn.config import Config

from service.errors import StartupError
from service.hosting.listeners.shared_port import SharedPort
from service.hosting.worker_main import SharedFile

FREE = "127.0.0.1:0"
PORT = SharedPort("metrics_bind")


@pytest.mark.parametrize(("at_first", "now"), [(FREE, "127.0.0.1:9464"), (FREE, None), (None, FREE)])
def test_a_worker_whose_settings_have_changed_since_refuses_to_start(at_first: str | None, now: str | None) -> None:
    config = Config()
    PORT.share(config, at_first)
    opened = PORT.open(config, at_first)
    try:
        with pytest.raises(StartupError, match=r"metrics_bind has changed .*restart"):
            PORT.open(config, now)
    finally:
        if opened is not None:
            opened.close()
            _close_shared(config)


def test_the_workers_share_one_port_and_without_a_master_each_process_has_its_own() -> None:
    config = Config()
    PORT.share(config, FREE)
    with _open(config) as one, _open(config) as other:
        assert one.getsockname() == other.getsockname()
        with _open(Config()) as alone:
            assert alone.getsockname() != one.getsockname()
    _close_shared(config)
    assert PORT.open(Config(), None) is None


def _open(config: Config) -> socket.socket:
    opened = PORT.open(config, FREE)
    assert opened is not None
    return opened


def _close_shared(config: Config) -> None:
    shared = config.lastcall_metrics_bind  # type: ignore[attr-defined]  # set by the port
    assert isinstance(shared, SharedFile)
    os.close(shared.descriptor)
