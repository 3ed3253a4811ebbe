"""The description of the API is whole, and the page of it needs nothing from elsewhere."""

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import pytest
from werkzeug.exceptions import default_exceptions

from service import errors
from service.api.app import create_app
from service.api.http.problems import STATUS_BY_ERROR, code_of, codes, problem_of, status_of
from service.api.native.wire import UpdateSession
from service.api.reference.page import document_of
from service.errors import LastcallError, ModelError, RefusedError, StartupError
from service.failure_codes import FailureCode
from tests.api.inprocess import open_api

DOCUMENT = document_of(create_app())


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
        "POST /sessions/{session_id}/fork", "POST /chat",
        "GET /healthz", "GET /readyz", "GET /openapi.json", "GET /docs",
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
            assert list(response["content"]) == ["application/problem+json"]
    probe = name in ("GET /healthz", "GET /readyz")
    assert ("401" in operation["responses"]) is not probe
    assert ("requestBody" in operation) is ("415" in operation["responses"])


def test_the_codes_are_enums_with_what_each_means() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name, holder, known in (
        ("FailureCode", "Failure", get_args(FailureCode)),
        ("ProblemCode", "Problem", [code for _, code in codes()]),
    ):
        assert schemas[holder]["properties"]["code"] == {"$ref": f"#/components/schemas/{name}"}
        assert schemas[name]["enum"] == list(known)
        for code in known:
            assert re.search(rf"^- `{code}`: .+$", schemas[name]["description"], re.MULTILINE)


def test_what_null_clears_is_named() -> None:
    clearable = {field.name for field in msgspec.structs.fields(UpdateSession) if _takes_null(field.name)}
    assert clearable == {"title", "model", "system_message"}
    said = DOCUMENT["paths"]["/sessions/{session_id}"]["patch"]["description"]
    assert "null clears `title`, `model` and `system_message`." in said


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
    never_told = {RefusedError, errors.LimitError, errors.HeadMovedError}
    assert [kind for kind in refusals(LastcallError) if status_of(kind) == 500 and kind not in never_told] == []
    assert status_of(ModelError) == status_of(ValueError) == 500


async def test_the_page_is_whole_without_anything_from_elsewhere() -> None:
    async with open_api() as api:
        assert (await api.call("GET", "/openapi.json")).json == json.loads(json.dumps(DOCUMENT))
        reply = await api.call("GET", "/docs")
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        page = reply.body.decode()
        assert "<script" not in page
        assert re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", page) == ["openapi.json"]
        for name, operation in operations():
            assert name.split()[1] in page
            assert f'id="{operation["operationId"]}"' in page
        for target in re.findall(r'href="#([^"]+)"', page):
            assert f'id="{target}"' in page


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
    assert len(set(anchors)) == len(anchors)
