"""What the commands in a terminal (``lastcall chat`` and its like) take from the environment.

They are clients: they need the server's address and a key, and none of the server's settings. So this module reads
the few values itself, without :mod:`service.settings`, whose import takes longer than a short command. What both need
is here.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

URL_VARIABLE, KEY_VARIABLE, KEY_FILE_VARIABLE = "LASTCALL_URL", "LASTCALL_API_KEY", "LASTCALL_API_KEY_FILE"
CLIENT_VARIABLES = frozenset({URL_VARIABLE, KEY_VARIABLE, KEY_FILE_VARIABLE})
"""The variables that only clients read: they are no settings of the server."""
SECRET_FILE_BYTES_MAX = 64 * 1024
"""Bound of a file that holds a key."""
DEFAULT_BIND = "127.0.0.1:8000"
CONFIG_FILE = "lastcall.toml"
CONFIG_FILE_VARIABLE = "LASTCALL_CONFIG_FILE"
"""Names a file to read instead of ``lastcall.toml`` in the working directory. It is no setting."""
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_BIND = re.compile(r"(?:\[(?P<v6>[^\]\s]+)\]|(?P<host>[^\s:\[\]/]+)):(?P<port>[0-9]{1,5})")


class ClientSettingsError(Exception):
    """A value that names the server or the key cannot be used. ``str(error)`` is one sentence, without a secret."""


@dataclass(frozen=True)
class Target:
    """A server, and the key that it is to be asked with.

    Attributes:
        url: ``http://host:port``, with the prefix of a proxy if there is one.
        unix_path: The socket to connect to in place of the URL's host and port.
        api_key: The key; None to send none.
    """

    url: str
    unix_path: str | None = None
    api_key: str | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """The address for people."""
        return f"unix:{self.unix_path}" if self.unix_path else self.url

    @property
    def is_on_this_machine(self) -> bool:
        """Whether no proxy of the environment may come between."""
        return self.unix_path is not None or bool(re.match(r"https?://(127\.|localhost\b|\[::1\])", self.url))


def read_target(
    url: str | None = None, api_key_file: str | None = None, environ: Mapping[str, str] | None = None
) -> Target:
    """The server and the key that a command is to use.

    Args:
        url: ``--url``; unless given ``LASTCALL_URL``, else the address that a server here would bind: ``LASTCALL_BIND``
            or ``bind`` of ``lastcall.toml``.
        api_key_file: ``--api-key-file``; unless given ``LASTCALL_API_KEY``, else the file ``LASTCALL_API_KEY_FILE``.

    Raises:
        ClientSettingsError: One of them cannot be used.
    """
    environ = os.environ if environ is None else environ
    named = url or environ.get(URL_VARIABLE, "").strip()
    target = _named(named, "--url" if url else URL_VARIABLE) if named else _of_settings(environ)
    return Target(target.url, target.unix_path, _key(api_key_file, environ))


def wants_no_colour(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the user wants no colours. Source: https://no-color.org"""
    return bool((os.environ if environ is None else environ).get("NO_COLOR"))


def is_dumb_terminal(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the terminal says that it cannot move its cursor."""
    return (os.environ if environ is None else environ).get("TERM", "dumb") in ("", "dumb")


def _named(text: str, origin: str) -> Target:
    if text.startswith("unix:") and text != "unix:":
        return Target("http://localhost", text.removeprefix("unix:"))
    url = text if "://" in text else f"http://{text}"
    if not re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[!-~]*)?", url):
        raise ClientSettingsError(f"{origin}: {text!r} should be http://host:port, https://host or unix:path")
    return Target(url.rstrip("/"))


def _of_settings(environ: Mapping[str, str]) -> Target:
    file = Path(environ.get(CONFIG_FILE_VARIABLE) or CONFIG_FILE)
    kept: dict[str, object] = {}
    try:
        kept = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ClientSettingsError(f"{file}, which may name the server, cannot be read: {error}; use --url") from None
    bind = environ.get("LASTCALL_BIND", "").strip() or kept.get("bind") or DEFAULT_BIND
    is_tls = bool(environ.get("LASTCALL_TLS_CERTFILE") or kept.get("tls_certfile"))
    if isinstance(bind, str) and bind.startswith("unix:"):
        return Target("http://localhost", bind.removeprefix("unix:"))
    found = _BIND.fullmatch(bind) if isinstance(bind, str) else None
    if found is None or found["port"] == "0":
        raise ClientSettingsError(f"the setting bind is {bind!r}, which names no server to talk to; use --url")
    host = found["v6"] or found["host"]
    host = _EVERY_INTERFACE.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    return Target(f"{'https' if is_tls else 'http'}://{shown}:{found['port']}")


def _key(file: str | None, environ: Mapping[str, str]) -> str | None:
    key, named = environ.get(KEY_VARIABLE, "").strip(), environ.get(KEY_FILE_VARIABLE, "").strip()
    origin = KEY_VARIABLE
    if file is None and not key:
        file, origin = named or None, KEY_FILE_VARIABLE
    elif file is not None:
        origin = "--api-key-file"
    if file is not None:
        key = _read_key(file, origin)
    if not key:
        return None
    if not re.fullmatch(r"[!-~]+", key):
        raise ClientSettingsError(f"{origin}: a key is one word of ASCII characters, and this is none")
    return key


def _read_key(file: str, origin: str) -> str:
    try:
        with Path(file).open("rb") as opened:
            held = opened.read(SECRET_FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        # The path is not told: people put the key itself in its place.
        raise ClientSettingsError(
            f"{origin} should name a file that holds the key: {getattr(error, 'strerror', error)}"
        ) from None
    text = held.decode("utf-8", "replace").removeprefix("\ufeff").strip()
    if len(held) > SECRET_FILE_BYTES_MAX or not text:
        raise ClientSettingsError(f"{origin} names a file without a key in it")
    return text
