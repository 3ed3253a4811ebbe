"""The connections to a model server that wait for a next request."""

from collections import deque
from collections.abc import Sequence

import trio

from service.models.http.connection import Connection


class IdleConnections:
    """Keeps connections for a while. Each call costs the same, however many are kept.

    The connection that came last is used first; the others expire. They are closed when the next one is added or taken.

    Args:
        connections_max: Bound on the connections that are kept. One more closes the oldest.
        expiry_s: How long a connection is kept.
    """

    def __init__(self, *, connections_max: int, expiry_s: float) -> None:
        self._connections_max = connections_max
        self._expiry_s = expiry_s
        self._kept: deque[tuple[float, Connection]] = deque()  # with the time of each expiry, the oldest first

    def __repr__(self) -> str:
        return f"<IdleConnections: {len(self)}>"

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def connections(self) -> Sequence[Connection]:
        """Those that are kept, the oldest first."""
        return [connection for _, connection in self._kept]

    def add(self, connection: Connection) -> None:
        """Keep a connection that has no request and that can take one."""
        now = trio.current_time()
        self._kept.append((now + self._expiry_s, connection))
        while len(self._kept) > self._connections_max or self._kept[0][0] <= now:
            self._kept.popleft()[1].close()

    def take(self) -> Connection | None:
        """A connection that the peer has not closed, as far as this side knows yet; None if there is none."""
        now = trio.current_time()
        while self._kept:
            expires_at, connection = self._kept.pop()
            if expires_at > now and connection.is_usable():
                return connection
            connection.close()
        return None

    def close(self) -> None:
        """Close all connections."""
        while self._kept:
            self._kept.pop()[1].close()
