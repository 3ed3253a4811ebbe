"""The schemas say what generated clients need: what is always there, and what may be left out.

``just clients`` generates clients from them and calls every operation.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from service.api.app import create_app
from service.api.http.problems import Problem
from service.api.http.wire_types import BodyPart, RequestBody
from service.api.native.events import Event
from service.api.native.message_wire import AddedMessages, MessageList
from service.api.native.session_wire import SessionList
from service.api.native.turn_wire import TurnList, TurnTree
from service.api.openai.chat_frames import ChatCompletion
from service.api.openai.conversation_wire import Conversation, ConversationDeleted
from service.api.openai.errors import ErrorBody
from service.api.openai.failures import EndErrorBody
from service.api.openai.items import ItemList
from service.api.openai.models import ModelList
from service.api.openai.response import Response
from service.api.openai.responses import DeletedResponse
from service.api.operator.console import Root
from service.api.operator.drain import Draining
from service.api.operator.health import Health
from service.api.operator.shutdowns import Shutdowns
from service.api.operator.tree_wire import Tree
from service.api.reference.client_schemas import structs_in
from service.api.reference.page import document_of

SCHEMAS = document_of(create_app())["components"]["schemas"]


def kinds_of(base: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct]]:
    return {kind.__name__: kind for kind in base.__subclasses__() if kind.__module__.startswith("service.")}


BODIES = kinds_of(RequestBody)
PARTS = kinds_of(BodyPart)
ANSWERS = {
    name: kind
    for of in (
        *(SessionList, MessageList, AddedMessages, TurnList, TurnTree),
        *(Health, Root, Problem, Event, Tree, Draining, Shutdowns),
        *(Response, ItemList, DeletedResponse, ErrorBody, EndErrorBody),
        *(ChatCompletion, Conversation, ConversationDeleted, ModelList),
    )
    for name, kind in structs_in(of).items()
}


def nodes(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes(value)


def sent(kind: type[msgspec.Struct], *, whole: bool) -> set[str]:
    """The names of the fields that an answer sends if all of them are set, or only those without a default."""
    fields = msgspec.structs.fields(kind)
    values: dict[str, object] = {it.name: "x" for it in fields if whole or it.required}
    if any(it.name == "seq" and it.default is not None for it in fields):
        values["seq"] = 1  # every event has a seq above the default
    decoded: dict[str, object] = msgspec.json.decode(msgspec.json.encode(kind(**values)))
    return decoded.keys() | set()


def test_each_type_of_the_document_is_a_body_or_an_answer() -> None:
    assert SCHEMAS.keys() == {*BODIES, *PARTS, *ANSWERS, "Event", "FailureCode", "ProblemCode"}


@pytest.mark.parametrize("name", BODIES)
def test_a_field_of_a_body_that_has_a_default_may_be_left_out(name: str) -> None:
    needed = [field.encode_name for field in msgspec.structs.fields(BODIES[name]) if field.required]
    assert SCHEMAS[name]["required"] == needed
    for field in msgspec.structs.fields(BODIES[name]):
        if not field.required and field.default not in (None, msgspec.UNSET, msgspec.NODEFAULT):
            said = SCHEMAS[name]["properties"][field.encode_name]["description"]
            assert said.endswith(f"`{msgspec.json.encode(field.default).decode()}` if left out.")


@pytest.mark.parametrize("name", PARTS)
def test_a_field_of_a_part_of_a_body_that_has_a_default_may_be_left_out(name: str) -> None:
    needed = [field.encode_name for field in msgspec.structs.fields(PARTS[name]) if field.required]
    config = PARTS[name].__struct_config__
    assert SCHEMAS[name]["required"] == ([] if config.tag is None else [config.tag_field]) + needed


@pytest.mark.parametrize("name", ANSWERS)
def test_a_field_of_an_answer_is_required_if_it_is_always_there(name: str) -> None:
    assert set(SCHEMAS[name]["required"]) == sent(ANSWERS[name], whole=False)
    assert SCHEMAS[name]["properties"].keys() == sent(ANSWERS[name], whole=True)


def test_a_field_that_is_left_out_instead_of_null_is_never_null() -> None:
    for name in ("field", "retry_after_s", "turn_id", "state", "text"):
        assert {"type": "null"} not in SCHEMAS["Problem"]["properties"][name].get("anyOf", [])
    assert SCHEMAS["TurnFailed"]["properties"]["left_out"] == {"$ref": "#/components/schemas/LeftOut"}
    assert {"type": "null"} in SCHEMAS["Turn"]["properties"]["left_out"]["anyOf"]


def test_no_field_has_a_default_and_each_enum_has_a_type() -> None:
    for node in nodes({name: schema.get("properties", {}) for name, schema in SCHEMAS.items()}):
        assert "default" not in node
        assert "type" in node or not {"enum", "const"} & node.keys()


def test_times_have_the_format_of_times() -> None:
    times = [name for name in SCHEMAS["Turn"]["properties"] if name.endswith("_at")]
    assert times == ["created_at", "started_at", "ended_at"]
    for name in times:
        assert "date-time" in {node.get("format") for node in nodes(SCHEMAS["Turn"]["properties"][name])}
