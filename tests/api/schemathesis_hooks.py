"""Tells schemathesis what the schema cannot say, and notes the answers that it has seen.

Loaded by schemathesis itself (``SCHEMATHESIS_HOOKS``).
"""

import os
import re
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response
from schemathesis.checks import negative_data_rejection, positive_data_acceptance

OPAQUE = {
    "after",
    "at",
    "head",
    "Idempotency-Key",
    "Last-Event-ID",
    "lastEventId",
    "parent",
    "turn_id",
    "under",
    "worker",
}
"""Parameters whose texts may have the right form and are still refused, because the server never gave them out."""
DEPENDENT = re.compile(r"count|tool_choice(\.name)?|tools\[\d+\]\.name|(input|items)\[\d+\]\.call_id")
"""Fields that have to fit others: a choice needs its function, names and ids are there once, a search has no count."""

OF_OPENAI = re.compile(
    r"input|tools|tool_choice|conversation|previous_response_id|store|stream_options|starting_after|after|metadata|client_metadata"
    r"|messages|max_tokens|items"
)
"""The beginnings of such parameters of OpenAI's API, whose objects have no types in the schema."""

BODY_BYTES_MAX = 4 * 1024 * 1024
"""No call takes a larger body: it is the default of ``history_bytes_max``. A schema cannot tell the bound of a body."""


@schemathesis.check
def what_the_schema_allows_is_accepted(ctx: CheckContext, response: Response, case: Case[Any]) -> bool | None:
    if response.status_code in (410, 412):
        return None  # by what was deleted meanwhile, and by a precondition: schemathesis knows no ETag of a session
    if response.status_code == 400 and _names_no_etag(case, response.json().get("field")):
        return None  # schemathesis sends "0" as a value that the schema allows, and the schema wants quotation marks
    if response.status_code in (400, 404, 422) and isinstance(error := response.json().get("error"), dict):
        field = error["param"] or ""
        if field in OPAQUE or OF_OPENAI.match(field):
            return None
    field = response.json().get("field", "") if response.status_code == 422 else ""
    if field in OPAQUE or DEPENDENT.fullmatch(field):
        return None
    outcome: bool | None = positive_data_acceptance(ctx, response, case)
    return outcome


@schemathesis.check
def what_the_schema_forbids_is_refused(ctx: CheckContext, response: Response, case: Case[Any]) -> bool | None:
    body = response.request.body
    if response.status_code == 413 and isinstance(body, bytes) and len(body) > BODY_BYTES_MAX:
        return None  # refused by its size, before the schema matters: so large is one item more than ``messages`` takes
    outcome: bool | None = negative_data_rejection(ctx, response, case)
    return outcome


def _names_no_etag(case: Case[Any], header: str | None) -> bool:
    headers: dict[str, Any] = dict(case.headers or {})
    value = str(headers.get(header, "*")) if header == "If-Match" else "*"
    return value != "*" and '"' not in value


@schemathesis.check
def answers_are_noted(_ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    answer = f"{case.id} {case.operation.definition.raw['operationId']} {response.status_code}\n"
    with Path(os.environ["ANSWERS_SEEN"]).open("a") as seen:
        seen.write(answer)


@schemathesis.hook
def before_load_schema(_context: HookContext, raw_schema: dict[str, Any]) -> None:
    """Replace the schema of each stream by the schema of one event: schemathesis checks each event with it.

    Leave owners out, responses that are not stored, and the examples of answers: schemathesis would ask for the ids of
    examples and for no others, where it knows no call that makes such things.
    """
    data = {"contentMediaType": "application/json", "contentSchema": {"$ref": "#/components/schemas/Event"}}
    event = {
        "type": "object",
        "properties": {"id": {"type": "string", "pattern": "^[0-9]+$"}, "data": {"type": "string", **data}},
        "required": ["id", "data"],
    }
    # An owner by chance has no session, so nothing that was made would be found again.
    del raw_schema["components"]["schemas"]["CreateSession"]["properties"]["owner"]
    # Neither is a response that is not stored.
    del raw_schema["components"]["schemas"]["CreateResponse"]["properties"]["store"]
    for operation in (it for methods in raw_schema["paths"].values() for it in methods.values()):
        operation["parameters"] = [it for it in operation["parameters"] if it["name"] != "Lastcall-Owner"]
        for response in operation["responses"].values():
            if stream := response.get("content", {}).get("text/event-stream"):
                stream["schema"] = event if "example" in stream else {"type": "object"}  # of OpenAI's API
            for content in response.get("content", {}).values():
                content.pop("example", None)
