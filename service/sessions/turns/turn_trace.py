"""What a trace says of a turn: one span from the acceptance to the end, and in it one for each call of the model.

The span of a turn is a child of the request that has started it, whichever task runs it and however late it begins. If
the turn goes on in another process, that one's span is a child of the first one's, in the same trace, and linked to the
request that has found the turn there.

A call's span, ``chat MODEL``, covers the logical call with all its repetitions, which are events of it. Its names are
those of the conventions for generative AI, release v0.1.0. They are of this release until another one is chosen here:
``OTEL_SEMCONV_STABILITY_OPT_IN`` is for those who have sent older names, and changes nothing. What was said is never in
a span, also not if ``OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`` asks for it.

Source: https://github.com/open-telemetry/semantic-conventions-genai/blob/v0.1.0/docs/gen-ai/client-inference.md
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import msgspec
import trio

from service.models.client import CallNotes, Usage
from service.sessions.events import outcome
from service.storage.records import TurnRecord
from service.telemetry.log_context import current_ids

if TYPE_CHECKING:
    from service.telemetry.tracing import TraceSpan, Tracing

TRACEPARENT = "traceparent"


class TurnTrace:
    """The span of a turn, which :meth:`end` ends.

    Args:
        record: The turn at its acceptance, or adoption.
        upstream: The name of the model's server.
        began_at: When the turn was accepted here, on Trio's clock.
    """

    def __init__(
        self, tracing: "Tracing", record: TurnRecord, *, upstream: str, request_id: str | None, began_at: float
    ) -> None:
        self._tracing = tracing
        self._upstream = upstream
        self._conversation = {"gen_ai.conversation.id": record.session_id}
        is_adopted = record.trace != ""
        here = tracing.current_fields() if is_adopted else {}
        self._span = tracing.begin(
            "turn",
            "internal",
            parent={TRACEPARENT: record.trace} if is_adopted else None,
            attributes={
                **self._conversation,
                "lastcall.turn.id": record.id,
                "lastcall.turn.attempt": record.attempt,
                "gen_ai.request.model": record.model,
                **({} if request_id is None else {"lastcall.request.id": request_id}),
            },
            began_at=began_at,
            links=[here] if here else [],
        )

    @property
    def trace_id(self) -> str | None:
        return self._span.trace_id

    @property
    def traceparent(self) -> str:
        """The span's name for another process."""
        return self._span.fields.get(TRACEPARENT, "")

    def current(self) -> AbstractContextManager[None]:
        """Let the turn's span be the one of its task."""
        return self._span.current()

    def begin_call(self, asked: TurnRecord) -> "CallTrace":
        """Begin the span of a call of the model for this turn; the caller ends it."""
        return CallTrace(
            self._tracing.begin(
                f"chat {asked.model}",
                "client",
                parent=self._span.fields,
                attributes={
                    **self._conversation,
                    "gen_ai.operation.name": "chat",
                    "gen_ai.provider.name": self._upstream,
                    "gen_ai.request.model": asked.model,
                    "gen_ai.request.stream": True,
                },
            ),
            asked,
        )

    def end(
        self,
        end: outcome.Outcome | outcome.Suspended | None,
        *,
        counts: Mapping[str, int],
        queued_until: float | None,
        first_token_at: float | None,
    ) -> None:
        """End the turn's span.

        Args:
            end: How the turn ended; None if it goes on elsewhere.
            counts: Numbers that say how much it was, by name.
            queued_until: When it began to run, if it was queued before.
            first_token_at: When the model's first events came.
        """
        span = self._span
        name = "suspended" if end is None else outcome.name_of(end)
        span.note({"lastcall.turn.outcome": name, "lastcall.turn.code": outcome.code_of(end)})
        span.note({f"lastcall.turn.{name}": count for name, count in counts.items()})
        if queued_until is not None:
            span.note_event("turn.started", at=queued_until)
        if first_token_at is not None:
            span.note_event("turn.first_token", at=first_token_at)
        if isinstance(end, outcome.Failed):
            span.note_error(end.error.code)
        span.end()


class CallTrace(CallNotes):
    """The span of a call of a model, and the fields that name it to the model's server."""

    __slots__ = ("_began_at", "_span")

    def __init__(self, span: "TraceSpan", asked: TurnRecord) -> None:
        super().__init__(span.fields)
        self._span = span
        self._began_at = trio.current_time()
        options = asked.options
        span.note(
            {
                "gen_ai.request.temperature": asked.temperature,
                "gen_ai.request.max_tokens": asked.max_output_tokens,
                "gen_ai.request.top_p": options.top_p,
                "gen_ai.request.presence_penalty": options.presence_penalty,
                "gen_ai.request.frequency_penalty": options.frequency_penalty,
                "gen_ai.request.seed": options.seed,
                "gen_ai.output.type": "json" if options.text_format is not None else None,
            }
        )

    def note_server(self, host: str, port: int, *, provider: str | None) -> None:
        self._span.note({"server.address": host, "server.port": port, "gen_ai.provider.name": provider})

    def note_repeat(self, failure: str) -> None:
        super().note_repeat(failure)
        self._span.note_event("repeated", {"error.type": failure, "lastcall.call.repeat": self.repeats})

    def end(
        self,
        end: outcome.Outcome | outcome.Suspended | None,
        *,
        error: str | None,
        first_at: float | None,
        usage: Usage | None,
    ) -> None:
        """End the call's span.

        Args:
            end: How the turn ends, if that is decided.
            error: The code of the failure of a call after which the turn goes on.
            first_at: When the first events of the turn came.
            usage: What the model's server has counted.
        """
        span = self._span
        span.note(
            {
                "lastcall.upstream.request_id": current_ids().get("upstream_request_id"),
                "lastcall.call.repeats": self.repeats or None,
            }
        )
        if first_at is not None and first_at >= self._began_at:
            span.note({"gen_ai.response.time_to_first_chunk": round(first_at - self._began_at, 6)})
        if usage is not None:
            cached = usage.cached_tokens
            span.note(
                {
                    "gen_ai.usage.input_tokens": usage.input_tokens,
                    "gen_ai.usage.output_tokens": usage.output_tokens,
                    "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
                    "gen_ai.usage.cache_read.input_tokens": None if cached is msgspec.UNSET else cached or None,
                }
            )
        if isinstance(end, outcome.Completed):
            span.note({"gen_ai.response.finish_reasons": (end.finish_reason,)})
        elif isinstance(end, outcome.Failed):
            span.note_error(end.error.code)
        elif error is not None:
            span.note_error(error)
        else:
            span.note({"lastcall.call.dropped": True})  # the turn has ended for a cause of its own
        span.end()
