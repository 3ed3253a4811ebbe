"""The header ``Idempotency-Key``: which keys are taken, and which requests are the same."""

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.http.idempotency_keys import InvalidKeyError, canonical, fingerprint_of, parse_key
from service.api.http.request_body import parse_body
from service.api.http.wire_types import RequestBody
from service.api.native.message_wire import AddMessages
from service.api.native.session_wire import CreateSession, ForkSession
from service.api.native.turn_requests import Chat, StartTurn
from service.errors import InvalidRequestError

KEYS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=255)


def quoted(key: str) -> str:
    return '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(KEYS)
def test_a_quoted_key_and_a_bare_one_are_the_same_key(key: str) -> None:
    assert parse_key(quoted(key)) == key
    if key == key.strip() and "," not in key and not key.startswith('"'):
        assert parse_key(key) == key
        assert parse_key(f" \t{key} ") == key


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ('""', "empty"),
        ("k" * 256, "256 characters; at most 255"),
        (quoted("k" * 256), "256 characters; at most 255"),
        ("a\tb", "printable ASCII"),
        ("a\x7fb", "printable ASCII"),
        ("a\x00b", "printable ASCII"),
        ("schl\xfcssel", "printable ASCII"),
        ('"schl\xfcssel"', "in quotes"),
        ('"a\nb"', "in quotes"),
        ('"a', "in quotes"),
        ('"', "in quotes"),
        ('"a\\b"', "in quotes"),
        ('"a"b"', "in quotes"),
        ('"a"; b=1', "in quotes"),
        ('"a", "b"', "in quotes"),
        ("a, b", "A comma parts several keys"),
    ],
)
def test_what_is_not_one_key_is_refused(told: str, says: str) -> None:
    with pytest.raises(InvalidKeyError, match=says) as raised:
        parse_key(told)
    assert raised.value.field == "Idempotency-Key"


def test_the_longest_key_is_taken() -> None:
    assert parse_key("k" * 255) == parse_key(quoted("k" * 255)) == "k" * 255


# Fingerprints

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
NUMBERS = st.one_of(st.integers(0, 2), st.floats(0, 2))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), TEXTS),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(TEXTS, parts, max_size=3),
    max_leaves=5,
)
OUTPUTS = st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": TEXTS, "output": TEXTS})
MESSAGES = st.fixed_dictionaries({"type": st.just("message"), "text": TEXTS})
TOOLS = st.fixed_dictionaries(
    {"type": st.just("function"), "name": st.sampled_from(["f", "g"])},
    optional={"parameters": st.dictionaries(TEXTS, JSON, max_size=3), "strict": st.booleans()},
)
BODIES: dict[type[RequestBody], st.SearchStrategy[dict[str, Any]]] = {
    CreateSession: st.fixed_dictionaries(
        {}, optional={"title": TEXTS, "metadata": st.dictionaries(TEXTS, TEXTS, max_size=3)}
    ),
    ForkSession: st.fixed_dictionaries({}, optional={"id": st.sampled_from(["a", "b"])}),
    Chat: st.fixed_dictionaries({"message": TEXTS}, optional={"session_id": st.sampled_from(["a", "b"])}),
    StartTurn: st.fixed_dictionaries(
        {"input": TEXTS | st.lists(MESSAGES | OUTPUTS, min_size=1, max_size=3)},
        optional={
            "temperature": NUMBERS,
            "background": st.booleans(),
            "on_conflict": st.sampled_from(["reject", "queue"]),
            "parent": st.none() | st.just("turn_" + 32 * "0"),
            "tools": st.lists(TOOLS, max_size=2),
        },
    ),
    AddMessages: st.fixed_dictionaries(
        {
            "items": st.lists(
                st.fixed_dictionaries({"type": st.just("message"), "role": st.just("user"), "text": TEXTS}),
                min_size=1,
                max_size=3,
            )
        }
    ),
}
KINDS = st.sampled_from(list(BODIES))


def fingerprint(body: dict[str, Any], kind: type[RequestBody], raw: bytes | None = None, **changes: Any) -> bytes:
    request = {"method": "POST", "route": "/things/<id>", "names": {"id": "one"}} | changes
    parsed = parse_body(raw or json.dumps(body).encode(), kind, text_bytes_max=1000)
    return fingerprint_of(body=parsed, **request)


def said_otherwise(value: Any, random: Random) -> Any:
    """The same JSON value, with the fields of its objects in another order, and numbers in another form."""
    if isinstance(value, dict):
        pairs = [(key, said_otherwise(part, random)) for key, part in value.items()]
        random.shuffle(pairs)
        return dict(pairs)
    if isinstance(value, list):
        return [said_otherwise(part, random) for part in value]
    return float(value) if type(value) is int and abs(value) < 2**53 else value


@given(st.data(), KINDS, st.randoms(use_true_random=False))
def test_the_same_request_in_other_words_has_the_same_fingerprint(
    data: st.DataObject, kind: type[RequestBody], random: Random
) -> None:
    body = data.draw(BODIES[kind])
    first = fingerprint(body, kind)
    other = said_otherwise(body, random)
    words = json.dumps(other, ensure_ascii=random.random() < 0.5, indent=random.choice([None, 1]))
    assert fingerprint(body, kind, words.encode()) == first


@given(st.data(), KINDS)
def test_another_request_has_another_fingerprint(data: st.DataObject, kind: type[RequestBody]) -> None:
    one, other = data.draw(BODIES[kind]), data.draw(BODIES[kind])
    is_same = parse_body(json.dumps(one).encode(), kind, text_bytes_max=1000) == parse_body(
        json.dumps(other).encode(), kind, text_bytes_max=1000
    )
    assert (fingerprint(one, kind) == fingerprint(other, kind)) == is_same
    assert len({
        fingerprint(one, kind),
        fingerprint(one, kind, method="PUT"),
        fingerprint(one, kind, route="/others/<id>"),
        fingerprint(one, kind, names={"id": "two"}),
    }) == 4  # fmt: skip


def test_a_field_with_its_default_is_the_same_as_none() -> None:
    """So the keys of this version stay valid in later ones, which have more fields."""
    said = {"input": "Hi", "background": False, "on_conflict": "reject", "tools": [], "temperature": None}
    assert fingerprint(said, StartTurn) == fingerprint({"input": "Hi"}, StartTurn)
    assert canonical(parse_body(json.dumps(said).encode(), StartTurn, text_bytes_max=1000)) == {"input": "Hi"}
    root = {"input": "Hi", "parent": None}
    assert fingerprint(root, StartTurn) != fingerprint({"input": "Hi"}, StartTurn)


def test_items_of_two_types_with_equal_fields_differ() -> None:
    message = {"input": [{"type": "message", "text": "x"}]}
    output = {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}
    told = [
        canonical(parse_body(json.dumps(body).encode(), StartTurn, text_bytes_max=99)) for body in (message, output)
    ]
    assert told == [message, output]


def test_a_body_that_is_nested_as_deeply_as_is_taken_has_a_fingerprint() -> None:
    for depth in (10, 100, 300, 900, 3000):
        nested = "[" * depth + "]" * depth
        raw = b'{"input":"Hi","tools":[{"type":"function","name":"f","parameters":{"a":%s}}]}' % nested.encode()
        try:
            parse_body(raw, StartTurn, text_bytes_max=10_000)
        except InvalidRequestError:
            return
        assert fingerprint({}, StartTurn, raw)
