"""The banner of a started server: its addresses, its model and store, and one call to try."""

from collections.abc import Collection, Sequence

import structlog

from service import __version__
from service.setting_types import reaches_beyond_loopback, shown_url, split_host_port
from service.settings import Settings
from service.telemetry.logging import Log

logger = structlog.get_logger("lastcall")

STAND_IN = "the model is a stand-in; name a real one with LASTCALL_MODEL_URL, LASTCALL_MODEL and LASTCALL_MODEL_API_KEY"
NO_KEYS = "no api_keys are set, so only requests from this machine are answered (LASTCALL_API_KEYS)"


def announce(
    log: Log, settings: Settings, *, binds: Sequence[str], secure: Collection[str] | None = None, store: str
) -> None:
    """Announce that the server serves: a text for people, an event for machines.

    Args:
        binds: The addresses in use, ``host:port`` with the real port, or ``unix:path``.
        secure: The addresses that speak TLS. None takes them from the settings.
        store: The name that the store gives itself.
    """
    if log.is_console:
        log.writer.write(banner(settings, binds=binds, secure=secure, store=store))
        return
    secure = _secure(settings, binds, secure)
    urls = [_url(bind, secure) for bind in binds]
    model = {"model": settings.default_model, "model_url": shown_url(settings.default_upstream.url)}
    attempt = _curl(settings, binds[0], secure)
    logger.info("serving", urls=urls, **model, store=store, version=__version__, attempt=attempt)
    if _is_stand_in(settings):
        logger.info(STAND_IN)
    if _is_open_without_keys(settings, binds):
        logger.warning(NO_KEYS)


def banner(settings: Settings, *, binds: Sequence[str], secure: Collection[str] | None = None, store: str) -> str:
    """Return the banner for people."""
    secure = _secure(settings, binds, secure)
    rows = [
        ("serves", ", ".join(_url(bind, secure) for bind in binds)),
        ("model", f"{settings.default_model} at {shown_url(settings.default_upstream.url)}"),
        ("note", STAND_IN if _is_stand_in(settings) else None),
        ("store", store),
        ("docs", f"{_url(binds[0], secure)}/docs"),
        ("try", _curl(settings, binds[0], secure)),
        ("caution", NO_KEYS if _is_open_without_keys(settings, binds) else None),
    ]
    lines = [f"  {name:<8} {text}" for name, text in rows if text is not None]
    return "\n".join(["", f"Lastcall {__version__}", *lines, "", ""])


def _is_stand_in(settings: Settings) -> bool:
    return settings.default_upstream.url.startswith("scripted:")


def _is_open_without_keys(settings: Settings, binds: Sequence[str]) -> bool:
    return not settings.api_keys and any(map(reaches_beyond_loopback, binds))


def _secure(settings: Settings, binds: Sequence[str], secure: Collection[str] | None) -> Collection[str]:
    if secure is not None:
        return secure
    return binds if settings.tls_certfile else ()


def _url(bind: str, secure: Collection[str]) -> str:
    if bind.startswith("unix:"):
        return bind
    return f"{'https' if bind in secure else 'http'}://{bind}"


def _curl(settings: Settings, bind: str, secure: Collection[str]) -> str:
    if bind.startswith("unix:"):
        target = f"--unix-socket {bind.removeprefix('unix:')} http://localhost/chat"
    else:
        scheme = "https" if bind in secure else "http"
        host, port = split_host_port(bind)
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        target = f"{scheme}://{host}:{port}/chat"
    key = "-H 'Authorization: Bearer KEY' " if settings.api_keys else ""
    return f"""curl -N {target} {key}-H 'Content-Type: application/json' -d '{{"message": "Hello!"}}'"""
