"""Whether OpenTelemetry's variables ask for traces, and whether this installation can take them.

===============================================================  =====================================================
``OTEL_EXPORTER_OTLP_ENDPOINT``, ``…_TRACES_ENDPOINT``           traces are on, and go there
``OTEL_TRACES_EXPORTER``                                         ``otlp``: they are on, and go to ``localhost:4318``
                                                                 unless an endpoint is named. ``none``: they are off
``OTEL_SDK_DISABLED``                                            ``true``: they are off, whatever the others say
``OTEL_EXPORTER_OTLP_PROTOCOL``, ``…_TRACES_PROTOCOL``           only ``http/protobuf`` is there
===============================================================  =====================================================

The libraries read all other variables by themselves. What they ask for and cannot have is a warning, and no reason not
to serve: an operator of a cluster sets such variables for all processes of it.

Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

PREFIX = "OTEL_"
PROTOCOL = "http/protobuf"
OpenTracing = Callable[..., AbstractAsyncContextManager["Tracing | None"]]
"""Opens traces: :func:`service.telemetry.tracing.open_asked_tracing`."""


class AskedTraces(NamedTuple):
    """What the variables ask for; ``warning`` says what of that cannot be had."""

    on: bool
    warning: str | None = None


def asked_traces(variables: Mapping[str, str]) -> AskedTraces:
    """Return whether these variables ask for traces that can be had."""

    def said(name: str) -> str:
        return variables.get(PREFIX + name, "").strip()

    def of_traces(name: str) -> str:
        return said(f"EXPORTER_OTLP_TRACES_{name}") or said(f"EXPORTER_OTLP_{name}")

    exporters = {name.strip() for name in said("TRACES_EXPORTER").lower().split(",")} - {""}
    if said("SDK_DISABLED").lower() == "true" or exporters == {"none"}:
        return AskedTraces(on=False)
    if not (exporters or of_traces("ENDPOINT")):
        return AskedTraces(on=False)
    if exporters and "otlp" not in exporters:
        return AskedTraces(
            on=False, warning=f"OTEL_TRACES_EXPORTER is {said('TRACES_EXPORTER')!r}, and only otlp is there"
        )
    if (protocol := of_traces("PROTOCOL").lower()) not in ("", PROTOCOL):
        return AskedTraces(
            on=False, warning=f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, and only {PROTOCOL} is there"
        )
    return AskedTraces(on=True)


def find_tracing(variables: Mapping[str, str]) -> tuple[OpenTracing | None, str | None]:
    """Return what opens the traces that these variables ask for, if there are any; and a warning, if they cannot be
    had."""
    asked = asked_traces(variables)
    if not asked.on:
        return None, asked.warning
    try:
        from service.telemetry.tracing import open_asked_tracing  # noqa: PLC0415  takes the extra, and 0.2 s
    except ModuleNotFoundError:
        return (
            None,
            "OpenTelemetry's variables ask for them, and it is not installed: pip install 'lastcall[otel]'",
        )
    except Exception as error:  # noqa: BLE001  some variables are read by the import
        return None, refusal_of(variables, error)
    return open_asked_tracing, None


def refusal_of(variables: Mapping[str, str], error: Exception) -> str:
    """Say with which error the libraries refuse their variables. If its text has a part of the collector's headers or
    address, only the type is told."""
    private = [unquote(value) for name, value in variables.items() if name.endswith(("HEADERS", "ENDPOINT"))]
    words = re.findall(r"[^\s'\"=,;:/]{6,}", unquote(str(error)))
    text = "" if any(word in value for word in words for value in private) else f": {error}"
    return f"the libraries refuse their variables ({type(error).__name__}{text})"
