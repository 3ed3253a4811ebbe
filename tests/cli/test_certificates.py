"""``lastcall certificates``: an authority and certificates that replicas accept of each other."""

import os
import ssl
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.cli.certificates import AUTHORITY_DAYS, DAYS, make_certificates
from service.cli.main import main
from service.cluster.peer_certificates import PeerCertificates
from service.errors import SettingsError, StartupError

NOW = datetime.now(UTC)


def run(folder: Path, *arguments: str) -> int:
    return main(["certificates", str(folder), *arguments])


def opened(folder: Path, host: str, *, ca: Path | None = None) -> PeerCertificates:
    return PeerCertificates(str(folder / f"{host}.crt"), str(folder / f"{host}.key"), str((ca or folder) / "ca.crt"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_certificates_are_made_that_replicas_accept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "peer"
    before = os.umask(0o000)
    try:
        assert run(folder, "--host", "Pod-0.lastcall", "--host", "10.1.2.3", "--host", "fd00::7") == 0
    finally:
        os.umask(before)
    hosts = ["10.1.2.3", "fd00--7", "pod-0.lastcall"]
    assert sorted(it.name for it in folder.iterdir()) == sorted(
        [f"{name}{end}" for name in (*hosts, "ca") for end in (".crt", ".key")]
    )
    assert mode(folder) == 0o700
    assert {mode(it) for it in folder.glob("*.key")} == {0o600}
    assert {mode(it) for it in folder.glob("*.crt")} == {0o644}
    for host in hosts:
        left = opened(folder, host).valid_until - NOW
        assert timedelta(days=DAYS - 1) < left < timedelta(days=DAYS + 1)
    out = capsys.readouterr().out
    assert f"{folder}/ca.crt: the authority, until {NOW + timedelta(days=AUTHORITY_DAYS):%Y}" in out
    assert "ca.key elsewhere" in out


def test_a_strict_client_accepts_them_for_their_name(tmp_path: Path) -> None:
    """As a probe or ``openssl`` checks them: by name, and by the rules of RFC 5280."""
    assert run(tmp_path, "--host", "a.example", "--host", "10.1.2.3") == 0
    for name in ("a.example", "10.1.2.3"):
        client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        client.load_verify_locations(tmp_path / "ca.crt")
        server.load_cert_chain(tmp_path / f"{name}.crt", tmp_path / f"{name}.key")
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        one, other = client.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True)
        for end in (one, other, one, other):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
        assert one.version() == "TLSv1.3"


def test_nothing_is_overwritten_unless_it_is_to_be_renewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--host", "a") == 0
    files = {it: it.read_bytes() for it in tmp_path.iterdir()}
    assert run(tmp_path, "--host", "b", "--host", "a") == 78
    assert "a.crt is there already; --renew" in capsys.readouterr().err
    assert {it: it.read_bytes() for it in tmp_path.iterdir()} == files, "b was not made either"
    assert run(tmp_path, "--host", "a", "--renew", "--days", "30") == 0
    changed = {it.name for it in tmp_path.iterdir() if it.read_bytes() != files[it]}
    assert changed == {"a.crt", "a.key"}
    assert opened(tmp_path, "a").valid_until - NOW < timedelta(days=31)


def test_certificates_of_one_authority_made_at_different_times_fit_together(tmp_path: Path) -> None:
    assert run(tmp_path, "--host", "a") == 0
    assert run(tmp_path, "--host", "b") == 0
    opened(tmp_path, "b")
    assert run(tmp_path / "other", "--host", "b") == 0
    with pytest.raises(SettingsError, match="would not be accepted"):
        opened(tmp_path / "other", "b", ca=tmp_path)


def test_a_certificate_ends_with_its_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("a",), days=DAYS, renews=False, now=NOW)
    late = NOW + timedelta(days=AUTHORITY_DAYS - 10)
    told = make_certificates(tmp_path, ("b",), days=DAYS, renews=False, now=late)
    assert f"{NOW + timedelta(days=AUTHORITY_DAYS):%Y-%m-%d}" in told[0]
    with pytest.raises(StartupError, match="has expired"):
        make_certificates(tmp_path, ("c",), days=DAYS, renews=False, now=late + timedelta(days=11))
    assert not (tmp_path / "c.key").exists()


@pytest.mark.parametrize("broken", ["ca.crt", "ca.key"])
@pytest.mark.parametrize("becomes", [b"garbage", None])
def test_an_authority_that_cannot_be_used_is_refused(
    broken: str, becomes: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--host", "a") == 0
    if becomes is None:
        (tmp_path / broken).unlink()
    else:
        (tmp_path / broken).write_bytes(becomes)
    before = sorted(tmp_path.iterdir())
    assert run(tmp_path, "--host", "b") == 78
    told = capsys.readouterr().err
    assert broken in told
    assert "cannot be used" in told
    assert sorted(tmp_path.iterdir()) == before


def test_the_key_of_another_authority_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--host", "a") == 0
    assert run(tmp_path / "other", "--host", "a") == 0
    (tmp_path / "other" / "ca.key").replace(tmp_path / "ca.key")
    assert run(tmp_path, "--host", "b") == 78
    assert "is not the key of" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["", "../a", "a/b", "a b", "ca", "-a", "a..b", "*", 300 * "a", "é"])
def test_a_host_that_is_none_is_refused(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        run(tmp_path / "new", f"--host={host}")
    assert refused.value.code == 2
    assert "should be the name of a host" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("days", ["0", "826", "x", "-1"])
def test_the_days_have_bounds(days: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--host", "a", f"--days={days}")


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file", "--host", "a") == 78
    assert f"{tmp_path}/file cannot be used: File exists" in capsys.readouterr().err


def test_the_library_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert run(tmp_path / "new", "--host", "a") == 78
    assert "pip install '.[cluster]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
