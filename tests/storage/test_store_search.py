"""Search in every store: what is found, in which order, and what later changes do to it."""

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import apsw
import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequestError
from service.ids import new_turn_id
from service.steps import at_once
from service.storage import search
from service.storage.records import Item, Match, Page, SessionPatch, SessionStatus
from service.storage.snippets import SNIPPET_LENGTH_MAX
from service.storage.sqlite import SqliteStore, documents
from service.storage.sqlite.indexing import Indexing
from service.storage.store import Store
from service.storage.terms import TERMS_MAX, document_terms, query_terms
from tests.storage.conftest import OpenStore
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, at, ended, said

PAGES_MAX = 50


async def add_session(store: Store, session_id: str, title: str | None = None, **metadata: str) -> None:
    session = msgspec.structs.replace(a_session(session_id), title=title, metadata=metadata)
    await store.create_session(session, now=T0)


async def add_turn(store: Store, session_id: str, text: str, reply: str = "", *, turn_id: str | None = None) -> str:
    turn = a_turn(turn_id or new_turn_id(), session_id, texts=[text])
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn, text=reply), runs=said(reply) if reply else (), now=T0)
    return turn.id


async def index_whole(store: Store) -> None:
    """Put all turns into the index that wait for that."""
    if isinstance(store, SqliteStore):
        await store._writing.call(index_at_once)


def index_at_once(db: apsw.Connection) -> None:
    work = Indexing()
    while not work.is_done(db):
        work.run_step(lambda step: step(db))


async def found(
    store: Store, query: str, *, now: float = 0, limit: int = 100, status: SessionStatus | None = None, **more: str
) -> list[str]:
    """The sessions that a search finds, on all of its pages."""
    return [it.session.id for it in await matches(store, query, now=now, limit=limit, status=status, **more)]


async def matches(
    store: Store, query: str, *, now: float = 0, limit: int = 100, status: SessionStatus | None = None, **more: str
) -> list[Match]:
    data: list[Match] = []
    after = None
    for _ in range(PAGES_MAX):
        page = await store.search_sessions(
            query, limit=limit, after=after, status=status, now=at(now), metadata=more or None
        )
        assert not page.partial
        assert page.data or page.next is None
        data += page.data
        after = page.next
        if after is None:
            return data
    raise AssertionError("a search has no end")


async def test_a_session_is_found_by_its_title_and_by_the_texts_of_both_sides(store: Store) -> None:
    await add_session(store, "a", "Holiday plans")
    await add_session(store, "b")
    asked = await add_turn(store, "b", "Where is Lisbon?", "In Portugal.")
    [by_title] = await matches(store, "PLANS")
    assert (by_title.session.id, by_title.turn_id, by_title.snippet) == ("a", None, "Holiday plans")
    [by_input] = await matches(store, "lisbon")
    assert (by_input.turn_id, by_input.snippet) == (asked, "Where is Lisbon?")
    [by_output] = await matches(store, "portugal")
    assert (by_output.turn_id, by_output.snippet) == (asked, "In Portugal.")
    assert by_output.session == await store.get_session("b", now=T0)
    assert await found(store, "lisbon portugal") == ["b"], "the input and the output are one document"


async def test_all_terms_are_in_one_document_and_whole(store: Store) -> None:
    await add_session(store, "a", "alpha")
    await add_turn(store, "a", "beta", "gamma")
    await add_turn(store, "a", "delta")
    assert await found(store, "gamma beta") == ["a"]
    assert await found(store, "beta delta") == []
    assert await found(store, "alpha beta") == []
    assert await found(store, "gam") == []


async def test_reasoning_calls_and_outputs_of_calls_are_not_searched(store: Store) -> None:
    await add_session(store, "a")
    turn = msgspec.structs.replace(
        a_turn(),
        session_id="a",
        input=(Item(id="i", type="function_call_output", role="user", text="seen", call_id="c"),),
    )
    await store.begin_turn(turn, now=T0)
    end = ended(turn, text="answer", reasoning="thought")
    call = Item(id="c", type="function_call", role="assistant", text='{"x": "argument"}', call_id="c", name="tool")
    await store.end_turn(msgspec.structs.replace(end, output=(*end.output, call)), runs=(), now=T0)
    assert [await found(store, word) for word in ("answer", "thought", "seen", "argument", "tool")] == [
        ["a"],
        [],
        [],
        [],
        [],
    ]


async def test_the_newest_document_is_first_and_each_session_comes_once(store: Store) -> None:
    for name in ("a", "b", "c"):
        await add_session(store, name, f"word in {name}")
    await add_turn(store, "b", "word")
    newest = await add_turn(store, "a", "word", "twice: word")
    await add_turn(store, "b", "other")
    first, *_ = await matches(store, "word")
    assert (first.session.id, first.turn_id) == ("a", newest)
    for limit in (1, 2, 3):
        assert await found(store, "word", limit=limit) == ["a", "b", "c"]


async def test_a_turn_is_found_once_it_has_ended(store: Store) -> None:
    await add_session(store, "a")
    turn = a_turn("t", "a", texts=["question"])
    await store.begin_turn(turn, now=T0)
    assert await found(store, "question") == []
    await store.end_turn(ended(turn, "cancelled", text="a part"), runs=said("a part"), now=T0)
    assert await found(store, "question part") == ["a"]


async def test_a_search_follows_titles_at_once(store: Store) -> None:
    await add_session(store, "a", "first")
    await add_session(store, "b", "second")
    await store.update_session("a", SessionPatch(title="second"), now=T0)
    assert await found(store, "first") == []
    assert await found(store, "second") == ["a", "b"], "the title that was set last is the newest"
    await store.update_session("b", SessionPatch(title="second", metadata={"k": "v"}), now=T0)
    assert await found(store, "second") == ["a", "b"], "it was the same title"
    await store.update_session("a", SessionPatch(title=None), now=T0)
    assert await found(store, "second") == ["b"]


async def test_deleted_and_expired_sessions_are_not_found(store: Store) -> None:
    for name in ("a", "b", "c"):
        await add_session(store, name, "word")
        await add_turn(store, name, "text")
    await store.mark_deleted("a", now=T0)
    assert await found(store, "word") == await found(store, "text") == ["c", "b"]
    await store.remove_deleted("a")
    await add_session(store, "a", "another")
    assert await found(store, "word") == ["c", "b"]
    assert await found(store, "another") == ["a"]
    await store.begin_turn(a_turn("open", "c"), now=T0)
    assert await found(store, "word", now=IDLE_TIMEOUT_S) == ["c"], "it has an open turn"
    await store.delete_expired(now=at(IDLE_TIMEOUT_S), limit=10)
    assert await found(store, "word") == ["c"]


async def test_a_fork_is_found_beside_its_source(store: Store) -> None:
    await add_session(store, "a", "title")
    turn = await add_turn(store, "a", "text", "x" * 10)
    await add_turn(store, "a", "later")
    copy = await store.fork_session("a", at=turn, copy_id="copy", now=T0)
    assert [match.turn_id for match in await matches(store, "text")] == [copy.head, turn]
    assert await found(store, "title") == ["copy", "a"]
    assert await found(store, "later") == ["a"]
    await store.mark_deleted("a", now=T0)
    await store.remove_deleted("a")
    assert await found(store, "text") == await found(store, "title") == ["copy"]


async def test_a_search_is_filtered_by_status_and_metadata(store: Store) -> None:
    await add_session(store, "a", "word", team="blue")
    await add_session(store, "b", "word", team="red", vip="yes")
    await add_session(store, "c", "word", team="blue", vip="yes")
    await store.begin_turn(a_turn("t", "c"), now=T0)
    assert await found(store, "word", status="running") == ["c"]
    assert await found(store, "word", status="idle") == ["b", "a"]
    assert await found(store, "word", team="blue") == ["c", "a"]
    assert await found(store, "word", team="blue", vip="yes") == ["c"]
    assert await found(store, "word", team="blue", status="idle") == ["a"]
    assert await found(store, "word", team="") == await found(store, "word", other="blue") == []


async def test_a_search_of_an_owner_finds_this_owners_sessions_only(store: Store) -> None:
    for name in ("ann/a", "bob/a", "a", "ann/b"):
        await add_session(store, name, "one word")
        await add_turn(store, name, "text of a turn")
    for query in ("word", "one word", "turn", "text turn"):
        for owner, names in {"ann": ["ann/b", "ann/a"], "bob": ["bob/a"], "": ["a"], "eve": []}.items():
            page = await store.search_sessions(query, limit=9, after=None, status=None, owner=owner, now=T0)
            assert [match.session.id for match in page.data] == names
    copy = await store.fork_session("ann/a", at=None, copy_id="ann/c", now=T0)
    page = await store.search_sessions("text", limit=9, after=None, status=None, owner="ann", now=T0)
    assert [match.session.id for match in page.data] == [copy.id, "ann/b", "ann/a"]


async def test_a_cursor_does_not_tell_how_many_documents_there_are(store: Store) -> None:
    cursors: list[str] = []
    for n in range(20):
        await add_session(store, f"s{n}", "word")
        page = await store.search_sessions("word", limit=1, after=None, status=None, now=T0)
        cursors += page.cursors
    raw = [b64decode(cursor + "=" * (-len(cursor) % 4), b"-_") for cursor in cursors]
    assert len({one[:8] for one in raw}) == len({one[8:16] for one in raw}) == 20, "no part counts"
    assert raw != sorted(raw)


async def test_a_cursor_stays_the_same_while_other_owners_go_on(store: Store) -> None:
    async def cursors(owner: str) -> tuple[str, ...]:
        page = await store.search_sessions("word", limit=1, after=None, status=None, owner=owner, now=T0)
        assert page.next == page.cursors[0]
        following = await store.search_sessions("word", limit=1, after=page.next, status=None, owner=owner, now=T0)
        return *page.cursors, *following.cursors

    for name in ("bob/a", "bob/b", "a", "b"):
        await add_session(store, name, "word")
    before = [await cursors("bob"), await cursors("")]
    await add_session(store, "ann/a", "word")
    await add_turn(store, "ann/a", "word", "reply")
    await store.update_session("ann/a", SessionPatch(title="another word"), now=T0)
    assert [await cursors("bob"), await cursors("")] == before


async def test_later_documents_do_not_move_the_pages_of_a_search(store: Store) -> None:
    for name in "abcdef":
        await add_session(store, name, "word")
    page = await store.search_sessions("word", limit=2, after=None, status=None, now=T0)
    assert [match.session.id for match in page.data] == ["f", "e"]
    await add_session(store, "g", "word")
    await add_turn(store, "a", "word")
    await store.mark_deleted("e", now=T0)
    await store.remove_deleted("e")
    page = await store.search_sessions("word", limit=2, after=page.next, status=None, now=T0)
    assert [match.session.id for match in page.data] == ["d", "c"]
    page = await store.search_sessions("word", limit=2, after=page.next, status=None, now=T0)
    assert [match.session.id for match in page.data] == ["b", "a"]
    assert page.next is None


async def test_the_number_of_a_deleted_document_is_not_given_again_between_two_pages(store: Store) -> None:
    for name in "abc":
        await add_session(store, name)
        await add_turn(store, name, "word", turn_id=f"t{name}")
    page = await store.search_sessions("word", limit=1, after=None, status=None, now=T0)
    assert [match.session.id for match in page.data] == ["c"]
    await store.delete_turns("c", "tc", now=T0)
    await add_turn(store, "a", "word", turn_id="newer")
    page = await store.search_sessions("word", limit=9, after=page.next, status=None, now=T0)
    assert [match.session.id for match in page.data] == ["b", "a"]


async def test_a_page_ends_where_its_bytes_end_and_goes_on_after_any_row(store: Store) -> None:
    for n in range(6):
        await add_session(store, f"s{n}", "word " + "x" * 100)
    page = await store.search_sessions("word", limit=6, after=None, status=None, now=T0)
    assert len(page.data) == len(page.cursors) == 6
    for n, cursor in enumerate(page.cursors, 1):
        rest = await store.search_sessions("word", limit=6, after=cursor, status=None, now=T0)
        assert rest.data == page.data[n:]
    for bytes_max, rows in ((1, 1), (450, 2), (10_000, 6)):
        short = await store.search_sessions("word", limit=6, after=None, status=None, now=T0, bytes_max=bytes_max)
        assert short.data == page.data[:rows]
        assert short.next == (page.cursors[rows - 1] if rows < 6 else None)


@pytest.mark.parametrize("cursor", ["", "x", "WzFd", "WyJhIiwxXQ", "W10", "A" * 32, "é"])
async def test_a_cursor_of_something_else_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidRequestError, match="cursor"):
        await store.search_sessions("x", limit=1, after=cursor, status=None, now=T0)


HOSTILE = [
    *(
        "",
        " ",
        '"',
        "'",
        "*",
        "a*",
        "^a",
        "a:b",
        "-a",
        "NEAR(a b)",
        "a AND",
        "a OR b",
        "NOT a",
        "(",
        "{a b}: c",
        "\x00",
    ),
    *("\ud800", "a\udfff", "'; DROP TABLE search; --", "a" * 10**6, "a " * 500_000, "\u0301", "search terms rank"),
    *(" ".join(f"w{n}" for n in range(1000)), "日" * 1000, "!" * 10**5),
]


@pytest.mark.parametrize("query", HOSTILE)
async def test_any_query_is_safe(store: Store, query: str) -> None:
    await add_session(store, "s", "a b or not and near")
    await add_session(store, "own", "".join(query[:5000].split("\ud800")).encode(errors="ignore").decode())
    page = await store.search_sessions(query, limit=10, after=None, status=None, now=T0)
    terms = set(at_once(query_terms(query)))
    expected = [it for it in ("own", "s") if terms and terms <= await terms_of_title(store, it)]
    assert [match.session.id for match in page.data] == expected


async def terms_of_title(store: Store, session_id: str) -> set[str]:
    return at_once(document_terms(((await store.get_session(session_id, now=T0)).title or "",)))


async def test_a_query_of_a_thousand_words_finds_the_text_that_has_them_all(store: Store) -> None:
    words = [f"word{n}" for n in range(1000)]
    await add_session(store, "a")
    await add_session(store, "b")
    await add_turn(store, "a", " ".join(words))
    await add_turn(store, "b", " ".join(words[:-1]))
    await add_turn(store, "b", " ".join(words[1:]))
    assert await found(store, " ".join(words)) == ["a"]
    assert await found(store, " ".join(words[1:-1]), limit=1) == ["b", "a"]


async def test_a_long_reply_is_found_by_its_last_word_and_its_snippet_is_short(store: Store) -> None:
    await add_session(store, "a")
    reply = "a word and another one " * 50_000 + "the end: zebra"
    await add_turn(store, "a", "long", reply)
    [match] = await matches(store, "zebra long")
    assert match.snippet.endswith("the end: zebra")
    assert len(match.snippet) <= SNIPPET_LENGTH_MAX + 2


async def test_a_search_whose_time_is_over_is_partial_and_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SEARCH_S", 0)
    names = [f"s{n}" for n in range(5)]
    for name in names:
        await add_session(store, name, "one two")
    data: list[str] = []
    page: Page[Match] = Page((), None)
    for _ in range(PAGES_MAX):
        page = await store.search_sessions("two one", limit=3, after=page.next, status=None, now=T0)
        data += [match.session.id for match in page.data]
        if page.next is None:
            break
        assert page.partial
        assert len(page.data) <= 1
    assert data == names[::-1]
    page = await store.search_sessions("one three", limit=3, after=None, status=None, owner="bob", now=T0)
    assert (page.data, page.next, page.partial) == ((), None, False), "no other owner's document ends a page"


async def test_partial_pages_show_a_session_once_also_while_documents_are_added(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SEARCH_S", 0)
    for name in "abcd":
        await add_session(store, name, "one two", team="blue" if name in "abc" else "red")
    data: list[str] = []
    page: Page[Match] = Page((), None)
    for n in range(PAGES_MAX):
        page = await store.search_sessions(
            "two one", limit=3, after=page.next, status=None, now=T0, metadata={"team": "blue"}
        )
        assert n or not page.data, "the newest document is one of another team"
        data += [match.session.id for match in page.data]
        if page.next is None:
            break
        for name in "abc":
            await store.update_session(name, SessionPatch(title=f"one two {n}"), now=T0) if name in data else None
        await add_session(store, f"new{n}", "one two", team="blue")
    assert data == ["c", "b", "a"]


async def test_an_end_whose_caller_is_cancelled_leaves_the_whole_turn_in_the_index_or_nothing(store: Store) -> None:
    await add_session(store, "a")
    long = " ".join(f"w{n}" for n in range(30_000))
    turn = a_turn("t", "a", texts=["question"])
    await store.begin_turn(turn, now=T0)
    with trio.move_on_after(0) as scope:
        await store.end_turn(ended(turn, text=long), runs=(), now=T0)
    assert scope.cancelled_caught
    is_ended = not (await store.get_turn("a", "t", now=T0)).is_open
    await index_whole(store)
    assert await found(store, "w29999") == await found(store, "question") == (["a"] if is_ended else [])
    await store.end_turn(ended(turn, text=long), runs=(), now=T0)
    await index_whole(store)
    assert await found(store, "w29999") == await found(store, "question") == ["a"]


async def test_the_first_terms_of_a_turn_count_up_to_their_bound(store: Store) -> None:
    await add_session(store, "a")
    first, last = (" ".join(f"{name}{n}" for n in range(TERMS_MAX // 2 - 1)) for name in "vw")
    turn = a_turn("t", "a", texts=[first, last])
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn, text="one two three"), runs=said("one two three"), now=T0)
    await index_whole(store)
    assert await found(store, f"v0 w{TERMS_MAX // 2 - 2} one three") == ["a"], "the least ones of the last part count"
    assert await found(store, "two") == []
    await store.delete_item("a", turn.input[0].id, now=T0)
    await index_whole(store)
    assert await found(store, f"w{TERMS_MAX // 2 - 2} one two three") == ["a"], "they are among the first ones now"
    assert await found(store, "v0") == []
    await store.delete_turns("a", "t", now=T0)
    assert await found(store, "two") == await found(store, "w0") == []


async def test_turns_with_many_terms_are_found_like_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "STEP_TERMS_MAX", 2)
    for name in ("a", "b", "c"):
        await add_session(store, name)
    long = await add_turn(store, "a", "word one two", "three four")
    await add_turn(store, "b", "word")
    await add_turn(store, "c", "word one two")
    newest = await add_turn(store, "b", "words five", "three four")
    copy = await store.fork_session("a", at=long, copy_id="d", now=T0)
    await index_whole(store)
    assert [(it.session.id, it.turn_id) for it in await matches(store, "four three")] == [
        ("d", copy.head),
        ("b", newest),
        ("a", long),
    ]
    assert await found(store, "word", limit=1) == ["d", "c", "b", "a"], "a turn counts from its end"
    await store.delete_turns("a", long, now=T0)
    await store.mark_deleted("c", now=T0)
    await store.remove_deleted("c")
    assert await found(store, "one two") == ["d"]


async def test_other_tasks_run_while_a_long_reply_is_put_into_the_index_and_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.steps.STEP_S", 0)
    await add_session(store, "a")
    turn = a_turn("t", "a")
    await store.begin_turn(turn, now=T0)
    rounds = 0

    async def count_rounds() -> None:
        nonlocal rounds
        while True:
            await trio.lowlevel.checkpoint()
            rounds += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_rounds)
        await store.end_turn(ended(turn, text="word " * 50_000), runs=(), now=T0)
        assert await found(store, "word") == ["a"]
        nursery.cancel_scope.cancel()
    assert rounds >= 50, "the words are cut in steps"


# Against a model


@dataclass
class Document:
    session: str
    turn: str | None
    text: str


@dataclass
class Naive:
    """All documents in a list, the newest last; every search looks at all of them."""

    documents: list[Document] = field(default_factory=list)

    def find(self, query: str) -> list[tuple[str, str | None]]:
        terms = set(at_once(query_terms(query)))
        newest: dict[str, str | None] = {}
        for it in reversed(self.documents):
            if terms and terms <= at_once(document_terms((it.text,))) and it.session not in newest:
                newest[it.session] = it.turn
        return list(newest.items())

    def forget(self, session: str, *, only_title: bool = False) -> None:
        self.documents = [it for it in self.documents if it.session != session or (only_title and it.turn is not None)]

    def copy(self, source: str, turns: dict[str, str], name: str) -> None:
        documents = [it for it in self.documents if it.session == source]
        self.documents += [Document(name, None, it.text) for it in documents if it.turn is None]
        self.documents += [Document(name, turns[it.turn], it.text) for it in documents if it.turn is not None]


Change = tuple[Literal["create", "title", "turn", "delete", "fork", "index", "search"], int, str, int]
words = st.sampled_from(
    ["one", "two", "TWO one", "three, one", "日本語", "本", "Éa", "e\u0301a", "", "!", "one two three"]
)
changes: st.SearchStrategy[Change] = st.tuples(
    st.sampled_from(["create", "title", "turn", "turn", "turn", "delete", "fork", "index", "search", "search"]),
    st.integers(0, 2),
    words,
    st.integers(1, 3),
)


@settings(
    max_examples=2 * settings().max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(changes, max_size=30))
async def test_a_store_finds_what_a_look_at_all_documents_finds(
    open_store: OpenStore, history: Sequence[Change]
) -> None:
    async with open_store() as store:
        model = Naive()
        heads: dict[str, str | None] = {}
        for kind, n, text, limit in history:
            name = f"s{n}"
            match kind:
                case "create" if name not in heads:
                    await add_session(store, name, text)
                    heads[name] = None
                    model.documents.append(Document(name, None, text))
                case "title" if name in heads:
                    before = (await store.get_session(name, now=T0)).title
                    await store.update_session(name, SessionPatch(title=text or None), now=T0)
                    if before != (text or None):
                        model.forget(name, only_title=True)
                        model.documents += [Document(name, None, text)] if text else []
                case "turn" if name in heads:
                    turn = a_turn(new_turn_id(), name, parent=heads[name], texts=[text])
                    await store.begin_turn(turn, now=T0)
                    await store.end_turn(ended(turn, text="yes"), runs=said("yes"), now=T0)
                    heads[name] = turn.id
                    model.documents.append(Document(name, turn.id, f"{text} yes"))
                case "delete" if name in heads:
                    await store.mark_deleted(name, now=T0)
                    await store.remove_deleted(name)
                    del heads[name]
                    model.forget(name)
                case "fork" if name in heads and (copy := f"s{(n + 1) % 3}") not in heads:
                    session = await store.fork_session(name, at=None, copy_id=copy, now=T0)
                    sources = [turn.id for turn in (await store.list_turns(name, limit=99, after=None, now=T0)).data]
                    copies = [turn.id for turn in (await store.list_turns(copy, limit=99, after=None, now=T0)).data]
                    heads[copy] = session.head
                    model.copy(name, dict(zip(sources, copies, strict=True)), copy)
                case "index":
                    await index_whole(store)
                case "search":
                    for query in (text, f"{text} yes"):
                        given_pages = await matches(store, query, limit=limit)
                        assert [(it.session.id, it.turn_id) for it in given_pages] == model.find(query), query
                case _:
                    pass
