"""Binding the addresses: invalid ones and those of another server are refused."""

import socket
from pathlib import Path

import pytest
from hypercorn.config import Config

from service.errors import StartupError
from service.hosting.listeners.bind import bind_addresses


def test_an_invalid_address_is_refused_by_its_name() -> None:
    with pytest.raises(StartupError, match=r"^Cannot listen on fd://x: "):
        bind_addresses(Config.from_mapping(bind=["fd://x"]))


def test_an_invalid_certificate_path_is_refused_by_its_name() -> None:
    with pytest.raises(StartupError, match=r"^The certificate a\0 and its key b cannot be used: "):
        bind_addresses(Config.from_mapping(bind=["127.0.0.1:0"], certfile="a\0", keyfile="b"))


def test_a_port_is_not_shared_with_another_server_with_several_workers_either() -> None:
    """For the message of the second server see ``test_exit_codes.py``."""
    config = Config.from_mapping(bind=["127.0.0.1:0"], workers=2)
    bind_addresses(config)
    assert config.workers == 2
    [bind] = config.bind
    with socket.socket(fileno=int(bind.removeprefix("fd://"))) as taken:
        assert not taken.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


@pytest.mark.removal
def test_hypercorn_still_shares_a_port_between_servers_with_several_workers() -> None:
    """This test fails once hypercorn refuses the second server; then bind_addresses need not set ``workers``."""
    [first] = Config.from_mapping(bind=["127.0.0.1:0"], workers=2).create_sockets().insecure_sockets
    with first:
        first.listen()
        bind = "{}:{}".format(*first.getsockname())
        [second] = Config.from_mapping(bind=[bind], workers=2).create_sockets().insecure_sockets
        second.close()


def test_a_unix_socket_of_another_server_is_refused_and_one_that_is_left_over_taken(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
        another.listen(0)
        for _ in range(3):  # the last attempt finds the backlog full
            with pytest.raises(StartupError, match=f"Cannot listen on unix:{path}: another server answers there"):
                bind_addresses(Config.from_mapping(bind=[f"unix:{path}"]))
        waiting, _ = another.accept()
        waiting.close()
    config = Config.from_mapping(bind=[f"unix:{path}"])
    bind_addresses(config)
    [bind] = config.bind
    with socket.socket(fileno=int(bind.removeprefix("fd://"))) as taken:
        assert taken.getsockname() == str(path)


@pytest.mark.removal
def test_hypercorn_still_takes_the_unix_socket_of_another_server(tmp_path: Path) -> None:
    """This test fails once hypercorn refuses such a socket; then _is_answered is no longer needed."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
        another.listen()
        [taken] = Config.from_mapping(bind=[f"unix:{path}"]).create_sockets().insecure_sockets
        taken.close()
