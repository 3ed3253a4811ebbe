"""The certificate of this replica, and those that sign other replicas' certificates.

All three files are read again when they change, so that certificates are renewed without a restart. What is read is
tried first, in a handshake of this certificate with itself: a certificate without its key, one that ``peer_cafile``
has not signed, one that has expired and one that may not be used on both sides are refused with the reason. Files that
cannot be used leave the certificate in force as it is. A connection keeps the certificate with which it began.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from service.clock import wall_clock
from service.cluster.peer_tls import PeerObject, end_after_name, reason_of
from service.errors import SettingsError
from service.settings import Settings
from service.watched_files import WatchedFiles

logger = structlog.get_logger("lastcall.cluster")

WARNED_AT = (0.0, 0.05, 0.2)
"""Parts of a certificate's life. When less than one of them is left, a line in the log says so."""


@dataclass(frozen=True)
class _Pair:
    """A certificate with its key, in force from one reading of the files to the next."""

    client: ssl.SSLContext
    server: ssl.SSLContext
    begins: datetime
    ends: datetime

    def left(self, now: datetime) -> float:
        """The part of its life that is left; 0 once it has expired."""
        return max((self.ends - now) / max(self.ends - self.begins, timedelta(seconds=1)), 0.0)


class PeerCertificates:
    """The certificates in force.

    Args:
        certfile: The chain of this replica's certificate (PEM).
        keyfile: Its private key.
        cafile: The certificates that sign those of all replicas.
        clock: Wall time.

    Raises:
        SettingsError: The files cannot be used; the text names the setting, and the reason.
    """

    def __init__(self, certfile: str, keyfile: str, cafile: str, *, clock: Callable[[], datetime] = wall_clock) -> None:
        self._paths = certfile, keyfile, cafile
        self._clock = clock
        self._watched = WatchedFiles([Path(it) for it in self._paths])
        self._watched.note_read()
        self._pair = _read(*self._paths)
        self._told = ""
        self._warned_at = 1.0
        self._say("the certificate for other replicas was loaded")

    @classmethod
    def of(cls, settings: Settings) -> "PeerCertificates | None":
        """The certificates that settings name; None if they name none. Raises: SettingsError."""
        if settings.peer_certfile is None or settings.peer_keyfile is None or settings.peer_cafile is None:
            return None
        return cls(settings.peer_certfile, settings.peer_keyfile, settings.peer_cafile)

    @property
    def client(self) -> ssl.SSLContext:
        """For a connection that this process makes."""
        return self._pair.client

    @property
    def server(self) -> ssl.SSLContext:
        """For a connection that this process accepts."""
        return self._pair.server

    @property
    def valid_until(self) -> datetime:
        return self._pair.ends

    async def look(self) -> None:
        """Read the files if they have changed, and not since the last look. Warns before the certificate expires."""
        if self._watched.have_changed():
            self._read_again()
        self._warn()

    def _read_again(self) -> None:
        try:
            self._pair = _read(*self._paths)
        except SettingsError as error:
            if str(error) != self._told:
                logger.warning(
                    "the changed certificate for other replicas cannot be used: the one before stays in force",
                    error=str(error),
                    valid_until=self.valid_until.isoformat(),
                )
            self._told = str(error)
            self._watched.note_unread()
            return
        self._told, self._warned_at = "", 1.0
        self._say("the changed certificate for other replicas is in force")

    def _say(self, what: str) -> None:
        logger.info(what, certfile=self._paths[0], valid_until=self.valid_until.isoformat())

    def _warn(self) -> None:
        left = self._pair.left(self._clock())
        reached = min((part for part in WARNED_AT if left <= part), default=1.0)
        if reached < self._warned_at:
            has_expired = reached == 0
            logger.warning(
                "the certificate for other replicas has expired: no request is forwarded; renew it"
                if has_expired
                else "the certificate for other replicas expires soon; renew it (no restart is needed)",
                valid_until=self.valid_until.isoformat(),
            )
        self._warned_at = min(reached, self._warned_at)


def _read(certfile: str, keyfile: str, cafile: str) -> _Pair:
    """Raises: SettingsError."""
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the peer's proof of the store's secret says which process it is
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authorities(context, cafile)
        _load_pair(context, certfile, keyfile)
        contexts.append(context)
    client, server = contexts
    server.num_tickets = 0  # no session is resumed: each connection has a handshake of its own
    server.sslobject_class = PeerObject
    server.sni_callback = end_after_name
    found = _try(client, server, certfile=certfile, cafile=cafile)
    return _Pair(client, server, begins=_moment(found["notBefore"]), ends=_moment(found["notAfter"]))


def _load_authorities(context: ssl.SSLContext, cafile: str) -> None:
    try:
        context.load_verify_locations(cafile)
    except ssl.SSLError as error:
        raise SettingsError(f"peer_cafile {cafile!r} should hold certificates in PEM: {reason_of(error)}") from None
    except OSError as error:
        raise SettingsError(f"peer_cafile {cafile!r} cannot be read: {error.strerror}") from None
    if not context.cert_store_stats()["x509_ca"]:
        raise SettingsError(f"peer_cafile {cafile!r} should hold the certificate that signs those of the replicas")


def _load_pair(context: ssl.SSLContext, certfile: str, keyfile: str) -> None:
    for setting, path in (("peer_certfile", certfile), ("peer_keyfile", keyfile)):
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            raise SettingsError(f"{setting} {path!r} cannot be read: {error.strerror}") from None
    try:
        context.load_cert_chain(certfile, keyfile, password=_refuse_to_ask)
    except _EncryptedKeyError:
        raise SettingsError(f"peer_keyfile {keyfile!r} should not be encrypted: no one can be asked") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(f"peer_keyfile {keyfile!r} is not the key of peer_certfile {certfile!r}") from None
        raise SettingsError(
            f"peer_certfile {certfile!r} and peer_keyfile {keyfile!r} should hold a certificate and its key in PEM: "
            f"{reason_of(error)}"
        ) from None
    except OSError as error:  # one was removed meanwhile
        raise SettingsError(f"peer_certfile {certfile!r} cannot be read: {error.strerror}") from None


class _EncryptedKeyError(Exception):
    """OpenSSL asks for the password of a key."""


def _refuse_to_ask() -> str:
    raise _EncryptedKeyError


def _try(client: ssl.SSLContext, server: ssl.SSLContext, *, certfile: str, cafile: str) -> dict[str, str]:
    """Let the certificate meet itself on both sides of a connection, and return what it says. Raises: SettingsError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one, other = client.wrap_bio(down, up, server_hostname="localhost"), server.wrap_bio(up, down, server_side=True)
    try:
        for end in (one, other, one, other):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLError as error:
        raise SettingsError(
            f"peer_certfile {certfile!r} would not be accepted by a replica with peer_cafile {cafile!r}: "
            f"{reason_of(error)}"
        ) from None
    found: dict[str, str] = other.getpeercert()  # type: ignore[assignment]
    return found


def _moment(text: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), UTC)
