# ruff: noqa: RUF001  letters that look like others are what is tested
"""Texts and queries are cut into the same terms, whatever their case and normal form."""

import random
import re
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Literal
from unicodedata import combining, normalize

import pytest
from apsw import unicode
from hypothesis import given
from hypothesis import strategies as st

from service.steps import Steps, at_once
from service.storage import terms
from service.storage.snippets import SNIPPET_LENGTH_MAX, snippet
from service.storage.terms import TERM_LENGTH_MAX, TERMS_MAX, document_terms, has_terms, query_terms

SPACELESS = "日本語テキストひらがなสวัสดีครับພາສາລາວខ្មែរမြန်မာ"
texts = (
    st.text()
    | st.text(st.sampled_from("aB1é.,'_ ßİ日本語คำ한국\u200b\u200d\u0301\u00ad🙂"))
    | st.text(st.characters(codec="ascii"))
)


def of_query(query: str) -> set[str]:
    return set(at_once(query_terms(query)))


def of_document(*texts: str) -> set[str]:
    return at_once(document_terms(texts))


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Hello, World!", "WORLD hello"),
        ("see https://example.com/a_path", "example"),
        ("L’amour can't wait", "amour can"),
        ("Straße", "STRASSE"),
        ("caf\u00e9", "CAFE\u0301"),
        ("ﬁle №5 ｈｔｔｐ", "file no5 http"),
        ("日本語のテキスト", "日本"),
        ("日本語のテキスト", "語"),
        ("ｶﾞｲﾄﾞ", "ガイド"),
        ("我爱你", "爱"),
        ("สวัสดีครับ", "สวัสดี"),
        ("ភាសា\u200bខ្មែរ", "ភាសាខ្មែរ"),
        ("한국어 문장입니다", "한국어"),
        ("co\u00adoperate", "cooperate"),
        ("می\u200cخواهم", "میخواهم"),
        ("GPT-4 costs 3.14", "gpt 4"),
    ],
)
def test_a_text_is_found_by_its_words(text: str, query: str) -> None:
    assert of_query(query)
    assert of_query(query) <= of_document(text)


@pytest.mark.parametrize(
    ("text", "query"), [("Hello", "Hell"), ("日本語", "日語"), ("한국어", "한국"), ("one two", "three"), ("é", "e")]
)
def test_a_text_is_not_found_by_parts_of_words_nor_by_pairs_that_it_lacks(text: str, query: str) -> None:
    assert not of_query(query) <= of_document(text)


@given(texts, st.integers(0, 30))
def test_a_text_finds_itself_and_is_found_by_each_of_its_words(text: str, pick: int) -> None:
    assert of_query(text) <= of_document(text)
    words = list(unicode.word_iter(normalize("NFKC", text)))
    if words:
        assert of_query(words[pick % len(words)]) <= of_document(text)


@given(texts, st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_the_normal_form_and_the_case_of_a_text_do_not_matter(
    text: str, form: Literal["NFC", "NFD", "NFKC", "NFKD"]
) -> None:
    assert of_document(normalize(form, text)) == of_document(text)
    assert of_document(text.casefold()) == of_document(text)
    if text.isascii():
        assert of_document(text.upper()) == of_document(text)


@given(st.text(st.characters(codec="ascii")))
def test_ascii_has_the_same_terms_beside_other_characters(text: str) -> None:
    assert terms.terms_of(f"{text} é") == terms.terms_of(text) | {"é"}


@given(texts)
def test_terms_consist_of_letters_digits_and_marks(text: str) -> None:
    for term in of_document(text) | of_query(text):
        assert 0 < len(term) <= TERM_LENGTH_MAX
        assert re.fullmatch(r"[0-9a-z\x80-\U000fffff]+", term), "FTS5 would cut it, or read it as an operator"
        assert not re.search(r"[\s\ue000-\uf8ff\ud800-\udfff]", term), "stores use these characters"


def has(given_texts: Sequence[str], wanted: Collection[str]) -> bool:
    return at_once(has_terms(given_texts, wanted))


@given(st.lists(texts, max_size=3), texts, st.randoms(use_true_random=False))
def test_a_document_has_the_terms_that_it_is_cut_into_and_no_others(
    given_texts: list[str], other: str, chosen: random.Random
) -> None:
    own = of_document(*given_texts)
    for wanted in (own, chosen.sample(sorted(own), len(own) // 2), of_query(other), {*of_query(other), *own}):
        assert has(given_texts, wanted) == own.issuperset(wanted)


def test_a_document_with_very_many_words_has_the_first_ones() -> None:
    words = [f"w{n}" for n in range(TERMS_MAX + 1)]
    text = " ".join(words)
    assert has([text], words[:2])
    assert not has([text], words[-1:])
    assert not has(["a b"], ["a", "c"])
    assert has([], [])


@given(st.text(st.sampled_from("aB1 .'_é日本語한\n")), st.integers(1, 5))
def test_a_long_text_has_the_terms_of_its_words_however_it_is_cut_into_chunks(text: str, length: int) -> None:
    whole = terms.terms_of(text)
    cut_length, terms._CHUNK_LENGTH = terms._CHUNK_LENGTH, length * 10
    try:
        assert whole <= of_document(text) or max(map(len, text.split()), default=0) > length * 10
    finally:
        terms._CHUNK_LENGTH = cut_length


@pytest.mark.parametrize("text", ["a" * 10**6, "日" * 10**6, "word " * 200_000, '"\x00' * 500_000, "\ud800" * 10**6])
def test_a_text_of_a_million_characters_is_cut_in_small_steps(text: str) -> None:
    steps: Steps[object] = document_terms((text,))
    assert sum(1 for _ in steps) >= len(text) // 10_000
    assert all(len(chunk) <= 10_000 for _, chunk in terms.chunks(text))
    assert len(at_once(query_terms(text))) <= 300


LONG = [
    "a" + "\u0301\u0316" * 20_000,  # marks of two classes in turns: each pair is in the wrong order
    "a" + "\u0301\u00ad\u0316\u00ad" * 10_000,  # the same, once invisible characters are taken out
    "a" + "\uff9e\u0301" * 20_000,  # a letter that becomes a mark
    "a" + "\u0f73" * 20_000,  # a mark of class 0 that becomes two of other classes
    "a" + "\u0344\u0316" * 20_000,
    "(\u0301\u0316" * 15_000,
    "\ufdfa" * 30_000,
    "\U0001d160" * 30_000,
    "日a" * 20_000,
    "สวัสดีครับ" * 4000,
    "我爱你，" * 10_000,
    "é" + "word " * 10_000,
]


@pytest.mark.parametrize("text", LONG)
def test_no_step_of_any_text_is_long(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    normalized: list[str] = []

    def note(form: Literal["NFKC", "NFKD"], given: str) -> str:
        normalized.append(given)
        return normalize(form, given)

    monkeypatch.setattr(terms, "normalize", note)
    lengths: list[int] = []
    for _ in document_terms((text,)):
        lengths.append(sum(map(len, normalized)))
        normalized = [given for given in normalized if len(given) > 1]
        assert all(moves(given) <= 50 * len(given) for given in normalized)
        normalized.clear()
    assert len(lengths) >= len(text) // 1100
    assert max(lengths) <= 50_000


def moves(text: str) -> int:
    """How often CPython moves a mark by one place to bring a text into its normal form."""
    moved = 0
    for is_mark, classes in groupby(map(combining, normalize_each(text)), bool):
        ordered: list[int] = []
        for number in classes if is_mark else ():
            place = bisect_right(ordered, number)
            moved += len(ordered) - place
            ordered.insert(place, number)
    return moved


def normalize_each(text: str) -> Iterator[str]:
    for character in text:
        yield from normalize("NFKD", character)


def test_all_marks_are_among_the_characters_of_a_run_of_marks() -> None:
    marks = [it for it in map(chr, range(sys.maxunicode + 1)) if combining(normalize("NFKD", it)[0])]
    assert len(marks) > 900
    assert [it for it in marks if not terms._MARKS.fullmatch(it * 33)] == []


@given(
    st.text(st.sampled_from("a日é\u0301\u0316\u0323\u0344\u0f73\uff9e\u00ad\u1100\u1161🙂"), max_size=60),
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]),
)
def test_marks_of_a_long_run_may_stand_in_any_order_of_the_same_text(
    marks: str, form: Literal["NFC", "NFD", "NFKC", "NFKD"]
) -> None:
    text = "a" + "\u0301\u0316\u0334" * 15 + marks
    assert len(of_document(text)) >= 1
    assert terms._normalized(text) == normalize("NFKC", text)
    assert of_document(normalize(form, text)) == of_document(text)
    assert of_document("a" + "\u0334\u0316\u0301" * 15 + marks) == of_document(text)


@pytest.mark.parametrize("query", ["", "   ", "!?", '"', "\x00", "()*^:-", "🙂", "\ud800", "\u200b", "\u0301"])
def test_a_query_without_words_has_no_terms(query: str) -> None:
    assert of_query(query) == set()


# Snippets


def test_a_snippet_is_the_part_of_the_text_around_the_term() -> None:
    text = "one two three " * 1000 + "the Needle,\n here " + "four five six " * 1000
    found = at_once(snippet(("nothing", text), "needle"))
    assert found.startswith("…")
    assert found.endswith("…")
    assert "three the Needle, here four" in found
    assert len(found) <= SNIPPET_LENGTH_MAX + 2
    assert found.strip("…").split()[0] in ("one", "two", "three"), "words are whole"


def test_a_short_text_is_its_own_snippet() -> None:
    assert at_once(snippet(("A short text",), "short")) == "A short text"
    assert at_once(snippet((SPACELESS,), "日本")) == SPACELESS


def test_only_parts_of_an_ascii_text_that_may_have_the_term_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[str] = []

    def note(chunk: str) -> set[str]:
        cut.append(chunk)
        return terms.terms_of(chunk)

    monkeypatch.setattr("service.storage.snippets.terms_of", note)
    text = "word " * 50_000 + "needles " + "word " * 5000 + "a NEEDLE"
    assert at_once(snippet((text,), "needle")).endswith("a NEEDLE")
    assert sum(map(len, cut)) < 40_000


@pytest.mark.parametrize("text", ["begin " + "word " * 50_000 + "needle", "begin " + "我爱你，" * 10_000 + "needle"])
def test_a_snippet_whose_time_is_over_is_the_beginning_of_the_text(text: str) -> None:
    steps = snippet((text,), "needle", is_over=lambda: True)
    assert sum(1 for _ in steps) == 1
    assert at_once(snippet((text,), "needle", is_over=lambda: True)).startswith("begin ")
    assert at_once(snippet(("needle " + text,), "needle", is_over=lambda: True)).startswith("needle begin")
    assert at_once(snippet((text,), "needle")).endswith("needle")


@given(st.lists(texts, max_size=3), texts)
def test_a_snippet_is_short_whatever_the_text(given_texts: list[str], word: str) -> None:
    for term in of_query(word) or {"x"}:
        assert len(at_once(snippet([*given_texts, word * 50], term))) <= SNIPPET_LENGTH_MAX + 2
