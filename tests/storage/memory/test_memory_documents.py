"""The memory store's index of documents whose terms the next search puts into their lists."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.steps import Steps, at_once
from service.storage.memory.documents import NOTED_COST_MAX, NOTED_MAX, Document, MemoryDocuments

LONG_S = 60.0
WORDS = ["one", "two", "three", "four"]


class Said:
    """The texts of a document, which may change."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __call__(self) -> Iterable[str]:
        return self.texts


def noted(documents: MemoryDocuments, *texts: str) -> tuple[int, Said]:
    number, said = documents.reserve(), Said(*texts)
    documents.note(number, Document("session", f"turn {number}", said))
    return number, said


def found(documents: MemoryDocuments, word: str) -> list[int]:
    last = documents.newest or 0
    return [number for number, document in documents.matching([word], below=last + 1) if document is not None]


def interrupted(steps: Steps[None], after: int) -> None:
    """Do some steps, as a task that is cancelled then."""
    for _, _ in zip(range(after), steps, strict=False):
        pass
    steps.close()


def test_a_noted_document_is_found_once_a_search_has_prepared_it() -> None:
    documents = MemoryDocuments()
    number, _ = noted(documents, "one two")
    assert not documents.is_whole()
    assert found(documents, "one") == []
    at_once(documents.prepare_noted(within_s=LONG_S))
    assert documents.is_whole()
    assert found(documents, "one") == [number]


def test_the_newest_documents_are_prepared_first_and_only_for_the_given_time() -> None:
    documents = MemoryDocuments()
    first, _ = noted(documents, "one")
    second, _ = noted(documents, "one")
    interrupted(documents.prepare_noted(within_s=LONG_S), after=3)
    assert found(documents, "one") == [second]
    at_once(documents.prepare_noted(within_s=0))
    assert not documents.is_whole()
    at_once(documents.prepare_noted(within_s=LONG_S))
    assert found(documents, "one") == [second, first]


def test_few_documents_wait_for_the_next_search_however_many_come() -> None:
    documents = MemoryDocuments()
    for n in range(2 * NOTED_MAX):
        at_once(documents.prepare_oldest())
        noted(documents, f"word{n}")
        assert len(documents._waiting) == min(n + 1, NOTED_MAX + 1)
    assert found(documents, "word0") == [1], "the oldest ones are prepared first"
    at_once(documents.prepare_noted(within_s=LONG_S))
    assert documents.is_whole()
    at_once(documents.prepare_oldest())
    assert (documents._waiting, documents._waiting_cost) == ({}, 0)


@pytest.mark.parametrize("text", ["word " * 20_000, "的 " * 7_000])
def test_few_long_documents_wait_for_the_next_search(text: str) -> None:
    documents = MemoryDocuments()
    cost = len(text) * (1 if text.isascii() else 8)
    for _ in range(25):
        at_once(documents.prepare_oldest())
        noted(documents, text)
    assert len(documents._waiting) == NOTED_COST_MAX // cost + 1
    assert documents._waiting_cost == len(documents._waiting) * cost
    for number in list(documents._waiting):
        documents.remove(number, tuple)
    assert (documents._waiting, documents._waiting_cost, documents._noted) == ({}, 0, {})


def test_tasks_at_the_same_time_prepare_different_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.storage.memory.documents.NOTED_MAX", 0)
    documents = MemoryDocuments()
    numbers = [noted(documents, f"word{n}")[0] for n in range(3)]
    first, second, third, fourth = (documents.prepare_oldest() for _ in range(4))
    for steps in (first, second, third):
        next(steps)
    at_once(fourth)  # all are claimed
    assert len(documents._waiting) == 3
    second.close()
    at_once(third)
    assert set(documents._waiting) == {numbers[0]}
    at_once(first)
    assert documents.is_whole()
    assert [found(documents, f"word{n}") for n in range(3)] == [[number] for number in numbers]


@pytest.mark.parametrize("after", range(1, 5))
def test_a_text_that_is_deleted_while_it_is_prepared_is_not_found(after: int) -> None:
    documents = MemoryDocuments()
    number, said = noted(documents, "one", "two")
    steps = documents.prepare_noted(within_s=LONG_S)
    for _ in range(after):
        next(steps, None)
    said.texts = ("two",)
    documents.drop(number, {"one"})
    at_once(documents.reclaim())
    for _ in steps:
        assert found(documents, "one") == []
    at_once(documents.prepare_noted(within_s=LONG_S))
    at_once(documents.reclaim())
    assert found(documents, "one") == []
    assert found(documents, "two") == [number]


def test_a_search_of_an_owner_prepares_and_walks_no_documents_of_others() -> None:
    documents = MemoryDocuments()
    numbers: dict[str, list[int]] = {"ann/": [], "bob/": [], "": []}
    for n in range(12):
        owner = list(numbers)[n % 3]
        number = documents.reserve()
        numbers[owner].append(number)
        documents.note(number, Document(f"{owner}s", f"turn {n}", Said("one", f"word{n}")))
    at_once(documents.prepare_noted("bob", within_s=LONG_S))
    assert [documents.is_whole(owner) for owner in ("ann", "bob", "", None)] == [False, True, False, False]

    def walked(*words: str, owner: str | None) -> list[int]:
        return [number for number, _ in documents.matching(words, below=100, owner=owner)]

    assert walked("one", owner=None) == walked("one", owner="bob") == numbers["bob/"][::-1]
    at_once(documents.prepare_noted(within_s=LONG_S))
    assert [documents.is_whole(owner) for owner in ("ann", "bob", "", None)] == [True] * 4
    assert walked("one", owner=None) == list(range(12, 0, -1))
    assert walked("one", owner="ann") == numbers["ann/"][::-1]
    assert walked("one", owner="") == numbers[""][::-1]
    assert walked("word0", "one", owner="bob") == walked("one", owner="eve") == []
    documents.remove(numbers["bob/"][-1], Said("one", "word10"))
    at_once(documents.reclaim())
    assert walked("one", owner="bob") == numbers["bob/"][-2::-1]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("note"), st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)),
            st.tuples(st.just("edit"), st.integers(0, 5)),
            st.tuples(st.just("remove"), st.integers(0, 5)),
            st.tuples(st.just("step"), st.integers(0, 3)),
            st.tuples(st.just("cancel"), st.integers(0, 3)),
            st.tuples(st.just("reclaim"), st.none()),
        ),
        max_size=40,
    )
)
def test_tasks_that_prepare_at_once_find_what_a_scan_finds(actions: list[tuple[str, object]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.storage.memory.documents.NOTED_MAX", 0)
        check_against_a_scan(actions)


def begun(documents: MemoryDocuments, index: int) -> Steps[None]:
    return documents.prepare_noted(within_s=LONG_S) if index < 2 else documents.prepare_oldest()


def check_against_a_scan(actions: list[tuple[str, object]]) -> None:
    documents = MemoryDocuments()
    kept: dict[int, Said] = {}
    tasks = [begun(documents, index) for index in range(4)]
    for action, given_value in actions:
        match action, given_value:
            case "note", list(words):
                number, said = noted(documents, *words)
                kept[number] = said
            case "edit", int(index) if index < len(kept):
                number = list(kept)[index]
                said = kept[number]
                lost, said.texts = said.texts[:1], said.texts[1:]
                documents.drop(number, set(lost) - set(said.texts))
            case "remove", int(index) if index < len(kept):
                number = list(kept)[index]
                documents.remove(number, kept.pop(number))
            case "step", int(index):
                if next(tasks[index], tasks) is tasks:
                    tasks[index] = begun(documents, index)
            case "cancel", int(index):
                tasks[index].close()
                tasks[index] = begun(documents, index)
            case "reclaim", None:
                at_once(documents.reclaim())
        for word in WORDS:
            assert set(found(documents, word)) <= {number for number, said in kept.items() if word in said.texts}
    for task in tasks:
        at_once(task)
    at_once(documents.prepare_noted(within_s=LONG_S))
    at_once(documents.reclaim())
    for word in WORDS:
        assert set(found(documents, word)) == {number for number, said in kept.items() if word in said.texts}
    assert documents.is_whole()
