"""The metrics that the service has: the one list of them, with which ``docs/metrics.md``, the dashboard and the alerts
are compared.

Names, units and kinds follow Prometheus' conventions. Every set of label values is bounded: upstreams and models are
those of the settings, and all other values are from lists in the code.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, eq=False)
class Family:
    """One metric.

    Attributes:
        help: A sentence without a full stop.
        starts: The label values whose series exist from the start, at zero. A metric without labels always does.
        bounds: The upper bounds of a histogram's buckets, in seconds, without infinity.
        across: How the numbers of several workers become one: their sum, the largest, or that of the worker which
            answers, where every worker sees the same thing. Counters and histograms are always sums.
    """

    name: str
    help: str
    kind: Literal["counter", "gauge", "histogram"] = "counter"
    labels: tuple[str, ...] = ()
    starts: tuple[tuple[str, ...], ...] = ()
    bounds: tuple[float, ...] = ()
    across: Literal["sum", "max", "own"] = "sum"

    def __repr__(self) -> str:
        return f"<Family {self.name}>"


_WAITS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# Sessions and turns

SESSIONS = Family(
    "lastcall_sessions",
    "Sessions in the store that have not expired, by whether a turn of theirs is open; the same for all processes that "
    "share a store",
    "gauge",
    ("state",),
    (("running",), ("idle",)),
    across="own",
)
TURNS_OPEN = Family(
    "lastcall_turns",
    "Turns that run, and turns that are queued or being accepted",
    "gauge",
    ("state",),
    (("running",), ("queued",)),
)
TURNS_ACCEPTED = Family(
    "lastcall_turns_accepted_total",
    "Turns that were accepted here, and turns of other processes that go on here",
    labels=("origin",),
    starts=(("new",), ("adopted",)),
)
TURNS = Family(
    "lastcall_turns_total",
    "Turns that have ended, by outcome and by the finish reason, error code or reason of it; suspended are those that "
    "go on in another process",
    labels=("outcome", "reason"),
)
TURNS_CRASHED = Family("lastcall_turns_crashed_total", "Turns that a fault of this service has ended")
TURNS_UNTOLD = Family(
    "lastcall_turns_without_terminal_event_total",
    "Turns that have left this process without a terminal event and do not go on elsewhere; must stay 0",
)
ENDS_NOT_STORED = Family(
    "lastcall_turn_ends_not_stored_total",
    "Ends of turns that were told before the store had taken them; must stay 0",
)
ENDS_PENDING = Family(
    "lastcall_turn_ends_pending", "Ends of turns that the store has still not taken; they are tried again", "gauge"
)
TURN_DURATION = Family(
    "lastcall_turn_duration_seconds",
    "Time from the acceptance of a turn to its end",
    "histogram",
    ("outcome",),
    (("completed",), ("failed",), ("cancelled",), ("interrupted",)),
    (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
TURN_QUEUE = Family(
    "lastcall_turn_queue_seconds",
    "Time that a queued turn has waited for the turns before it",
    "histogram",
    bounds=(0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300),
)
FIRST_TOKEN = Family(
    "lastcall_turn_first_token_seconds",
    "Time from the acceptance of a turn to the first event of the model, waiting in a queue included",
    "histogram",
    ("upstream",),
    bounds=_WAITS,
)
TOKEN_GAP = Family(
    "lastcall_turn_token_gap_seconds",
    "Time between two pieces of a reply as they arrive; pieces that arrive together have no time between them",
    "histogram",
    ("upstream",),
    bounds=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
INPUT_TOKENS = Family(
    "lastcall_input_tokens_total",
    "Tokens of prompts as the upstream has counted them; models that the settings do not name are other",
    labels=("upstream", "model"),
)
OUTPUT_TOKENS = Family(
    "lastcall_output_tokens_total",
    "Tokens of replies as the upstream has counted them, reasoning included",
    labels=("upstream", "model"),
)
LOG_BYTES = Family("lastcall_event_log_bytes", "Bytes in the event logs of open turns", "gauge")

# Streams

STREAMS_OPEN = Family("lastcall_streams", "Event streams that are open", "gauge", ("face",), (("native",),))
STREAMS = Family(
    "lastcall_streams_total",
    "Event streams that were sent to their end, and those whose client left or did not read",
    labels=("face", "end"),
    starts=(("native", "ended"), ("native", "aborted")),
)
RESUME_GAPS = Family(
    "lastcall_resume_gaps_total",
    "Streams that could not go on where the client stopped, because events were lost (events_lost); must stay 0",
)
REFUSALS = Family(
    "lastcall_refusals_total", "Requests that were answered with a problem, by its code", labels=("code",)
)

# Upstreams

UPSTREAM_CALLS = Family(
    "lastcall_upstream_calls_total",
    "Attempts to get a reply from an upstream: ok if it has begun, abandoned if a caller or a stop ended the wait, "
    "first_token_timeout or turn_timeout if the deadline did, "
    "otherwise the code of the error",
    labels=("upstream", "result"),
)
UPSTREAM_RETRIES = Family(
    "lastcall_upstream_retries_total", "Attempts that were made again after this error", labels=("upstream", "code")
)
UPSTREAM_OPENED = Family(
    "lastcall_upstream_connections_opened_total", "Connections to an upstream that were opened", labels=("upstream",)
)
UPSTREAM_CONNECTIONS = Family(
    "lastcall_upstream_connections",
    "Connections to an upstream with and without a request",
    "gauge",
    ("upstream", "state"),
)

# Store

STORE_COMMIT = Family(
    "lastcall_store_commit_seconds",
    "Time that a commit has taken",
    "histogram",
    bounds=(0.0005, *_SHORT),
)
STORE_REFUSES = Family(
    "lastcall_store_refusing", "Whether the store has refused the last write of a process", "gauge", across="max"
)
WAL_BYTES = Family("lastcall_sqlite_wal_bytes", "Size of the write-ahead log of SQLite", "gauge", across="max")
SWEEPS = Family(
    "lastcall_expiry_sweeps_total",
    "Runs of the loop that removes expired sessions",
    labels=("result",),
    starts=(("ok",), ("failed",)),
)
SWEEP_DURATION = Family(
    "lastcall_expiry_sweep_seconds",
    "Time that such a run has taken",
    "histogram",
    bounds=(0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60),
)
EXPIRED = Family("lastcall_expired_sessions_total", "Sessions that were removed because they have expired")

# The process

LOOP_LAG = Family(
    "lastcall_event_loop_lag_seconds",
    "How late the event loop has run a task that was due, once a second",
    "histogram",
    bounds=_SHORT,
)
TASKS = Family("lastcall_tasks", "Tasks of the event loop that live", "gauge")
WORKERS = Family("lastcall_workers", "Processes that serve, those that start or drain included", "gauge")
CPU = Family("lastcall_cpu_seconds_total", "Time that the processes have used of a processor")
MEMORY = Family("lastcall_resident_memory_bytes", "Memory of the processes", "gauge")
BUILD = Family("lastcall_build_info", "Always 1", "gauge", ("version", "python"), across="max")

# Stops

SHUTDOWNS = Family(
    "lastcall_shutdowns_total",
    "Stops of a process: of a worker that others have replaced, say",
    labels=("result",),
    starts=(("clean",), ("faults",)),
)
SHUTDOWN_PHASE = Family(
    "lastcall_shutdown_phase_seconds",
    "Time of each phase of a stop",
    "histogram",
    ("phase",),
    bounds=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
TASKS_LEFT = Family("lastcall_shutdown_tasks_left_total", "Tasks that were left at the end of a stop; must stay 0")
STREAMS_CUT = Family(
    "lastcall_shutdown_streams_aborted_total",
    "Event streams that a stop did not send to their end after its drain; must stay 0",
)
LAST_STOP_AT = Family(
    "lastcall_last_shutdown_timestamp_seconds",
    "When the newest stop with this result before the start was over; none where no reports are kept",
    "gauge",
    ("result",),
    across="max",
)
LAST_STOP_TOOK = Family(
    "lastcall_last_shutdown_seconds",
    "Time that the newest stop with this result before the start has taken",
    "gauge",
    ("result",),
    across="max",
)

FAMILIES: tuple[Family, ...] = tuple(it for it in list(globals().values()) if isinstance(it, Family))
"""All of them, in the order of this page."""
ZERO = (TURNS_UNTOLD, ENDS_NOT_STORED, RESUME_GAPS, TASKS_LEFT, STREAMS_CUT, TURNS_CRASHED)
"""The counters that must stay 0: each has an alert."""
OTHER_MODEL = "other"
"""The model of the label where a caller has named one that the settings do not have."""
