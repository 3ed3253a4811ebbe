"""Traces by OpenTelemetry. This module and ``trace_export`` alone know its libraries, which the extra ``otel`` has.

Spans end on the event loop and wait in a bounded queue (``OTEL_BSP_MAX_QUEUE_SIZE``); beyond it they are dropped. A
thread of the libraries sends them in batches to a collector, by OTLP over HTTP. :func:`open_tracing` owns this thread,
and ends it when the service closes, within the time that it is given. A collector that refuses does not delay that. One
that answers nothing keeps the thread busy for longer: then the thread is left behind, with the spans that it has not
sent. It is a daemon thread, and no process waits for it.

Where traces go, which are taken and how the service is called is said by OpenTelemetry's own variables
(:mod:`service.telemetry.trace_variables`). The libraries' state for a whole process (the global provider and
propagators) is not touched: so several services in a process do not share it, and baggage of callers goes nowhere.

Source: https://opentelemetry.io/docs/specs/otel/trace/sdk/, https://www.w3.org/TR/trace-context/
"""

import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import structlog
import trio
from opentelemetry import context as contexts
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_EXPORT_BATCH_SIZE, OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from service import __version__
from service.setting_sources import standard_variables
from service.telemetry.trace_export import Losses, WatchedExporter, replacing_library_records
from service.telemetry.trace_variables import PREFIX, refusal_of

logger = structlog.get_logger("lastcall.tracing")

SERVICE = "lastcall"
"""The service's name in traces, unless ``OTEL_SERVICE_NAME`` or ``OTEL_RESOURCE_ATTRIBUTES`` says another one."""
_KINDS = {"server": SpanKind.SERVER, "internal": SpanKind.INTERNAL, "client": SpanKind.CLIENT}
_TRACE_CONTEXT = TraceContextTextMapPropagator()
_NONE = Context()


@asynccontextmanager
async def open_asked_tracing(
    *, flush_deadline: Callable[[], float] = trio.current_time
) -> AsyncIterator["Tracing | None"]:
    """As :func:`open_tracing`; None, with a warning, if the libraries refuse their variables."""
    try:
        parts = _Parts(None)
    except Exception as error:  # noqa: BLE001  a wrong variable of a whole cluster is no reason not to serve
        logger.warning("there are no traces", reason=refusal_of(standard_variables(PREFIX), error))
        yield None
        return
    async with _opened(parts, flush_deadline) as tracing:
        yield tracing


@asynccontextmanager
async def open_tracing(
    *, flush_deadline: Callable[[], float] = trio.current_time, exporter: SpanExporter | None = None
) -> AsyncIterator["Tracing"]:
    """Make spans until the context is left. Leaving sends those that wait, if there is time, and ends the thread.

    Args:
        flush_deadline: The moment, on Trio's clock, until which leaving may wait for the collector.
        exporter: Takes the spans; that of OTLP over HTTP unless given. It is closed.

    Raises:
        Exception: The libraries refuse a variable.
    """
    async with _opened(_Parts(exporter), flush_deadline) as tracing:
        yield tracing


class _Parts:
    """The libraries' parts, as their variables want them. The thread runs once they are made."""

    def __init__(self, exporter: SpanExporter | None) -> None:
        self.losses = Losses()
        with replacing_library_records(self.losses):
            self.provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
            self.exporter = WatchedExporter(OTLPSpanExporter() if exporter is None else exporter, self.losses)
            processor = BatchSpanProcessor(self.exporter, max_export_batch_size=_batch_size())
        self.provider.add_span_processor(processor)


@asynccontextmanager
async def _opened(parts: _Parts, flush_deadline: Callable[[], float]) -> AsyncIterator["Tracing"]:
    try:
        yield Tracing(parts.provider)
    finally:
        with trio.CancelScope(shield=True, deadline=flush_deadline()) as bound:
            parts.exporter.end_soon()
            try:
                await trio.to_thread.run_sync(parts.provider.shutdown, abandon_on_cancel=True)
            except Exception as error:  # noqa: BLE001  no thread can be started, or the libraries fail: traces only
                logger.warning("traces were lost: they could not be sent at the end of the stop", reason=repr(error))
        parts.losses.tell()
        if bound.cancelled_caught:
            logger.warning("traces were lost: the collector did not take them before the end of the stop")


def _batch_size() -> int | None:
    """The queue's size where a batch would be larger, which the libraries refuse; otherwise None: what they choose."""
    variables = standard_variables(PREFIX)
    queue = variables.get(OTEL_BSP_MAX_QUEUE_SIZE, "")
    batch = variables.get(OTEL_BSP_MAX_EXPORT_BATCH_SIZE, "512")
    is_larger = queue.isdecimal() and batch.isdecimal() and 0 < int(queue) < int(batch)
    return int(queue) if is_larger else None


def _resource() -> Resource:
    named = OTELResourceDetector().detect().attributes.get("service.name")
    return Resource.create(
        {
            "service.name": named or SERVICE,
            "service.version": __version__,
            "service.instance.id": str(uuid.uuid4()),
            "process.pid": os.getpid(),
        }
    )


class Tracing:
    """Begins spans. Lives as long as its service."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer(SERVICE, __version__)

    def begin(
        self,
        name: str,
        kind: str,
        *,
        parent: Mapping[str, str] | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
        began_at: float | None = None,
        links: Iterable[Mapping[str, str]] = (),
    ) -> "TraceSpan":
        """Begin a span.

        Args:
            kind: ``server``, ``internal`` or ``client``.
            parent: The fields of W3C's trace context that name the parent, as :attr:`TraceSpan.fields` has them: it may
                be another process's. Without them the parent is the span of the current task, if there is one.
            began_at: When it began, on Trio's clock; now unless given.
            links: The fields of other spans that have led to this one.
        """
        context = None if parent is None else _context_of(parent)
        linked = (get_current_span(_context_of(fields)).get_span_context() for fields in links)
        span = self._tracer.start_span(
            name,
            context,
            _KINDS[kind],
            attributes,
            [Link(it) for it in linked if it.is_valid],
            None if began_at is None else _epoch_ns(began_at),
        )
        return TraceSpan(span)

    def current_fields(self) -> Mapping[str, str]:
        """The fields that name the span of the current task; empty if it has none."""
        fields: dict[str, str] = {}
        _TRACE_CONTEXT.inject(fields)
        return fields


class TraceSpan:
    """A span that has begun, and must be ended."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def fields(self) -> Mapping[str, str]:
        """The fields of W3C's trace context that name this span to another server, or to another process."""
        fields: dict[str, str] = {}
        _TRACE_CONTEXT.inject(fields, set_span_in_context(self._span, _NONE))
        return fields

    @property
    def trace_id(self) -> str | None:
        """The id of its trace, for the log; None if the trace is not taken."""
        named = self._span.get_span_context()
        return f"{named.trace_id:032x}" if named.trace_flags.sampled else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let this span be the one of the current task, and of the tasks that it starts, until the context is left."""
        token = contexts.attach(set_span_in_context(self._span, _NONE))
        try:
            yield
        finally:
            contexts.detach(token)

    def enter(self) -> None:
        """Let this span be the one of the current task, and of the tasks that it starts, until :meth:`leave`."""
        contexts.attach(set_span_in_context(self._span, _NONE))

    @staticmethod
    def leave() -> None:
        """Let the current task have no span any more. It need not be the task that has entered."""
        contexts.attach(_NONE)

    def note(self, attributes: Mapping[str, AttributeValue | None]) -> None:
        """Add attributes; those that are None are left out."""
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def note_event(
        self, name: str, attributes: Mapping[str, AttributeValue] | None = None, *, at: float | None = None
    ) -> None:
        """Add an event at a moment of Trio's clock; now unless given."""
        self._span.add_event(name, attributes, None if at is None else _epoch_ns(at))

    def note_error(self, kind: str) -> None:
        """Note that what the span tells has failed. ``kind`` is of a small set: a status, or a code."""
        self._span.set_attribute("error.type", kind)
        self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        """End it. What is noted later is lost."""
        self._span.end()


def _context_of(fields: Mapping[str, str]) -> Context:
    return _TRACE_CONTEXT.extract(fields, _NONE)


def _epoch_ns(at: float) -> int:
    return time.time_ns() - int((trio.current_time() - at) * 1e9)
