"""The addresses that the store keeps of processes."""

import os
from pathlib import Path

import pytest

from service.cluster import peer_address
from service.cluster.peer_address import PeerAddress, this_place


def test_an_address_on_one_machine_is_the_name_of_a_socket() -> None:
    made = PeerAddress.made()
    assert str(made).startswith("@lastcall-")
    assert PeerAddress.parse(str(made)) == made
    assert not made.is_far
    assert PeerAddress.is_instance(made.instance)


@pytest.mark.parametrize(
    ("host", "shown"), [("10.1.2.3", "10.1.2.3"), ("fd00::7", "[fd00::7]"), ("pod-0.lastcall", "pod-0.lastcall")]
)
def test_an_address_with_a_port_is_read_as_it_was_written(host: str, shown: str) -> None:
    made = PeerAddress.made(host=host, port=7443)
    assert str(made) == f"tls://{shown}:7443/{made.instance}?place={this_place()}"
    assert PeerAddress.parse(str(made)) == made
    assert " " not in str(made), "the master lists addresses with spaces between them"


def test_two_addresses_are_never_the_same() -> None:
    assert PeerAddress.made(host="h", port=1).instance != PeerAddress.made(host="h", port=1).instance


def test_a_process_in_this_place_is_reached_through_its_socket_and_any_other_through_its_port() -> None:
    made = PeerAddress.made(host="10.1.2.3", port=7443)
    assert not made.is_far
    assert PeerAddress.parse(str(made).replace(this_place(), 16 * "0")).is_far


@pytest.mark.parametrize("text", ["/run/lastcall/peer", "@other", "tls://", "tls://h/x", "x y"])
def test_any_other_text_is_the_name_of_a_socket(text: str) -> None:
    assert PeerAddress.parse(text).unix_name.removeprefix("@") == text.removeprefix("@")
    assert not PeerAddress.parse(text).is_far


def test_the_place_depends_on_the_boot_the_namespaces_and_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = this_place.__wrapped__()
    assert here == this_place()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 54321)
        assert this_place.__wrapped__() != here
    with monkeypatch.context() as patch:
        (tmp_path / "boot").write_text("another")
        patch.setattr(peer_address, "_BOOT", str(tmp_path / "boot"))
        assert this_place.__wrapped__() != here
    with monkeypatch.context() as patch:
        patch.setattr(peer_address, "_NAMESPACES", ("net", "uts"))
        assert this_place.__wrapped__() != here
    with monkeypatch.context() as patch:
        patch.setattr(peer_address, "_BOOT", str(tmp_path / "missing"))
        nowhere = this_place.__wrapped__()
        patch.setattr(os, "getpid", lambda: 1)
        assert this_place.__wrapped__() != nowhere, "where nothing is known each process is in a place of its own"
