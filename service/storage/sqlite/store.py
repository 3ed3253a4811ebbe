"""The store in one SQLite file: four threads with a connection each, and the store object in the event loop."""

import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

import anyio
import apsw
import msgspec

from service import store_capabilities
from service.errors import ItemNotFoundError, RefusedError, RepeatedError, StoreError
from service.models.client import Usage
from service.storage import rules
from service.storage.page_cursor import decode_session_cursor, decode_turn_cursor
from service.storage.pieces import Run, skip, split, text_of
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
    utf8_length,
)
from service.storage.search import search_query, terms_of
from service.storage.sql_thread import CLAIMED_GRACE_S, SqlThread
from service.storage.sqlite import (
    adoptions,
    creations,
    deletions,
    documents,
    event_pages,
    forks,
    idempotency,
    recovery,
    search,
    sessions,
    suspensions,
    tree_changes,
    trees,
    turns,
)
from service.storage.sqlite.event_pages import fits_in_turn
from service.storage.sqlite.open_files import OpenFiles
from service.storage.sqlite.ownership import Ownership, find_open_turn, find_owner, is_oldest
from service.storage.sqlite.reader import Reader
from service.storage.sqlite.rows import STAGED_MARK
from service.storage.sqlite.tree_changes import Progress
from service.storage.sqlite.writer import Writer
from service.storage.standing import Standing
from service.storage.store import PAGE_LENGTH_MAX, Monotonic
from service.telemetry.metrics.metrics import Metrics

P = TypeVar("P", bound=Progress)
T = TypeVar("T")

STEP_LENGTH_MAX = 1024 * 1024
"""Bound on the code points and events that one step writes, so that the step holds the write lock for milliseconds."""

_LONG_LENGTH = 16 * 1024
"""The characters of a turn whose terms its end adds. A shorter one waits for that, and searches look into it. Those of
a text that is not ASCII count fourfold: they take a multiple of the time."""
_ITEM_BYTES_MAX = 256
"""What an item takes in its row beside its strings."""
_ESCAPED_BYTES_MAX = 6
"""What a byte of a string takes in its row."""


@asynccontextmanager
async def open_sqlite_store(
    path: str | Path,
    *,
    address: str | None = None,
    close_timeout_s: float = 5,
    monotonic: Monotonic = time.monotonic,
    metrics: Metrics | None = None,
) -> AsyncIterator["SqliteStore"]:
    """Open the store in the file at ``path``, which may be a link. Makes the file if necessary; closes on leaving.

    Args:
        address: The address at which this process answers other owners of the same file.
        close_timeout_s: How long closing may take. A disk that hangs longer is left to daemon threads.
        monotonic: The time by which housekeeping and the repetition of a fault in the log are due.
        metrics: Counts the commits.

    Raises:
        StartupError: The file cannot be used; one sentence says why and what to do.
        StoreError: On leaving: the file was deleted or replaced, so its content is lost.
    """
    store = SqliteStore(path, address=address, monotonic=monotonic, metrics=metrics)
    try:
        await store.open()
        yield store
    finally:
        with anyio.move_on_after(close_timeout_s, shield=True):
            await store.aclose()
    if store.files.were_lost:
        raise StoreError("Its file was deleted or replaced while it was open.", retry_after_s=None)


class SqliteStore:
    """Meets :class:`service.storage.store.Store`. Made by :func:`open_sqlite_store`.

    Attributes:
        fence: This owner's number among all owners that ever opened the file.
        files: The open files.
        writer: The writer, whose counts say how many steps shared a commit.
    """

    capabilities = store_capabilities.SQLITE

    def __init__(
        self,
        path: str | Path,
        *,
        address: str | None,
        monotonic: Monotonic = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        self.files = OpenFiles(path)
        self.standing = Standing()
        self.name = f"sqlite:{self.files.path}"
        self._ownership = Ownership(self.files.path.with_name(f"{self.files.path.name}-owners"))
        self.writer = Writer(
            self.files,
            self._ownership,
            address=address,
            opened_at=time.time_ns() // 1000,
            monotonic=monotonic,
            metrics=metrics,
        )
        self._writing = SqlThread("sqlite writer", self.writer)
        self._marks = count()
        # A second reader, so that the many short reads do not wait for a long one.
        self._looking = SqlThread("sqlite reader", Reader(self.files, monotonic=monotonic))
        self._reading = SqlThread("sqlite long reader", Reader(self.files, monotonic=monotonic, steps_max=1))
        # A third reader, because a search takes up to a quarter of a second.
        self._searching = SqlThread("sqlite search", Reader(self.files, monotonic=monotonic, steps_max=1))
        self._forking = anyio.Lock()  # one fork at a time, because its turns are in memory meanwhile
        self._abandoned: set[str] = set()
        """The hidden sessions of forks and creations that failed or whose callers left."""
        self._given_up: set[int] = set()
        """Changes of trees that failed or whose callers left."""

    @property
    def peer_secret(self) -> bytes:
        return self._ownership.secret

    @property
    def fence(self) -> int:
        return self._ownership.fence

    async def open(self) -> None:
        """Open the store. Raises: StartupError; the caller must close the store in this case, too."""
        await self._writing.open()
        await self._looking.open()
        await self._reading.open()
        await self._searching.open()

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
            await self._writing.call(lambda db: sessions.create(db, session, now, key=key))
            return
        creation = creations.Creation(
            session=session,
            added=added,
            terms=[await terms_of(turn) for turn in added],
            hidden_id=sessions.hidden_id_for(session.id),
            key=key,
        )
        progress: creations.Progress | None = None
        step = partial(creations.build, creation=creation, fence=self.fence, now=now)
        async with self._given_up_unless_shown(creation.hidden_id):
            while (progress := await self._writing.call(partial(step, progress=progress))) is not None:
                pass

    async def fork_session(
        self, source_id: str, *, at: str | None, copy_id: str, now: datetime, key: IdempotencyKey | None = None
    ) -> SessionRecord:
        async with self._forking:
            plan = forks.Plan(source_id, at, copy_id=copy_id, fence=self.fence, now=now, key=key)
            while not plan.is_complete:
                await self._reading.call(plan.read_some)
            fork = plan.fork
            progress: forks.Progress | None = None
            step = partial(forks.build, fork=fork, fence=self.fence, now=now)
            async with self._given_up_unless_shown(fork.hidden_id):
                is_shown = False
                while not is_shown:
                    for index in forks.places_to_cut(fork, progress):
                        fork.terms[index] = await terms_of(fork.turns[index])
                    progress = await self._writing.call(partial(step, progress=progress))
                    is_shown = progress is None
            return fork.session

    @asynccontextmanager
    async def _given_up_unless_shown(self, hidden_id: str) -> AsyncIterator[None]:
        """If the steps of a hidden session fail, or their caller leaves, remove what is there of the session."""
        try:
            yield
        except BaseException:
            self._abandoned.add(hidden_id)
            with anyio.move_on_after(CLAIMED_GRACE_S, shield=True), suppress(StoreError):
                await self._clear_abandoned()
            raise

    async def get_session(self, session_id: str, *, now: datetime) -> SessionRecord:
        return await self._looking.call(lambda db: sessions.visible(db, session_id, now).record)

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
                await self._searching.call(listing.read_some)
            return listing.page
        return await self._reading.call(
            lambda db: sessions.list_page(
                db, limit=limit, after=position, status=status, now=now, owner=owner, bytes_max=bytes_max
            )
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
            await self._searching.call(searched.read_some)
        return searched.page

    async def count_sessions(self, *, status: SessionStatus | None, now: datetime, owner: str | None = None) -> int:
        return await self._reading.call(lambda db: sessions.count(db, status, now, owner=owner))

    async def update_session(
        self, session_id: str, patch: SessionPatch, *, now: datetime, revisions: Collection[str] | None = None
    ) -> SessionRecord:
        return await self._writing.call(
            lambda db: sessions.update(db, session_id, patch, self._ownership, now, revisions=revisions)
        )

    async def keep_title(
        self,
        session: SessionRecord,
        title: str | None,
        *,
        usage: Usage | None,
        now: datetime,
        source: TitleSource | None = None,
    ) -> bool:
        return await self._writing.call(lambda db: sessions.keep_title(db, session, title, usage, now, source=source))

    async def mark_deleted(self, session_id: str, *, now: datetime, revisions: Collection[str] | None = None) -> None:
        await self._writing.call(
            lambda db: sessions.mark_deleted(db, session_id, self._ownership, now, revisions=revisions),
            makes_space=True,
        )

    async def is_marked(self, session_id: str) -> bool:
        # The writer answers, because a reader does not see a mark that is being committed.
        return await self._writing.call(lambda db: sessions.is_marked(db, session_id, self.fence), makes_space=True)

    async def remove_deleted(self, session_id: str) -> None:
        await self._remove(lambda db: sessions.remove_deleted(db, session_id))

    async def delete_expired(self, *, now: datetime, limit: int) -> int:
        return await self._remove(lambda db: _delete_expired(db, self._ownership, now, limit))

    # Idempotency keys

    async def check_key(self, key: IdempotencyKey, *, now: datetime) -> None:
        await self._writing.call(lambda db: idempotency.check(db, key, now), makes_space=True)

    async def forget_keys(self, *, now: datetime, limit: int) -> bool:
        def forget(db: apsw.Connection) -> bool:
            return is_oldest(db, self._ownership) and idempotency.forget(db, now, limit)

        return await self._writing.call(forget, makes_space=True)

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
        return await self._writing.call(
            lambda db: turns.begin(
                db,
                turn,
                self._ownership,
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
        step = partial(turns.add_some, added=added, terms=terms, owners=self._ownership, now=now, head=head, key=key)
        session = (await self._change(step, turns.Addition())).session
        assert session is not None, "an addition never begins anew"
        return session

    async def delete_turns(self, session_id: str, turn_id: str, *, now: datetime) -> None:
        is_done: bool | None = False
        while not is_done:  # again if the tree has changed meanwhile
            read = deletions.FollowersRead(session_id, turn_id, now)
            while not read.is_complete:
                await self._reading.call(read.read_some)
            step = partial(deletions.delete_turns, read=read, owners=self._ownership, now=now)
            is_done = (await self._change(step, Progress(), makes_space=True)).is_done

    async def delete_turn(
        self, session_id: str, turn_id: str, *, now: datetime, session_revisions: Collection[str] = ()
    ) -> None:
        is_done: bool | None = False
        while not is_done:  # again if the tree has changed meanwhile
            read = deletions.EndOfBranchRead(session_id, turn_id, now)
            while not read.is_complete:
                await self._reading.call(read.read_some)
            step = partial(
                deletions.delete_turn,
                read=read,
                owners=self._ownership,
                now=now,
                session_revisions=session_revisions,
            )
            is_done = (await self._change(step, Progress(), makes_space=True)).is_done

    async def find_item(self, session_id: str, item_id: str, *, now: datetime) -> TurnRecord:
        search = await self._search_item(session_id, item_id, now, with_answers=False)
        if search.turn is None:
            raise ItemNotFoundError(item_id)
        return search.turn

    async def _search_item(
        self, session_id: str, item_id: str, now: datetime, *, with_answers: bool
    ) -> deletions.ItemSearch:
        search = deletions.ItemSearch(session_id, item_id, now, with_answers=with_answers)
        while not search.is_complete:
            await self._reading.call(search.read_some)
        return search

    async def delete_item(self, session_id: str, item_id: str, *, now: datetime) -> None:
        is_done: bool | None = False
        while not is_done:  # again if the tree has changed meanwhile
            search = await self._search_item(session_id, item_id, now, with_answers=True)
            terms = () if search.turn is None else await terms_of(rules.without_items(search.turn, [item_id]))
            step = partial(deletions.delete_item, search=search, terms=terms, owners=self._ownership, now=now)
            is_done = (await self._change(step, Progress())).is_done

    async def _change(self, step: Callable[..., P], progress: P, *, makes_space: bool = False) -> P:
        """Do the steps of a change of a tree. Returns its progress: done, or to be begun anew.

        A change that fails, or whose caller leaves, is done as a whole or undone.
        """
        key = tree_changes.new_key()
        try:
            while progress.is_done is None:
                call: Callable[[apsw.Connection], P] = partial(step, change=key, progress=progress)
                progress = await self._remove(call, lambda it: it.is_done is not None, makes_space=makes_space)
        except BaseException as error:
            if progress.noted or not isinstance(error, RefusedError | RepeatedError):
                self._given_up.add(key)
                with anyio.move_on_after(CLAIMED_GRACE_S, shield=True), suppress(StoreError):
                    await self._clear_abandoned()
            raise
        return progress

    async def start_turn(self, turn_id: str, *, now: datetime) -> bool:
        return await self._writing.call(lambda db: turns.start(db, turn_id, self.fence, now))

    async def checkpoint_turns(self, checkpoints: Sequence[Checkpoint]) -> Collection[str]:
        staged = [
            await self._stage_events(it.session_id, it.turn_id, it.runs, it.text, after=it.after) for it in checkpoints
        ]
        return await self._writing.call(lambda db: turns.checkpoint(db, checkpoints, staged, self.fence))

    async def end_turn(self, turn: TurnRecord, *, runs: Sequence[Run], now: datetime, after: int = 0) -> EndResult:
        if turn.ephemeral:
            return await self._end_ephemeral(turn, now)
        staged = None
        if _is_large(turn) and not fits_in_turn(turn, runs):
            staged = await self._stage_growth(turn, runs, after=after)
        terms = await terms_of(turn) if _is_long(turn) else None
        return await self._writing.call(
            lambda db: turns.end(db, turn, runs, staged, terms=terms, after=after, fence=self.fence, now=now)
        )

    async def _end_ephemeral(self, turn: TurnRecord, now: datetime) -> EndResult:
        end = partial(turns.end, turn=turn, runs=(), staged=None, terms=(), after=0, fence=self.fence, now=now)
        return await self._remove(end, lambda _: True)

    async def _stage_growth(self, turn: TurnRecord, runs: Sequence[Run], *, after: int) -> turns.StagedEvents | None:
        """Stage what a turn's reply grew by after a seq, as :meth:`_stage_events` does."""
        text = text_of(runs, [item.text for item in turn.output], after=after)
        return await self._stage_events(turn.session_id, turn.id, list(skip(runs, after)), text, after=after)

    async def _stage_events(
        self, session_id: str, turn_id: str, runs: Sequence[Run], text: str, *, after: int
    ) -> turns.StagedEvents | None:
        """Where the events are too many for one step, keep all but the last part of them."""
        if max(len(text), sum(len(run.lengths) for run in runs)) <= STEP_LENGTH_MAX:
            return None
        staged: turns.StagedEvents | None = turns.StagedEvents(f"{STAGED_MARK} {next(self._marks)}", after)
        *parts, _ = split(runs, text, length_max=STEP_LENGTH_MAX)
        for part, part_text in parts:
            if staged is not None:
                staged = await self._writing.call(
                    partial(
                        turns.stage_events,
                        session_id=session_id,
                        turn_id=turn_id,
                        runs=part,
                        text=part_text,
                        staged=staged,
                        after=after,
                        fence=self.fence,
                    )
                )
        return staged

    async def suspend_turns(self, suspended: Sequence[SuspendedTurn], *, now: datetime) -> Collection[str]:
        staged = [
            await self._stage_growth(it.turn, it.runs, after=it.after) if _is_large(it.turn) else None
            for it in suspended
        ]
        return await self._writing.call(lambda db: turns.suspend(db, suspended, staged, fence=self.fence, now=now))

    async def adopt_turns(
        self,
        session_ids: Sequence[str],
        *,
        now: datetime,
        continues: Callable[[TurnRecord], bool],
        running: Collection[str] = (),
        path_bytes_max: Callable[[TurnRecord], int | None] | None = None,  # noqa: ARG002  a read costs no more here
    ) -> Mapping[str, Adoption]:
        return await self._writing.call(
            lambda db: adoptions.adopt(db, session_ids, self._ownership, now, continues=continues, running=running)
        )

    async def list_suspended(self, *, limit: int) -> Sequence[SuspendedSession]:
        return await self._looking.call(lambda db: suspensions.list_page(db, limit=limit))

    async def find_open_turn(self, session_id: str, turn_id: str) -> OpenTurn | None:
        return await self._looking.call(lambda db: find_open_turn(db, session_id, turn_id, me=self.fence))

    async def get_turn(self, session_id: str, turn_id: str, *, now: datetime, with_texts: bool = True) -> TurnRecord:
        return await self._looking.call(lambda db: turns.get(db, session_id, turn_id, now, with_texts=with_texts))

    async def get_reply(self, session_id: str, turn_id: str, *, now: datetime) -> TurnRecord:
        return await self._looking.call(lambda db: turns.get(db, session_id, turn_id, now, with_input=False))

    async def find_session_of(self, turn_id: str) -> str | None:
        return await self._looking.call(lambda db: turns.find_session_of(db, turn_id))

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
        return await self._reading.call(
            lambda db: turns.list_page(
                db, session_id, limit=limit, after=position, now=now, bytes_max=bytes_max, parent=parent
            )
        )

    async def list_tree(self, session_id: str, *, limit: int, after: str | None, now: datetime) -> Page[TreeNode]:
        position = None if after is None else decode_turn_cursor(after)
        return await self._reading.call(
            lambda db: turns.list_tree(db, session_id, limit=limit, after=position, now=now)
        )

    async def find_places(self, session_id: str, turn_ids: Collection[str]) -> Places:
        return await self._looking.call(lambda db: trees.find_places(db, session_id, turn_ids))

    async def read_path(self, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
        read = turns.PathRead(session_id, turn_id, bytes_max)
        # The first step of a bounded read is as short as other looks, and nearly always the only one.
        await (self._reading if bytes_max is None else self._looking).call(read.read_some)
        while not read.is_complete:
            await self._reading.call(read.read_some)
        return read.turns

    async def measure_path(self, session_id: str, turn_id: str) -> LeftOut:
        measure = turns.PathMeasure(session_id, turn_id)
        while not measure.is_complete:
            await self._reading.call(measure.read_some)
        return measure.measured

    async def find_on_path(self, session_id: str, turn_id: str, *, among: Collection[str]) -> set[str]:
        search = turns.PathSearch(session_id, turn_id, among)
        while not search.is_complete:
            await self._reading.call(search.read_some)
        return search.found

    async def list_path(
        self, session_id: str, turn_id: str, *, limit: int, first: str | None, bytes_max: int | None = None
    ) -> Sequence[TurnRecord]:
        page = turns.PathPage(session_id, turn_id, limit=limit, first=first, bytes_max=bytes_max)
        while not page.is_complete:
            await self._reading.call(page.read_some)
        return page.turns

    async def read_events(
        self, session_id: str, turn_id: str, *, after: int = 0, length_max: int = PAGE_LENGTH_MAX
    ) -> EventsPage:
        return await self._reading.call(
            lambda db: event_pages.read(db, session_id, turn_id, after=after, length_max=length_max)
        )

    # Owners

    async def find_owner(self, session_id: str) -> Owner | None:
        return await self._looking.call(lambda db: find_owner(db, session_id, besides=self.fence))

    async def recover(self, *, now: datetime, after_step: Callable[[], None] | None = None) -> int:
        await self._clear_abandoned()
        recovered, finished = 0, False
        while not finished:
            step = partial(recovery.recover_some, owners=self._ownership, now=now)
            ended, finished = await self._remove(step, lambda _: True, makes_space=False)
            recovered += ended
            if after_step is not None:
                after_step()
        return recovered

    async def aclose(self) -> None:
        # The writer closes last, because the last connection writes the log back and removes it.
        try:
            for thread in (self._looking, self._reading, self._searching, self._writing):
                await thread.close()
        finally:
            self._ownership.close()
            self.files.close()

    async def _remove(
        self, call: Callable[[apsw.Connection], T], leaves: Callable[[T], object] = bool, *, makes_space: bool = True
    ) -> T:
        """Run a step that may leave rows to reclaim. The writer learns it in its thread, before it looks whether it may
        rest, and also if the caller has left.

        Args:
            leaves: Whether there are such rows, by the result of the step.
        """

        def run(db: apsw.Connection) -> T:
            result = call(db)
            self.writer.removed = bool(leaves(result)) or self.writer.removed
            return result

        return await self._writing.call(run, makes_space=makes_space)

    async def _clear_abandoned(self) -> None:
        """Remove the hidden sessions of failed forks and creations, and undo failed changes of trees."""
        for key in list(self._given_up):
            await self._remove(partial(tree_changes.give_up, change=key), lambda _: True)
            self._given_up.discard(key)
        for hidden_id in list(self._abandoned):
            await self.remove_deleted(hidden_id)
            self._abandoned.discard(hidden_id)


def _delete_expired(db: apsw.Connection, owners: Ownership, now: datetime, limit: int) -> int:
    return sessions.delete_expired(db, now, limit) if is_oldest(db, owners) else 0


def _is_large(turn: TurnRecord) -> bool:
    """Whether the reply may be too long for one step."""
    return sum(len(item.text) for item in turn.output) > STEP_LENGTH_MAX


def _is_long(turn: TurnRecord) -> bool:
    """Whether a search could not look into the turn, or would take long for it."""
    items = (*turn.input, *turn.output)
    if sum(len(item.text) * (1 if item.text.isascii() else 4) for item in items) > _LONG_LENGTH:
        return True
    strings = (text for it in items for text in (it.text, it.encrypted, it.upstream, it.name, it.call_id))
    bytes_max = len(items) * _ITEM_BYTES_MAX + _ESCAPED_BYTES_MAX * sum(map(utf8_length, strings))
    return bytes_max > documents.LOOKED_AT_BYTES_MAX
