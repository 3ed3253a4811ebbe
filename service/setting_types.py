"""The types of settings: what each value may be, and the texts that say so.

Pydantic puts the name and the value of a setting before each text. URLs of stores and model servers are shown here as
well: without the secrets that they hold.
"""

import os
import re
from ipaddress import IPv6Network, ip_address, ip_network
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from service.errors import StartupError
from service.ids import is_owner_name

Permission = Literal["talk", "read", "administer", "metrics"]
"""What a key may do: see :mod:`service.api.http.callers`."""
UNIX_PEERS = "unix:"
"""An entry of ``trusted_proxies``: every peer that connects through a Unix socket."""
MASK = "********"
"""The text that is shown in place of a secret."""
CALLER_KEY_LENGTH_MIN = 16
"""Bound below which a key of callers could be found by trying."""
EXAMPLES_OF_LISTS = {
    "api_keys": '["first-key-0123456789", "second-key-0123456789"]',
    "cors_origins": '["https://app.example.org"]',
    "may": '["talk", "read"]',
    "models": '["small", "large"]',
    "trusted_proxies": '["10.0.0.0/8"]',
}
"""Examples of settings that are lists of strings, as written in the file."""
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


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("is not a number")  # noqa: TRY004  pydantic reports a ValueError, and raises a TypeError
    return value


def checked_text(value: object) -> object:
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


def _listen_address(text: str) -> str:
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
    if not (text.startswith("tls://") and is_port and host) or is_every_interface(host):
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


def is_every_interface(host: str) -> bool:
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
        raise ValueError(f"should be at least one, such as {EXAMPLES_OF_LISTS['models']}")
    return names


Seconds = Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False), BeforeValidator(_number)]
PositiveSeconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False), BeforeValidator(_number)]
# The lower bound keeps the loop with this interval from taking a whole core.
IntervalSeconds = Annotated[float, Field(ge=0.1, le=31_536_000, allow_inf_nan=False), BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1, le=10_000_000), BeforeValidator(_number)]
Retries = Annotated[int, Field(ge=0, le=10), BeforeValidator(_number)]
Bytes = Annotated[int, Field(ge=1024, le=1 << 30), BeforeValidator(_number)]
# The lower bound is well above the room that a log reserves for its terminal event, so that other events fit, too.
HeldBytes = Annotated[int, Field(ge=1024 * 1024, le=1 << 40), BeforeValidator(_number)]
LogBytes = Annotated[int, Field(ge=64 * 1024, le=1 << 30), BeforeValidator(_number)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
ModelNames = Annotated[tuple[Name, ...], AfterValidator(_models)]
OwnerName = Annotated[str, AfterValidator(_owner_name)]
Permissions = Annotated[tuple[Permission, ...], AfterValidator(_permissions)]
ListenAddress = Annotated[str, AfterValidator(_listen_address)]
HostAndPort = Annotated[str, AfterValidator(_host_and_port)]
PeerUrl = Annotated[str, AfterValidator(_peer_url)]
WebOrigin = Annotated[str, AfterValidator(_web_origin)]
Proxy = Annotated[str, AfterValidator(_proxies)]
StoreUrl = Annotated[str, AfterValidator(checked_store_url), Field(repr=False)]
SchemaName = Annotated[str, AfterValidator(checked_schema_name)]
Key = Annotated[SecretStr, AfterValidator(_key)]
CallerKey = Annotated[Key, AfterValidator(_caller_key)]
Sha256 = Annotated[SecretStr, AfterValidator(_sha256)]
UpstreamUrl = Annotated[str, AfterValidator(_upstream_url)]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_log_level)]
AnyCase = BeforeValidator(_lowercase)
"""Of a setting that is one of some words: capital letters are taken as small ones."""
OneOrMore = BeforeValidator(_several)
"""Of a setting that is a list: one value stands for a list of it."""
Continuation = Annotated[Literal["none", "trailing", "prefix", "final_message"], AnyCase]
"""How a model server is asked to go on with a reply: :data:`service.models.continuation.Form`."""
