"""The API's description: the OpenAPI document, and a page of it that needs nothing from elsewhere."""

from html import escape
from typing import Any

import msgspec
from quart import Blueprint, Quart, current_app
from quart_trio.wrappers import TrioResponse

from service.api.http.locations import located
from service.api.http.operations import Answer, operation
from service.api.http.problems import codes
from service.api.reference.openapi import build_document

blueprint = Blueprint("docs", __name__)

_DOCUMENT = "lastcall.openapi"


@blueprint.get("/openapi.json")
@operation(
    id="openapi",
    answers=(Answer(status=200, description="OpenAPI 3.1.", media_type="application/json"),),
)
async def openapi() -> TrioResponse:
    """Get this description."""
    document = document_of(current_app) | {"servers": [{"url": located("") or "/"}]}
    return TrioResponse(msgspec.json.encode(document), content_type="application/json")


@blueprint.get("/docs")
@operation(id="docs", answers=(Answer(status=200, description="HTML.", media_type="text/html"),))
async def docs() -> TrioResponse:
    """Read this description."""
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return TrioResponse(render(document_of(current_app)), headers=headers, content_type="text/html; charset=utf-8")


def document_of(app: Quart) -> dict[str, Any]:
    """The document of an application, built when it is first asked for: its routes do not change."""
    if _DOCUMENT not in app.extensions:
        app.extensions[_DOCUMENT] = build_document(app)
    document: dict[str, Any] = app.extensions[_DOCUMENT]
    return document


_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
summary { cursor: pointer; padding: .3rem 0 }
code, pre { font: .875em/1.45 ui-monospace, monospace }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8885; border-radius: 4px }
summary code b { display: inline-block; min-width: 4rem }
table { border-collapse: collapse } td { padding: .15rem 1rem .15rem 0; vertical-align: top }
details > :not(summary) { margin-left: 1.2rem }
"""


def render(document: dict[str, Any]) -> str:
    """The document as a page, whole without scripts."""
    info = document["info"]
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{info["title"]}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>',
        f"<h1>{info['title']} {info['version']}</h1><p>{info['summary']} ",
        'The same for machines: <a href="openapi.json">openapi.json</a>.</p>',
    ]
    for tag in document["tags"]:
        parts.append(f"<h2>{tag['name'].capitalize()}</h2><p>{escape(tag['description'])}</p>")
        for path, methods in document["paths"].items():
            parts += [
                _operation(method, path, operation)
                for method, operation in methods.items()
                if operation["tags"] == [tag["name"]]
            ]
    parts.append("<h2>Schemas</h2>")
    parts += [_schema(name, schema) for name, schema in sorted(document["components"]["schemas"].items())]
    parts.append("<h2>Problems</h2><p>Every error is a problem document (RFC 9457) with one of these codes.</p><table>")
    parts += [f'<tr id="{code}"><td>{status}<td><code>{code}</code>' for status, code in codes()]
    parts.append("</table></html>")
    return "\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = [
        f"<tr><td><code>{escape(parameter['name'])}</code><td>{parameter['in']}"
        f"<td>{_type(parameter['schema'])}<td>{escape(_described(parameter))}"
        for parameter in operation["parameters"]
    ]
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        rows.append(f"<tr><td>body<td>{media}<td>{_type(content['schema'])}<td>")
    for status, response in operation["responses"].items():
        types = " or ".join(
            f"{_type(content['schema'])} <small>{media}</small>"
            for media, content in response.get("content", {}).items()
        )
        rows.append(f"<tr><td><b>{status}</b><td colspan=2>{types}<td>{_prose(response['description'])}")
    return (
        f'<details id="{operation["operationId"]}"><summary><code><b>{method.upper()}</b> {escape(path)}</code> '
        f"{_prose(operation['summary'])}</summary>"
        f"<p>{_prose(operation['description'])}</p><table>{''.join(rows)}</table></details>"
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    shown = escape(
        msgspec.json.format(msgspec.json.encode({k: v for k, v in schema.items() if k != "description"})).decode()
    )
    return (
        f'<details id="schema-{name}"><summary><code>{name}</code></summary>'
        f"<p>{_prose(schema.get('description', ''))}</p><pre>{shown}</pre></details>"
    )


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#schema-{name}">{name}</a>'
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    return escape(str(schema.get("type", "")))


def _described(parameter: dict[str, Any]) -> str:
    text: str = parameter.get("description") or parameter["schema"].get("description", "")
    return text


def _prose(text: str) -> str:
    """Text with `code` in backticks, as the document has it."""
    pieces = escape(text).replace("``", "`").split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
