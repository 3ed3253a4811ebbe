"""The description of the API is whole, and its page loads nothing from other servers."""

import json
import re
import shlex
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from html import unescape
from itertools import pairwise
from typing import Any, get_args

import msgspec
import pytest
from werkzeug.exceptions import default_exceptions

from service import errors
from service.api.app import create_app
from service.api.http import event_stream, problems
from service.api.http.problems import STATUS_BY_ERROR, code_of, codes, problem_of, status_of
from service.api.native import message_wire, session_wire, turn_requests, turn_wire
from service.api.native.session_wire import UpdateSession
from service.api.openai import (
    chat_frames,
    chat_requests,
    conversation_wire,
    failures,
    items,
    models,
    requests,
    responses,
)
from service.api.openai import errors as openai_errors
from service.api.openai import response as openai_response
from service.api.operator import console, drain, health, shutdowns, tree_wire
from service.api.reference.page import document_of
from service.errors import LastcallError, ModelError, RefusedError, StartupError
from service.failure_codes import FailureCode
from tests.api.inprocess import open_api

DOCUMENT = document_of(create_app())
WIRE = (
    *(message_wire, session_wire, turn_requests, turn_wire, event_stream, problems),
    *(health, console, tree_wire, drain, shutdowns),
    *(openai_errors, failures, items, requests, openai_response, responses),
    *(chat_frames, chat_requests, conversation_wire, models),
)
"""The modules with the types of bodies."""
ENDLESS = ("stream_live_tree",)
"""A stream that ends with the server."""


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from references(value)


def test_every_call_of_the_design_that_there_is_is_described() -> None:
    assert {name for name, _ in operations()} == {
        "POST /sessions", "GET /sessions", "GET /sessions/{session_id}", "PATCH /sessions/{session_id}",
        "DELETE /sessions/{session_id}", "GET /sessions/{session_id}/messages", "POST /sessions/{session_id}/turns",
        "GET /sessions/{session_id}/turns", "GET /sessions/{session_id}/turns/{turn_id}",
        "GET /sessions/{session_id}/turns/{turn_id}/events", "POST /sessions/{session_id}/turns/{turn_id}/cancel",
        "POST /sessions/{session_id}/turns/{turn_id}/retry", "GET /sessions/{session_id}/tree",
        "POST /sessions/{session_id}/fork", "POST /sessions/{session_id}/messages",
        "DELETE /sessions/{session_id}/messages/{item_id}", "DELETE /sessions/{session_id}/turns/{turn_id}",
        "POST /chat",
        "POST /v1/chat/completions", "GET /v1/models", "GET /v1/models/{model}", "POST /v1/conversations",
        "GET /v1/conversations/{conversation_id}", "POST /v1/conversations/{conversation_id}",
        "DELETE /v1/conversations/{conversation_id}", "GET /v1/conversations/{conversation_id}/items",
        "POST /v1/conversations/{conversation_id}/items",
        "GET /v1/conversations/{conversation_id}/items/{item_name}",
        "DELETE /v1/conversations/{conversation_id}/items/{item_name}",
        "POST /v1/responses", "GET /v1/responses/{response_id}", "DELETE /v1/responses/{response_id}",
        "POST /v1/responses/{response_id}/cancel", "GET /v1/responses/{response_id}/input_items",
        "GET /admin/tree", "GET /admin/tree/events", "POST /admin/drain", "GET /admin/shutdowns",
        "GET /healthz", "GET /readyz", "GET /metrics", "GET /openapi.json", "GET /docs", "GET /",
    }  # fmt: skip


def test_every_reference_has_its_schema_and_every_link_its_operation() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for reference in references(DOCUMENT):
        assert reference.removeprefix("#/components/schemas/") in schemas
    ids = {operation["operationId"] for _, operation in operations()}
    for _, operation in operations():
        for response in operation["responses"].values():
            assert {link["operationId"] for link in response.get("links", {}).values()} <= ids
    assert {"TurnDelta", "TurnCompleted", "TurnInterrupted", "Problem"} <= schemas.keys()


@pytest.mark.parametrize(("name", "operation"), list(operations()))
def test_every_operation_says_what_it_is_and_how_it_fails(name: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert "\n" not in operation["summary"]
    for status, response in operation["responses"].items():
        assert response["description"]
        if status >= "4":
            media = "application/json" if " /v1/" in name else "application/problem+json"
            assert list(response["content"]) == [media]
    is_open = name in ("GET /healthz", "GET /readyz", "GET /openapi.json", "GET /docs", "GET /")
    assert ("401" in operation["responses"]) is not is_open
    assert (operation.get("security") == []) is is_open
    assert ("requestBody" in operation) is ("415" in operation["responses"])


def test_the_codes_are_enums_with_their_meanings() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name, holder, known in (
        ("FailureCode", "Failure", get_args(FailureCode)),
        ("ProblemCode", "Problem", [code for _, code in codes()]),
    ):
        assert schemas[holder]["properties"]["code"] == {"$ref": f"#/components/schemas/{name}"}
        assert schemas[name]["enum"] == list(known)
        for code in known:
            assert re.search(rf"^- `{code}`: .+$", schemas[name]["description"], re.MULTILINE)


def test_the_fields_that_null_clears_are_named() -> None:
    clearable = {field.name for field in msgspec.structs.fields(UpdateSession) if _takes_null(field.name)}
    cleared = {"title", "model", "system_message", "temperature", "max_output_tokens"}
    assert clearable == cleared | {"head", "seen_head"}, "null as a head is a place: before the first turn"
    said = DOCUMENT["paths"]["/sessions/{session_id}"]["patch"]["description"]
    assert "null clears `title`, `model`, `system_message`, `temperature` and `max_output_tokens`." in " ".join(
        said.split()
    )


def _takes_null(name: str) -> bool:
    try:
        msgspec.convert({name: None}, UpdateSession)
    except msgspec.ValidationError:
        return False
    return True


def refusals(kind: type[LastcallError]) -> Iterator[type[LastcallError]]:
    for derived in kind.__subclasses__():
        if derived.__module__.startswith("service.") and not issubclass(derived, StartupError | ModelError):
            yield derived
            yield from refusals(derived)


def test_every_refusal_has_a_status() -> None:
    never_told = {RefusedError, errors.LimitError, errors.RepeatedError}
    assert [kind for kind in refusals(LastcallError) if status_of(kind) == 500 and kind not in never_told] == []
    assert status_of(ModelError) == status_of(ValueError) == 500


async def test_the_page_is_whole_without_anything_from_elsewhere() -> None:
    async with open_api() as api:
        assert (await api.call("GET", "/openapi.json")).json == json.loads(json.dumps(DOCUMENT))
        reply = await api.call("GET", "/docs")
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        page = reply.body.decode()
        assert "<script" not in page
        assert "`" not in page, "backticks are shown as code"
        assert re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", page) == ["openapi.json", "./"]
        for name, operation in operations():
            assert name.split()[1] in page
            assert f'id="{operation["operationId"]}"' in page
        for target in re.findall(r'href="#([^"]+)"', page):
            assert f'id="{target}"' in page


KEY = "a-key-of-sixteen-or-more"
OPERATOR = {"name": "operator", "key": KEY, "may": ("administer", "talk")}
CONVERSATIONS_FIRST = ("create_conversation", "create_conversation_items")
CONVERSATIONS_LAST = ("delete_conversation_item", "delete_conversation")


async def test_the_description_needs_no_key_and_all_else_does() -> None:
    async with open_api(api_keys=(KEY,)) as api:
        for path, status in (("/docs", 200), ("/openapi.json", 200), ("/", 200)):
            assert (await api.call("GET", path)).status == status
            assert (await api.call("GET", path, headers={"Host": "app.example.org", "Via": "1.1 x"})).status == status
        for method, path in (
            *(("GET", "/sessions"), ("POST", "/docs"), ("POST", "/"), ("GET", "/docs/"), ("GET", "/docs/../sessions")),
            *(("GET", "/docs/sessions"), ("GET", "/openapi.json/sessions"), ("GET", "/doc"), ("GET", "/%2e")),
        ):
            (await api.call(method, path)).problem(401, "unauthorized")


async def test_without_keys_the_description_is_for_this_machine_like_all_else() -> None:
    async with open_api() as api:
        for path in ("/docs", "/openapi.json", "/"):
            assert (await api.call("GET", path)).status == 200
            (await api.call("GET", path, headers={"Host": "app.example.org"})).problem(403, "loopback_only")


async def test_the_page_allows_its_own_style_and_nothing_else() -> None:
    async with open_api() as api:
        reply = await api.call("GET", "/docs")
    policy = reply.headers["content-security-policy"]
    (style,) = re.findall("<style>(.*?)</style>", reply.body.decode(), re.DOTALL)
    digest = b64encode(sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert "style=" not in reply.body.decode()


@pytest.mark.parametrize(("keys", "prefix"), [((), ""), ((OPERATOR,), "/ai")])
async def test_each_call_has_a_command_that_does_it(keys: tuple[object, ...], prefix: str) -> None:
    url = f"http://localhost:8000{prefix}"
    async with open_api(api_keys=keys, model_url="scripted:?tokens=3&rate=0&first_token_s=0") as api:
        page = (await api.call("GET", "/docs", scope={"root_path": prefix})).body.decode()
        commands = {
            id_: shlex.split(unescape(command))
            for id_, command in re.findall(r'<details id="(\w+)">.*?<pre>(curl .*?)</pre>', page, re.DOTALL)
        }
        assert commands.keys() == {operation["operationId"] for _, operation in operations()}
        ids: dict[str, str] = {}
        first = (
            "create_session",
            "start_turn",
            "fork_session",
            "add_messages",
            "create_response",
            *CONVERSATIONS_FIRST,
        )
        last = ("delete_message", "delete_turn", "delete_session", "delete_response", *CONVERSATIONS_LAST, "drain")
        for id_ in (*first, *sorted(commands.keys() - {*first, *last, *ENDLESS}), *last):
            parts = commands[id_]
            target = next(part for part in parts if part.startswith(url)).removeprefix(url)
            method = parts[parts.index("-X") + 1] if "-X" in parts else "GET"
            headers = dict(part.split(": ", 1) for option, part in pairwise(parts) if option == "-H")
            if "Authorization" in headers:
                headers["Authorization"] = headers["Authorization"].replace("$API_KEY", KEY)
            data = next((part for option, part in pairwise(parts) if option == "-d"), "")
            for shown, given in ids.items():
                target, data = target.replace(shown, given), data.replace(shown, given)
            reply = await api.call(method, target, raw=data.encode() or None, headers=headers)
            assert reply.status in (200, 201, 202, 204), (id_, reply)
            assert (parts[1] == "-N") is (reply.headers.get("content-type") == "text/event-stream")
            if id_ == "start_turn":
                ids["turn_0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19"] = reply.events[0]["turn_id"]
            if id_ == "create_response":
                ids["resp_0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19"] = reply.headers["location"].rpartition("/")[2]
            if id_ == "create_conversation":
                ids["conv_6f0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a"] = reply.json["id"]
            if id_ == "create_conversation_items":
                ids["msg_9c0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a"] = reply.json["first_id"]
            if id_ == "add_messages":
                ids["msg_9c6c1b9e2f3d4c5a8b7e6f5d4c3b2a19"] = reply.json["messages"][0]["id"]


def test_each_body_has_an_example_that_is_one() -> None:
    taken = [
        content
        for _, operation in operations()
        for part in (operation.get("requestBody", {}), *operation["responses"].values())
        for media, content in part.get("content", {}).items()
        if media == "application/json" and "$ref" in content["schema"]
    ]
    assert len(taken) > 15
    for content in taken:
        name = content["schema"]["$ref"].rpartition("/")[2]
        (kind,) = {getattr(module, name) for module in WIRE if hasattr(module, name)}
        assert msgspec.convert(content["example"], kind)


async def test_every_problem_leads_to_its_place_on_the_page() -> None:
    kinds = {kind for kind in refusals(LastcallError) if status_of(kind) != 500}
    sent = {f"/docs#{code_of(kind)}" for kind in kinds | STATUS_BY_ERROR.keys()}
    sent |= {problem_of(kind()).type for kind in default_exceptions.values()}
    sent |= {problem_of(error).type for error in (ValueError(), LastcallError(), ModelError("rate_limited", "x"))}
    assert {"/docs#bad_request", "/docs#not_found", "/docs#internal_error"} < sent
    async with open_api() as api:
        page = (await api.call("GET", "/docs")).body.decode()
    anchors = [f"/docs#{anchor}" for anchor in re.findall('id="([^"]+)"', page)]
    assert sent <= set(anchors)
    assert {f"/docs#{code}" for code in get_args(FailureCode)} <= set(anchors)
    assert len(set(anchors)) == len(anchors)
