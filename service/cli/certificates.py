"""``lastcall certificates``: a small private authority, and certificates of replicas, for those who have none.

The folder holds ``ca.crt`` and ``ca.key``, and ``NAME.crt`` and ``NAME.key`` of each host. The authority is made once;
later calls use it. Nothing is overwritten, unless a certificate is to be renewed: then its key is new, too.
"""

import argparse
import os
import re
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, NamedTuple

from service.errors import StartupError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY = "ca"
AUTHORITY_DAYS = 3650
DAYS = 365
"""How long the certificate of a replica is valid, unless the command says otherwise."""
DAYS_MAX = 825
"""Bound on that: what is never renewed is forgotten."""
_BACKDATED = timedelta(minutes=5)
"""The clocks of replicas may differ by so much."""
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")


def add_certificates_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this command to a command line."""
    made = commands.add_parser("certificates", help="make certificates with which replicas know each other")
    made.add_argument("folder", metavar="DIR", type=Path, help="where the files are, or will be")
    made.add_argument(
        "--host",
        metavar="NAME",
        dest="hosts",
        action="append",
        required=True,
        type=_host,
        help="a replica's name or address; may be given several times. All replicas may share one certificate",
    )
    made.add_argument(
        "--days", metavar="N", type=_days, default=DAYS, help=f"how long they are valid ({DAYS}, at most {DAYS_MAX})"
    )
    made.add_argument("--renew", action="store_true", help="replace the certificates of these hosts that are there")


def _host(text: str) -> str:
    """Raises: ArgumentTypeError."""
    with suppress(ValueError):
        return str(ip_address(text))
    if not _HOST.fullmatch(text) or text.lower() == AUTHORITY:
        raise argparse.ArgumentTypeError(f"{text!r} should be the name of a host, or an address")
    return text.lower()


def _days(text: str) -> int:
    """Raises: ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= DAYS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number from 1 to {DAYS_MAX}")
    return int(text)


def run_certificates_command(arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit code.

    Raises:
        StartupError: The library is not installed, the folder cannot be used, or a file is there already.
    """
    try:
        import cryptography  # noqa: F401, PLC0415  of the extra `cluster`
    except ImportError as error:
        raise StartupError(
            "lastcall certificates needs a library that is not installed: pip install '.[cluster]' in the folder of "
            "the code."
        ) from error
    folder: Path = arguments.folder
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for line in make_certificates(
            folder, tuple(dict.fromkeys(arguments.hosts)), days=arguments.days, renews=arguments.renew
        ):
            sys.stdout.write(f"{line}\n")
    except OSError as error:
        raise StartupError(f"{error.filename or folder} cannot be used: {error.strerror}") from None
    return 0


def make_certificates(
    folder: Path, hosts: tuple[str, ...], *, days: int, renews: bool, now: datetime | None = None
) -> list[str]:
    """Make the certificates of hosts, and the authority if there is none. Returns what to tell the operator.

    Raises:
        StartupError: A file is there already, or the authority cannot be used. No file has changed then.
        OSError
    """
    now = now or datetime.now(UTC)
    taken = [it for host in hosts for it in _files(folder, host) if it.exists()]
    if taken and not renews:
        raise StartupError(f"{taken[0]} is there already; --renew makes new certificates in the place of old ones.")
    told = []
    if any(it.exists() for it in _files(folder, AUTHORITY)):
        authority = _load_authority(folder, now=now)
    else:
        authority = _make_authority(now)
        _write(folder, AUTHORITY, authority)
        told.append(f"{_files(folder, AUTHORITY).certificate}: the authority, until {authority.ends}")
    for host in hosts:
        made = _make_certificate(host, authority, now=now, days=days)
        _write(folder, host, made)
        told.append(f"{_files(folder, host).certificate}: {host}, until {made.ends}")
    told.append(
        f"Each replica needs its own two files (peer_certfile, peer_keyfile) and {AUTHORITY}.crt (peer_cafile); keep "
        f"{AUTHORITY}.key elsewhere, it is needed for the next certificates only."
    )
    return told


class _Files(NamedTuple):
    certificate: Path
    key: Path


class _Made(NamedTuple):
    certificate: "x509.Certificate"
    key: "EllipticCurvePrivateKey"

    @property
    def ends(self) -> str:
        return f"{self.certificate.not_valid_after_utc:%Y-%m-%d}"


def _files(folder: Path, name: str) -> _Files:
    plain = name.replace(":", "-")  # of an IPv6 address
    return _Files(folder / f"{plain}.crt", folder / f"{plain}.key")


def _load_authority(folder: Path, *, now: datetime) -> _Made:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    files = _files(folder, AUTHORITY)
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        key = load_pem_private_key(files.key.read_bytes(), None)
    except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
        raise StartupError(f"{files.certificate} and {files.key} cannot be used: {error}") from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise StartupError(f"{files.key} is not the key of {files.certificate}, as this command makes them.")
    if certificate.not_valid_after_utc <= now:
        raise StartupError(f"{files.certificate} has expired on {certificate.not_valid_after_utc:%Y-%m-%d}.")
    return _Made(certificate, key)


def _make_authority(now: datetime) -> _Made:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"Lastcall replicas {token_hex(4)}")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(name, name, key, now=now, ends=now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Made(certificate, key)


def _make_certificate(host: str, authority: _Made, *, now: datetime, days: int) -> _Made:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.x509.oid import ExtendedKeyUsageOID  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    try:
        named: x509.GeneralName = x509.IPAddress(ip_address(host))
    except ValueError:
        named = x509.DNSName(host)
    ends = min(now + timedelta(days=days), authority.certificate.not_valid_after_utc)
    issuer = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host[:64])]),
            authority.certificate.subject,
            key,
            now=now,
            ends=ends,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName([named]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return _Made(certificate, key)


def _builder(
    subject: "x509.Name", issuer: "x509.Name", key: "EllipticCurvePrivateKey", *, now: datetime, ends: datetime
) -> "x509.CertificateBuilder":
    from cryptography import x509  # noqa: PLC0415

    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _BACKDATED,
        not_valid_after=ends,
    )


def _usage(*, signs_certificates: bool) -> "x509.KeyUsage":
    from cryptography import x509  # noqa: PLC0415

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(folder: Path, name: str, made: _Made) -> None:
    """Write both files, each as a whole: the key first, which nobody else may read."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    files = _files(folder, name)
    key = made.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_whole(files.key, key, mode=0o600)
    _write_whole(files.certificate, made.certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _write_whole(path: Path, data: bytes, *, mode: int) -> None:
    beside = path.with_name(f".{path.name}.{token_hex(4)}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123
            os.fchmod(file.fileno(), mode)  # whatever the umask says
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
