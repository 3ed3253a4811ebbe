"""The certificates of a replica: what is refused, and how they change while the service runs."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import trio
from structlog.testing import capture_logs

from service.cluster import peer_certificates
from service.cluster.peer_certificates import PeerCertificates
from service.cluster.peer_tls import TlsStream
from service.errors import PeerUntrustedError, SettingsError
from service.settings import Settings
from tests.cluster.certificates import peer_certificates as certificates_in
from tests.cluster.certificates import peer_files

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def opened(files: dict[str, str]) -> PeerCertificates:
    return PeerCertificates(files["peer_certfile"], files["peer_keyfile"], files["peer_cafile"])


def problem_of(files: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as refused:
        opened(files)
    return str(refused.value)


@pytest.mark.parametrize("name", ["peer_certfile", "peer_keyfile", "peer_cafile"])
@pytest.mark.parametrize(
    ("becomes", "why"),
    [("missing", "cannot be read: No such file or directory"), ("a folder", "cannot be read"), ("garbage", "PEM")],
)
def test_a_file_that_cannot_be_read_is_named(name: str, becomes: str, why: str, tmp_path: Path) -> None:
    files = peer_files(tmp_path / "it")
    path = Path(files[name])
    path.unlink()
    if becomes == "a folder":
        path.mkdir()
    elif becomes == "garbage":
        path.write_bytes(b"\0garbage")
    told = problem_of(files)
    assert name in told
    assert why in told
    assert str(path) in told


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    files = peer_files(tmp_path / "it")
    other = peer_files(tmp_path / "other")
    assert "is not the key of peer_certfile" in problem_of(files | {"peer_keyfile": other["peer_keyfile"]})


def test_an_encrypted_key_is_refused_and_no_one_is_asked(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    files = peer_files(tmp_path / "it")
    key = Path(files["peer_keyfile"])
    plain = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    assert "should not be encrypted" in problem_of(files)


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    files = peer_files(tmp_path / "it", signed_by="another")
    assert "unable to get local issuer certificate" in problem_of(files)


@pytest.mark.parametrize(
    ("begins", "ends", "why"),
    [(NOW - 9 * DAY, NOW - DAY, "certificate has expired"), (NOW + DAY, NOW + 9 * DAY, "certificate is not yet valid")],
)
def test_a_certificate_out_of_its_time_is_refused(begins: datetime, ends: datetime, why: str, tmp_path: Path) -> None:
    assert why in problem_of(peer_files(tmp_path / "it", not_before=begins, not_after=ends))


def test_the_settings_name_all_files_or_none(tmp_path: Path) -> None:
    assert PeerCertificates.of(Settings()) is None
    files = peer_files(tmp_path / "it")
    found = PeerCertificates.of(Settings.model_validate({"peer_bind": "127.0.0.1:0", **files}))
    assert found is not None
    assert found.valid_until.year == 3000


async def settle(certificates: PeerCertificates) -> None:
    """Look as often as a change takes to be in force."""
    for _ in range(3):
        await certificates.look()


def replace(files: dict[str, str], other: dict[str, str], *names: str) -> None:
    """Put other files in the place of these, as an operator does: each of them at once."""
    for name in names or files:
        shutil.copy(other[name], files[name] + ".new")
        Path(files[name] + ".new").replace(files[name])


async def test_a_changed_certificate_that_could_not_be_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not be valid yet, or no descriptor was left."""
    files = peer_files(tmp_path / "it")
    certificates = opened(files)
    before = certificates.server
    replace(files, peer_files(tmp_path / "later", not_before=NOW - DAY, not_after=NOW + 1000 * DAY))
    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(peer_certificates, "_read", Mock(side_effect=SettingsError("peer_cafile cannot be read")))
        await settle(certificates)
        await settle(certificates)
    assert [it["error"] for it in logs if it["log_level"] == "warning"] == ["peer_cafile cannot be read"]
    assert certificates.server is before
    await certificates.look()
    assert certificates.server is not before
    assert certificates.valid_until.year != 3000


async def test_a_changed_certificate_is_in_force_once_all_of_it_is_there(tmp_path: Path) -> None:
    files = peer_files(tmp_path / "it")
    later = peer_files(tmp_path / "later", not_before=NOW - DAY, not_after=NOW + 1000 * DAY)
    certificates = opened(files)
    before = certificates.server
    with capture_logs() as told:
        replace(files, later, "peer_certfile")
        await settle(certificates)
        await settle(certificates)
        assert certificates.server is before, "the key is not there yet"
        assert [it["log_level"] for it in told] == ["warning"], "once"
        assert "is not the key" in told[0]["error"]
        replace(files, later, "peer_keyfile")
        await settle(certificates)
    assert certificates.server is not before
    assert told[-1]["valid_until"].startswith(f"{NOW + 1000 * DAY:%Y-%m-%d}")
    assert "in force" in told[-1]["event"]


@pytest.mark.parametrize("broken", [b"", b"-----BEGIN CERTIFICATE-----\nMIIB"])
async def test_files_that_cannot_be_used_leave_the_certificate_in_force(broken: bytes, tmp_path: Path) -> None:
    files = peer_files(tmp_path / "it")
    certificates = opened(files)
    before = certificates.server
    for path in map(trio.Path, files.values()):
        whole = await path.read_bytes()
        await path.write_bytes(broken)
        await settle(certificates)
        assert certificates.server is before
        await path.write_bytes(whole)
        await settle(certificates)
        before = certificates.server


async def test_a_file_that_still_grows_is_not_read(tmp_path: Path) -> None:
    files = peer_files(tmp_path / "it")
    certificates = opened(files)
    with capture_logs() as told:
        for size in range(1, 5):
            await trio.Path(files["peer_cafile"]).write_bytes(b"x" * size)
            await certificates.look()
    assert told == []


async def test_an_expiry_is_told_before_it_comes(tmp_path: Path) -> None:
    files = peer_files(tmp_path / "it", not_before=NOW - DAY, not_after=NOW + 99 * DAY)
    times = [NOW, NOW + 78 * DAY, NOW + 80 * DAY, NOW + 81 * DAY, NOW + 95 * DAY, NOW + 99 * DAY, NOW + 200 * DAY]
    moments = iter(times)
    certificates = PeerCertificates(
        files["peer_certfile"], files["peer_keyfile"], files["peer_cafile"], clock=lambda: next(moments)
    )
    told = []
    for _ in times:
        with capture_logs() as logs:
            await certificates.look()
        told.append([it["event"] for it in logs])
    soon, over = "the certificate for other replicas expires soon", "the certificate for other replicas has expired"
    assert [it[0].partition(";")[0].partition(":")[0] if it else "" for it in told] == [
        "",
        "",
        soon,
        "",
        soon,
        over,
        "",
    ]


async def meet(one: PeerCertificates, other: PeerCertificates) -> bytes:
    """Let two replicas meet; returns what the other one received."""
    with trio.fail_after(60), trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        with trio.socket.socket() as ours:
            await ours.connect(listener.getsockname())
            theirs, _ = await listener.accept()
            with theirs:
                client, server = TlsStream(ours, one.client, server_name="x"), TlsStream(theirs, other.server)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(client.send_all, b"hello")
                    got = await server.receive_some()
                client.leave()
                server.leave()
                return got


async def test_authorities_are_changed_under_load_without_a_refused_connection(tmp_path: Path) -> None:
    """The new authority is trusted everywhere first, then each replica gets its new certificate, then the old goes."""
    names = ("one", "other")
    all_files = {name: peer_files(tmp_path / name) for name in names}
    running = {name: opened(files) for name, files in all_files.items()}
    met = dict.fromkeys(names, 0)

    async def go_on_meeting(one: str, other: str) -> None:
        while True:
            assert await meet(running[one], running[other]) == b"hello"
            met[one] += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_on_meeting, "one", "other")
        nursery.start_soon(go_on_meeting, "other", "one")
        steps = [("ours", ("ours", "next")), ("next", ("ours", "next")), ("next", ("next",))]
        for number, (signed_by, trusts) in enumerate(steps):
            for name in names:
                made = peer_files(tmp_path / f"{name}-{number}", signed_by=signed_by, trusts=trusts)
                before = running[name].server
                replace(all_files[name], made)
                await settle(running[name])
                assert running[name].server is not before
                since = dict(met)
                while any(met[it] < since[it] + 2 for it in names):  # noqa: ASYNC110  in the other tasks' own time
                    await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    old = certificates_in(tmp_path / "old", trusts=("ours", "next"))
    with pytest.RaisesGroup(PeerUntrustedError, flatten_subgroups=True):
        await meet(old, running["one"])
