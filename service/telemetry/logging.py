"""The log: structlog's events and the standard library's records in one form, on standard error.

Each event is a line: for people on a terminal, JSON elsewhere. Each line has the process's id and the ids of the work
that its task does (``log_context``). No value can leave its line or its place on it (``escaping``); a traceback for
people follows indented. A secret of the settings never appears in the log, also not as part of another text. A
cancellation is no fault and has no traceback. Writing never waits and never raises (``log_writer``).
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import structlog
import trio
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from service.setting_types import MASK
from service.settings import Settings, secrets_of
from service.telemetry.escaping import escape, escape_json, escape_lines, escape_value
from service.telemetry.log_context import with_current_ids
from service.telemetry.log_writer import LogWriter

ACCESS_LOGGER = "hypercorn.access"
LOGGERS_WITH_HANDLERS = ("hypercorn.error", ACCESS_LOGGER)
"""hypercorn may give these loggers its own handlers at any time. It does not change filters."""
SECRET_LENGTH_MIN = 6
"""Shorter secrets are not masked: they protect nothing, and masking them would make the log unreadable."""


def configure_logging(settings: Settings, *, fd: int = 2) -> "Log":
    """Send all logs of this process to ``fd``, from now until :meth:`Log.uninstall` or the next call.

    Loggers that were made before are included: structlog's loggers read the configuration at each use.
    """
    for log in _current_logs():
        log.uninstall()
    return Log(settings, LogWriter(fd))


def drain_log(timeout_s: float = 0.25) -> None:
    """Wait until the log is written, for at most ``timeout_s``. Blocks: only for the end of the process."""
    for log in _current_logs():
        log.writer.drain(timeout_s)


def current_layout() -> "LineLayout | None":
    """Return the layout of this process's log; None before :func:`configure_logging`. Takes no lock."""
    return next((log.layout for log in reversed(_current_logs())), None)


def mask_secrets_of(settings: Settings) -> None:
    """Mask the secrets of changed settings in this process's log; those of the former settings stay masked."""
    for log in _current_logs():
        log.layout.mask.add(settings)


def _current_logs() -> list["Log"]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, Log)]


class LineLayout:
    """The form of a line, for people or for machines. The setting ``log_format`` decides, or else the kind of output.

    Attributes:
        is_console: Whether lines are written for a person, and not as JSON.
        render: The processors that make the line of an event that has its level, its logger and its time.
        mask: The last of them.
    """

    def __init__(self, settings: Settings, *, isatty: bool) -> None:
        self.is_console = isatty if settings.log_format == "auto" else settings.log_format == "console"
        self.render = _console_processors(colors=isatty) if self.is_console else _json_processors()
        self.mask = _SecretMask(settings)
        self.render.append(self.mask)

    def line(self, text: str, *, level: str, logger_name: str) -> str:
        """Return the line of one text that does not go through the log, as in a signal handler."""
        event: EventDict = {"event": text, "level": level, "logger": logger_name}
        rendered: Any = _with_process_id(None, level, _STAMP(None, level, event))
        for processor in self.render:
            rendered = processor(None, level, rendered)
        return str(rendered)


class Log(logging.Handler):
    """The log of this process: the handler that writes structlog's events and the standard library's records."""

    def __init__(self, settings: Settings, writer: LogWriter) -> None:
        level = logging.getLevelNamesMapping()[settings.log_level.upper()]
        super().__init__(level)
        self.writer = writer
        self.layout = LineLayout(settings, isatty=writer.isatty)
        before: list[Processor] = [
            with_current_ids,
            add_log_level,
            _STAMP,
            _with_process_id,
            _without_cancellation,
            self._with_lost_lines,
        ]
        render = self.layout.render
        structlog.configure(
            processors=[add_logger_name, *before, *render],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            logger_factory=lambda name="lastcall": _Lines(writer, name),
            cache_logger_on_first_use=False,
        )
        self.setFormatter(
            ProcessorFormatter(
                foreign_pre_chain=[add_logger_name, ExtraAdder(), *before],
                processors=[ProcessorFormatter.remove_processors_meta, *render],
            )
        )
        root = logging.getLogger()
        root.addHandler(self)
        root.setLevel(max(level, logging.WARNING))  # libraries log a line for each request at INFO
        for name in LOGGERS_WITH_HANDLERS:
            logging.getLogger(name).addFilter(self.take_over)
        logging.captureWarnings(capture=True)

    @property
    def is_console(self) -> bool:
        return self.layout.is_console

    def uninstall(self) -> None:
        """Give the loggers back to their former handlers. Not needed at the end of the process."""
        logging.captureWarnings(capture=False)
        for name in LOGGERS_WITH_HANDLERS:
            logging.getLogger(name).removeFilter(self.take_over)
        logging.getLogger().removeHandler(self)
        structlog.reset_defaults()
        self.writer.close()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  a record with the wrong arguments must not harm the code that logged it
            told = f"a log record of {record.name} could not be formatted: {record.msg!r}"
            line = self.layout.line(told, level=record.levelname.lower(), logger_name="lastcall")
        self.writer.write(line + "\n")

    def take_over(self, record: logging.LogRecord) -> bool:
        """Write a record here, and keep it from its logger's own handlers. Installed as that logger's filter."""
        if record.levelno >= self.level:
            if record.name == ACCESS_LOGGER and isinstance(record.args, Mapping):
                record.args = _Quotable(record.args)
            self.handle(record)
        return False

    def _with_lost_lines(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        if lost := self.writer.take_lost():
            event["log_lines_lost"] = lost
        return event


_JSON = json.JSONEncoder(default=str, ensure_ascii=False)
_STAMP = structlog.processors.TimeStamper(fmt="iso", utc=True)


def _with_process_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["pid"] = os.getpid()
    return event


class _Quotable(Mapping[str, object]):
    """The values of an access log line, with escaped quotes: the log's format puts quotes around them."""

    def __init__(self, atoms: Mapping[str, object]) -> None:
        self._atoms = atoms

    def __getitem__(self, name: str) -> object:
        atom = self._atoms[name]
        return atom.replace("\\", "\\\\").replace('"', '\\"') if isinstance(atom, str) else atom

    def __iter__(self) -> Iterator[str]:
        return iter(self._atoms)

    def __len__(self) -> int:
        return len(self._atoms)


class _Lines:
    """The target of structlog: it writes each rendered event as a line."""

    def __init__(self, writer: LogWriter, name: str) -> None:
        self.name = name
        self._writer = writer

    def msg(self, line: str) -> None:
        self._writer.write(line + "\n")

    debug = info = warning = error = critical = exception = msg


class _SecretMask:
    """The last step: masks every secret of the settings in the rendered line."""

    def __init__(self, settings: Settings) -> None:
        self._secrets: list[str] = []
        self.add(settings)

    def add(self, settings: Settings) -> None:
        """Mask the secrets of these settings, too."""
        self._secrets = sorted({*self._secrets, *_forms_of_secrets(settings)}, key=len, reverse=True)

    def __call__(self, _logger: WrappedLogger, _method: str, rendered: Any) -> str:
        line = str(rendered)
        for secret in self._secrets:
            if secret in line:
                line = line.replace(secret, MASK)
        return line


def _forms_of_secrets(settings: Settings) -> Iterator[str]:
    keys = [key for entry in settings.api_keys for key in secrets_of(entry)]
    secrets = [
        it.get_secret_value() for it in (*keys, *(up.api_key for up in settings.all_upstreams)) if it is not None
    ]
    for upstream in settings.all_upstreams:
        if not upstream.url.startswith("scripted:"):
            secrets += _query_values(upstream.url)
    for value in secrets:
        if len(value) >= SECRET_LENGTH_MIN:
            yield from (value, json.dumps(value)[1:-1], repr(value)[1:-1], escape(value))
            yield escape_json(json.dumps(value, ensure_ascii=False)[1:-1])


def _query_values(url: str) -> Iterator[str]:
    """Yield the values of a URL's query, raw and decoded, because each of them may be a key."""
    for part in urlsplit(url).query.split("&"):
        name, equals, value = part.partition("=")
        yield from {value if equals else name, unquote_plus(value if equals else name)}


def _console_processors(*, colors: bool) -> list[Processor]:
    return [
        _escaped,
        structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False, exception_formatter=_write_traceback),
    ]


def _escaped(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    escaped: EventDict = {}
    for name, value in event.items():
        if name == "exc_info":
            escaped[name] = value
        elif name in ("exception", "stack"):
            escaped[name] = escape_lines(str(value))
        else:
            escaped[escape(name)] = escape(str(value)) if name == "event" else escape_value(value)
    return escaped


def _write_traceback(lines: Any, exc_info: ExcInfo) -> None:
    text = StringIO()
    structlog.dev.plain_traceback(text, exc_info)  # structlog's rich_traceback prints local variables, also secrets
    lines.write("\n" + escape_lines(text.getvalue().strip("\n")))


def _json_processors() -> list[Processor]:
    return [
        structlog.processors.format_exc_info,
        _in_order,
        _in_json,
    ]


def _in_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    return escape_json(_JSON.encode(event))


def _in_order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    first = {"timestamp": event.pop("timestamp"), "level": event.pop("level"), "message": event.pop("event")}
    return {**first, "logger": event.pop("logger"), "pid": event.pop("pid"), **event}


def _without_cancellation(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Remove the traceback of a cancellation, or of a group of cancellations only: it does not help a reader."""
    fault = event.get("exc_info")
    if isinstance(fault, tuple):
        fault = fault[1]
    if fault is True:
        fault = sys.exception()
    if isinstance(fault, BaseException) and _is_cancellation(fault):
        del event["exc_info"]
    return event


def _is_cancellation(fault: BaseException) -> bool:
    if isinstance(fault, BaseExceptionGroup):
        return all(map(_is_cancellation, fault.exceptions))
    return isinstance(fault, trio.Cancelled)
