"""A long body is parsed in steps, as strictly as a short one is in one step, and to the same values."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.http import long_body
from service.api.http.long_body import parse_in_steps
from service.api.http.strict_json import InputTooLargeError, MalformedBodyError, parse_json, scan
from service.steps import at_once

JSON: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
WRONG = [
    "",
    " ",
    "{",
    "[",
    '"',
    "[1",
    "[1,",
    "[1,]",
    "[,1]",
    "[1 2]",
    '{"a"}',
    '{"a":}',
    '{"a":1,}',
    "{a:1}",
    "{'a':1}",
    '{"a":1 "b":2}',
    "[1]]",
    "[1]x",
    "nul",
    "[tru]",
    "[NaN]",
    "[-Infinity]",
    "[01]",
    "[1.]",
    "[+1]",
    "[\x0b1]",
    '["\x01"]',
    '["a\nb"]',
    '["\\x"]',
    '["\\u12"]',
    '["\\u12g4"]',
    '["\\',
    '["\\u',
    '["abc',
    "\ufeff[1]",
    "[" + "9" * 500 + "]",
    '{"a":1,"a":2}',
    '[[{"b":{"c":[1,{"d":1,"d":2}]}}]]',
    "[" * 5000,
]


def parsed(text: str | bytes, *, structure_max: int = 10_000) -> object:
    raw = text.encode() if isinstance(text, str) else text
    return at_once(parse_in_steps(raw, structure_max=structure_max))


def outcome(parse: Any, text: str) -> object:
    """The value, or the place of the fault in words that are the same for both ways."""
    try:
        return repr(parse(text))
    except MalformedBodyError as error:
        return "refused", error.field


LENGTHS = [(1, 4, 12), (3, 16, 13), (8, 64, 20), (2048, 65536, 16384)]


def set_lengths(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int, int]) -> None:
    """Set from how many characters on a value is long: few, so that short values of the tests are."""
    for name, length in zip(("_SHORT", "_LONG", "_PIECE"), lengths, strict=True):
        monkeypatch.setattr(long_body, name, length)


@pytest.fixture(params=LENGTHS)
def lengths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_lengths(monkeypatch, request.param)


@pytest.mark.usefixtures("lengths")
@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_json_is_refused_in_both_ways(text: str) -> None:
    assert outcome(parsed, text) == outcome(lambda it: parse_json(it.encode()), text)
    with pytest.raises(MalformedBodyError):
        parsed(text)


@pytest.mark.parametrize("lengths", LENGTHS[:3])
def test_any_json_has_the_same_value_in_both_ways(
    lengths: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_lengths(monkeypatch, lengths)

    @given(JSON, st.booleans(), st.sampled_from([None, 1, "\t"]))
    def check(value: object, ascii_only: bool, indent: Any) -> None:
        text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            raw = json.dumps(value).encode()
        assert repr(parsed(raw)) == repr(parse_json(raw))

    check()


@pytest.mark.parametrize("lengths", LENGTHS[:3])
def test_any_text_is_read_or_refused_in_both_ways(
    lengths: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_lengths(monkeypatch, lengths)

    @given(st.text(alphabet='[]{}",:\\u0dDx1.e-tn \n😀', max_size=40))
    def check(text: str) -> None:
        assert outcome(parsed, text) == outcome(lambda it: parse_json(it.encode()), text)

    check()


@pytest.mark.usefixtures("lengths")
@pytest.mark.parametrize("character", ["\U0001f600", "\ud83d", "\ude00\ud83d", "é", "\n", '"', "\\"])
def test_characters_in_escapes_are_whole_wherever_a_piece_ends(character: str) -> None:
    for before in range(9):
        text = json.dumps("a" * before + character * 9)
        assert parsed(text) == parse_json(text.encode())


@pytest.mark.usefixtures("lengths")
@pytest.mark.parametrize("raw", [b'["\xff"]', b'["\xc3"]', b'["\xed\xa0\x80"]', "é".encode("latin-1")])
def test_what_is_no_utf_8_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedBodyError, match="UTF-8"):
        parsed(raw)


@pytest.mark.usefixtures("lengths")
def test_values_are_counted_outside_of_texts() -> None:
    value = {"items": [{"a": "[{,:" * 30, "b": ['"\\,' * 20]}] * 50}
    text = json.dumps(value)
    assert parsed(text, structure_max=50 * 8 + 10) == value
    with pytest.raises(InputTooLargeError, match="bound is 200"):
        parsed(text, structure_max=200)


def test_every_fault_names_its_place() -> None:
    long = "x" * 100_000
    with pytest.raises(MalformedBodyError) as repeated:
        parsed(json.dumps({"input": [1, {"text": long}]})[:-3] + ', "text": 1}]}')
    assert repeated.value.field == "input[1].text"
    with pytest.raises(MalformedBodyError, match="Expecting ',' delimiter at character 100003"):
        parsed(f'["{long[:-1]}" 1]')


def test_a_long_body_takes_many_steps() -> None:
    steps = parse_in_steps(json.dumps({"input": ["x" * 100] * 1000 + ["y" * 1_000_000]}).encode(), structure_max=10_000)
    assert sum(1 for _ in steps) > 250


def nested(depth: int, numbers: int) -> str:
    return f"{'[' * depth}[{'0,' * (numbers - 1)}0]{',0]' * depth}"


@pytest.mark.parametrize(
    "text",
    [
        nested(58, 34_000),
        ",".join([nested(58, 34_000)] * 5),
        ",".join([nested(58, 900)] * 150),
        ",".join([nested(58, 4_100)] * 40),
        "{}," * 22_000 + "{}",
        ",".join([f'{{"content":[{{"text":"{"x" * 9_000}"}}]}}'] * 100),
    ],
    ids=["one", "five", "short", "middle", "objects", "items"],
)
def test_the_work_grows_with_the_document_and_each_step_is_short_however_values_are_nested(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = [0]

    def counting(piece: str, start: int) -> tuple[object, int]:
        try:
            value, end = scan(piece, start)
        except BaseException:
            scanned[-1] += len(piece)
            raise
        scanned[-1] += end
        return value, end

    monkeypatch.setattr(long_body, "scan", counting)
    document = f'{{"input":[{text}]}}'
    scanned += (0 for _ in parse_in_steps(document.encode(), structure_max=200_000))  # one more number with each step
    assert max(scanned) <= 16 * 1024
    assert sum(scanned) <= 4 * len(document)
