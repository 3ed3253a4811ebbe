"""What the metrics count of a turn, when it ends or leaves its process. What the log says of it: :mod:`.turn_log`."""

import trio

from service.models.client import Usage
from service.sessions.events import outcome
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics


class TurnMeter:
    """Counts one turn. Its methods take a few microseconds, and none of them fails.

    Attributes:
        is_accepted: Whether the turn was accepted. The end of another one is not counted: its caller got an error.
        first_token_at: When the first pieces of the model came, on Trio's clock.
    """

    __slots__ = (
        "_accepted_at",
        "_gaps",
        "_metrics",
        "_note_gap",
        "_token_at",
        "_upstream",
        "first_token_at",
        "is_accepted",
    )

    def __init__(self, metrics: Metrics, upstream: str) -> None:
        self.first_token_at: float | None = None
        self.is_accepted = False
        self._metrics = metrics
        self._upstream = upstream
        self._gaps = metrics.gaps_of(upstream)
        self._note_gap = self._gaps.times.append
        self._accepted_at = trio.current_time()
        self._token_at = 0.0

    def count_queued(self) -> None:
        """Count the wait of a turn that was queued, and begins to run."""
        self._metrics.observe(families.TURN_QUEUE, value=trio.current_time() - self._accepted_at)

    def count_pieces(self, pieces: int, now: float) -> None:
        """Count pieces of the reply that have come together. This is on the way of each token."""
        if self.first_token_at is None:
            self.first_token_at = now
            self._metrics.observe(families.FIRST_TOKEN, self._upstream, value=now - self._accepted_at)
        else:
            self._note_gap(now - self._token_at)
        self._token_at = now
        if pieces > 1:
            self._gaps.together += pieces - 1

    def count_end(self, end: outcome.Outcome, *, model: str, usage: Usage | None, crashed: bool, is_kept: bool) -> None:
        """Count an end that is told now, or that clients find in the store from now on.

        Args:
            is_kept: Whether the store has the end, or will never take it, because the turn was deleted meanwhile.
        """
        if not self.is_accepted:
            return
        metrics = self._metrics
        metrics.add_gaps()
        count_tokens(metrics, self._upstream, model, usage)
        metrics.add(families.TURNS, *_labels_of(end))
        metrics.observe(families.TURN_DURATION, outcome.name_of(end), value=trio.current_time() - self._accepted_at)
        if crashed:
            metrics.add(families.TURNS_CRASHED)
        if not is_kept:
            metrics.add(families.ENDS_NOT_STORED)

    def count_leave(self, end: outcome.Outcome | outcome.Suspended | None) -> None:
        """Count a turn that has left this process without a terminal event."""
        if not self.is_accepted:
            return
        self._metrics.add_gaps()
        if isinstance(end, outcome.Suspended):
            self._metrics.add(families.TURNS, *_labels_of(end))
        else:
            self._metrics.add(families.TURNS_UNTOLD)


def count_recovered(metrics: Metrics, turns: int) -> None:
    """Count turns of processes that have died, which this one has ended."""
    if turns:
        metrics.add(families.TURNS, *_labels_of(outcome.Interrupted("crash")), by=turns)


def count_tokens(metrics: Metrics, upstream: str, model: str, usage: Usage | None) -> None:
    """Count the tokens of a reply."""
    if usage is not None:
        labels = upstream, metrics.model(model)
        metrics.add(families.INPUT_TOKENS, *labels, by=usage.input_tokens)
        metrics.add(families.OUTPUT_TOKENS, *labels, by=usage.output_tokens)


def _labels_of(end: outcome.Outcome | outcome.Suspended) -> tuple[str, str]:
    return outcome.name_of(end), outcome.code_of(end) or ""
