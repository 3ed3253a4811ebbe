"""The index of sessions by the pairs of their metadata (:mod:`service.storage.metadata_pairs`): its rows change in the
transactions that change the pairs."""

import time
from collections.abc import Callable, Mapping, Sequence

from service.storage.metadata_pairs import COUNTED_MAX, Pair, pairs_asked_for, pairs_of
from service.storage.moments import moment, time_of
from service.storage.page_cursor import SessionPosition
from service.storage.page_size import page_of_sessions
from service.storage.postgres.connections import Db
from service.storage.postgres.rows import Row, session_of
from service.storage.records import Page, SessionRecord
from service.storage.search import SEARCH_S

ROWS_MAX = 200
"""The rows of an index that one step of a listing looks at."""
_END = (1 << 62, "")

_INSERT = (
    "INSERT INTO {s}.session_metadata (pair, created_at, id, session) "
    "SELECT pair, %s, %s, %s FROM unnest(%s::bytea[]) AS pair"
)
_DELETE = "DELETE FROM {s}.session_metadata WHERE session = ANY(%s)"
_COUNT = (
    "SELECT count(*) FROM (SELECT 1 FROM {s}.session_metadata WHERE pair = ANY(%s) LIMIT "
    + str(COUNTED_MAX)
    + ") AS counted"
)
_BELOW = (
    "(SELECT created_at, id, session FROM {s}.session_metadata WHERE pair = %s AND (created_at, id) < (%s, %s) "
    "ORDER BY created_at DESC, id DESC LIMIT %s)"
)


def insert(db: Db, key: int, session: SessionRecord) -> None:
    """Add the pairs of a session, by its key."""
    pairs = pairs_of(session)
    digests = [digest for pair in pairs for digest in pair]
    if digests:
        db.execute(_INSERT, (moment(session.created_at), session.id, key, digests))


def delete(db: Db, keys: Sequence[int]) -> None:
    """Remove the pairs of sessions, if there are any."""
    db.execute(_DELETE, (list(keys),))


class Listing:
    """Makes a page of the sessions with some pairs, as :meth:`~service.storage.store.Store.list_sessions` says.

    Works in short steps, each on its own snapshot.

    Attributes:
        page: The page, once the listing is complete.

    Args:
        columns: The columns of a session that is listed, of the table ``sessions``.
        is_listed: Whether the listing has a session, by its record.
        visible: The condition that a session is listed, and its parameters.
        owner: Only the rows of this owner are read.
    """

    def __init__(
        self,
        metadata: Mapping[str, str],
        *,
        columns: str,
        visible: tuple[str, Mapping[str, object]],
        is_listed: Callable[[SessionRecord], bool],
        owner: str | None,
        limit: int,
        after: SessionPosition | None,
        bytes_max: int | None,
    ) -> None:
        self.page: Page[SessionRecord] | None = None
        self._pairs = pairs_asked_for(metadata, owner)
        self._columns = columns
        self._visible = visible
        self._is_listed = is_listed
        self._limit = limit
        self._bytes_max = bytes_max
        self._below = _END if after is None else (moment(after.created_at), after.id)
        self._found: list[SessionRecord] = []
        self._has_begun = False
        self._took_s = 0.0

    def read_some(self, db: Db) -> None:
        """Do one step."""
        began_at = time.monotonic()
        if not self._has_begun:
            if len(self._pairs) > 1:
                self._pairs.sort(key=lambda pair: _count(db, pair))
            self._has_begun = True
        rows = self._newest(db)
        for row in rows:
            self._below = row[:2]
            if row[3] is None:  # the session is not listed
                continue
            session = session_of(row[3:])
            if self._is_listed(session):
                self._found.append(session)
                if len(self._found) > self._limit:
                    break
        self._took_s += time.monotonic() - began_at
        if len(self._found) > self._limit or len(rows) < ROWS_MAX:
            self._complete()
        elif self._took_s >= SEARCH_S:
            self._complete(rest=SessionPosition(time_of(self._below[0]), self._below[1]))

    def _newest(self, db: Db) -> list[Row]:
        """The rows of the rarest pair that come next, each with its session if that is listed and has all pairs."""
        condition, given = self._visible
        values: dict[str, object] = dict(given)
        lists = []
        for number, digest in enumerate(self._pairs[0]):
            values[f"pair_{number}"] = digest
            lists.append(
                _BELOW.replace("= %s", f"= %(pair_{number})s").replace("(%s, %s)", "(%(below)s, %(below_id)s)")
            )
        values |= {"below": self._below[0], "below_id": self._below[1], "rows": ROWS_MAX}
        some = " UNION ALL ".join(lists).replace("LIMIT %s", "LIMIT %(rows)s")
        others = ""
        for number, pair in enumerate(self._pairs[1:]):
            values[f"other_{number}"] = list(pair)
            others += (
                f" AND EXISTS (SELECT 1 FROM {{s}}.session_metadata o WHERE o.pair = ANY(%(other_{number})s) "
                "AND (o.created_at, o.id, o.session) = (newest.created_at, newest.id, newest.session))"
            )
        columns = ", ".join(f"sessions.{name}" for name in self._columns.split(", "))
        return db.execute(
            f"SELECT newest.created_at, newest.id, newest.session, {columns} FROM ("
            f"SELECT * FROM ({some}) AS merged ORDER BY created_at DESC, id DESC LIMIT %(rows)s) AS newest "
            f"LEFT JOIN {{s}}.sessions ON sessions.key = newest.session AND {condition}{others} "
            "ORDER BY newest.created_at DESC, newest.id DESC",
            values,
        ).fetchall()

    def _complete(self, *, rest: SessionPosition | None = None) -> None:
        self.page = page_of_sessions(
            self._found, limit=self._limit, bytes_max=self._bytes_max, rest=rest, partial=rest is not None
        )


def _count(db: Db, pair: Pair) -> int:
    row = db.execute(_COUNT, (list(pair),)).fetchone()
    assert row is not None
    counted: int = row[0]
    return counted
