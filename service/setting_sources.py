"""Where settings come from: the file, the environment, the command line and files of secrets.

Only this module and :mod:`service.client_settings` read the environment. An unknown name is refused, so a mistyped
setting never falls back to a default in silence. One error text names every wrong setting, each with its value and the
values that are allowed.
"""

import codecs
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from stat import S_ISREG
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic import ValidationError as InvalidSettings
from pydantic_core import ErrorDetails

from service.client_settings import (
    CLIENT_VARIABLES,
    CONFIG_FILE,
    CONFIG_FILE_VARIABLE,
    KEY_FILE_VARIABLE,
    KEY_VARIABLE,
    SECRET_FILE_BYTES_MAX,
)
from service.errors import SettingsError
from service.service_links import made_by_links
from service.setting_types import EXAMPLES_OF_LISTS, shown_url
from service.settings import NAMED, PLAIN, NamedKey, Settings, Upstream

ENV_PREFIX = "LASTCALL_"
OPTIONS = {"bind": "bind", "store_url": "store"}
"""Settings that the command line may say, and what its option is called."""
SECRETS = frozenset({"api_key", "api_keys", "key", "key_sha256", "model_api_key"})
"""Settings whose values are never shown."""
FILE_SUFFIX = "_file"
"""``api_keys_file`` in place of ``api_keys``, and so for each secret: the value is read from that file."""
_KEYS_OF_CALLERS = ("api_keys", "key")
"""Secrets of which a file may hold several."""
_TABLES = {"api_keys": "key", "upstreams": "api_key"}
"""Settings that are lists of tables, and the secret in each table. It may be in a file, too: ``key_file``."""
SHOWN_MAX = 100
"""The longest value, in characters, that an error text shows in full."""
_TYPE_OF_TABLE: dict[str, type[BaseModel]] = {"api_keys": NamedKey, "upstreams": Upstream}
_SECRETS_AT_THE_TOP = SECRETS & Settings.model_fields.keys()


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
            name, *path = detail["loc"] = tuple(part for part in detail["loc"] if part not in (PLAIN, NAMED))
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
    if detail["type"] == "tuple_type" and name not in EXAMPLES_OF_LISTS:
        return "should be a string, or a list of strings"
    if detail["type"] == "tuple_type":
        return f"should be a list of strings, such as {EXAMPLES_OF_LISTS[name]}"
    field_schema: dict[str, Any] = Settings.model_json_schema()["properties"].get(name, {})
    schema = field_schema.get("anyOf", [field_schema])[0]
    if "maximum" not in schema:
        return detail["msg"][detail["msg"].find("should") :].replace("a valid string", "a string")
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    least = f"of at least {schema['minimum']}" if "minimum" in schema else f"above {schema['exclusiveMinimum']}"
    return f"should be {kind} {least}, at most {schema['maximum']}"
