"""The store that keeps everything in this process's memory, and loses it with the process.

This store is the reference for other stores. Each method has one checkpoint at its start, and then one block without a
checkpoint, so that it schedules and cancels like a store with I/O. A listing, a fork and a path have more, because
they may look at thousands of rows, and so has the beginning of a turn, which puts earlier turns into the search index.
The end of a turn checks for cancellation but does not yield, because in a shutdown hundreds of ends come at once, and
their callers end anyway.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from itertools import islice
from math import inf
from operator import attrgetter
from secrets import token_bytes
from typing import TypeVar

import anyio
import anyio.lowlevel
import msgspec
from sortedcontainers import SortedList

from service import store_capabilities
from service.errors import (
    EditedMeanwhileError,
    ItemNotFoundError,
    RepeatedError,
    SessionExistsError,
    SessionLimitError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
    TurnsSuspendedError,
)
from service.ids import owner_of
from service.models.client import Usage
from service.steps import Steps, WorkTime, at_once, in_steps
from service.storage import rules, search
from service.storage.fork_path import ForkPath, copies_of, forked_session
from service.storage.memory.deletions import CallAnswers, delete_from, find_turn, lost_terms, without_answers
from service.storage.memory.documents import Document, MemoryDocuments
from service.storage.memory.idempotency import Keys
from service.storage.memory.kept import KeptEvents, KeptSession, KeptTurn, KeptTurns, TurnDeletion
from service.storage.memory.listings import Listings
from service.storage.memory.paths import Paths, found, measured
from service.storage.memory.search import MemoryIndex
from service.storage.page_cursor import (
    SessionPosition,
    TurnPosition,
    decode_session_cursor,
    decode_turn_cursor,
    encode_cursor,
)
from service.storage.page_size import fitting, page_of_sessions
from service.storage.pieces import Run, count, join, last_seq, pack, skip, split, text_of, unpack
from service.storage.records import (
    Adoption,
    BegunTurn,
    Checkpoint,
    EndResult,
    EventsPage,
    IdempotencyKey,
    Item,
    LeftOut,
    Match,
    OpenTurn,
    Owner,
    Page,
    Places,
    SessionPatch,
    SessionRecord,
    SessionStatus,
    Siblings,
    SuspendedSession,
    SuspendedTurn,
    TitleSource,
    TreeNode,
    TurnRecord,
    text_length,
)
from service.storage.search import SEARCH_S, search_page, search_query
from service.storage.standing import Standing
from service.storage.store import PAGE_LENGTH_MAX
from service.storage.terms import document_terms

R = TypeVar("R")

_LISTED_AT_ONCE = 1000
"""Sessions that a listing looks at in one step of the event loop, which takes less than a millisecond."""
_FURTHER_TERMS_S = 5
"""Bound on the indexing after a deletion, which a cancelled caller waits for."""
_RECLAIM_S = 0.5
"""How long the caller of a deletion of turns waits until they are taken out of the lists; the next call goes on."""
_ROOM_AFTER_S = 10
"""After which time a caller that found no room for a session is told to try again: sessions live for long."""
_FORKED_AT_ONCE = 100
"""Turns that a fork copies in one step of the event loop, which takes some milliseconds."""


@asynccontextmanager
async def open_memory_store(*, sessions_max: float = inf) -> AsyncIterator["MemoryStore"]:
    """An empty store for at most ``sessions_max`` sessions, closed on leaving."""
    store = MemoryStore(sessions_max=sessions_max)
    try:
        yield store
    finally:
        await store.aclose()


class MemoryStore:
    """Meets :class:`service.storage.store.Store`."""

    name = "memory"
    capabilities = store_capabilities.MEMORY
    fence = 0

    def __init__(self, *, sessions_max: float = inf) -> None:
        self.peer_secret = token_bytes(32)  # only this process uses the store
        self.standing = Standing()
        self._sessions_max = sessions_max
        self._sessions: dict[str, KeptSession] = {}
        self._turns = KeptTurns()
        self._paths = Paths(self._sessions, self._turns)
        self._listings = Listings()
        self._keys = Keys()
        self._documents = MemoryDocuments()
        self._deleting = anyio.Lock()  # one deletion of turns at a time, because it marks its turns
        self._deletions: deque[TurnDeletion] = deque()
        """Those whose turns are not yet taken out of the lists."""
        self._suspended: dict[str, None] = {}
        """The sessions with suspended turns."""

    # Sessions

    async def create_session(
        self,
        session: SessionRecord,
        *,
        now: datetime,
        key: IdempotencyKey | None = None,
        added: Sequence[TurnRecord] = (),
    ) -> None:
        await anyio.lowlevel.checkpoint()
        self._check_key(key, now)
        if added:
            await self._add_with_turns(session, await in_steps(_with_events(added)), now, key)
        else:
            self._keys.keep(key, self._add(session, now))

    async def _add_with_turns(
        self,
        session: SessionRecord,
        turns: Sequence[KeptTurn],
        now: datetime,
        key: IdempotencyKey | None,
        *,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """Add a session with turns that have ended. ``check`` refuses it at last."""
        title_document = self._documents.reserve()
        async with self._prepared(turns):
            check()
            self._check_key(key, now)
            added = self._add(session, now, title_document=title_document)
        self._keys.keep(key, added)
        for turn in turns:
            added.add(turn)
        self._turns |= {turn.record.id: turn for turn in added.turns}
        self._publish(added, *turns)

    async def fork_session(
        self, source_id: str, *, at: str | None, copy_id: str, now: datetime, key: IdempotencyKey | None = None
    ) -> SessionRecord:
        await anyio.lowlevel.checkpoint()
        self._check_key(key, now)
        found = self._visible(source_id, now)
        source, edits = found.record, found.edits
        rules.check_takes_turns(source)
        at = source.head if at is None else at
        path, kept = ForkPath(), []
        while at is not None:
            turn = self._turn_of(source_id, at)
            size = sum(len(page.runs) for page in turn.pages) + sum(len(it.text.encode()) for it in turn.record.output)
            path.add(turn.record, events_bytes=size)
            kept.append(turn)
            at = turn.record.parent
            await self._let_others_run(source_id, after=len(kept), edits=edits, now=now)
        copies: list[TurnRecord] = []
        for copied in copies_of(path, copy_id=copy_id):
            copies.append(copied)
            await self._let_others_run(source_id, after=len(copies), edits=edits, now=now)
        session = forked_session(source, path, head=copies[-1].id if copies else None, copy_id=copy_id, now=now)
        turns = [KeptTurn(it, old.pages, old.kept) for it, old in zip(copies, reversed(kept), strict=True)]
        await self._add_with_turns(
            session, turns, now, key, check=partial(self._check_unchanged, source_id, edits, now)
        )
        return session

    async def get_session(self, session_id: str, *, now: datetime) -> SessionRecord:
        await anyio.lowlevel.checkpoint()
        return self._visible(session_id, now).record

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
        await anyio.lowlevel.checkpoint()
        work = WorkTime()
        listed = self._listings.of(owner)
        order = listed.running_by_age if status == "running" else listed.by_age
        if metadata:
            order = self._listings.with_metadata(owner, metadata)
        maximum = None
        if after is not None:
            position = decode_session_cursor(after)
            maximum = (position.created_at, position.id)
        is_listed = partial(rules.is_listed, status=status, owner=owner, metadata=metadata or {})
        is_over = (lambda: work.elapsed_s >= search.SEARCH_S) if metadata else (lambda: False)
        newest = self._newest(order, maximum, limit + 1, is_listed, now=now, is_over=is_over)
        found, rest = await in_steps(work.of(newest))
        place = None if rest is None else SessionPosition(*rest)
        return page_of_sessions(found, limit=limit, bytes_max=bytes_max, rest=place, partial=rest is not None)

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
        await anyio.lowlevel.checkpoint()
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
        await in_steps(self._documents.prepare_noted(owner, within_s=SEARCH_S))
        return await in_steps(search_page(MemoryIndex(self._documents, self._sessions, wanted), wanted))

    async def count_sessions(self, *, status: SessionStatus | None, now: datetime, owner: str | None = None) -> int:
        await anyio.lowlevel.checkpoint()
        return self._listings.of(owner).count(status, now)

    async def update_session(
        self, session_id: str, patch: SessionPatch, *, now: datetime, revisions: Collection[str] | None = None
    ) -> SessionRecord:
        await anyio.lowlevel.checkpoint()
        session = self._visible(session_id, now)
        rules.check_revision(session.record, revisions)
        rules.check_head(session.record, patch.seen_head)
        if patch.head is not msgspec.UNSET:
            for turn_id in (patch.head, session.record.head):
                self._refuse_if_open(session_id, turn_id, instead=rules.INSTEAD_OF_MOVING)
        title = session.record.title
        self._replace(session, rules.patched(session.record, patch, now))
        if session.record.title != title:
            self._forget_title(session, title)
            self._publish_title(session)
        return session.record

    async def keep_title(
        self,
        session: SessionRecord,
        title: str | None,
        *,
        usage: Usage | None,
        now: datetime,
        source: TitleSource | None = None,
    ) -> bool:
        await anyio.lowlevel.checkpoint()
        kept = self._sessions.get(session.id)
        if kept is None or not rules.is_titled(kept.record, session, now, is_deleted=kept.deleted):
            return False
        if source is not None:
            turn = self._turns.find(source.turn_id)
            if turn is None or TitleSource.of(turn.record) != source:
                title = None
        before = kept.record
        self._replace(kept, rules.titled(before, title, usage, now))
        if kept.record.title == before.title:
            return False
        self._publish_title(kept)
        return True

    async def mark_deleted(self, session_id: str, *, now: datetime, revisions: Collection[str] | None = None) -> None:
        await anyio.lowlevel.checkpoint()
        session = self._visible(session_id, now)
        rules.check_revision(session.record, revisions)
        self._listings.remove(session.record)
        session.deleted = True

    async def is_marked(self, session_id: str) -> bool:
        await anyio.lowlevel.checkpoint()
        session = self._sessions.get(session_id)
        return session is not None and session.deleted

    async def remove_deleted(self, session_id: str) -> None:
        await anyio.lowlevel.checkpoint()
        session = self._sessions.get(session_id)
        if session is not None and session.deleted:
            self._remove(session)
            await in_steps(self._reclaim())

    async def delete_expired(self, *, now: datetime, limit: int) -> int:
        await anyio.lowlevel.checkpoint()
        removed = self._remove_expired(now, limit)
        await in_steps(self._reclaim())
        return removed

    # Idempotency keys

    async def check_key(self, key: IdempotencyKey, *, now: datetime) -> None:
        await anyio.lowlevel.checkpoint()
        self._check_key(key, now)

    async def forget_keys(self, *, now: datetime, limit: int) -> bool:
        await anyio.lowlevel.checkpoint()
        return self._keys.forget(now, limit=limit)

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
        await anyio.lowlevel.checkpoint()
        # Each turn that ends has begun: what its end leaves to the next search stays little.
        await in_steps(self._documents.prepare_oldest())
        self._check_key(key, now)
        if creates is not None:
            rules.check_first_turn(creates, turn, head)
            session = self._add(creates, now)
        else:
            session = self._to_follow(turn, now)
            rules.check_head(session.record, head)
            if session.is_suspended:
                raise TurnsSuspendedError(session.open_turns()[0].record.id)
            if branches:
                self._refuse_if_open(turn.session_id, turn.parent)
        kept = self._turns[turn.id] = KeptTurn(turn)
        siblings = session.add(kept)
        self._keys.keep(key, session, turn.id)
        self._replace(session, rules.begun(session.record, turn, now))
        path = None if path_bytes_max is msgspec.UNSET else self._paths.short(session, turn, path_bytes_max)
        return BegunTurn(session.record, path, siblings)

    async def add_turns(
        self,
        added: Sequence[TurnRecord],
        *,
        now: datetime,
        head: str | None | msgspec.UnsetType = msgspec.UNSET,
        key: IdempotencyKey | None = None,
    ) -> SessionRecord:
        await anyio.lowlevel.checkpoint()
        turns = await in_steps(_with_events(added))
        async with self._prepared(turns):
            self._check_key(key, now)
            session = self._to_follow(added[0], now)
            rules.check_head(session.record, head)
            self._refuse_if_open(added[0].session_id, added[0].parent, instead=rules.INSTEAD_OF_ADDING)
            for turn in turns:
                session.add(turn)
                self._turns[turn.record.id] = turn
            self._publish(session, *turns)
            self._keys.keep(key, session, added[-1].id, first_turn_id=added[0].id)
            self._replace(session, rules.with_added(session.record, added, now))
            return session.record

    async def delete_turns(self, session_id: str, turn_id: str, *, now: datetime) -> None:
        await anyio.lowlevel.checkpoint()
        async with self._deleting:
            while not await in_steps(self._delete_turns(session_id, turn_id, now)):
                pass  # the tree has changed meanwhile
        with anyio.move_on_after(_RECLAIM_S, shield=True):
            await in_steps(self._reclaim())

    def _delete_turns(self, session_id: str, turn_id: str, now: datetime) -> Steps[bool]:
        """Delete a turn and all that follow it. Returns whether they are deleted: not if the tree changes meanwhile."""
        session = self._visible(session_id, now)
        version, first = session.version, self._turn_of(session_id, turn_id)
        return (yield from self._delete_all(session, version, (yield from session.followers_of(first)), now))

    def _delete_all(
        self, session: KeptSession, version: tuple[int, int, int], turns: list[KeptTurn], now: datetime
    ) -> Steps[bool]:
        """Delete turns, of which the first one is above all others. ``version``: that of the tree which has them."""
        session_id, first, messages = session.record.id, turns[0], 0
        deletion = TurnDeletion(session, turns)
        for turn in deletion.turns:
            yield
            if turn.record.is_open:
                raise TurnInProgressError(turn.record.id, instead=rules.INSTEAD_OF_DELETING)
            turn.deletion = deletion
            messages += turn.record.message_count
        others = yield from session.others_than(deletion)
        if self._visible(session_id, now) is not session or session.version != version:
            return False
        deletion.is_done = True
        self._deletions.append(deletion)
        head = session.record.head
        if head is not None and self._turns.find(head) is None:
            head = first.record.parent
        session.remove(deletion.turns, others)
        self._note_edit(session, messages=messages, head=head)
        return True

    async def delete_turn(
        self, session_id: str, turn_id: str, *, now: datetime, session_revisions: Collection[str] = ()
    ) -> None:
        await anyio.lowlevel.checkpoint()
        async with self._deleting:
            while not await in_steps(self._delete_turn(session_id, turn_id, now, session_revisions)):
                pass  # the tree has changed meanwhile
        with anyio.move_on_after(_RECLAIM_S, shield=True):
            await in_steps(self._reclaim())

    def _delete_turn(
        self, session_id: str, turn_id: str, now: datetime, session_revisions: Collection[str]
    ) -> Steps[bool]:
        session = self._visible(session_id, now)
        version, turn = session.version, self._turn_of(session_id, turn_id)
        if session.children.get(turn_id):
            record = turn.record
            terms = yield from document_terms(turn.texts())
            is_current = self._visible(session_id, now) is session and session.version == version
            return is_current and turn.record is record and self._empty(session, turn, terms)
        is_deleted = yield from self._delete_all(session, version, (yield from self._end_of_branch(session, turn)), now)
        if is_deleted and not session.turns and rules.revision_of(session.record) in session_revisions:
            self._remove(session)
        return is_deleted

    def _end_of_branch(self, session: KeptSession, last: KeptTurn) -> Steps[list[KeptTurn]]:
        """A turn that no other one follows, below the emptied turns that nothing else follows."""
        found, above = [last], last.record.parent
        while above is not None and len(session.children[above]) == 1:
            turn = self._turns.find(above)
            if turn is None or not turn.record.is_emptied:
                break
            found.append(turn)
            above = turn.record.parent
            yield
        return found[::-1]

    def _empty(self, session: KeptSession, turn: KeptTurn, terms: set[str]) -> bool:
        """Empty a turn that others follow. Raises: TurnInProgressError."""
        still_open = self._open_follower(session, turn)
        if still_open is not None:
            raise TurnInProgressError(still_open, instead=rules.INSTEAD_OF_DELETING)
        if turn.document is not None:
            self._documents.drop(turn.document, terms)
        messages, turn.record = turn.record.message_count, rules.emptied(turn.record)
        turn.pages, turn.kept = (), 0
        self._note_edit(session, messages=messages, head=session.record.head)
        return True

    async def find_item(self, session_id: str, item_id: str, *, now: datetime) -> TurnRecord:
        await anyio.lowlevel.checkpoint()
        turn = await in_steps(find_turn(self._visible(session_id, now).turns, item_id))
        if turn is None:
            raise ItemNotFoundError(item_id)
        return turn.record

    async def delete_item(self, session_id: str, item_id: str, *, now: datetime) -> None:
        await anyio.lowlevel.checkpoint()
        while True:
            session = self._visible(session_id, now)
            version = session.version
            turn = await in_steps(find_turn(session.turns, item_id))
            item = None if turn is None else turn.record.find_item(item_id)
            if turn is None or item is None:
                raise ItemNotFoundError(item_id)
            record = turn.record
            terms, had_all = await in_steps(lost_terms(record, rules.without_items(record, [item_id])))
            changes = await in_steps(without_answers(session, turn, item))
            if (
                self._visible(session_id, now) is session
                and session.version == version
                and turn.record is record
                and changes.are_current()
            ):
                self._delete_item(session, turn, item, terms, changes)
                with anyio.move_on_after(_FURTHER_TERMS_S, shield=True):
                    if not had_all:
                        await in_steps(self._add_further_terms(turn, turn.record))
                    await in_steps(self._reclaim())
                return

    def _delete_item(
        self, session: KeptSession, found: KeptTurn, item: Item, terms: set[str], answers: CallAnswers
    ) -> None:
        still_open = self._open_follower(session, found)
        if still_open is not None:
            raise TurnInProgressError(still_open, instead=rules.INSTEAD_OF_DELETING)
        if found.document is not None:
            self._documents.drop(found.document, terms)
        for turn, _, without in answers.changes:
            turn.record = without
        self._note_edit(session, messages=answers.messages + delete_from(found, [item.id]), head=session.record.head)

    def _add_further_terms(self, turn: KeptTurn, record: TurnRecord) -> Steps[None]:
        """Index what a turn has now, until it changes again: of more terms than count, other ones may be the first."""
        number = turn.document
        if number is not None and not self._documents.is_noted(number):  # the next search prepares a noted one
            for _ in self._documents.prepare(number, owner_of(record.session_id), turn.texts):
                yield
                if turn.document != number or turn.record is not record:
                    return

    async def start_turn(self, turn_id: str, *, now: datetime) -> bool:
        await anyio.lowlevel.checkpoint()
        turn = self._turns.find(turn_id)
        if turn is None or turn.is_suspended:
            return False
        turn.record = rules.started(turn.record, now)
        return turn.record.is_open

    async def checkpoint_turns(self, checkpoints: Sequence[Checkpoint]) -> Collection[str]:
        # Nothing is kept, because no turn in this store outlives its owner.
        await anyio.lowlevel.checkpoint()
        lost: list[str] = []
        for it in checkpoints:
            turn = self._turns.find(it.turn_id)
            if turn is None or turn.is_suspended or not turn.record.is_open:
                lost.append(it.turn_id)
            else:
                turn.adopted = None
        return lost

    async def end_turn(
        self,
        turn: TurnRecord,
        *,
        runs: Sequence[Run],
        now: datetime,
        after: int = 0,  # noqa: ARG002
    ) -> EndResult:
        await anyio.lowlevel.checkpoint_if_cancelled()
        kept = self._turns.find(turn.id)
        if kept is None or kept.is_suspended or not kept.record.is_open:
            return rules.result_of_late_end(None if kept is None else kept.record, turn)
        session = self._sessions[kept.record.session_id]
        if turn.ephemeral:
            self._replace(session, rules.ended(session.record, turn, now))
            self._remove_ephemeral(session, kept)
            return EndResult.KEPT
        kept.record, kept.document = turn, self._documents.reserve()
        self._documents.note(kept.document, Document(turn.session_id, turn.id, kept.texts, kept.is_deleted))
        session.documents.add(kept.document)
        kept.pages, kept.kept, kept.adopted = tuple(_pages_of(runs)), last_seq(runs), None
        self._replace(session, rules.ended(session.record, turn, now))
        return EndResult.KEPT

    def _remove_ephemeral(self, session: KeptSession, turn: KeptTurn) -> None:
        """Remove an ephemeral turn, and its session if that was made for it."""
        if session.record.ephemeral:
            self._remove(session)
            return
        session.remove([turn], None)
        session.removed += 1
        session.children.pop(turn.record.id, None)
        del self._turns[turn.record.id]
        self._keys.note_turn_gone(session, turn.record.id)

    async def suspend_turns(self, suspended: Sequence[SuspendedTurn], *, now: datetime) -> Collection[str]:
        await anyio.lowlevel.checkpoint()
        found = [(it, self._turns.find(it.turn.id)) for it in suspended]
        for it, turn in found:
            if turn is not None and turn.record.is_open and not turn.is_suspended:
                session = self._sessions[turn.record.session_id]
                turn.record, turn.is_suspended, turn.adopted = it.turn, True, None
                turn.pages, turn.kept = tuple(_pages_of(it.runs)), last_seq(it.runs)
                session.suspended += 1
                self._suspended[session.record.id] = None
                self._replace(session, rules.used(session.record, now))
        return [it.turn.id for it, turn in found if turn is None or not turn.is_suspended]

    async def adopt_turns(
        self,
        session_ids: Sequence[str],
        *,
        now: datetime,  # noqa: ARG002
        continues: Callable[[TurnRecord], bool],
        running: Collection[str] = (),
        path_bytes_max: Callable[[TurnRecord], int | None] | None = None,  # noqa: ARG002
    ) -> Mapping[str, Adoption]:
        await anyio.lowlevel.checkpoint()
        return {it: self._adopt(it, continues, running) for it in session_ids}

    def _adopt(self, session_id: str, continues: Callable[[TurnRecord], bool], running: Collection[str]) -> Adoption:
        session = self._sessions.get(session_id)
        if session is None or session.deleted:
            return Adoption()
        for turn in session.open_turns():
            if turn.is_suspended:
                runs = join(run for page in turn.pages for run in unpack(page.runs))
                turn.adopted = rules.resumed(turn.record, runs, continues=continues(turn.record))
                turn.record = msgspec.structs.replace(turn.adopted.turn, output=())
                turn.pages, turn.kept, turn.is_suspended = (), 0, False
        session.suspended = 0
        self._suspended.pop(session_id, None)
        adopted = [turn.adopted for turn in session.open_turns()]
        return Adoption(
            session=session.record, turns=[it for it in adopted if it is not None and it.turn.id not in running]
        )

    async def list_suspended(self, *, limit: int) -> Sequence[SuspendedSession]:
        await anyio.lowlevel.checkpoint()
        found = (self._sessions[session_id] for session_id in self._suspended)
        waiting = sorted(
            (it for it in found if it.is_suspended and not it.deleted),
            key=lambda it: (it.record.last_accessed_at, it.record.id),
        )
        return [
            SuspendedSession(
                id=it.record.id,
                awaits_client=all(turn.record.on_disconnect == "cancel" for turn in it.open_turns()),
            )
            for it in waiting[:limit]
        ]

    async def find_open_turn(self, session_id: str, turn_id: str) -> OpenTurn | None:
        await anyio.lowlevel.checkpoint()
        turn = self._turns.find(turn_id)
        if turn is None or turn.record.session_id != session_id or not turn.record.is_open:
            return None
        if self._sessions[session_id].deleted:
            return None
        return OpenTurn(is_suspended=turn.is_suspended)

    async def get_turn(
        self,
        session_id: str,
        turn_id: str,
        *,
        now: datetime,
        with_texts: bool = True,  # noqa: ARG002
    ) -> TurnRecord:
        await anyio.lowlevel.checkpoint()
        self._visible(session_id, now)
        return self._turn_of(session_id, turn_id).record

    async def get_reply(self, session_id: str, turn_id: str, *, now: datetime) -> TurnRecord:
        return msgspec.structs.replace(await self.get_turn(session_id, turn_id, now=now), input=())

    async def find_session_of(self, turn_id: str) -> str | None:
        await anyio.lowlevel.checkpoint()
        turn = self._turns.find(turn_id)
        return None if turn is None else turn.record.session_id

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
        await anyio.lowlevel.checkpoint()
        session = self._visible(session_id, now)
        if isinstance(parent, str):
            self._turn_of(session_id, parent)
        turns = session.turns if parent is msgspec.UNSET else session.children.get(parent, ())
        shown, more = _after(turns, after, limit=limit)
        fits = fitting((turn.record.text_bytes for turn in shown), bytes_max=bytes_max)
        return _page_of([turn.record for turn in shown[:fits]], shown, more=more)

    async def list_tree(self, session_id: str, *, limit: int, after: str | None, now: datetime) -> Page[TreeNode]:
        await anyio.lowlevel.checkpoint()
        shown, more = _after(self._visible(session_id, now).turns, after, limit=limit)
        return _page_of([TreeNode.of(turn.record) for turn in shown], shown, more=more)

    async def find_places(self, session_id: str, turn_ids: Collection[str]) -> Places:
        await anyio.lowlevel.checkpoint()
        session = self._sessions.get(session_id)
        if session is None:
            return Places()
        turns = [turn for turn in map(self._turns.find, turn_ids) if turn and turn.record.session_id == session_id]
        counts = session.children
        return Places(
            session.record.head,
            {turn.record.id: Siblings(turn.place, len(counts[turn.record.parent])) for turn in turns},
        )

    async def read_path(self, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
        await anyio.lowlevel.checkpoint()
        return await in_steps(self._paths.newest(session_id, turn_id, bytes_max))

    async def measure_path(self, session_id: str, turn_id: str) -> LeftOut:
        return await in_steps(measured(await self.read_path(session_id, turn_id, bytes_max=None)))

    async def find_on_path(self, session_id: str, turn_id: str, *, among: Collection[str]) -> set[str]:
        await anyio.lowlevel.checkpoint()
        return await in_steps(found(self._paths.down(session_id, turn_id), set(among)))

    async def list_path(
        self, session_id: str, turn_id: str, *, limit: int, first: str | None, bytes_max: int | None = None
    ) -> Sequence[TurnRecord]:
        path = await self.read_path(session_id, turn_id, bytes_max=None)
        start = next((index for index, turn in enumerate(path) if first in (None, turn.id)), len(path))
        found = path[start : start + limit]
        return found[: fitting((turn.text_bytes for turn in found), bytes_max=bytes_max, rows_min=2)]

    async def read_events(
        self, session_id: str, turn_id: str, *, after: int = 0, length_max: int = PAGE_LENGTH_MAX
    ) -> EventsPage:
        await anyio.lowlevel.checkpoint()
        turn = self._turns.find(turn_id)
        if turn is None or turn.record.session_id != session_id:
            return EventsPage(after=after)
        if turn.record.events_deleted:
            return EventsPage(after=after, ended=True, events_deleted=True)
        page = EventsPage(
            after=after,
            kept=turn.kept,
            ended=not turn.record.is_open,
            text_length=0 if turn.record.is_open else text_length(turn.record.output),
        )
        if after >= turn.kept:
            return page
        kept = turn.pages[bisect_right(turn.pages, after, key=attrgetter("after")) - 1]
        kept_runs = unpack(kept.runs)
        runs, _ = next(split(skip(kept_runs, after, begins=kept.after), "", length_max=length_max))
        texts = [item.text for item in turn.record.output]
        text = text_of(kept_runs, texts, after=after, begins=kept.after, events=count(runs), starts=kept.starts)
        return msgspec.structs.replace(page, runs=tuple(runs), text=text)

    async def find_owner(self, session_id: str) -> Owner | None:  # noqa: ARG002
        # A memory store has only one owner.
        await anyio.lowlevel.checkpoint()
        return None

    async def recover(self, *, now: datetime, after_step: Callable[[], None] | None = None) -> int:  # noqa: ARG002
        # No turn in this store outlives its owner.
        await anyio.lowlevel.checkpoint()
        return 0

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()

    # Documents

    @asynccontextmanager
    async def _prepared(self, turns: Sequence[KeptTurn]) -> AsyncIterator[None]:
        """Put ended turns into the index, in steps; the body publishes them. If it raises, they are taken out again."""
        try:
            for turn in turns:
                turn.document = self._documents.reserve()
                await in_steps(self._documents.prepare(turn.document, owner_of(turn.record.session_id), turn.texts))
            yield
        except BaseException:
            for turn in turns:
                self._forget(turn)
            raise

    def _publish(self, session: KeptSession, *turns: KeptTurn) -> None:
        for turn in turns:
            assert turn.document is not None
            self._documents.publish(
                turn.document, Document(turn.record.session_id, turn.record.id, turn.texts, turn.is_deleted)
            )
        session.documents.update(turn.document for turn in turns if turn.document is not None)

    def _forget(self, turn: KeptTurn) -> None:
        if turn.document is not None:
            self._documents.remove(turn.document, turn.texts)
            turn.document = None

    def _reclaim(self) -> Steps[None]:
        """Take deleted turns out of the lists, and removed documents out of the index."""
        while self._deletions:
            deletion = self._deletions[0]
            while deletion.turns:
                self._take_out(deletion.session, deletion.turns.pop())
                yield
            if self._deletions and self._deletions[0] is deletion:  # no other task has done the same meanwhile
                self._deletions.popleft()
        yield from self._documents.reclaim()

    def _take_out(self, session: KeptSession, turn: KeptTurn) -> None:
        turn_id = turn.record.id
        session.children.pop(turn_id, None)
        if turn.document is not None:
            session.documents.remove(turn.document)
        self._forget(turn)
        del self._turns[turn_id]
        self._keys.note_turn_gone(session, turn_id)

    def _publish_title(self, session: KeptSession, number: int | None = None) -> None:
        title = session.record.title
        if title is not None:
            number = session.title_document = number or self._documents.reserve()
            at_once(self._documents.prepare(number, session.record.owner, partial(_title, title)))
            self._documents.publish(number, Document(session.record.id, None, partial(_title, title)))
            session.documents.add(number)

    def _forget_title(self, session: KeptSession, title: str | None) -> None:
        if session.title_document is not None and title is not None:
            self._documents.remove(session.title_document, partial(_title, title))
            session.documents.remove(session.title_document)
            session.title_document = None

    # Parts of a step

    async def _let_others_run(self, source_id: str, *, after: int, edits: int, now: datetime) -> None:
        """Yield to other tasks after every hundred turns of a fork. The copied turns have ended.

        Raises:
            SessionNotFoundError: The source was removed meanwhile.
            EditedMeanwhileError: Something was deleted from the source meanwhile.
        """
        if after % _FORKED_AT_ONCE == 0:
            await anyio.lowlevel.checkpoint()
            self._check_unchanged(source_id, edits, now)

    def _check_unchanged(self, source_id: str, edits: int, now: datetime) -> None:
        if self._visible(source_id, now).edits != edits:
            raise EditedMeanwhileError

    def _open_follower(self, session: KeptSession, turn: KeptTurn) -> str | None:
        """An open turn that is this turn or follows it. One whose path is long counts as a follower."""
        looked_at, left = 0, session.record.open_turns
        for newer in reversed(session.turns):
            if not left:
                break
            if not newer.record.is_open:
                continue
            left -= 1
            for record in self._paths.down(session.record.id, newer.record.id):
                looked_at += 1
                if record.id == turn.record.id or looked_at > rules.PATHS_LOOKED_AT_MAX:
                    return newer.record.id
                if self._turns[record.id].ordinal < turn.ordinal:
                    break
        return None

    def _note_edit(self, session: KeptSession, *, messages: int, head: str | None) -> None:
        session.edits += 1
        self._replace(session, rules.with_deleted(session.record, messages=messages, head=head))

    def _newest(
        self,
        order: SortedList[tuple[datetime, str]],
        maximum: tuple[datetime, str] | None,
        limit: int,
        is_listed: Callable[[SessionRecord], bool],
        *,
        now: datetime,
        is_over: Callable[[], bool],
    ) -> Steps[tuple[list[SessionRecord], tuple[datetime, str] | None]]:
        """The newest sessions below ``maximum``; and where to go on, if the time was over first.

        Many sessions may have expired that are not removed yet.
        """
        found: list[SessionRecord] = []
        while True:
            keys = list(islice(order.irange(maximum=maximum, inclusive=(True, False), reverse=True), _LISTED_AT_ONCE))
            for _, session_id in keys:
                session = self._sessions[session_id].record
                if not session.has_expired(now) and is_listed(session):
                    found.append(session)
                    if len(found) == limit:
                        return found, None
            if len(keys) < _LISTED_AT_ONCE:
                return found, None
            maximum = keys[-1]
            if is_over():
                return found, maximum
            yield

    def _visible(self, session_id: str, now: datetime) -> KeptSession:
        session = self._sessions.get(session_id)
        if session is None or not rules.is_visible(session.record, now, is_deleted=session.deleted):
            raise SessionNotFoundError(session_id)
        return session

    def _to_follow(self, turn: TurnRecord, now: datetime) -> KeptSession:
        """The session of a turn that may begin. Raises: SessionNotFoundError, TurnNotFoundError."""
        session = self._visible(turn.session_id, now)
        rules.check_takes_turns(session.record)
        if turn.parent is not None and self._turn_of(turn.session_id, turn.parent).record.ephemeral:
            raise TurnNotFoundError(turn.parent)
        return session

    def _add(self, session: SessionRecord, now: datetime, *, title_document: int | None = None) -> KeptSession:
        present = self._sessions.get(session.id)
        if present is not None:
            if rules.keeps_its_id(present.record, now, is_deleted=present.deleted):
                raise SessionExistsError(session.id)
            self._remove(present)
        if len(self._sessions) >= self._sessions_max and not self._remove_expired(now, limit=1):
            raise SessionLimitError(
                f"{self._sessions_max} sessions are kept already (memory_sessions_max); delete some or try later.",
                retry_after_s=_ROOM_AFTER_S,
            )
        added = self._sessions[session.id] = KeptSession(session)
        self._listings.add(session)
        self._publish_title(added, title_document)
        return added

    def _check_key(self, key: IdempotencyKey | None, now: datetime) -> None:
        made = self._keys.find(key)
        if made is None:
            return
        session = made.session
        exists = session is not None and rules.is_visible(session.record, now, is_deleted=session.deleted)
        raise RepeatedError(
            fingerprint=made.fingerprint,
            session_id=made.session_id,
            turn_id=made.turn_id,
            first_turn_id=made.first_turn_id,
            is_gone=not exists or (made.turn_id is not None and self._turns.find(made.turn_id) is None),
        )

    def _turn_of(self, session_id: str, turn_id: str) -> KeptTurn:
        turn = self._turns.find(turn_id)
        if turn is None or turn.record.session_id != session_id:
            raise TurnNotFoundError(turn_id)
        return turn

    def _refuse_if_open(self, session_id: str, turn_id: str | None, **instead: str) -> None:
        """Raises: TurnInProgressError: A turn on the path to this turn is open. TurnNotFoundError: There is none."""
        if turn_id is None:
            return
        self._turn_of(session_id, turn_id)
        path = self._paths.down(session_id, turn_id)
        still_open = rules.find_open((turn.id, turn.state, turn.started_at) for turn in path)
        if still_open is not None:
            raise TurnInProgressError(still_open, **instead)

    def _remove_expired(self, now: datetime, limit: int) -> int:
        expired = self._listings.expired(now, limit=limit)
        for session_id in expired:
            self._remove(self._sessions[session_id])
        return len(expired)

    def _replace(self, session: KeptSession, record: SessionRecord) -> None:
        if not session.deleted:
            self._listings.replace(session.record, record)
        session.record = record

    def _remove(self, session: KeptSession) -> None:
        if not session.deleted:
            self._listings.remove(session.record)
        self._forget_title(session, session.record.title)
        for turn in session.turns:
            self._forget(turn)
            del self._turns[turn.record.id]
        del self._sessions[session.record.id]
        self._suspended.pop(session.record.id, None)
        self._keys.note_session_gone(session)


def _after(turns: Sequence[KeptTurn], after: str | None, *, limit: int) -> tuple[Sequence[KeptTurn], bool]:
    """The turns after a page cursor, and whether there are more than these."""
    ordinal = -1 if after is None else decode_turn_cursor(after).ordinal
    start = bisect_right(turns, ordinal, key=attrgetter("ordinal"))
    return turns[start : start + limit], len(turns) > start + limit


def _page_of(rows: Sequence[R], turns: Sequence[KeptTurn], *, more: bool) -> Page[R]:
    """The page of these rows, which are those of the first of these turns; ``more``: turns come after them."""
    cursors = tuple(encode_cursor(TurnPosition(turn.ordinal)) for turn in turns[: len(rows)])
    has_next = more or len(rows) < len(turns)
    return Page(data=tuple(rows), next=cursors[-1] if cursors and has_next else None, cursors=cursors)


def _title(title: str) -> Iterable[str]:
    return (title,)


def _with_events(added: Sequence[TurnRecord]) -> Steps[list[KeptTurn]]:
    turns: list[KeptTurn] = []
    for turn in added:
        yield
        runs = rules.events_at_once(turn.output)
        turns.append(KeptTurn(turn, tuple(_pages_of(runs)), last_seq(runs)))
    return turns


def _pages_of(runs: Sequence[Run]) -> Iterator[KeptEvents]:
    after, ends = 0, dict[int, int]()
    for part, _ in split(runs, "", length_max=PAGE_LENGTH_MAX):
        yield KeptEvents(after, pack(part), {run.item: ends.get(run.item, 0) for run in part})
        for run in part:
            ends[run.item] = ends.get(run.item, 0) + run.length
        after = last_seq(part, after)
