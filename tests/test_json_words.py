"""Error messages about values use the names of JSON's types, never of Python's."""

import re
from collections.abc import Iterable

import msgspec
import pytest

from service.api.http.event_stream import EventsQuery
from service.api.http.strict_json import convert
from service.api.http.wire_types import Query, RequestBody
from service.api.native.paging_wire import PageQuery
from service.api.native.session_wire import CreateSession, ForkSession, SessionsQuery, UpdateSession
from service.api.native.turn_requests import Chat, StartTurn
from service.errors import InvalidRequestError
from service.json_words import in_json_words

PYTHON = re.compile(r"\b(str|int|float|bool|dict|list|tuple|NoneType|None|True|False)\b")
VALUES: tuple[object, ...] = (
    *(None, True, 1, 1.5, -1, 1e300, "", "x" * 9999, [], [1], {}, {"": ""}, {"a": 1}, {"a": "x" * 999}),
    *({"a" * 99: ""}, {str(number): "" for number in range(20)}),
)
QUERIES = (SessionsQuery, PageQuery, EventsQuery)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Expected `str`, got `int`", "Expected a string, got a number"),
        ("Expected `int | null`, got `float` - at `$.a`", "Expected a whole number or null, got a number - at `$.a`"),
        ("Expected `bool`, got `null`", "Expected true or false, got null"),
        ("Expected `float` <= 31536000.0", "Expected a number <= 31536000"),
        ("Expected `float` >= 0.5", "Expected a number >= 0.5"),
        ("Expected `object` of length <= 16", "Expected an object of length <= 16"),
        ("Expected `array`, got `object`", "Expected an array, got an object"),
        ("Object contains unknown field `str`", "Object contains unknown field `str`"),
        ("Object contains unknown field `Expected `str``", "Object contains unknown field `Expected `str``"),
        ("Expected `str` matching regex '^a$'", "Expected `str` matching regex '^a$'"),
        ("", ""),
    ],
)
def test_types_are_named_as_json_has_them_and_all_else_stays(said: str, told: str) -> None:
    assert in_json_words(said) == told


def refusals(kind: type[msgspec.Struct], values: Iterable[object], *, strict: bool) -> list[str]:
    """The error text of each refused value, in each field of a type."""
    texts = []
    for field in msgspec.structs.fields(kind):
        for value in values:
            try:
                convert({field.encode_name: value}, kind, strict=strict)
            except InvalidRequestError as error:
                texts.append(str(error))
    return texts


@pytest.mark.parametrize(
    "kind",
    [
        CreateSession,
        UpdateSession,
        ForkSession,
        StartTurn,
        Chat,
    ],
    ids=repr,
)
def test_no_refusal_of_a_body_names_a_type_of_python(kind: type[RequestBody]) -> None:
    texts = refusals(kind, VALUES, strict=True)
    for value in (None, [1], 1, "x", True):
        with pytest.raises(InvalidRequestError, match=r"^Expected an object, got ") as caught:
            convert(value, kind)
        texts.append(str(caught.value))
    assert len(texts) > 15
    assert [text for text in texts if PYTHON.search(text) or "regex" in text] == []


@pytest.mark.parametrize("kind", QUERIES, ids=repr)
def test_no_refusal_of_a_parameter_names_a_type_that_it_came_as(kind: type[Query]) -> None:
    texts = refusals(kind, ("", "x", "null", "2.5", "-1", "9" * 600), strict=False)
    assert len(texts) > 3
    assert [text for text in texts if PYTHON.search(text) or "got a string" in text] == []
