"""The console: a page at ``/`` that talks to this service's API from the browser, and the files that it loads.

The files hold no data, so they need no key, as a browser sends none for a page. What the page asks for needs one.

All files but the page lie in a folder whose name is a hash of them all. So they may be cached for ever, and the modules
that one file imports are those of the same version.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

import msgspec
import trio
from quart import Blueprint, Quart, current_app, request
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import NotFound

from service import __version__
from service.api.http.app_state import no_content
from service.api.http.locations import located, prefix_of
from service.api.http.operations import Answer, operation

blueprint = Blueprint("console", __name__)

FOLDER = Path(__file__).parents[2] / "console"
CLIENT = "lastcall.js"
"""The client of ``clients/js``, which the page uses unchanged. An installed package has it beside the page's files."""
_CLIENT_IN_CHECKOUT = FOLDER.parents[1] / "clients/js" / CLIENT

_CONSOLE = "lastcall.console"
_READING = "lastcall.console_reading"
"""Key of the limit on threads that read the console: one, which does not count among those for Trio's other work."""
_PAGE = "index.html"
_PLACE = b"{files}"
"""What stands in the page for the address of the folder of its files."""
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The types of files. The machine's own table (``mimetypes``) may say that a module is plain text."""
HEADERS = {
    # Nothing inline, nothing of other servers, and no text that becomes HTML: the page builds its elements itself.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_FOR_EVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class File:
    """A file of the console: its bytes, its media type and its ETag, a hash of the bytes."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, content: bytes, name: str) -> Self:
        return cls(content, _TYPES[Path(name).suffix], f'"{_hash(content)}"')


@dataclass(frozen=True)
class Console:
    """The page, and its files by their names; ``version`` is a hash of them all."""

    page: File
    files: Mapping[str, File]
    version: str

    @classmethod
    def load(cls) -> Self:
        """Read the files of the console. Raises: OSError."""
        contents = dict(_contents())
        page = contents.pop(_PAGE)
        version = _hash(b"".join(name.encode() + b"\0" + _hash(it).encode() for name, it in sorted(contents.items())))
        page = page.replace(_PLACE, f"console/{version}".encode())
        return cls(File.of(page, _PAGE), {name: File.of(it, name) for name, it in contents.items()}, version)


class Root(msgspec.Struct, frozen=True):
    """``{"name": "lastcall", "version": "0.1.0", "docs": "/docs", "openapi": "/openapi.json"}``

    The addresses are paths of this server.
    """

    name: str
    version: str
    docs: str
    openapi: str


@blueprint.get("/")
@operation(
    id="root",
    answers=(
        Answer(
            status=200,
            description="The console: HTML. With `Accept: application/json` the addresses of the API's description.",
            body=Root,
            media_type="text/html",
        ),
    ),
)
async def root() -> TrioResponse:
    """Get the console, a page to chat and to look at the server."""
    if _is_without_slash():  # the page's addresses are relative
        return TrioResponse(b"", 302, {"Location": located("/"), "Cache-Control": "no-store"}, content_type="text/html")
    accepted = request.accept_mimetypes
    if accepted["application/json"] > accepted["text/html"]:
        addresses = Root("lastcall", __version__, located("/docs"), located("/openapi.json"))
        headers = {"Cache-Control": "no-store"}
        response = TrioResponse(msgspec.json.encode(addresses), headers=headers, content_type="application/json")
    else:
        response = _respond((await console_of(current_app)).page, "no-cache")
    response.headers["Vary"] = "Accept"
    return response


@blueprint.get("/console/<version>/<name>")
@operation(id="console_file", answers=(Answer(status=200, description="A file of the console."),), is_described=False)
async def console_file(version: str, name: str) -> TrioResponse:
    """Get a file of the console.

    Another version, of a page that was loaded before a deploy or from another replica, gets today's file, and keeps it
    for this once.

    Raises:
        NotFound: There is no file of this name.
    """
    console = await console_of(current_app)
    file = console.files.get(name)
    if file is None:
        raise NotFound
    return _respond(file, _FOR_EVER if version == console.version else "no-store")


async def console_of(app: Quart) -> Console:
    """Return the console of an application. Its files are read once, in a thread. A caller may leave at any time."""
    if _CONSOLE not in app.extensions:
        limiter = app.extensions.setdefault(_READING, trio.CapacityLimiter(1))
        await trio.to_thread.run_sync(_load_into, app.extensions, abandon_on_cancel=True, limiter=limiter)
    console: Console = app.extensions[_CONSOLE]
    return console


def _load_into(extensions: dict[str, object]) -> None:
    if _CONSOLE not in extensions:  # one thread at a time: those that waited have it already
        extensions[_CONSOLE] = Console.load()


def _respond(file: File, caching: str) -> TrioResponse:
    """Return a file, or 304 where the browser has it already."""
    headers = HEADERS | {"Cache-Control": caching, "ETag": file.etag}
    if request.if_none_match.contains_weak(file.etag.strip('"')):
        return no_content(304, headers)
    return TrioResponse(file.content, headers=headers, content_type=file.media_type)


def _is_without_slash() -> bool:
    """Whether the browser asks for ``/prefix`` in place of ``/prefix/``."""
    prefix = prefix_of(dict(request.scope))
    return bool(prefix) and (request.scope.get("raw_path") or b"").partition(b"?")[0] == prefix.encode()


def _contents() -> Iterator[tuple[str, bytes]]:
    for path in FOLDER.iterdir():
        if path.suffix in _TYPES:
            yield path.name, path.read_bytes()
    if not (FOLDER / CLIENT).exists():
        yield CLIENT, _CLIENT_IN_CHECKOUT.read_bytes()


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]
