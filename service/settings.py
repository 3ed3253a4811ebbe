"""Settings: one frozen object, read once. ``LASTCALL_*`` over ``lastcall.toml`` over the defaults.

What each value may be: :mod:`service.setting_types`. Where the values come from: :mod:`service.setting_sources`.
Whether the settings fit together is checked here, when each single setting is right.
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    SecretStr,
    Tag,
    field_validator,
    model_validator,
)

from service.client_settings import DEFAULT_BIND
from service.errors import SettingsError
from service.setting_types import (
    AnyCase,
    Bytes,
    CallerKey,
    Continuation,
    Count,
    HeldBytes,
    HostAndPort,
    IntervalSeconds,
    Key,
    ListenAddress,
    LogBytes,
    LogLevel,
    ModelNames,
    Name,
    OneOrMore,
    OwnerName,
    PeerUrl,
    Permissions,
    PositiveSeconds,
    Proxy,
    Retries,
    SchemaName,
    Seconds,
    Sha256,
    StoreUrl,
    UpstreamUrl,
    WebOrigin,
    checked_text,
    is_every_interface,
    reaches_beyond_loopback,
    shown_url,
    split_host_port,
    store_scheme_of,
)
from service.store_capabilities import BY_SCHEME, StoreCapabilities

PLAIN, NAMED = "a plain key", "a named key"
"""The forms of an entry of ``api_keys``. Pydantic has these tags in the place of an error."""


def _form_of_key(value: object) -> str:
    return NAMED if isinstance(value, dict | NamedKey) else PLAIN


class NamedKey(BaseModel):
    """One ``[[api_keys]]`` table: the keys of one caller, the name of that caller, and what it may do."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: OwnerName
    key: Annotated[tuple[CallerKey, ...], OneOrMore] = ()
    key_sha256: Annotated[tuple[Sha256, ...], OneOrMore] = ()
    may: Permissions = ("talk", "read")

    _texts = field_validator("*", mode="before")(checked_text)


class Upstream(BaseModel):
    """One ``[[upstreams]]`` table: a model server and the models it serves."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Name
    url: UpstreamUrl
    api_key: Key | None = None
    models: ModelNames
    prompt_bytes_max: dict[Name, Bytes] = {}
    continuation: Continuation = "none"

    _texts = field_validator("*", mode="before")(checked_text)


class Settings(BaseModel):
    """All settings. ``*_s`` are durations in seconds; ``*_max`` are bounds that are never passed.

    The constructor reads neither the environment nor a file: :mod:`service.setting_sources` does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    bind: ListenAddress = DEFAULT_BIND
    """Where to listen: `host:port`, `[::1]:8000` or, with `api_keys`, `unix:path`; port 0 takes a free one. Bare
    hypercorn has its own `--bind` instead."""
    tls_certfile: Name | None = None
    """Certificate chain (PEM); together with `tls_keyfile`. Bare hypercorn has its own `--certfile` instead."""
    tls_keyfile: Name | None = None
    """The certificate's private key (PEM). Bare hypercorn has its own `--keyfile` instead."""
    peer_bind: HostAndPort | None = None
    """Where to listen for the other replicas of a PostgreSQL store: `host:port`, one port for all workers, with TLS and
    the three files below. Unless set, requests are forwarded within one machine only."""
    peer_url: PeerUrl | None = None
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
            Annotated[CallerKey, Tag(PLAIN)] | Annotated[NamedKey, Tag(NAMED)],
            Discriminator(_form_of_key),
        ],
        ...,
    ] = ()
    """Bearer keys of callers, 16 characters at least, separated by commas in the environment; or `api_keys_file`, a
    file of them; or `[[api_keys]]` tables of `name`, `key` (`key_file`, `key_sha256`) and `may`. Without any, only
    loopback is served."""
    cors_origins: tuple[WebOrigin, ...] = ()
    """Web origins whose pages may call; separated by commas in the environment."""
    trusted_proxies: tuple[Proxy, ...] = ()
    """Proxies whose `X-Forwarded-For` or `Forwarded` names the caller in the log: addresses and networks, separated by
    commas in the environment. Needs `api_keys`; gives access to no caller."""
    log_level: LogLevel = "info"
    """The least severe level that is logged: `debug`, `info`, `warning` or `error`."""
    log_format: Annotated[Literal["auto", "console", "json"], AnyCase] = "auto"
    """`auto` is `console` on a terminal and `json`, one line for each event, elsewhere."""
    metrics_bind: HostAndPort | None = None
    """Where `/metrics` alone is served, without a key: `host:port`, one port for all workers; port 0 takes a free one.
    Unless set, `/metrics` is among the other calls, and wants a key that may read it."""
    access_log: Annotated[Literal["off", "on"], AnyCase] = "off"
    """Whether each request has a line in the log."""

    store_url: StoreUrl = "sqlite:lastcall.db"
    """Where sessions are kept: `sqlite:path`, a file; `postgresql://user@host/database`; or `memory:`, gone with the
    process."""
    shutdowns_file: Name | None = None
    """The file that keeps the reports of past shutdowns, for `GET /admin/shutdowns`. Unless set, it is beside a SQLite
    database, as `lastcall.db-shutdowns`; with other stores there is none."""
    store_schema: SchemaName = "lastcall"
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
    model_retries_max: Retries = 2
    """How often an upstream's fault before the first token is retried."""
    upstream_words: Annotated[Literal["caller", "log", "both"], AnyCase] = "caller"
    """Where an upstream's own error text goes, which may quote the conversation: into the `error.message` of the failed
    turn (`caller`), into the log (`log`), or into both."""
    hosted_tools: Annotated[Literal["leave_out", "refuse"], AnyCase] = "leave_out"
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
    on_interrupt: Annotated[Literal["fail", "retry", "continue"], AnyCase] = "fail"
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

    _texts = field_validator("*", mode="before")(checked_text)

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
            if is_every_interface(host):
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
