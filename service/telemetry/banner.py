"""The first words of a started server: where it is, what it runs on, one call to try."""

from collections.abc import Sequence

import structlog

from service import __version__
from service.settings import Settings, reaches_beyond_loopback, split_host_port
from service.telemetry.logging import Log

logger = structlog.get_logger("lastcall")


def announce(log: Log, settings: Settings, *, binds: Sequence[str], store: str) -> None:
    """Say that the server serves: a text to people, an event to machines.

    Args:
        binds: The addresses in use, ``host:port`` with the real port, or ``unix:path``.
        store: What the store calls itself.
    """
    if log.for_people:
        log.writer.write(banner(settings, binds=binds, store=store))
        return
    urls = [_url(settings, bind) for bind in binds]
    logger.info(
        "serving",
        urls=urls,
        model=settings.default_model,
        model_url=settings.default_upstream.url,
        store=store,
        version=__version__,
    )
    for warning in _warnings(settings, binds):
        logger.warning(warning)


def banner(settings: Settings, *, binds: Sequence[str], store: str) -> str:
    """The text for people."""
    upstream = settings.default_upstream
    rows = [
        ("serves", ", ".join(_url(settings, bind) for bind in binds)),
        ("model", f"{settings.default_model} at {upstream.url}"),
    ]
    if upstream.url.startswith("scripted:"):
        rows += [
            ("", "a stand-in, not a model: its replies are made up. Name a real model with"),
            ("", "LASTCALL_MODEL_URL, LASTCALL_MODEL and LASTCALL_MODEL_API_KEY."),
        ]
    rows += [("store", store), ("docs", f"{_url(settings, binds[0])}/docs"), ("try", _curl(settings, binds[0]))]
    rows += [("caution", warning) for warning in _warnings(settings, binds)]
    return "\n".join([f"\nLastcall {__version__}", *(f"  {name:<8} {text}" for name, text in rows), "", ""])


def _url(settings: Settings, bind: str) -> str:
    if bind.startswith("unix:"):
        return bind
    return f"{'https' if settings.tls_certfile else 'http'}://{bind}"


def _curl(settings: Settings, bind: str) -> str:
    if bind.startswith("unix:"):
        target = f"--unix-socket {bind.removeprefix('unix:')} http://localhost/chat"
    else:
        host, port = split_host_port(bind)
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        target = f"{_url(settings, f'{host}:{port}')}/chat"
    key = "-H 'Authorization: Bearer KEY' " if settings.api_keys else ""
    return f"""curl -N {target} {key}-H 'Content-Type: application/json' -d '{{"message": "Hello!"}}'"""


def _warnings(settings: Settings, binds: Sequence[str]) -> list[str]:
    if settings.api_keys or not any(map(reaches_beyond_loopback, binds)):
        return []
    return ["no api_keys are set: only requests from this machine are answered (LASTCALL_API_KEYS)"]
