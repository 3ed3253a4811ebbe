"""Settings: one frozen object, read once. ``LASTCALL_*`` over ``lastcall.toml`` over the defaults.

Only this module reads the environment. An unknown name is refused, so a mistyped setting never falls back to a default
in silence. One error text names every wrong setting, each with its value and the values that are allowed. Whether the
settings fit together is checked when each single setting is right.
"""

import codecs
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import sha256
from ipaddress import IPv6Network, ip_address, ip_network
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, Literal, get_origin
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    field_validator,
    model_validator,
)
from pydantic import ValidationError as InvalidSettings
from pydantic_core import ErrorDetails

from service.client_settings import (
    CLIENT_VARIABLES,
    CONFIG_FILE,
    CONFIG_FILE_VARIABLE,
    DEFAULT_BIND,
    KEY_FILE_VARIABLE,
    KEY_VARIABLE,
    SECRET_FILE_BYTES_MAX,
)
from service.errors import SettingsError, StartupError
from service.ids import is_owner_name
from service.service_links import made_by_links
from service.store_capabilities import BY_SCHEME, StoreCapabilities

ENV_PREFIX = "LASTCALL_"
OPTIONS = {"bind": "bind", "store_url": "store"}
"""Settings that the command line may say, and what its option is called."""
SECRETS = frozenset({"api_key", "api_keys", "key", "key_sha256", "model_api_key"})
"""Settings whose values are never shown."""
Permission = Literal["talk", "read", "administer", "metrics"]
"""What a key may do: see :mod:`service.api.http.callers`."""
UNIX_PEERS = "unix:"
"""An entry of ``trusted_proxies``: every peer that connects through a Unix socket."""
MASK = "********"
"""The text that is shown in place of a secret."""
FILE_SUFFIX = "_file"
"""``api_keys_file`` in place of ``api_keys``, and so for each secret: the value is read from that file."""
_SHOWN_IN_STORE_URLS = ("dbname", "host", "hostaddr", "port", "user", "sslmode", "target_session_attrs")
"""The parameters of a ``postgresql:`` URL that are shown with their values. Others may be secrets."""
_POSTGRESQL_URL = re.compile(
    r"""postgres(ql)?://
    ((%[0-9a-f]{2}|[^%@:/?#\s])* (:(%[0-9a-f]{2}|[^%@:/?#\s])*)? @)?                      # user and password
    ((\[[0-9a-f:.]+\]|(%[0-9a-f]{2}|[^%@:/?#,\s\[\]])*) (:[0-9]{1,5})? (,(?=[^/?])|(?=[/?]|$)))+  # hosts
    (/(%[0-9a-f]{2}|[^%@:/?#\s])*)?
    (\?[^?#\s]*)?""",
    re.VERBOSE | re.IGNORECASE,
)
"""A URL whose parts libpq reads as they are meant: of others its error texts may show a piece of the password."""
_KEYS_OF_CALLERS = ("api_keys", "key")
"""Secrets of which a file may hold several."""
CALLER_KEY_LENGTH_MIN = 16
"""Bound below which a key of callers could be found by trying."""
_LISTS = {
    "api_keys": '["first-key-0123456789", "second-key-0123456789"]',
    "cors_origins": '["https://app.example.org"]',
    "may": '["talk", "read"]',
    "models": '["small", "large"]',
    "trusted_proxies": '["10.0.0.0/8"]',
}
"""Examples of settings that are lists of strings, as written in the file."""
_TABLES = {"api_keys": "key", "upstreams": "api_key"}
"""Settings that are lists of tables, and the secret in each table. It may be in a file, too: ``key_file``."""
_PLAIN, _NAMED = "a plain key", "a named key"
"""The forms of an entry of ``api_keys``. Pydantic has these tags in the place of an error."""

SHOWN_MAX = 100
"""The longest value, in characters, that an error text shows in full."""


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("is not a number")  # noqa: TRY004  pydantic reports a ValueError, and raises a TypeError
    return value


def _text(value: object) -> object:
    """Refuse a text with a NUL, or with bytes that are not UTF-8."""
    for part in value if isinstance(value, list | tuple) else [value]:
        if isinstance(part, str) and re.search(r"[\x00\ud800-\udfff]", part):
            raise ValueError("should be UTF-8 without a NUL")
    return value


def _lowercase(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _log_level(value: object) -> object:
    level = _lowercase(value)
    return "warning" if level == "warn" else level


def _listening_address(text: str) -> str:
    if text.startswith("unix:"):
        if 1 <= len(os.fsencode(text.removeprefix("unix:"))) <= 107:
            return text
        raise ValueError("should be unix:path with a path of 1 to 107 bytes")
    host, port = split_host_port(text)
    if host and re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= 65535:
        return text
    raise ValueError("should be host:port ([address]:port for IPv6) or unix:path; port 0 takes a free one")


def _host_and_port(text: str) -> str:
    host, port = split_host_port(text)
    if re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= 65535 and _is_host(host):
        return text
    raise ValueError(
        "should be host:port, or [address]:port for IPv6; port 0 takes a free one. The host is an address or a name of "
        "letters, digits, - and _ (with dots between its parts, of 63 characters at most)"
    )


def _peer_url(text: str) -> str:
    host, port = split_host_port(text.removeprefix("tls://"))
    is_port = re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535
    if not (text.startswith("tls://") and is_port and host) or _is_every_interface(host):
        raise ValueError("should be tls://host:port, where other replicas reach this one")
    if not _is_host(host):
        raise ValueError(
            f"names the host {host}, which can be neither an address nor a name: a name has letters, digits, - and _, "
            "with dots between its parts, which have 63 characters at most"
        )
    return text


_LABEL = "(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\.?$){_LABEL}(\.{_LABEL})*\.?")


def _is_host(text: str) -> bool:
    """Whether a system may find an address for this: to look up another text raises a UnicodeError, or never works."""
    try:
        ip_address(text.partition("%")[0])  # an IPv6 address may name its interface
    except ValueError:
        return _HOST_NAME.fullmatch(text) is not None
    return True


def _is_every_interface(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def checked_store_url(text: str) -> str:
    """Raises: ValueError: This version has no such store."""
    if text == "sqlite::memory:":
        raise ValueError("would be a file of the name :memory:; a store in memory is memory:")
    if text == "memory:" or re.fullmatch(r"sqlite:.+", text, re.DOTALL):
        return text
    if text.startswith(("postgres:", "postgresql:")):
        if _POSTGRESQL_URL.fullmatch(text):
            return text
        raise ValueError(
            "should be postgresql://user:password@host:port/database; in a user, a password and a database the "
            "characters @ : / ? # % and space stand percent-encoded (%40 for @)"
        )
    raise ValueError(
        "names a store that this version does not have; it should be memory:, sqlite:path or postgresql://host/database"
    )


def checked_schema_name(text: str) -> str:
    if re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", text) and not text.startswith("pg_"):
        return text
    raise ValueError("should be 1 to 63 of the letters a to z, digits and _, without a digit or pg_ at the beginning")


def _upstream_url(text: str) -> str:
    if text.startswith("scripted:"):
        return text
    url = _split_url(text)
    if url is None or url.scheme not in ("http", "https") or not url.hostname or re.search(r"\s", text):
        raise ValueError("should be http://host/v1, https://host/v1 (an OpenAI-compatible server) or scripted:")
    if url.username is not None:
        raise ValueError("should not hold a user or password; an upstream's key is a setting of its own")
    return text


def shown_url(url: str) -> str:
    """An upstream's URL without the values of its query, because some servers take their key there."""
    if url.startswith("scripted:"):
        return url
    address, mark, query = url.partition("#")[0].partition("?")
    pairs = (part.partition("=") for part in query.split("&"))
    return address + mark + "&".join(name + equals + MASK if equals else name and MASK for name, equals, _ in pairs)


def store_scheme_of(url: str) -> str:
    """The kind of store that a URL names, as :data:`~service.store_capabilities.BY_SCHEME` has it."""
    scheme = url.partition(":")[0]
    return "postgresql" if scheme == "postgres" else scheme


def missing_driver(url: str) -> StartupError:
    """The error of a store whose driver is not installed."""
    return StartupError(
        f"The store is {shown_store_url(url)}, and its driver is not installed: pip install '.[postgres]' in the "
        "folder of the code."
    )


def shown_store_url(url: str) -> str:
    """The URL of a store without its password."""
    scheme, mark, rest = url.partition("://")
    if not mark or not scheme.startswith("postgres"):
        return url
    address, question, query = rest.partition("?")
    user, at, place = address.rpartition("@")
    if at and ":" in user:
        user = f"{user.partition(':')[0]}:{MASK}"
    pairs = [
        f"{name}{equals}{value if name in _SHOWN_IN_STORE_URLS else MASK}"
        for name, equals, value in (pair.partition("=") for pair in query.split("&"))
    ]
    return f"postgresql://{user}{at}{place}{question}{'&'.join(pairs) if question else ''}"


def _split_url(text: str) -> SplitResult | None:
    """The parts of a URL; None if the text is no URL: an open bracket, a port that is not a number."""
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError:
        return None
    return url


def _key(secret: SecretStr) -> SecretStr:
    if not secret.get_secret_value():
        raise ValueError("should not be empty; is there a comma too many?")
    if not re.fullmatch(r"[!-~]+", secret.get_secret_value()):
        raise ValueError("should be visible ASCII characters without spaces or a line end, as it travels in a header")
    return secret


def _caller_key(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value()) < CALLER_KEY_LENGTH_MIN:
        raise ValueError(
            f"should be at least {CALLER_KEY_LENGTH_MIN} characters; "
            "openssl rand -hex 32 makes one that cannot be guessed"
        )
    return secret


def _owner_name(text: str) -> str:
    if not is_owner_name(text):
        raise ValueError(
            "should be 1 to 128 of A-Z a-z 0-9 _ . ~ @ | : + = -, as it is the owner of the key's sessions"
        )
    return text


def _sha256(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError('should be the SHA-256 of a key, 64 of 0-9 a-f: printf %s "$KEY" | sha256sum makes it')
    return SecretStr(text)


def _several(value: object) -> object:
    return (value,) if isinstance(value, str | SecretStr) else value


def _permissions(may: tuple[Permission, ...]) -> tuple[Permission, ...]:
    if not may:
        raise ValueError('should be at least one of "talk", "read", "administer" and "metrics"')
    return may


def _form_of_key(value: object) -> str:
    return _NAMED if isinstance(value, dict | NamedKey) else _PLAIN


def _web_origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", text):
        raise ValueError(
            "should be * or an origin as browsers send it, such as https://app.example.org: "
            "in lower case, without a path, and no pattern"
        )
    return text


def _proxies(text: str) -> str:
    if text == UNIX_PEERS:
        return text
    try:
        network = ip_network(text)
    except ValueError as error:
        if "host bits" in str(error):
            raise ValueError(f"should be a network, such as {ip_network(text, strict=False)}, or an address") from None
        raise ValueError(
            "should be an address or a network of proxies, such as 10.1.2.3, 10.0.0.0/8 or fd00::/8; "
            "or unix: for a bind of unix:path"
        ) from None
    if network.prefixlen == 0:
        raise ValueError("should not cover all addresses: each caller could choose the address that is logged")
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError("should be written as IPv4")
    return text


def _models(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"should be at least one, such as {_LISTS['models']}")
    return names


Seconds = Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False), BeforeValidator(_number)]
PositiveSeconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False), BeforeValidator(_number)]
# The lower bound keeps the loop with this interval from taking a whole core.
IntervalSeconds = Annotated[float, Field(ge=0.1, le=31_536_000, allow_inf_nan=False), BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1, le=10_000_000), BeforeValidator(_number)]
Bytes = Annotated[int, Field(ge=1024, le=1 << 30), BeforeValidator(_number)]
# The lower bound is well above the room that a log reserves for its terminal event, so that other events fit, too.
HeldBytes = Annotated[int, Field(ge=1024 * 1024, le=1 << 40), BeforeValidator(_number)]
LogBytes = Annotated[int, Field(ge=64 * 1024, le=1 << 30), BeforeValidator(_number)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Key = Annotated[SecretStr, AfterValidator(_key)]
CallerKey = Annotated[Key, AfterValidator(_caller_key)]
UpstreamUrl = Annotated[str, AfterValidator(_upstream_url)]
Continuation = Annotated[Literal["none", "trailing", "prefix", "final_message"], BeforeValidator(_lowercase)]
"""How a model server is asked to go on with a reply: :data:`service.models.continuation.Form`."""


class NamedKey(BaseModel):
    """One ``[[api_keys]]`` table: the keys of one caller, the name of that caller, and what it may do."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, AfterValidator(_owner_name)]
    key: Annotated[tuple[CallerKey, ...], BeforeValidator(_several)] = ()
    key_sha256: Annotated[tuple[Annotated[SecretStr, AfterValidator(_sha256)], ...], BeforeValidator(_several)] = ()
    may: Annotated[tuple[Permission, ...], AfterValidator(_permissions)] = ("talk", "read")

    _texts = field_validator("*", mode="before")(_text)


class Upstream(BaseModel):
    """One ``[[upstreams]]`` table: a model server and the models it serves."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Name
    url: UpstreamUrl
    api_key: Key | None = None
    models: Annotated[tuple[Name, ...], AfterValidator(_models)]
    prompt_bytes_max: dict[Name, Bytes] = {}
    continuation: Continuation = "none"

    _texts = field_validator("*", mode="before")(_text)


class Settings(BaseModel):
    """All settings. ``*_s`` are durations in seconds; ``*_max`` are bounds that are never passed.

    The constructor reads neither the environment nor a file; :func:`load_settings` does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    bind: Annotated[str, AfterValidator(_listening_address)] = DEFAULT_BIND
    """Where to listen: `host:port`, `[::1]:8000` or, with `api_keys`, `unix:path`; port 0 takes a free one. Bare
    hypercorn has its own `--bind` instead."""
    tls_certfile: Name | None = None
    """Certificate chain (PEM); together with `tls_keyfile`. Bare hypercorn has its own `--certfile` instead."""
    tls_keyfile: Name | None = None
    """The certificate's private key (PEM). Bare hypercorn has its own `--keyfile` instead."""
    peer_bind: Annotated[str, AfterValidator(_host_and_port)] | None = None
    """Where to listen for the other replicas of a PostgreSQL store: `host:port`, one port for all workers, with TLS and
    the three files below. Unless set, requests are forwarded within one machine only."""
    peer_url: Annotated[str, AfterValidator(_peer_url)] | None = None
    """The address at which other replicas reach `peer_bind`: `tls://host:port`. It must be set if `peer_bind` names all
    interfaces."""
    peer_certfile: Name | None = None
    """This replica's certificate chain (PEM) for both sides of a connection between replicas. `lastcall certificates`
    makes one. It is read again when it changes, and so are the next two."""
    peer_keyfile: Name | None = None
    """The private key of `peer_certfile` (PEM)."""
    peer_cafile: Name | None = None
    """The certificates (PEM) that sign those of the replicas."""
    api_keys: tuple[
        Annotated[
            Annotated[CallerKey, Tag(_PLAIN)] | Annotated[NamedKey, Tag(_NAMED)],
            Discriminator(_form_of_key),
        ],
        ...,
    ] = ()
    """Bearer keys of callers, 16 characters at least, separated by commas in the environment; or `api_keys_file`, a
    file of them; or `[[api_keys]]` tables of `name`, `key` (`key_file`, `key_sha256`) and `may`. Without any, only
    loopback is served."""
    cors_origins: tuple[Annotated[str, AfterValidator(_web_origin)], ...] = ()
    """Web origins whose pages may call; separated by commas in the environment."""
    trusted_proxies: tuple[Annotated[str, AfterValidator(_proxies)], ...] = ()
    """Proxies whose `X-Forwarded-For` or `Forwarded` names the caller in the log: addresses and networks, separated by
    commas in the environment. Needs `api_keys`; gives access to no caller."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_log_level)] = "info"
    """The least severe level that is logged: `debug`, `info`, `warning` or `error`."""
    log_format: Annotated[Literal["auto", "console", "json"], BeforeValidator(_lowercase)] = "auto"
    """`auto` is `console` on a terminal and `json`, one line for each event, elsewhere."""
    metrics_bind: Annotated[str, AfterValidator(_host_and_port)] | None = None
    """Where `/metrics` alone is served, without a key: `host:port`, one port for all workers; port 0 takes a free one.
    Unless set, `/metrics` is among the other calls, and wants a key that may read it."""
    access_log: Annotated[Literal["off", "on"], BeforeValidator(_lowercase)] = "off"
    """Whether each request has a line in the log."""

    store_url: Annotated[str, AfterValidator(checked_store_url), Field(repr=False)] = "sqlite:lastcall.db"
    """Where sessions are kept: `sqlite:path`, a file; `postgresql://user@host/database`; or `memory:`, gone with the
    process."""
    shutdowns_file: Name | None = None
    """The file that keeps the reports of past shutdowns, for `GET /admin/shutdowns`. Unless set, it is beside a SQLite
    database, as `lastcall.db-shutdowns`; with other stores there is none."""
    store_schema: Annotated[str, AfterValidator(checked_schema_name)] = "lastcall"
    """The schema of a PostgreSQL database in which the tables are; made if necessary."""
    store_timeout_s: PositiveSeconds = 5
    """How long one step of the store may take, and the acceptance of a turn or a fork as a whole."""
    checkpoint_interval_s: IntervalSeconds = 1
    """How often the replies of running turns are kept, in a store that outlives the process."""

    model_url: UpstreamUrl = "scripted:"
    """The model server (OpenAI-compatible, up to `/v1`), or `scripted:`, the embedded stand-in. It must be set with
    `api_keys`, and where other machines reach the server."""
    model: Name = "scripted"
    """The model of sessions and turns that name none. With `upstreams`, their first model unless set."""
    title_model: Name | None = None
    """The model that writes a title for a session without one, after its first turn; unless set, titles are the
    callers'."""
    model_api_key: Key | None = None
    """The key sent to `model_url`; or `model_api_key_file`, a file that holds it."""
    model_continuation: Continuation = "none"
    """How the model server is asked to go on with a reply that a stop or a crash has cut: `none` (it cannot: the reply
    begins anew), `trailing`, `prefix` or `final_message`. Which server takes which form: docs/upstreams.md."""
    upstreams: tuple[Upstream, ...] = ()
    """Several model servers in place of `model_url`: `[[upstreams]]` tables of `name`, `url`, `api_key` (or
    `api_key_file`), `models`, `continuation` and `prompt_bytes_max`, a table of the models that have a bound of their
    own."""
    model_retries_max: Annotated[int, Field(ge=0, le=10), BeforeValidator(_number)] = 2
    """How often an upstream's fault before the first token is retried."""
    upstream_words: Annotated[Literal["caller", "log", "both"], BeforeValidator(_lowercase)] = "caller"
    """Where an upstream's own error text goes, which may quote the conversation: into the `error.message` of the failed
    turn (`caller`), into the log (`log`), or into both."""
    hosted_tools: Annotated[Literal["leave_out", "refuse"], BeforeValidator(_lowercase)] = "leave_out"
    """What becomes of a tool in a request under `/v1` that is no function, such as `web_search`: it is left out, and
    the answer names it (`leave_out`), or the request is refused (`refuse`)."""

    idle_timeout_s: PositiveSeconds | None = None
    """A session that is unused for this time expires; 30 days, or 1800 with `memory:`. A session may choose its own."""
    expiry_interval_s: IntervalSeconds = 300
    """How often expired sessions are removed."""
    connect_timeout_s: PositiveSeconds = 5
    """How long connecting to an upstream may take."""
    first_token_timeout_s: PositiveSeconds = 120
    """How long the first token may take, from the request to the upstream on."""
    next_token_timeout_s: PositiveSeconds = 60
    """How long the next token may take; keep-alive comments do not count."""
    turn_timeout_s: PositiveSeconds = 600
    """How long a whole turn may take."""
    disconnect_grace_s: Seconds = 0
    """How long a turn runs on after its last client has left, unless it was started to `continue`."""
    on_interrupt: Annotated[Literal["fail", "retry", "continue"], BeforeValidator(_lowercase)] = "fail"
    """What becomes of a turn whose process stops or dies, unless its request says so itself: it ends as `interrupted`
    (`fail`), the model is asked anew (`retry`), or goes on after the text so far, where it can (`continue`)."""
    heartbeat_interval_s: IntervalSeconds = 15
    """After this time without an event a stream gets a comment."""
    body_timeout_s: PositiveSeconds = 30
    """How long a request's body may take to arrive."""
    unread_timeout_s: PositiveSeconds = 30
    """An answer of which the client takes no byte for this time is given up; so is one that is read at less than
    1 KiB a second, this time later. Event streams wait, but not those of the live tree, which have no resume."""

    live_turns_max: Count = 1000
    """Turns that run, are queued or are being accepted, in all sessions."""
    queued_turns_max: Count = 8
    """Turns queued in one session."""
    branches_max: Count = 8
    """Turns of one session that run at once, when one more with an ended `parent` is to run beside them."""
    memory_sessions_max: Count = 1_000_000
    """Sessions kept at once with `memory:`."""
    streams_max: Count = 10000
    """Event streams open at once."""
    input_bytes_max: Bytes = 256 * 1024
    """One turn's input, and a session's system message. Reading 256 KiB may hold up other requests for 10 ms. Under
    `/v1` an input may be larger: `history_bytes_max`."""
    history_bytes_max: Bytes | None = None
    """A request's body under `/v1/responses` and `/v1/chat/completions`, which may bring a whole conversation. 4 MiB
    unless set; less if that is more than a quarter of `held_bytes_max`, and no less than other calls take."""
    reply_bytes_max: Bytes = 1024 * 1024
    """One turn's reply, calls included."""
    log_bytes_max: LogBytes = 16 * 1024 * 1024
    """One turn's events in memory: their texts, and some bytes for each event."""
    prompt_bytes_max: Bytes = 512 * 1024
    """The prompt that is sent to a model: its texts, and 128 bytes for each turn; beyond it the oldest turns are left
    out. At least twice `input_bytes_max`."""
    held_bytes_max: HeldBytes = 256 * 1024 * 1024
    """All requests while they arrive, inputs of running turns that are larger than `input_bytes_max`, and all answers
    until they are read; beyond it 503. What holds up to 16 KiB has a quarter more. At least 8 times `input_bytes_max`
    and `reply_bytes_max`, and 4 times `history_bytes_max`."""

    lame_duck_timeout_s: Seconds = 0
    """Shutdown: readiness is 503, everything still works."""
    drain_timeout_s: Seconds = 2
    """Shutdown: running turns may finish; 20 and more in production."""
    cleanup_timeout_s: PositiveSeconds = 1
    """Shutdown: turns that still run are interrupted and stored."""
    release_timeout_s: PositiveSeconds = 1
    """Shutdown: streams end; connections, model clients and the store close."""
    shutdown_timeout_s: PositiveSeconds | None = None
    """How long a whole shutdown may take; the sum of its phases plus 1 s unless set."""

    @property
    def default_model(self) -> str:
        """The model of sessions and turns that name none."""
        if self.upstreams and "model" not in self.model_fields_set:
            return self.upstreams[0].models[0]
        return self.model

    def prompt_bytes_max_of(self, model: str) -> int:
        """The bound on prompts for a model: its own, or that of all models."""
        own = (it.prompt_bytes_max[model] for it in self.upstreams if model in it.prompt_bytes_max)
        return next(own, self.prompt_bytes_max)

    @property
    def body_bytes_max(self) -> int:
        """The bound on a request's body: every text within ``input_bytes_max`` fits, with any escapes.

        An escape makes at most six bytes of one (``\\u0041``). All other fields together fit in the constant; the
        largest is metadata with surrogate pairs.
        """
        return 6 * self.input_bytes_max + 128 * 1024

    @property
    def history_bytes(self) -> int:
        """The bound on a request's body that may bring a whole conversation: ``history_bytes_max``, or its default."""
        if self.history_bytes_max is not None:
            return self.history_bytes_max
        return max(min(4 * 1024 * 1024, self.held_bytes_max // 4), self.body_bytes_max)

    @property
    def default_idle_timeout_s(self) -> float:
        """The idle timeout of sessions that choose none."""
        if self.idle_timeout_s is not None:
            return self.idle_timeout_s
        return 30 * 24 * 3600 if self.store_capabilities.durable else 1800

    @property
    def store_scheme(self) -> str:
        """The kind of store that ``store_url`` names."""
        return store_scheme_of(self.store_url)

    @property
    def store_capabilities(self) -> StoreCapabilities:
        """What the store that ``store_url`` names can do."""
        return BY_SCHEME[self.store_scheme]

    @property
    def all_upstreams(self) -> tuple[Upstream, ...]:
        """The model servers, from ``upstreams`` or ``model_url``: never empty, names and models unique."""
        if self.upstreams:
            return self.upstreams
        return (
            Upstream(
                name="default",
                url=self.model_url,
                api_key=self.model_api_key,
                models=(self.model,),
                continuation=self.model_continuation,
            ),
        )

    @property
    def default_upstream(self) -> Upstream:
        """The model server of :attr:`default_model`."""
        return next(it for it in self.all_upstreams if self.default_model in it.models)

    @property
    def shutdown_total_s(self) -> float:
        """How long a shutdown may take: ``shutdown_timeout_s``, or the sum of its phases plus 1 s."""
        if self.shutdown_timeout_s is not None:
            return self.shutdown_timeout_s
        return self.lame_duck_timeout_s + self.drain_timeout_s + self.cleanup_timeout_s + self.release_timeout_s + 1

    _texts = field_validator("*", mode="before")(_text)

    @model_validator(mode="after")
    def _check_consistency(self) -> "Settings":
        if problems := list(self._inconsistencies()):
            raise ValueError("\n".join(problems))
        return self

    def _sizes_that_do_not_fit(self) -> Iterator[str]:
        bounds = [("prompt_bytes_max", self.prompt_bytes_max)]
        bounds += [
            (f"upstreams[{number}].prompt_bytes_max[{model!r}]", bytes_max)
            for number, upstream in enumerate(self.upstreams)
            for model, bytes_max in upstream.prompt_bytes_max.items()
        ]
        for name, bytes_max in bounds:
            if bytes_max < 2 * self.input_bytes_max:
                # The system message and the newest input are never left out. Each may be as long as input_bytes_max.
                yield (
                    f"{name} should be at least twice input_bytes_max: {bytes_max} is less than "
                    f"2 * {self.input_bytes_max}"
                )
        for name, size in (("input_bytes_max", self.input_bytes_max), ("reply_bytes_max", self.reply_bytes_max)):
            if self.held_bytes_max < 8 * size:  # in JSON a text has up to six bytes for each byte of it
                yield (
                    f"held_bytes_max should be at least 8 times {name}: {self.held_bytes_max} is less than 8 * {size}"
                )
        if self.history_bytes_max is not None and self.held_bytes_max < 4 * self.history_bytes_max:
            yield (
                f"held_bytes_max should be at least 4 times history_bytes_max: {self.held_bytes_max} is less than "
                f"4 * {self.history_bytes_max}"
            )

    def _keys_that_clash(self) -> Iterator[str]:
        """Two owners of one key, or two tables of one name. Plain keys may be there twice: they are all alike."""
        named = [key for key in self.api_keys if isinstance(key, NamedKey)]
        names = [key.name for key in named]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield (
                f"api_keys should not share a name: {', '.join(map(repr, twice))}; a second key of one name goes into "
                'the same table: key = ["…", "…"]'
            )
        for key in named:
            if not key.key and not key.key_sha256:
                yield f"api_keys of {key.name!r} should have a key, a key_file or a key_sha256"
        owners: dict[bytes, str] = {}
        for name, digest in (pair for key in self.api_keys for pair in digests_of(key)):
            first = owners.setdefault(digest, name)
            if first != name:
                both = " and ".join(repr(it) if it else "a plain key" for it in (first, name))
                yield f"api_keys should not share a key: {both} have the same"

    def _inconsistencies(self) -> Iterator[str]:
        yield from self._keys_that_clash()
        if self.bind.startswith("unix:") and not self.api_keys:
            # Without keys only this machine is served, and a Unix socket does not say where a request comes from.
            yield "api_keys should be set for a bind of unix:path, or every request would be refused"
        if self.trusted_proxies and not self.api_keys:
            # Without keys only this machine is served, and behind a proxy every caller seems to be on this machine.
            yield "api_keys should be set with trusted_proxies: without keys no proxy's request is served"
        if (self.tls_certfile is None) != (self.tls_keyfile is None):
            yield "tls_certfile and tls_keyfile should be set together"
        yield from self._peers_that_do_not_fit()
        yield from self._sizes_that_do_not_fit()
        yield from self._upstreams_that_do_not_fit()

    def _peers_that_do_not_fit(self) -> Iterator[str]:
        needed = {
            "peer_bind": self.peer_bind,
            "peer_certfile": self.peer_certfile,
            "peer_keyfile": self.peer_keyfile,
            "peer_cafile": self.peer_cafile,
        }
        given = needed | {"peer_url": self.peer_url}
        missing = [name for name, value in needed.items() if value is None]
        if missing and any(value is not None for value in given.values()):
            yield f"{' and '.join(missing)} should be set, too: the settings peer_* belong together"
        elif self.peer_bind is not None and self.peer_url is None:
            host, _ = split_host_port(self.peer_bind)
            if _is_every_interface(host):
                yield (
                    f"peer_url should be set (tls://host:port): no other replica reaches this one at {self.peer_bind}"
                )

    def _upstreams_that_do_not_fit(self) -> Iterator[str]:
        given = self.model_fields_set
        if not self.upstreams:
            if not self.model_url.startswith("scripted:") and "model" not in given:
                yield f"model should be set: a model that {shown_url(self.model_url)} serves"
            yield from _continuation_of_a_script(self.default_upstream, "model_continuation")
            return
        if clash := sorted({"model_url", "model_api_key", "model_continuation"} & given):
            yield f"{' and '.join(clash)} should not be set together with upstreams"
        for what, names in (
            ("name", [it.name for it in self.upstreams]),
            ("model", [model for it in self.upstreams for model in it.models]),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                yield f"upstreams should not share a {what}: {', '.join(map(repr, twice))}"
        for number, upstream in enumerate(self.upstreams):
            yield from _continuation_of_a_script(upstream, f"upstreams[{number}].continuation")
            if others := sorted(upstream.prompt_bytes_max.keys() - set(upstream.models)):
                yield (
                    f"upstreams[{number}].prompt_bytes_max should only name models of this upstream: "
                    f"{', '.join(map(repr, others))}"
                )
        if not any(self.default_model in it.models for it in self.upstreams):
            yield f"model {self.model!r} should be one that an upstream serves"
        if self.title_model is not None and not any(self.title_model in it.models for it in self.upstreams):
            yield f"title_model {self.title_model!r} should be one that an upstream serves"


def _continuation_of_a_script(upstream: Upstream, name: str) -> Iterator[str]:
    if upstream.url.startswith("scripted:") and upstream.continuation != "none":
        yield f"{name} should be left out for a scripted: URL, which says it itself: scripted:?continues=false"


def digest_of(key: str) -> bytes:
    """The form in which a caller's key is kept and compared."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def secrets_of(entry: SecretStr | NamedKey) -> tuple[SecretStr, ...]:
    """The secrets of one entry of ``api_keys``."""
    return (entry,) if isinstance(entry, SecretStr) else (*entry.key, *entry.key_sha256)


def digests_of(entry: SecretStr | NamedKey) -> list[tuple[str, bytes]]:
    """The digests of the keys of one entry of ``api_keys``, each with its name, which is empty for a plain key."""
    if isinstance(entry, SecretStr):
        return [("", digest_of(entry.get_secret_value()))]
    hashed = [bytes.fromhex(it.get_secret_value()) for it in entry.key_sha256]
    return [(entry.name, digest) for digest in [*(digest_of(it.get_secret_value()) for it in entry.key), *hashed]]


_TYPE_OF_TABLE: dict[str, type[BaseModel]] = {"api_keys": NamedKey, "upstreams": Upstream}
_SECRETS_AT_THE_TOP = SECRETS & Settings.model_fields.keys()


def split_host_port(bind: str) -> tuple[str, str]:
    """The host, without brackets, and the port of ``host:port`` or ``[address]:port``; both empty for other texts."""
    found = re.fullmatch(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\s:\[\]/]+)):(?P<port>[^:]*)", bind)
    return (found["v6"] or found["host"], found["port"]) if found else ("", "")


def reaches_beyond_loopback(bind: str) -> bool:
    """Whether other machines may reach this address. A name other than localhost counts as reachable."""
    if bind.startswith("unix:"):
        return False
    host, _ = split_host_port(bind)
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def check_stand_in(settings: Settings, *, binds: Iterable[str]) -> None:
    """Refuse a start in which the embedded stand-in would answer other people because no model server is named.

    Settings get lost: the file of the environment was not read, or the working directory is another one. The unnamed
    stand-in is for a first try on this machine; elsewhere an operator must ask for the stand-in by its name.

    Args:
        binds: Where the server listens: ``host:port`` or ``unix:path``.

    Raises:
        SettingsError: No model server is named, and callers have keys or come from other machines.
    """
    if settings.upstreams or "model_url" in settings.model_fields_set:
        return
    reached = next(filter(reaches_beyond_loopback, binds), None)
    if settings.api_keys or reached is not None:
        why = "api_keys are set" if settings.api_keys else f"other machines reach {reached}"
        raise SettingsError(
            f"model_url should be set (LASTCALL_MODEL_URL): {why}, and without it an embedded stand-in would answer "
            "in a model's place; scripted: asks for the stand-in by its name"
        )


def load_settings(**overrides: str) -> Settings:
    """The settings of this process: ``overrides`` (the command line) over the environment, the file and the defaults.

    Raises:
        SettingsError: The text names every problem, one on each line.
    """
    return read_sources(**overrides).settings()


@dataclass(frozen=True)
class Sources:
    """Values of settings and their sources: ``origins`` has the variable, option or file of each name in ``values``.

    ``problems`` has what is wrong with files of secrets, which are read before the values are checked. ``key_files``
    are the files of callers' keys.
    """

    file: Path
    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    key_files: set[Path] = field(default_factory=set)

    def add(self, origin: str, name: str, value: object) -> None:
        self.values[name], self.origins[name] = value, origin
        self.problems.pop(name, None)  # this source overrides the one with the problem

    def add_layer(self, layer: Mapping[str, tuple[str, object]]) -> None:
        """Add the values of one source, ``name: (origin, value)``; they override those of earlier sources."""
        for name, (origin, value) in layer.items():
            secret = name.removesuffix(FILE_SUFFIX)
            if secret in _SECRETS_AT_THE_TOP and name != secret:
                self._add_secret_file(origin, secret, value, beside=secret in layer)
            elif name in _SECRETS_AT_THE_TOP and name + FILE_SUFFIX in layer:
                continue  # the file's name is refused
            elif name in _TABLES and isinstance(value, list):
                tables = [self._with_key(it, _TABLES[name], f"{origin}: {name}[{n}]") for n, it in enumerate(value)]
                self.add(origin, name, tables)
            else:
                self.add(origin, name, value)

    def _add_secret_file(self, origin: str, name: str, path: object, *, beside: bool) -> None:
        where = origin if origin.startswith(ENV_PREFIX) else f"{origin}: {name}{FILE_SUFFIX}"
        self.add(where, name, None)
        try:
            self.values[name] = self._read_secret(name, path, beside=beside)
        except ValueError as error:
            del self.values[name]
            self.problems[name] = f"{where}: {error}"

    def _with_key(self, table: object, secret: str, where: str) -> object:
        """The table of an upstream or of a caller, with its key from the file that it names."""
        if not isinstance(table, dict) or (name := f"{secret}{FILE_SUFFIX}") not in table:
            return table
        others = {key: value for key, value in table.items() if key != name}
        try:
            return others | {secret: self._read_secret(secret, table[name], beside=secret in table)}
        except ValueError as error:
            self.problems[where] = f"{where}.{name}: {error}"
            return others

    def _read_secret(self, name: str, path: object, *, beside: bool) -> object:
        if name in _KEYS_OF_CALLERS and isinstance(path, str):
            self.key_files.add(Path(path))
        return _read_secret(name, path, beside=beside)

    def settings(self) -> Settings:
        """Raises: SettingsError."""
        problems = list(self.problems.values())
        try:
            settings = Settings.model_validate(self.values)
            if not problems:
                return settings
        except InvalidSettings as error:
            problems += self._problems(error)
        raise SettingsError("\n".join(problems))

    def _problems(self, error: InvalidSettings) -> Iterator[str]:
        for detail in error.errors():
            if not detail["loc"] and self.problems:
                continue  # a secret that could not be read would seem not to be set
            if not detail["loc"]:
                yield from str(detail["ctx"]["error"]).splitlines()
                continue
            name, *path = detail["loc"] = tuple(part for part in detail["loc"] if part not in (_PLAIN, _NAMED))
            of_variable = self.origins[str(name)].startswith(ENV_PREFIX)
            yield f"{self.place(str(name), *path)}: {_complaint(detail, of_variable=of_variable)}"

    def place(self, name: str, *path: int | str) -> str:
        """The place where an operator corrects a setting, or a part of it."""
        origin = self.origins[name]
        told = origin.startswith((ENV_PREFIX, "--")) or origin.endswith(f": {name}{FILE_SUFFIX}")
        where = origin if told else f"{origin}: {name}"
        return where + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def read_sources(environ: Mapping[str, str] | None = None, /, **overrides: str) -> Sources:
    """Collect the settings of the file, the environment and the command line; a later source overrides an earlier one.

    An empty variable counts as not set. Space around a value is removed, because a value from a file has a line end.
    Variables that Kubernetes or Docker made are ignored (:func:`ignored_variables`). Each secret may be in a file
    that ``<name>_file`` names.

    Raises:
        SettingsError: The file cannot be read or is not TOML.
    """
    environ = os.environ if environ is None else environ
    named = environ.get(CONFIG_FILE_VARIABLE)
    file = named or CONFIG_FILE
    sources = Sources(Path(file))
    read = _read_file(sources.file, must_exist=bool(named))
    sources.add_layer({name: (file, value) for name, value in read.items()})
    variables: dict[str, tuple[str, object]] = {}
    not_ours = {CONFIG_FILE_VARIABLE, *CLIENT_VARIABLES, *ignored_variables(environ)}
    if not any(it in read or environ.get(ENV_PREFIX + it.upper()) for it in ("api_keys", "api_keys_file")):
        # A client's key beside a server without keys is more likely a mistyped setting.
        not_ours -= {KEY_VARIABLE, KEY_FILE_VARIABLE}
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in not_ours and environ[variable]:
            spelt = variable.encode(errors="backslashreplace").decode()  # an error text must be able to show it
            name = spelt.removeprefix(ENV_PREFIX)
            name = name.lower() if name == name.upper() else spelt  # lastcall_bind and LASTCALL_bind are not read
            variables[name] = (spelt, _split_list(name, environ[variable].strip()))
    sources.add_layer(variables)
    for name, value in overrides.items():
        sources.add(f"--{OPTIONS[name]}", name, value)
    return sources


def standard_variables(prefix: str) -> Mapping[str, str]:
    """The variables of the environment that another standard has named, such as OpenTelemetry's ``OTEL_``."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}


def ignored_variables(environ: Mapping[str, str] | None = None, /) -> list[str]:
    """Variables with our prefix that are no settings: Kubernetes or Docker made them from the name of a service."""
    made = made_by_links(os.environ if environ is None else environ, ENV_PREFIX)
    return sorted(it for it in made if it.removeprefix(ENV_PREFIX).lower() not in Settings.model_fields)


def _read_file(path: Path, *, must_exist: bool) -> dict[str, object]:
    try:
        if not S_ISREG(path.stat().st_mode):  # reading a pipe would wait for a writer
            raise SettingsError(f"{path} cannot be read: it is not a regular file")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a BOM
    except FileNotFoundError:
        if must_exist:
            raise SettingsError(f"{CONFIG_FILE_VARIABLE} names {path}, which is not there") from None
        return {}
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise SettingsError(f"{path} is not UTF-8: it begins with the BOM of UTF-16; save it as UTF-8") from None
        raise SettingsError(f"{path} is not TOML: {error}") from None
    except ValueError as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise SettingsError(f"{path} cannot be read: it is nested too deeply") from None


def _read_secret(name: str, path: object, *, beside: bool) -> object:
    """The secret in a file, or the list of them: separated by commas or line ends.

    The path is not told: people put the secret itself in its place.

    Args:
        beside: The source of the path has the secret itself, too.

    Raises:
        ValueError: What is wrong with it.
    """
    if beside:
        raise ValueError(f"should not be set together with {name}")
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError("should be the path of a file")
    try:
        if not S_ISREG(Path(path).stat().st_mode):
            raise ValueError("names something other than a regular file")
        with Path(path).open("rb") as file:
            held = file.read(SECRET_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(f"names a file that cannot be read: {error.strerror}") from None
    if len(held) > SECRET_FILE_BYTES_MAX:
        raise ValueError(f"names a file of more than {SECRET_FILE_BYTES_MAX} bytes")
    try:
        text = held.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("names a file that is not UTF-8") from None
    if not (parts := [part.strip() for part in re.split(r"[,\r\n]", text) if part.strip()]):
        raise ValueError("names a file without a key in it")
    return parts if name in _KEYS_OF_CALLERS else text


def _split_list(name: str, text: str) -> object:
    known = Settings.model_fields.get(name)
    if known is None or get_origin(known.annotation) is not tuple or name == "upstreams":
        return text
    return [part.strip() for part in text.split(",")]


def _complaint(detail: ErrorDetails, *, of_variable: bool) -> str:
    """The error text for one value: the value and what is allowed. Shows no secret, and no value of an unknown name."""
    names = [part for part in detail["loc"] if isinstance(part, str)]
    if detail["type"] == "extra_forbidden":
        known = _TYPE_OF_TABLE[names[0]] if len(names) > 1 else Settings
        if of_variable and names[-1] in ("api_key", "api_key_file"):
            return "is what clients send; the keys that this server accepts are LASTCALL_API_KEYS"
        meant = get_close_matches(names[-1].removeprefix(ENV_PREFIX).lower(), known.model_fields, n=1)
        spelt = [ENV_PREFIX + it.upper() if of_variable else it for it in meant]
        return f"is not a setting; did you mean {spelt[0]}?" if spelt else "is not a setting"
    if detail["type"] == "missing":
        return "is missing"
    if names == ["upstreams"]:
        return "should be at least one [[upstreams]] table of the file"
    if names[:2] == ["upstreams", "prompt_bytes_max"]:
        names = names[:2]  # the last name is that of a model
    value = detail["input"]
    if names[-1] in ("url", "model_url") and isinstance(value, str):
        value = shown_url(value)
    is_url = names[-1].endswith("url")
    secret = names[-1] in SECRETS or (is_url and ("@" in str(value) or str(value).startswith("postgres")))
    shown = isinstance(value, str | int | float) and not secret
    return f"{_shown(value)} {_allowed(names[-1], detail)}" if shown else _allowed(names[-1], detail)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as TOML writes it
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print a number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}… ({len(text)} characters)"


def _allowed(name: str, detail: ErrorDetails) -> str:
    if detail["type"] == "value_error" and not isinstance(detail["input"], bool):
        return str(detail["ctx"]["error"])
    if detail["type"] == "dict_type":
        return "should be a table of models, such as { small = 1048576 }"
    if detail["type"] == "tuple_type" and name not in _LISTS:
        return "should be a string, or a list of strings"
    if detail["type"] == "tuple_type":
        return f"should be a list of strings, such as {_LISTS[name]}"
    field_schema: dict[str, Any] = Settings.model_json_schema()["properties"].get(name, {})
    schema = field_schema.get("anyOf", [field_schema])[0]
    if "maximum" not in schema:
        return detail["msg"][detail["msg"].find("should") :].replace("a valid string", "a string")
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    least = f"of at least {schema['minimum']}" if "minimum" in schema else f"above {schema['exclusiveMinimum']}"
    return f"should be {kind} {least}, at most {schema['maximum']}"
