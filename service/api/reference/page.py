"""The API's description: the OpenAPI document, and a page of it that loads nothing from other servers.

Both can be read without an API key, because a browser sends no key and they hold no secret.
"""

import json
import shlex
from base64 import b64encode
from hashlib import sha256
from html import escape
from typing import Any

import msgspec
from quart import Blueprint, Quart, current_app
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_access
from service.api.http.event_stream import MEDIA_TYPE as EVENT_STREAM
from service.api.http.locations import located
from service.api.http.operations import Answer, operation
from service.api.http.problems import ADVICE, codes
from service.api.reference.openapi import OPENAI_TAGS, build_document
from service.failure_codes import FAILURES

blueprint = Blueprint("docs", __name__)

_DOCUMENT = "lastcall.openapi"
_PAGES = "lastcall.docs"
PAGES_MAX = 8
"""Bound on the pages that are kept; a server behind one proxy has one page. Beyond it the oldest page is dropped."""


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
    """Read this description as a page."""
    page = _page_of(current_app, prefix=located(""), keyed=current_access().needs_key)
    return TrioResponse(page, headers=_PAGE_HEADERS, content_type="text/html; charset=utf-8")


def document_of(app: Quart) -> dict[str, Any]:
    """Return the OpenAPI document of an application. It is built once, because the routes do not change."""
    if _DOCUMENT not in app.extensions:
        app.extensions[_DOCUMENT] = build_document(app)
    document: dict[str, Any] = app.extensions[_DOCUMENT]
    return document


def _page_of(app: Quart, *, prefix: str, keyed: bool) -> bytes:
    """Return the page. Kept, because rendering takes milliseconds of the event loop and the page needs no key."""
    pages: dict[tuple[str, bool], bytes] = app.extensions.setdefault(_PAGES, {})
    page = pages.get((prefix, keyed))
    if page is None:
        if len(pages) >= PAGES_MAX:
            del pages[next(iter(pages))]
        page = pages[prefix, keyed] = render(document_of(app), url=_EXAMPLE_URL + prefix, keyed=keyed).encode()
    return page


_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
summary { cursor: pointer; padding: .3rem 0 }
code, pre { font: .875em/1.45 ui-monospace, monospace }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8885; border-radius: 4px }
summary code b { display: inline-block; min-width: 4rem }
small { color: GrayText }
table { border-collapse: collapse } td { padding: .15rem 1rem .15rem 0; vertical-align: top }
details > :not(summary) { margin-left: 1.2rem }
"""


_EXAMPLE_URL = "http://localhost:8000"
_EXAMPLE_IDS = {
    "session_id": "support-4711",
    "turn_id": "turn_0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19",
    "item_id": "msg_9c6c1b9e2f3d4c5a8b7e6f5d4c3b2a19",
    "response_id": "resp_0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19",
    "conversation_id": "conv_6f0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a",
    "item_name": "msg_9c0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a",
    "model": "scripted",
}
_STYLE_HASH = b64encode(sha256(_STYLE.encode()).digest()).decode()
_PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def render(document: dict[str, Any], *, url: str = _EXAMPLE_URL, keyed: bool = False) -> str:
    """Return the OpenAPI document as a page that needs no scripts.

    Args:
        url: The server's URL in the example commands; with the prefix.
        keyed: Whether the commands need an API key.
    """
    info = document["info"]
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{info["title"]}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>',
        f"<h1>{info['title']} {info['version']}</h1><p>{_prose(info['summary'])} ",
        'The same as a document of OpenAPI: <a href="openapi.json">openapi.json</a>. ',
        'A page to try it all: <a href="./">the console</a>.</p>',
        f"<p>{_prose(_ABOUT_COMMANDS + (_ABOUT_KEYS if keyed else ''))}</p>",
    ]
    for tag in document["tags"]:
        parts.append(f"<h2>{tag['name'].capitalize()}</h2><p>{_prose(tag['description'])}</p>")
        for path, methods in document["paths"].items():
            parts += [
                _operation(method, path, operation, command=_command(method, path, operation, url=url, keyed=keyed))
                for method, operation in methods.items()
                if operation["tags"] == [tag["name"]]
            ]
    parts.append("<h2>Schemas</h2>")
    parts += [_schema(name, schema) for name, schema in sorted(document["components"]["schemas"].items())]
    parts += [_failed_turns(), _problems(), "</html>"]
    return "\n".join(parts)


_ABOUT_COMMANDS = (
    f"The commands are for a shell; replace `{_EXAMPLE_URL}` by this server's address, and the ids by your own."
)
_ABOUT_KEYS = " `$API_KEY` stands for one of the server's API keys: `export API_KEY=…` once."


def _command(method: str, path: str, operation: dict[str, Any], *, url: str, keyed: bool) -> str:
    """Return the command of ``curl`` for a call."""
    for name, value in _EXAMPLE_IDS.items():
        path = path.replace(f"{{{name}}}", value)
    parts = ["curl"]
    answers = [media for answer in operation["responses"].values() for media in answer.get("content", {})]
    bodies = [content["example"] for content in operation.get("requestBody", {}).get("content", {}).values()]
    streams = EVENT_STREAM in answers
    if operation["tags"][0] in OPENAI_TAGS:  # the body asks for a stream, and no header
        streams = any(body.get("stream") for body in bodies)
    if streams:
        parts.append("-N")  # show each event as it arrives
    if method != "get":
        parts.append(f"-X {method.upper()}")
    parts.append(shlex.quote(url + path))
    if keyed and operation.get("security") != []:
        parts.append('-H "Authorization: Bearer $API_KEY"')
    if streams and "application/json" in answers and operation["tags"][0] not in OPENAI_TAGS:
        parts.append(f"-H 'Accept: {EVENT_STREAM}'")
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        body = json.dumps(content["example"], ensure_ascii=False)
        parts += [f"-H 'Content-Type: {media}'", f"-d {shlex.quote(body)}"]
    return " ".join(parts)


def _failed_turns() -> str:
    """Return the table of codes of failed turns. A code that is also a problem's code has its plain anchor there."""
    shared = {code for _, code in codes()}
    rows = [
        f'<tr id="{"failed-" if code in shared else ""}{code}"><td><code>{code}</code>'
        f"<td>{_prose(meaning.cause)}<td>{_prose(meaning.fixed_by)}"
        for code, meaning in FAILURES.items()
    ]
    return (
        "<h2>Failed turns</h2><p>The <code>error.code</code> of a turn that failed, what happened, and who can fix it."
        f"</p><table>{''.join(rows)}</table>"
    )


def _problems() -> str:
    rows = [
        f'<tr id="{code}"><td>{status}<td><code>{code}</code><td>{_prose(ADVICE[code])}' for status, code in codes()
    ]
    return (
        "<h2>Problems</h2><p>Every error is a problem document (RFC 9457) with one of these codes.</p>"
        f"<table>{''.join(rows)}</table>"
    )


def _operation(method: str, path: str, operation: dict[str, Any], *, command: str) -> str:
    rows = [
        f"<tr><td><code>{escape(parameter['name'])}</code><td>{parameter['in']}"
        f"<td>{_type(parameter['schema'])}<td>{_prose(_described(parameter))}"
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
        f"{_paragraphs(operation['description'])}<pre>{escape(command)}</pre><table>{''.join(rows)}</table></details>"
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    without_text = {name: value for name, value in schema.items() if name != "description"}
    shown = _prose(msgspec.json.format(msgspec.json.encode(without_text)).decode())
    return (
        f'<details id="schema-{name}"><summary><code>{name}</code></summary>'
        f"{_paragraphs(schema.get('description', ''))}<pre>{shown}</pre></details>"
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


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_prose(part)}</p>" for part in text.split("\n\n") if part)


def _prose(text: str) -> str:
    """Return the HTML of a text with `code` in backticks."""
    pieces = escape(text).replace("``", "`").split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
