"""The store in a PostgreSQL database: threads with a connection each, and the store object in the event loop."""

import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import anyio
import msgspec
import psycopg
import trio

from service import store_capabilities
from service.errors import ItemNotFoundError, StoreError
from service.models.client import Usage
from service.storage import rules
from service.storage.page_cursor import decode_session_cursor, decode_turn_cursor
from service.storage.pieces import Run
from service.storage.postgres import (
    additions,
    adoptions,
    beats,
    deletions,
    durability,
    event_pages,
    forks,
    idempotency,
    owners,
    paths,
    recovery,
    removals,
    schema,
    search,
    segments,
    sessions,
    suspensions,
    trees,
    turns,
)
from service.storage.postgres.connections import Db, Line, Me, connect_first, name_of_store
from service.storage.postgres.ends import End
from service.storage.postgres.faults import Faults, startup_error
from service.storage.postgres.late_answers import LateAnswers
from service.storage.postgres.open_turns import OpenTurns
from service.storage.postgres.owners import FenceLostError, Observer, Ownership
from service.storage.postgres.reader import Reader
from service.storage.postgres.writer import Writer
from service.storage.records import (
    Adoption,
    BegunTurn,
    Checkpoint,
    EndResult,
    EventsPage,
    IdempotencyKey,
    LeftOut,
    Match,
    OpenTurn,
    Owner,
    Page,
    Places,
    SessionPatch,
    SessionRecord,
    SessionStatus,
    SuspendedSession,
    SuspendedTurn,
    TitleSource,
    TreeNode,
    TurnRecord,
)
from service.storage.search import search_query, terms_of
from service.storage.sql_thread import Joined, SqlThread, Step
from service.storage.standing import Standing
from service.storage.store import PAGE_LENGTH_MAX, Monotonic
from service.telemetry.metrics.metrics import Metrics

T = TypeVar("T")

ADDED_MAX = 100
"""So many turns are added by the thread of the short writes; more are added beside them."""
SUSPENDED_BYTES_MAX = 16 * 1024 * 1024
"""The texts of turns that are suspended by the thread of the short writes."""
REMOVING_S = 1.0
"""About how long one call removes the rows of sessions that are gone for every reader already."""
_LONG_STATEMENT_S = 60


@asynccontextmanager
async def open_postgres_store(
    url: str,
    *,
    schema_name: str = "lastcall",
    address: str | None = None,
    close_timeout_s: float = 5,
    monotonic: Monotonic = time.monotonic,
    metrics: Metrics | None = None,
) -> AsyncIterator["PostgresStore"]:
    """Open the store in a database, in a schema that is made if necessary; closes on leaving.

    Args:
        url: ``postgresql://…``, as libpq takes it.
        address: The address at which this process answers other owners of the same store.
        close_timeout_s: How long closing may take. A server that hangs longer is left to daemon threads.
        monotonic: The time by which the leases of other owners run out, and a fault in the log is repeated.
        metrics: Counts the commits.

    Raises:
        StartupError: The database cannot be used; one sentence says why and what to do.
    """
    store = PostgresStore(url, schema_name=schema_name, address=address, monotonic=monotonic, metrics=metrics)
    try:
        await store.open()
        yield store
    finally:
        with anyio.move_on_after(close_timeout_s, shield=True):
            await store.aclose()


class PostgresStore:
    """Meets :class:`service.storage.store.Store`. Made by :func:`open_postgres_store`.

    Attributes:
        ownership: This store among the owners of the database.
        writer: The writer, whose counts say how many steps shared a commit.
        observer: Beats, and looks for owners that have died.
        standing: Lost once another owner has taken this one for dead.
    """

    capabilities = store_capabilities.POSTGRESQL

    def __init__(
        self,
        url: str,
        *,
        schema_name: str,
        address: str | None,
        monotonic: Monotonic = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        self.name = name_of_store(url, schema_name)
        self.peer_secret = b""
        self.standing = Standing(lease_s=owners.LEASE_S, monotonic=monotonic)
        self._token = trio.lowlevel.current_trio_token()
        self.ownership = Ownership(on_lost=lambda: self._soon(self.standing.lose))
        self._url = url
        self._schema = schema_name
        self._address = address
        self._faults = Faults(self.name, monotonic)
        self._lines: list[Line] = []
        self._first = self._line()
        # Long changes, beside the writer: a fork or a deletion of thousands of turns takes seconds. Besides the writes
        # that wait for them, or for those of other owners.
        long_writer = Writer(
            self._line(),
            self.ownership,
            self._faults,
            is_left=True,
            statement_timeout_s=_LONG_STATEMENT_S,
            metrics=metrics,
        )
        self._changing = self._leaving("postgres long writer", long_writer)
        self.writer = Writer(
            self._first,
            self.ownership,
            self._faults,
            opens=self._begin,
            closes=self._leave,
            hand_over=self._changing.hand_over,
            metrics=metrics,
        )
        self._writing = self._leaving("postgres writer", self.writer, runs_on=long_writer)
        # Two readers, so that the many short reads do not wait for a long one.
        self._looking = self._leaving("postgres reader", Reader(self._line(), self._faults))
        self._reading = self._leaving("postgres long reader", Reader(self._line(), self._faults))
        self.observer = Observer(
            self.ownership,
            monotonic,
            on_beat=lambda at: self._soon(partial(self.standing.note_beat, at)),
            on_taken=lambda: self._soon(self.standing.taken_over.ring),
        )
        self._beating = SqlThread("postgres beats", beats.Beats(self._line(), self.observer, self._faults))
        self._late_answers = LateAnswers(self._lines)
        self._has_suspended = False
        self._open_turns = OpenTurns()
        self._forking = anyio.Lock()  # one fork at a time, because its turns are in memory meanwhile

    def _soon(self, call: Callable[[], object]) -> None:
        """Have a call made in the event loop. For the threads."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call)

    def _line(self) -> Line:
        line = Line(self._url, self._schema, self._faults)
        self._lines.append(line)
        return line

    def _leaving(self, name: str, batches: Writer | Reader, *, runs_on: Writer | Reader | None = None) -> SqlThread[Db]:
        """A thread whose steps are given up when their callers leave.

        Args:
            runs_on: Where they are given up, if not in this thread.
        """
        running = (runs_on or batches).running

        def leave(step: Step[Db, Any]) -> None:
            # A step that does not run yet finds that it is given up.
            if step.claim_commit() and running.has(step):
                threading.Thread(target=running.cancel, args=(step,), name="postgres cancel", daemon=True).start()

        return SqlThread(name, batches, on_left=leave)

    @property
    def me(self) -> Me:
        """This owner."""
        return self.ownership.me

    @property
    def fence(self) -> int:
        """This owner's number among all owners that ever opened the store."""
        return self.ownership.me.fence

    async def open(self) -> None:
        """Open the store. Raises: StartupError; the caller must close the store in this case, too."""
        await self._writing.open()
        self._late_answers.start()
        for thread in (self._beating, self._looking, self._reading, self._changing):
            await thread.open()

    async def beat(self) -> int:
        """Beat, and take over from owners that have died, at once instead of in a second. Returns how many."""
        return await self._beating.call(self.observer.run_once)

    # In the writer's thread

    def _begin(self) -> None:
        """Connect, prepare the tables and become an owner. Raises: StartupError."""
        connection = connect_first(self._url, place=self.name)
        try:
            self.peer_secret = schema.prepare(connection, self._schema, place=self.name).secret
            durability.warn_of_losses(connection, place=self.name)
            db = Db(connection, self._schema)
            db.begin(None)
            with connection.transaction():
                self.ownership.begin(db, address=self._address, opened_at=time.time_ns() // 1000)
        except psycopg.Error as error:
            connection.close()
            raise startup_error(self.name, error) from None
        except BaseException:
            connection.close()
            raise
        self._first.take(db)

    def _leave(self) -> None:
        """Leave the owners. If the database is away, they see in time that this one is gone."""
        if self.ownership.me.fence and not self.ownership.is_lost:
            with suppress(psycopg.Error, StoreError):
                db = self._first.open()
                db.begin(None, statement_max_s=beats.STATEMENT_MAX_S)
                self.ownership.leave(db)

    # Calls

    async def _write(self, call: Callable[[Db], T]) -> T:
        return await self._writing.call(call)

    async def _write_own(self, call: Callable[[Db], T]) -> T:
        """A write on turns of this owner: such writes share a transaction."""
        return await self._writing.call(call, shares=True)

    async def _change(self, call: Callable[[Db], T]) -> T:
        """A write that may be long. It follows the writes that were called before it."""
        await self._writing.call(lambda _: None)
        return await self._changing.call(call)

    async def _look(self, call: Callable[[Db], T]) -> T:
        """A short read of one statement."""
        return await self._looking.call(call, shares=True)

    async def _read(self, call: Callable[[Db], T]) -> T:
        """A read of several statements, which see one snapshot."""
        return await self._reading.call(call)

    # Sessions

    async def create_session(
        self,
        session: SessionRecord,
        *,
        now: datetime,
        key: IdempotencyKey | None = None,
        added: Sequence[TurnRecord] = (),
    ) -> None:
        if not added:
            await self._write(lambda db: sessions.create(db, session, now, key=key))
            return
        terms = [await terms_of(turn) for turn in added]
        write = self._write if len(added) <= ADDED_MAX else self._change
        await write(lambda db: additions.create(db, session, added, now, terms=terms, key=key))

    async def fork_session(
        self, source_id: str, *, at: str | None, copy_id: str, now: datetime, key: IdempotencyKey | None = None
    ) -> SessionRecord:
        async with self._forking:
            plan = forks.Plan(source_id, at, copy_id=copy_id, fence=self.fence, now=now, key=key)
            while not plan.is_complete:
                await self._read(plan.read_some)
            fork = plan.fork
            return await self._change(lambda db: forks.build(db, fork, now))

    async def get_session(self, session_id: str, *, now: datetime) -> SessionRecord:
        return await self._look(lambda db: sessions.visible(db, session_id, now).record)

    async def list_sessions(
        self,
        *,
        limit: int,
        after: str | None,
        status: SessionStatus | None,
        now: datetime,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
        bytes_max: int | None = None,
    ) -> Page[SessionRecord]:
        position = None if after is None else decode_session_cursor(after)
        if metadata:
            listing = sessions.listing_by_metadata(
                metadata, limit=limit, after=position, status=status, now=now, owner=owner, bytes_max=bytes_max
            )
            while listing.page is None:
                await self._read(listing.read_some)
            return listing.page
        return await self._reading.call(
            lambda db: sessions.list_page(
                db, limit=limit, after=position, status=status, now=now, owner=owner, bytes_max=bytes_max
            ),
            shares=True,
        )

    async def search_sessions(
        self,
        query: str,
        *,
        limit: int,
        after: str | None,
        status: SessionStatus | None,
        now: datetime,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
        bytes_max: int | None = None,
    ) -> Page[Match]:
        wanted = await search_query(
            self.peer_secret,
            query,
            limit=limit,
            after=after,
            status=status,
            owner=owner,
            metadata=metadata,
            now=now,
            bytes_max=bytes_max,
        )
        searched = search.Search(wanted)
        while searched.page is None:
            await self._read(searched.read_some)
        return searched.page

    async def count_sessions(self, *, status: SessionStatus | None, now: datetime, owner: str | None = None) -> int:
        return await self._reading.call(lambda db: sessions.count(db, status, now, owner=owner), shares=True)

    async def update_session(
        self, session_id: str, patch: SessionPatch, *, now: datetime, revisions: Collection[str] | None = None
    ) -> SessionRecord:
        return await self._write(lambda db: sessions.update(db, session_id, patch, self.me, now, revisions=revisions))

    async def keep_title(
        self,
        session: SessionRecord,
        title: str | None,
        *,
        usage: Usage | None,
        now: datetime,
        source: TitleSource | None = None,
    ) -> bool:
        return await self._write(lambda db: sessions.keep_title(db, session, title, usage, now, source=source))

    async def mark_deleted(self, session_id: str, *, now: datetime, revisions: Collection[str] | None = None) -> None:
        await self._write(lambda db: sessions.mark_deleted(db, session_id, self.me, now, revisions=revisions))

    async def is_marked(self, session_id: str) -> bool:
        # The writer answers, because a reader does not see a mark that is being committed.
        return await self._write(lambda db: sessions.is_marked(db, session_id, self.me))

    async def remove_deleted(self, session_id: str) -> None:
        await self._change(lambda db: sessions.hide_deleted(db, session_id))
        with suppress(StoreError):  # the session is gone, and its rows are removed later
            await self._remove_hidden()

    async def delete_expired(self, *, now: datetime, limit: int) -> int:
        hidden = await self._change(lambda db: sessions.hide_expired(db, now, limit))
        with suppress(StoreError):
            await self._remove_hidden()
        return hidden

    async def _remove_hidden(self, after_step: Callable[[], None] | None = None) -> None:
        """Remove rows of hidden sessions in pieces, for a while. What is left is removed by later calls."""
        stops_at = time.monotonic() + REMOVING_S
        while await self._change(removals.remove_some) and time.monotonic() < stops_at:
            if after_step is not None:
                after_step()

    # Idempotency keys

    async def check_key(self, key: IdempotencyKey, *, now: datetime) -> None:
        await self._write(lambda db: idempotency.check(db, key, now))

    async def forget_keys(self, *, now: datetime, limit: int) -> bool:
        return await self._write(lambda db: idempotency.forget(db, now, limit))

    # Turns

    async def begin_turn(
        self,
        turn: TurnRecord,
        *,
        now: datetime,
        head: str | None | msgspec.UnsetType = msgspec.UNSET,
        creates: SessionRecord | None = None,
        path_bytes_max: int | None | msgspec.UnsetType = msgspec.UNSET,
        key: IdempotencyKey | None = None,
        branches: bool = False,
    ) -> BegunTurn:
        return await self._write(
            lambda db: turns.begin(
                db,
                turn,
                self.me,
                now,
                head=head,
                creates=creates,
                path_bytes_max=path_bytes_max,
                key=key,
                branches=branches,
            )
        )

    async def add_turns(
        self,
        added: Sequence[TurnRecord],
        *,
        now: datetime,
        head: str | None | msgspec.UnsetType = msgspec.UNSET,
        key: IdempotencyKey | None = None,
    ) -> SessionRecord:
        terms = [await terms_of(turn) for turn in added]
        write = self._write if len(added) <= ADDED_MAX else self._change
        return await write(lambda db: additions.add(db, added, self.me, now, terms=terms, head=head, key=key))

    async def delete_turns(self, session_id: str, turn_id: str, *, now: datetime) -> None:
        await self._change(lambda db: deletions.delete_turns(db, session_id, turn_id, self.me, now))

    async def delete_turn(
        self, session_id: str, turn_id: str, *, now: datetime, session_revisions: Collection[str] = ()
    ) -> None:
        await self._change(
            lambda db: deletions.delete_turn(db, session_id, turn_id, self.me, now, session_revisions=session_revisions)
        )

    async def find_item(self, session_id: str, item_id: str, *, now: datetime) -> TurnRecord:
        found = await self._search_item(session_id, item_id, now)
        if found.turn is None:
            raise ItemNotFoundError(item_id)
        return found.turn

    async def _search_item(self, session_id: str, item_id: str, now: datetime) -> deletions.ItemSearch:
        searched = deletions.ItemSearch(session_id, item_id, now)
        while not searched.is_complete:
            await self._read(searched.read_some)
        return searched

    async def delete_item(self, session_id: str, item_id: str, *, now: datetime) -> None:
        is_done = False
        while not is_done:  # again if the turn has changed meanwhile
            is_done = await self._delete_item(await self._search_item(session_id, item_id, now), now)

    async def _delete_item(self, found: deletions.ItemSearch, now: datetime) -> bool:
        terms = () if found.turn is None else await terms_of(rules.without_items(found.turn, [found.item_id]))
        return await self._change(lambda db: deletions.delete_item(db, found, self.me, now, terms=terms))

    async def start_turn(self, turn_id: str, *, now: datetime) -> bool:
        try:
            return await self._write_own(lambda db: turns.start(db, turn_id, self.me, now))
        except FenceLostError:
            return False

    async def checkpoint_turns(self, checkpoints: Sequence[Checkpoint]) -> Collection[str]:
        try:
            return await self._write_own(lambda db: segments.keep(db, checkpoints, self.me))
        except FenceLostError:
            return {it.turn_id for it in checkpoints}

    async def end_turn(
        self,
        turn: TurnRecord,
        *,
        runs: Sequence[Run],
        now: datetime,
        after: int = 0,  # noqa: ARG002  an end has all events, wherever the checkpoints were
    ) -> EndResult:
        terms = () if turn.ephemeral else await terms_of(turn)
        try:
            return await self._write_own(Joined(self._end_all, End(turn, runs, terms, now)))
        except FenceLostError:
            kept = await self._read(lambda db: turns.find(db, turn.session_id, turn.id))
            return rules.result_of_late_end(kept, turn)

    def _end_all(self, db: Db, ends: Sequence[End]) -> Sequence[EndResult]:
        return turns.end_all(db, ends, self.me, leaves=self._has_suspended)

    async def suspend_turns(self, suspended: Sequence[SuspendedTurn], *, now: datetime) -> Collection[str]:
        self._has_suspended = True
        write = self._write if sum(it.turn.text_bytes for it in suspended) <= SUSPENDED_BYTES_MAX else self._change
        try:
            return await write(lambda db: suspensions.suspend(db, suspended, now, owner=self.fence))
        except FenceLostError:
            return {it.turn.id for it in suspended}

    async def adopt_turns(
        self,
        session_ids: Sequence[str],
        *,
        now: datetime,
        continues: Callable[[TurnRecord], bool],
        running: Collection[str] = (),
        path_bytes_max: Callable[[TurnRecord], int | None] | None = None,
    ) -> Mapping[str, Adoption]:
        return await self._write(
            lambda db: adoptions.adopt(
                db,
                session_ids,
                self.me,
                now,
                continues=continues,
                running=running,
                path_bytes_max=path_bytes_max,
            )
        )

    async def list_suspended(self, *, limit: int) -> Sequence[SuspendedSession]:
        return await self._look(lambda db: suspensions.list_page(db, limit=limit))

    async def find_open_turn(self, session_id: str, turn_id: str) -> OpenTurn | None:
        with self._open_turns.asking(session_id, turn_id, me=self.fence) as look:
            return await self._look(look)

    async def get_turn(self, session_id: str, turn_id: str, *, now: datetime, with_texts: bool = True) -> TurnRecord:
        # Without the texts it is one statement.
        read = lambda db: turns.get(db, session_id, turn_id, now, with_texts=with_texts)  # noqa: E731
        return await self._looking.call(read, shares=not with_texts)

    async def get_reply(self, session_id: str, turn_id: str, *, now: datetime) -> TurnRecord:
        return await self._looking.call(lambda db: turns.get(db, session_id, turn_id, now, with_input=False))

    async def find_session_of(self, turn_id: str) -> str | None:
        return await self._look(lambda db: turns.find_session_of(db, turn_id))

    async def list_turns(
        self,
        session_id: str,
        *,
        limit: int,
        after: str | None,
        now: datetime,
        bytes_max: int | None = None,
        parent: str | None | msgspec.UnsetType = msgspec.UNSET,
    ) -> Page[TurnRecord]:
        position = None if after is None else decode_turn_cursor(after)
        return await self._read(
            lambda db: turns.list_page(
                db, session_id, limit=limit, after=position, now=now, bytes_max=bytes_max, parent=parent
            )
        )

    async def list_tree(self, session_id: str, *, limit: int, after: str | None, now: datetime) -> Page[TreeNode]:
        position = None if after is None else decode_turn_cursor(after)
        return await self._read(lambda db: trees.list_page(db, session_id, limit=limit, after=position, now=now))

    async def find_places(self, session_id: str, turn_ids: Collection[str]) -> Places:
        return await self._look(lambda db: trees.find_places(db, session_id, turn_ids))

    async def read_path(self, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
        thread = self._reading if bytes_max is None else self._looking
        return await thread.call(lambda db: paths.read(db, session_id, turn_id, bytes_max=bytes_max))

    async def measure_path(self, session_id: str, turn_id: str) -> LeftOut:
        return await self._read(lambda db: paths.measure(db, session_id, turn_id))

    async def find_on_path(self, session_id: str, turn_id: str, *, among: Collection[str]) -> set[str]:
        return await self._read(lambda db: paths.find(db, session_id, turn_id, among=among))

    async def list_path(
        self, session_id: str, turn_id: str, *, limit: int, first: str | None, bytes_max: int | None = None
    ) -> Sequence[TurnRecord]:
        return await self._read(
            lambda db: paths.list_page(db, session_id, turn_id, limit=limit, first=first, bytes_max=bytes_max)
        )

    async def read_events(
        self, session_id: str, turn_id: str, *, after: int = 0, length_max: int = PAGE_LENGTH_MAX
    ) -> EventsPage:
        return await self._read(
            lambda db: event_pages.read(db, session_id, turn_id, after=after, length_max=length_max)
        )

    # Owners

    async def find_owner(self, session_id: str) -> Owner | None:
        return await self._look(lambda db: owners.find_owner(db, session_id, besides=self.fence))

    async def recover(self, *, now: datetime, after_step: Callable[[], None] | None = None) -> int:
        recovered = 0
        place: recovery.Place | None = recovery.Place()
        while place is not None:
            ended, place = await self._change(partial(recovery.recover_some, now=now, place=place))
            recovered += ended
            if after_step is not None:
                after_step()
        await self._remove_hidden(after_step)
        return recovered

    async def aclose(self) -> None:
        try:
            # The writer leaves last: what the others have in flight is over by then.
            for thread in (self._beating, self._looking, self._reading, self._changing, self._writing):
                await thread.close()
        finally:
            self._late_answers.close()
