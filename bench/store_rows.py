"""The rows of the scenario ``store``, their comparison with those of the memory store, and their table."""

import msgspec

from bench.table import Table, number, triple


class StoreRow(msgspec.Struct, kw_only=True):
    """The measurement of one load on one store, or of the disk's own time."""

    kind: str = "store"
    what: str
    store: str
    repeat: int
    n: int  # the number of turns, first tokens, interrupted turns, pages, events or fsyncs
    lost: int = 0  # clients, streams and groups of calls that met an error
    took_ms: tuple[float, float, float] | None = None  # p50, p99, max: a turn, a first token, a page, a delay, an fsync
    per_s: float | None = None
    cpu_share: float | None = None  # the server's use of one core
    gone_ms: float | None = None  # from the signal to the end of all processes
    phases_ms: dict[str, float] = {}  # from the shutdown report
    kept: int | None = None  # interrupted turns whose partial reply is in the store
    commits_per_s: float | None = None  # of transactions that write
    log_bytes: float | None = None  # what the store writes (PostgreSQL: WAL; SQLite: to files), a second and a turn
    of_memory: float | None = None  # turns a second, divided by the memory row's of this repeat
    added_ms: tuple[float, ...] = ()  # the difference to that row's p50 and p99, or to its ``gone_ms``
    busy_before: float | None = None  # the share of the machine that other processes used

    @property
    def beside(self) -> str:
        """The comparison with the memory row."""
        if self.of_memory is not None:
            return f"{self.of_memory:.2f}"
        return " / ".join(f"{added:+.2f}" for added in self.added_ms) + " ms" if self.added_ms else "-"


def compared(kept: StoreRow, memory: StoreRow) -> StoreRow:
    """The row of a durable store, with its comparison with the row of the memory store."""
    if kept.per_s is not None and memory.per_s:
        kept.of_memory = kept.per_s / memory.per_s
    elif kept.gone_ms is not None and memory.gone_ms is not None:
        kept.added_ms = (kept.gone_ms - memory.gone_ms,)
    elif kept.took_ms is not None and memory.took_ms is not None:
        kept.added_ms = tuple(ours - theirs for ours, theirs in zip(kept.took_ms, memory.took_ms, strict=True))[:2]
    return kept


TABLE = Table(
    "Store: SQLite and PostgreSQL beside memory",
    "took: a turn from the request to the answer, a first token, a page of 50 sessions or of 20 search results (of the "
    "store itself, without HTTP), all calls of a group, or an append of 4096 bytes and its fsync in the same file "
    "system; for a forwarded stream how much later an event comes through another process than from its owner, both "
    "read at the same time; p50 / p99 / max. gone: from the signal until the whole process group is gone; "
    "interrupting: the phase in it that stores the ends. commits/s: transactions that write. log B: "
    "bytes of PostgreSQL's WAL, or bytes that SQLite's process wrote to files, a second and a running turn. beside "
    "memory: turns a second over those of the memory row above; or what is added to its p50 and p99; or to its time to "
    "be gone. others: what they used of the machine just before.",
    (
        ("what", lambda row: row.what),
        ("store", lambda row: row.store),
        ("n", lambda row: f"{row.n:,}"),
        ("lost", lambda row: str(row.lost)),
        ("turns/s", lambda row: number(row.per_s, 0)),
        ("core", lambda row: "-" if row.cpu_share is None else f"{row.cpu_share:.0%}"),
        ("took ms", lambda row: triple(row.took_ms, 2)),
        ("gone ms", lambda row: number(row.gone_ms, 0)),
        ("interrupting ms", lambda row: number(row.phases_ms.get("interrupting"), 0)),
        ("commits/s", lambda row: number(row.commits_per_s, 1)),
        ("log B", lambda row: number(row.log_bytes, 0)),
        ("beside memory", lambda row: row.beside),
        ("others", lambda row: "-" if row.busy_before is None else f"{row.busy_before:.0%}"),
    ),
)
