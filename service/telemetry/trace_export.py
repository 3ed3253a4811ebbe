"""The way of spans to the collector, and what the log says of it: lines of our own, and few.

OpenTelemetry's libraries log what they were given: the headers for the collector with their key, its address with a
token in the path, fields of a caller's request. So their records, and those of the HTTP client below them, do not reach
the log. What an operator has to know is said here: that spans are lost, and why, at most once a minute; and at the
start which variables the libraries have not understood.
"""

import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from math import inf

import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from service.setting_sources import standard_variables
from service.telemetry.trace_variables import PREFIX

logger = structlog.get_logger("lastcall.tracing")

LOGGERS = ("opentelemetry", "requests", "urllib3")
"""The libraries' loggers. Nothing else in the service uses these libraries."""
INTERVAL_S = 60.0
_STATUSES = {status.phrase: status.value for status in HTTPStatus}
_exporting = threading.local()


class Losses:
    """Says in the log that spans are lost: the first time at once, and then at most once a minute. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told_at = -inf
        self._untold: tuple[str, int] | None = None

    def note(self, reason: str, spans: int = 0) -> None:
        """Note a loss; ``spans`` is 0 if their number is not known."""
        with self._lock:
            self._untold = reason, spans + (self._untold[1] if self._untold else 0)
            if time.monotonic() < self._told_at + INTERVAL_S:
                return
        self.tell()

    def tell(self) -> None:
        """Say what is noted and not said yet, at the end of the service."""
        with self._lock:
            untold, self._untold = self._untold, None
            if untold is None:
                return
            self._told_at = time.monotonic()
        reason, spans = untold
        logger.warning("spans are lost", reason=reason, **({"spans": spans} if spans else {}))


class WatchedExporter(SpanExporter):
    """An exporter that tells losses, and does not wait for a collector that refuses once the service ends.

    The exporter of OTLP waits between its attempts, and only its shutdown ends such a wait. But the libraries join the
    thread that sends spans before they shut its exporter down. So the end is told here first.

    Args:
        exporter: Sends the spans. It is closed.
    """

    def __init__(self, exporter: SpanExporter, losses: Losses) -> None:
        self._exporter = exporter
        self._losses = losses
        self._cause: str | None = None
        self._lock = threading.Lock()
        self._is_refused = self._ends = self._is_closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._is_closed:
            self._losses.note(self._cause or "the service ends", len(spans))
            return SpanExportResult.FAILURE
        self._cause = None
        _exporting.exporter = self
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001  its text may have the collector's address
            self._cause = _words_of(error)
            result = SpanExportResult.FAILURE
        finally:
            _exporting.exporter = None
            self._is_refused = False
        if result is not SpanExportResult.SUCCESS:
            self._losses.note(self._cause or "the collector did not take them", len(spans))
        return result

    def note_record(self, record: logging.LogRecord) -> None:
        """Note what a record of the libraries says of the export that runs."""
        for it in record.args if isinstance(record.args, tuple) else ():
            if words := _words_of(it):
                self._cause = words
        self._is_refused = True
        if self._ends:
            self.shutdown()

    def end_soon(self) -> None:
        """Make one attempt more, at most: from now on what the collector refuses is lost. From another thread."""
        self._ends = True
        if self._is_refused:
            self.shutdown()

    def shutdown(self) -> None:
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _words_of(it: object) -> str | None:
    """Say in our words what an error, a status or its phrase means for spans."""
    if isinstance(it, BaseException):
        return f"the collector could not be asked ({type(it).__name__})"
    status = _STATUSES.get(it) if isinstance(it, str) else it
    return f"the collector answered {status}" if isinstance(status, int) and 100 <= status < 600 else None


class _LibraryRecords(logging.Handler):
    """Takes the records of the libraries, and writes none of them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.losses = Losses()
        self.misunderstood: set[str] | None = None

    def handle(self, record: logging.LogRecord) -> bool:
        # Without the handler's lock: what is noted here may write to the log.
        exporter: WatchedExporter | None = getattr(_exporting, "exporter", None)
        if exporter is not None:
            exporter.note_record(record)
        elif self.misunderstood is not None:
            self.misunderstood |= _variables_of(record)
        elif isinstance(record.msg, str) and record.msg.startswith("Queue full"):
            self.losses.note("the queue is full (OTEL_BSP_MAX_QUEUE_SIZE)")
        return True


def _variables_of(record: logging.LogRecord) -> set[str]:
    """The variables that a record names or quotes, by their names; the library's module if there is none."""
    quoted = [str(it).strip().casefold() for it in (record.args if isinstance(record.args, tuple) else ())]
    named = re.findall(PREFIX + "[A-Z_]+", record.getMessage())

    def is_meant(name: str, value: str) -> bool:
        value = value.strip().casefold()
        return name in named or any(it == value or (len(it) > 3 and it in value) for it in quoted)

    return {name for name, value in standard_variables(PREFIX).items() if is_meant(name, value)} or {record.name}


_records = _LibraryRecords()


@contextmanager
def replacing_library_records(losses: Losses) -> Iterator[None]:
    """Keep the libraries' records out of the log, for good: a thread of theirs may outlive the service.

    In the context, in which their parts are made, the records are about the variables. Its end says which ones.
    """
    for name in LOGGERS:
        of_library = logging.getLogger(name)
        of_library.propagate = False
        if _records not in of_library.handlers:
            of_library.addHandler(_records)
    _records.losses = losses
    misunderstood = _records.misunderstood = set()
    try:
        yield
    finally:
        _records.misunderstood = None
        if misunderstood:
            logger.warning("OpenTelemetry does not understand its variables", variables=sorted(misunderstood))
