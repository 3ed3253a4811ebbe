"""The comparison of all answers of the service with those of the model."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

from service.errors import EventsDeletedError, SessionNotFoundError
from service.sessions.events.events import Piece
from service.storage.records import Page, Places, SessionRecord, TreeNode, TurnRecord
from tests.sessions.puppet import read_all
from tests.sessions.trees.model import Model, ModelSession, ModelTurn, Part
from tests.sessions.trees.steps import OWNERS, QUERIES, SESSION_IDS, TEAMS
from tests.sessions.trees.workers import Worker, Workers, pages

T0 = datetime(2030, 1, 1, tzinfo=UTC)


def at(seconds: int) -> datetime:
    """A moment of the model."""
    return T0 + timedelta(seconds=seconds)


def _at(seconds: int | None) -> datetime | None:
    return None if seconds is None else at(seconds)


class Comparison:
    """Compares the answers of the workers with the model.

    Attributes:
        seen: The records of turns, as the last comparison has seen them.
    """

    def __init__(self, workers: Workers, model: Model) -> None:
        self.seen: dict[str, TurnRecord] = {}
        self._workers = workers
        self._model = model
        self._looks = 0

    async def compare(self, session_ids: Iterable[str], turn_ids: Sequence[str]) -> None:
        """Compare the answers about some sessions, and one listing and one search.

        Args:
            turn_ids: Turns, some of which are gone or of other sessions.
        """
        for session_id in sorted(session_ids):
            if (session := self._model.find(session_id)) is not None:
                await self._compare_session(session)
                await self._compare_turns(session, turn_ids, {None, session.head}, {session.head})
            else:
                await self._compare_gone(session_id)
        self._looks += 1
        number = self._looks
        owner = (*OWNERS, None)[number % 3]
        await self._compare_listings(owner, [TEAMS[number // 3 % 3]])
        await self._compare_search(QUERIES[number % len(QUERIES)], owner)

    async def compare_all(self, turn_ids: Sequence[str]) -> None:
        """Compare all answers."""
        for session_id in SESSION_IDS:
            if (session := self._model.find(session_id)) is not None:
                await self._compare_session(session)
                await self._compare_turns(session, turn_ids, {None, *session.turns}, session.turns)
            else:
                await self._compare_gone(session_id)
        for owner in (*OWNERS, None):
            await self._compare_listings(owner, TEAMS)
            for query in QUERIES:
                await self._compare_search(query, owner)

    async def _compare_gone(self, session_id: str) -> None:
        calls: Sequence[Callable[[Worker], Awaitable[object]]] = (
            lambda worker: worker.sessions.get_session(session_id),
            lambda worker: worker.sessions.list_messages(session_id, limit=9),
            lambda worker: worker.sessions.list_turns(session_id, limit=9),
            lambda worker: worker.sessions.list_tree(session_id, limit=9),
        )
        for call in calls:
            with suppress(SessionNotFoundError):
                await self._workers.ask(call)
                raise AssertionError(f"{session_id} is found")

    async def _compare_session(self, session: ModelSession) -> None:
        record = await self._workers.ask(lambda worker: worker.sessions.get_session(session.id))
        assert {
            "head": record.head,
            "title": record.title,
            "metadata": record.metadata,
            "messages": record.message_count,
            "open": record.open_turns,
            "tokens": (record.input_tokens, record.output_tokens, record.reasoning_tokens, record.cached_tokens),
            "times": (record.created_at, record.last_accessed_at, record.expires_at),
        } == {
            "head": session.head,
            "title": session.title,
            "metadata": session.metadata,
            "messages": session.message_count,
            "open": len(session.open),
            "tokens": session.tokens,
            "times": (*map(at, (session.created, session.used, session.used + session.idle_timeout_s)),),
        }
        if session.head is not None:
            path = await self._workers.ask(
                lambda worker: worker.store.read_path(session.id, record.head or "", bytes_max=None)
            )
            assert [it.id for it in path] == [it.id for it in session.path(session.head)]
            size = await self._workers.ask(lambda worker: worker.store.measure_path(session.id, record.head or ""))
            assert size == session.size_in_prompts(session.head)
        messages = await pages(
            lambda after: self._workers.ask(
                lambda worker: worker.sessions.list_messages(session.id, limit=3, after=after)
            )
        )
        assert [(it.turn_id, Part.of(it.item)) for it in messages] == [
            (turn.id, part) for turn in session.path(session.head) for part in turn.messages
        ]

    async def _compare_turns(
        self,
        session: ModelSession,
        turn_ids: Sequence[str],
        parents: Iterable[str | None],
        replayed: Iterable[str | None],
    ) -> None:
        """Compare all turns of a session, their places in the tree, and the events of some of them."""
        turns = list(session.turns.values())
        records = await pages(self._workers.turns(session.id))
        assert [_told(record) for record in records] == [_expected(turn) for turn in turns]
        for record in records:
            before = self.seen.get(record.id)
            ids = {item.id for item in (*record.input, *record.output)}
            if before is not None:
                known = {item.id for item in (*before.input, *before.output)}
                assert ids <= known or before.is_open, "an item has another id than before"
            self.seen[record.id] = record
        tree = await pages(
            lambda after: self._workers.ask(lambda worker: worker.sessions.list_tree(session.id, limit=4, after=after))
        )
        assert tree == [
            TreeNode(id=it.id, parent=it.parent, state=it.state, created_at=at(it.created), ended_at=_at(it.ended))
            for it in turns
        ]
        others = [name for name in turn_ids[-9:] if name not in session.turns]
        places = await self._workers.ask(lambda worker: worker.store.find_places(session.id, [*session.turns, *others]))
        assert places == Places(session.head, {it.id: session.siblings(it) for it in turns})
        for parent in parents:
            children = await pages(self._workers.turns(session.id, parent=parent))
            assert [it.id for it in children] == [it.id for it in session.children(parent)]
        for turn_id in replayed:
            if turn_id is not None and not session.turns[turn_id].is_open:
                await self._compare_events(session, session.turns[turn_id])

    async def _compare_events(self, session: ModelSession, turn: ModelTurn) -> None:
        try:
            log, watch = await self._workers.ask(lambda worker: worker.sessions.open_events(session.id, turn.id))
        except EventsDeletedError:
            assert turn.events_deleted
            return
        watch.release()
        assert not turn.events_deleted
        events = await read_all(log)
        assert "".join(it.text for it in events if isinstance(it, Piece)) == "".join(it.text for it in turn.replied)
        assert type(events[-1]).__struct_config__.tag == f"turn.{turn.state}"

    async def _compare_listings(self, owner: str | None, teams: Iterable[Mapping[str, str]]) -> None:
        sessions = self._model.visible(owner)
        for team in teams:
            listed = await pages(partial(self._list_sessions, owner, team))
            assert [it.id for it in listed] == [it.id for it in sessions if team.items() <= it.metadata.items()]
        running = await self._workers.ask(lambda worker: worker.sessions.count_sessions(status="running", owner=owner))
        assert running == sum(bool(it.open) for it in sessions)

    async def _list_sessions(
        self, owner: str | None, team: Mapping[str, str], after: str | None
    ) -> Page[SessionRecord]:
        return await self._workers.ask(
            lambda worker: worker.sessions.list_sessions(limit=2, after=after, owner=owner, metadata=team)
        )

    async def _compare_search(self, query: str, owner: str | None) -> None:
        found = await pages(
            lambda after: self._workers.ask(
                lambda worker: worker.sessions.search_sessions(query, limit=2, after=after, owner=owner)
            )
        )
        matches = {it.id: self._model.matches(it, query) for it in self._model.visible(owner)}
        expected = {name: match for name, match in matches.items() if match[1]}
        assert sorted(it.session.id for it in found) == sorted(expected), query
        ranks = [expected[it.session.id][0] for it in found]
        assert ranks == sorted(ranks, reverse=True), f"{query}: the newest first"
        for it in found:
            assert it.turn_id in expected[it.session.id][1], query
            assert any(word in it.snippet.casefold() for word in query.split())


def _told(record: TurnRecord) -> dict[str, object]:
    return {
        "place": (record.id, record.parent),
        "state": (record.state, record.reason or (record.error and record.error.code)),
        "input": [Part.of(item) for item in record.input],
        "output": [Part.of(item) for item in record.output],
        "usage": record.usage,
        "times": (record.created_at, record.started_at, record.ended_at),
        "events_deleted": record.events_deleted,
    }


def _expected(turn: ModelTurn) -> dict[str, object]:
    return {
        "place": (turn.id, turn.parent),
        "state": (turn.state, turn.detail),
        "input": turn.said,
        "output": turn.replied,
        "usage": None if turn.is_open else turn.usage,
        "times": (*map(_at, (turn.created, turn.started, turn.ended)),),
        "events_deleted": turn.events_deleted,
    }
