"""The OpenAPI document, built from the routes and the descriptions beside their handlers."""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta
from quart import Quart

from service import __version__
from service.api.http.access import LoopbackOnlyError, ProxiedRequestError, UnauthorizedError
from service.api.http.callers import OWNER, NotPermittedError
from service.api.http.event_stream import MEDIA_TYPE as EVENT_STREAM
from service.api.http.held_bytes import HeldBytesLimitError
from service.api.http.idempotency_keys import HEADER, InvalidKeyError
from service.api.http.locations import path_template
from service.api.http.operations import Answer, Operation, operation_of
from service.api.http.preconditions import TAGS, MalformedHeaderError
from service.api.http.problems import ADVICE, NotReadyError, Problem, code_of, status_of
from service.api.http.problems import MEDIA_TYPE as PROBLEM
from service.api.http.problems import codes as problem_codes
from service.api.http.request_body import BodyTimeoutError, UnsupportedMediaTypeError
from service.api.http.strict_json import InputTooLargeError, MalformedBodyError
from service.api.http.wire_types import ItemId, ModelName, OwnerName, SessionId, TurnId
from service.api.native.events import Event
from service.api.openai.errors import ErrorBody, status_for_clients
from service.api.openai.ids import CONVERSATION_NAME, ITEM_NAME, RESPONSE_NAME
from service.api.reference.client_schemas import for_clients, structs_in
from service.errors import (
    InvalidRequestError,
    KeyReusedError,
    LastcallError,
    MadeIsGoneError,
    OwnedElsewhereError,
    PreconditionFailedError,
    ResourcesExhaustedError,
    ResumeConflictError,
    StoreError,
)
from service.failure_codes import FAILURES

_PROBE_TAG = "health"
OPENAI_TAGS = frozenset({"responses", "conversations", "chat_completions", "models"})
"""The calls with these tags are those of OpenAI's API, with errors in its shape."""
_OPEN_TAGS = (_PROBE_TAG, "docs", "console")
"""The calls with these tags need no API key."""
_OPERATOR_TAGS = ("metrics",)
"""The calls with these tags are about no owner."""
_TAGS = {
    "sessions": "A session holds a conversation: a tree of turns, and a head.",
    "turns": "A turn is an input and the reply to it. Every accepted turn ends exactly once.",
    "chat": "One call from a message to its reply.",
    "responses": "OpenAI's API: a response is a turn. See docs/openai.md for each parameter.",
    "conversations": "OpenAI's API: a conversation is a session.",
    "chat_completions": "OpenAI's API: a whole conversation goes in, one reply comes out, and nothing is kept.",
    "models": "OpenAI's API: the models that a request may name.",
    "admin": "For operators: the live tree, the shutdown, its reports. Needs a key that may `administer`.",
    "health": "For probes of a balancer or an orchestrator.",
    "metrics": "For Prometheus.",
    "docs": "The OpenAPI document, and a page of it.",
    "console": "A page to chat, and to look at the server.",
}
_BODY_ERRORS = (MalformedBodyError, BodyTimeoutError, InputTooLargeError, UnsupportedMediaTypeError)
_KEYED = (
    "Makes the call safe to repeat: a key of your choice, such as a random UUID, at most 255 characters. A repetition "
    "(same key, method, path and body) gets the answer of the first call and does nothing again. The key is kept as "
    "long as what the call made, and 24 hours at least after this is gone. A call that was refused keeps no key."
)
_KEY = r"^[!#-+\--~]([ -+\--~]{0,253}[!-+\--~])?$"
"""A bare key: it does not begin with a quote, and has no comma, and no blanks at its ends."""
_PATH_PARAMETERS = {
    "session_id": SessionId,
    "turn_id": TurnId,
    "item_id": ItemId,
    "response_id": Annotated[str, Meta(pattern=RESPONSE_NAME)],
    "conversation_id": Annotated[str, Meta(pattern=CONVERSATION_NAME)],
    "model": ModelName,
    "item_name": Annotated[str, Meta(pattern=ITEM_NAME)],
}
_REF = "#/components/schemas/{name}"
_ETAG = "Stands for what PATCH can change; for `If-Match`."
_EXAMPLE_STREAM = """\
id: 1
data: {"type":"turn.started","seq":1,"session_id":"sess_6f","turn_id":"turn_0a","model":"scripted"}

id: 2
data: {"type":"turn.delta","seq":2,"text":"Hello."}

id: 3
data: {"type":"turn.completed","seq":3,"finish_reason":"stop","usage":null,"text_length":6}"""


def build_document(app: Quart) -> dict[str, Any]:
    """Build the OpenAPI document of all operations of an application."""
    schemas = _Schemas()
    paths: dict[str, dict[str, Any]] = {}
    for rule in app.url_map.iter_rules():
        handler = app.view_functions[rule.endpoint]
        if not operation_of(handler).is_described:
            continue
        path = path_template(rule)
        tag = rule.endpoint.partition(".")[0]
        method = next(iter((rule.methods or set()) - {"HEAD", "OPTIONS"})).lower()
        paths.setdefault(path, {})[method] = _operation(
            operation_of(handler), tag, inspect.getdoc(handler) or "", sorted(rule.arguments), schemas
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Lastcall",
            "version": __version__,
            "summary": "AI chat sessions whose streams end properly.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "security": [{"bearer": []}, {}],
        "paths": paths,
        "components": {
            "schemas": schemas.components | _codes(schemas.components),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Needed if `api_keys` are set; without them only this machine is served.",
                }
            },
        },
    }


class _Schemas:
    """The component schemas that the document refers to so far."""

    def __init__(self) -> None:
        self.components: dict[str, Any] = {}
        self.problem = self.of(Problem)  # built once: a hundred places refer to it

    def of(self, kind: Any) -> dict[str, Any]:
        (schema,), components = msgspec.json.schema_components([kind], ref_template=_REF)
        for name, component in components.items():
            described = for_clients(component, structs_in(kind)[name])
            assert self.components.setdefault(name, described) == described, f"two types are named {name}"
        return for_clients(schema)

    def event_stream(self) -> dict[str, Any]:
        """Return the schema of a whole stream. It is a string: generated clients would parse another type as JSON."""
        self.components["Event"] = self.of(Event) | {"description": "The JSON of an event's `data:`."}
        description = (
            f"Events, each with a seq as its `id:` and an `Event` as its `data:`:\n\n```\n{_EXAMPLE_STREAM}\n```"
        )
        return {"type": "string", "description": description}


def _codes(components: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of the codes, and let the other components refer to them.

    The types themselves accept every text, so codes that an older or newer version has stored can be read.
    """
    components["Failure"]["properties"]["code"] = {"$ref": _REF.format(name="FailureCode")}
    components["Problem"]["properties"]["code"] = {"$ref": _REF.format(name="ProblemCode")}
    meanings: dict[str, str] = {code: f"{meaning.cause} ({meaning.fixed_by})" for code, meaning in FAILURES.items()}
    advice = {code: f"{status}: {ADVICE[code]}" for status, code in problem_codes()}
    return {
        "FailureCode": _enum("Why a turn failed, and who can fix it.", meanings),
        "ProblemCode": _enum("Why a call was refused, with the status, and what to do.", advice),
    }


def _enum(title: str, described: Mapping[str, str]) -> dict[str, Any]:
    lines = [f"- `{value}`: {text}" for value, text in described.items()]
    return {"type": "string", "enum": list(described), "description": "\n".join([title, "", *lines])}


def _operation(operation: Operation, tag: str, doc: str, path_names: list[str], schemas: _Schemas) -> dict[str, Any]:
    summary, _, description = doc.partition("\n\n")
    described: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [tag],
        "summary": " ".join(summary.split()),
        "description": description,
        "parameters": list(_parameters(operation, tag, path_names, schemas)),
        "responses": {},
    }
    if tag in _OPEN_TAGS:
        described["security"] = []
    if operation.needs:
        described["x-permissions"] = operation.needs
    if operation.body is not None:
        described["requestBody"] = {
            "required": not operation.body.may_be_left_out,
            "content": {"application/json": _content(operation.body, schemas)},
        }
    for answer in operation.answers:
        described["responses"][str(answer.status)] = _answer(answer, schemas)
    errors = _errors(operation, tag)
    described["responses"] |= _openai_errors(errors, schemas) if tag in OPENAI_TAGS else _problems(errors, schemas)
    return described


def _parameters(operation: Operation, tag: str, path_names: list[str], schemas: _Schemas) -> Iterator[dict[str, Any]]:
    for name in path_names:
        yield {"name": name, "in": "path", "required": True, "schema": schemas.of(_PATH_PARAMETERS[name])}
    if operation.query is not None:
        schema = schemas.of(operation.query)
        for name, of_one in schemas.components.pop(schema["$ref"].rpartition("/")[2])["properties"].items():
            style = {"style": "deepObject", "explode": True} if of_one.get("type") == "object" else {}
            yield {"name": name, "in": "query", "schema": of_one} | style
    if tag not in (*_OPEN_TAGS, *_OPERATOR_TAGS):
        yield {
            "name": OWNER,
            "in": "header",
            "description": "The owner for whom the caller acts; needs a key that may `administer`.",
            "schema": schemas.of(OwnerName),
        }
    if operation.keyed:
        yield {
            "name": HEADER,
            "in": "header",
            "description": _KEYED,
            "schema": {"type": "string", "pattern": _KEY},
        }
    if operation.resumes:
        yield {
            "name": "Last-Event-ID",
            "in": "header",
            "description": operation.resumes,
            "schema": {"type": "string", "pattern": "^[0-9]{0,15}$"},
        }
    for name, effect in operation.preconditions:
        yield {"name": name, "in": "header", "description": effect, "schema": TAGS}


def _answer(answer: Answer, schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {"description": answer.description}
    content: dict[str, Any] = {}
    if answer.body is not None:
        content["application/json"] = _content(answer.body, schemas)
    if answer.streams:
        content[EVENT_STREAM] = (
            {"schema": {"type": "string", "description": answer.events}}
            if answer.events
            else {"schema": schemas.event_stream(), "example": _EXAMPLE_STREAM}
        )
    if answer.media_type is not None:
        content[answer.media_type] = {"schema": {"type": "object" if answer.media_type.endswith("json") else "string"}}
    if content:
        described["content"] = content
    headers = {"Location": answer.located, "ETag": _ETAG if answer.tagged else ""}
    if any(headers.values()):
        described["headers"] = {
            name: {"description": meaning, "required": True, "schema": {"type": "string"}}
            for name, meaning in headers.items()
            if meaning
        }
    if answer.links:
        described["links"] = {
            name: {"operationId": name, "parameters": parameters} for name, parameters in answer.links
        }
    return described


def _content(kind: type[msgspec.Struct], schemas: _Schemas) -> dict[str, Any]:
    return {"schema": schemas.of(kind), "example": example_of(kind)}


def example_of(kind: Any) -> dict[str, Any]:
    """Return the example in a wire type's docstring; a list's example consists of its item's example.

    The example of one type out of several is that of the first one.
    """
    if not isinstance(kind, type):
        return example_of(get_args(kind)[0])
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    if fields.keys() >= {"data", "next"}:
        (item, _) = get_args(fields["data"])
        return {"data": [example_of(item)], "next": None}
    found = re.search(r"``(\{.*?\})``", kind.__doc__ or "", re.DOTALL)
    assert found is not None, f"{kind.__name__} has no example"
    example: dict[str, Any] = json.loads(found[1])
    return example


def _errors(operation: Operation, tag: str) -> Iterable[type[LastcallError]]:
    yield from operation.errors
    if operation.keyed:
        yield from (InvalidKeyError, KeyReusedError, MadeIsGoneError)
    if operation.body is not None:
        yield from _BODY_ERRORS
    if operation.preconditions:
        yield MalformedHeaderError
    yield InvalidRequestError
    yield LoopbackOnlyError
    yield NotReadyError
    if tag != _PROBE_TAG:
        yield ProxiedRequestError
        if tag not in _OPEN_TAGS:
            yield UnauthorizedError
            yield NotPermittedError
            yield HeldBytesLimitError
            yield StoreError
            yield ResourcesExhaustedError
            yield OwnedElsewhereError


def _openai_errors(errors: Iterable[type[LastcallError]], schemas: _Schemas) -> dict[str, Any]:
    """The errors of a call of OpenAI's API. Their codes are told by docs/openai.md."""
    described: dict[str, Any] = {}
    for status in sorted({status_for_clients(error) for error in errors}):
        described[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": _content(ErrorBody, schemas)},
        }
        if status in (429, 503):
            described[str(status)]["headers"] = {
                "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 0}}
            }
    return described


def _problems(errors: Iterable[type[LastcallError]], schemas: _Schemas) -> dict[str, Any]:
    codes: dict[int, list[str]] = {}
    for error in errors:
        codes.setdefault(status_of(error), []).append(f"`{code_of(error)}`")
    described = {}
    for status in sorted(codes):
        problem: dict[str, Any] = {
            "description": " or ".join(codes[status]),
            "content": {PROBLEM: {"schema": schemas.problem}},
        }
        if status in (429, 503):
            problem["headers"] = {
                "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 0}}
            }
        if f"`{ResumeConflictError.code}`" in codes[status]:
            problem["headers"] = {
                "Location": {"description": "The session's newest turn.", "schema": {"type": "string"}}
            }
        if f"`{PreconditionFailedError.code}`" in codes[status]:
            problem["headers"] = {"ETag": {"description": "That of the session now.", "schema": {"type": "string"}}}
        described[str(status)] = problem
    return described
