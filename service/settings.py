"""Settings: one frozen object, read once. ``LASTCALL_*`` over ``lastcall.toml`` over the defaults.

Only this module reads the environment.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Seconds = Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Bytes = Annotated[int, Field(ge=1024, le=1 << 30)]


class Upstream(BaseModel):
    """One ``[[upstreams]]`` table: a model server and the models it serves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    url: str
    api_key: SecretStr | None = None
    models: tuple[str, ...] = Field(min_length=1)


class Settings(BaseSettings):
    """All settings. Seconds are relative; ``*_max`` are bounds that are never passed."""

    model_config = SettingsConfigDict(env_prefix="LASTCALL_", frozen=True, extra="forbid")

    bind: str = "127.0.0.1:8000"
    tls_certfile: str | None = None
    tls_keyfile: str | None = None
    api_keys: tuple[SecretStr, ...] = ()
    cors_origins: tuple[str, ...] = ()
    log_level: str = "info"
    log_format: str = "auto"

    store_url: str = "memory:"
    store_timeout_s: PositiveSeconds = 5

    model_url: str = "scripted:"
    model: str = "scripted"
    model_api_key: SecretStr | None = None
    upstreams: tuple[Upstream, ...] = ()
    model_retries_max: int = Field(default=2, ge=0, le=10)

    idle_timeout_s: PositiveSeconds = 1800
    expiry_interval_s: PositiveSeconds = 300
    connect_timeout_s: PositiveSeconds = 5
    first_token_timeout_s: PositiveSeconds = 120
    next_token_timeout_s: PositiveSeconds = 60
    turn_timeout_s: PositiveSeconds = 600
    disconnect_grace_s: Seconds = 0
    heartbeat_interval_s: PositiveSeconds = 15
    body_timeout_s: PositiveSeconds = 30

    live_turns_max: Count = 1000
    queued_turns_max: Count = 8
    streams_max: Count = 10000
    input_bytes_max: Bytes = 256 * 1024
    reply_bytes_max: Bytes = 1024 * 1024
    log_bytes_max: Bytes = 16 * 1024 * 1024
    prompt_bytes_max: Bytes = 512 * 1024

    lame_duck_timeout_s: Seconds = 0
    drain_timeout_s: Seconds = 2
    cleanup_timeout_s: PositiveSeconds = 1
    release_timeout_s: PositiveSeconds = 1
    shutdown_timeout_s: PositiveSeconds | None = None

    @property
    def shutdown_total_s(self) -> float:
        """The most a shutdown may take: ``shutdown_timeout_s``, or the sum of its phases plus 1 s."""
        if self.shutdown_timeout_s is not None:
            return self.shutdown_timeout_s
        return (
            self.lame_duck_timeout_s + self.drain_timeout_s + self.cleanup_timeout_s + self.release_timeout_s + 1
        )
