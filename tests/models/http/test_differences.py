"""The same responses through this transport and through httpx's own, which httpcore does.

Both must give the same status, fields and bytes, or both an error. The differences that are meant, all of them where
httpx gives an error and this transport reads on and closes the connection afterwards:

- ``Transfer-Encoding: chunked`` more than once (:data:`REPEATED`).
- In a chunked body: lines that end with a line feed alone, and trailers that are no fields (the body is not clean).
"""

import random
import re

import httpcore
import httpx
import pytest

from service.models.http import transport as transport_module
from service.models.http.transport import BODY, Transport
from tests.models.http.chunked_fuzz import make_input
from tests.models.http.scripted_connection import ScriptedConnection

REPEATED = re.compile(
    rb"transfer-encoding:[^\n]*chunked[ \t]*(,|\r?\n(.*\n)*transfer-encoding:[ \t]*chunked)", re.IGNORECASE
)
URL = "http://model.test/v1/chat/completions"

ODD_FIELDS = (
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: identity",
    b" folded",
    b"Content-Length: 3",
    b"Content-Length: 3, 3",
    b"Content-Length: 3, 4",
    b"Content-Length: -1",
    b"Content-Length: 0x3",
    b"Content-Length: " + b"9" * 30,
    b"Connection: close",
    b"Connection: keep-alive",
    b"no field",
    b": no name",
    b"a b: c",
    b"a: \x00",
    b"a: \xff",
    b"Upgrade: h2c",
    b"Trailer: x",
)

Outcome = tuple[int, list[tuple[bytes, bytes]], bytes] | None
"""Status, fields and body; None for an error."""


async def by_httpx(pieces: list[bytes]) -> Outcome:
    async with httpcore.AsyncConnectionPool(network_backend=httpcore.AsyncMockBackend(list(pieces))) as pool:
        try:
            async with pool.stream("POST", URL, headers={"Host": "model.test"}, content=b"{}") as response:
                body = b"".join([chunk async for chunk in response.aiter_stream()])
                return response.status, response.headers, body
        except (httpcore.NetworkError, httpcore.ProtocolError):
            return None


async def by_ours(pieces: list[bytes], transport: Transport) -> tuple[Outcome, bool, bool]:
    """The outcome; whether the connection was kept; whether the body was clean."""
    connection = ScriptedConnection(*pieces)

    async def connect(*_: object, **__: object) -> ScriptedConnection:  # noqa: ASYNC124  as the real one
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport_module, "connect", connect)
        try:
            response = await transport.handle_async_request(httpx.Request("POST", URL, content=b"{}"))
            body = b"".join([chunk async for chunk in response.extensions[BODY]])
        except (httpx.NetworkError, httpx.ProtocolError):
            assert connection.is_closed
            return None, False, False
    kept = transport._idle.take() is connection
    assert connection.is_closed != kept
    outcome = response.status_code, response.headers.raw, body
    return outcome, kept, response.extensions[BODY]._decoder.is_clean


def make_response(rng: random.Random) -> bytes:
    line_end = b"\n" if rng.random() < 0.05 else b"\r\n"
    status = rng.choice(
        (b"200 OK",) * 8 + (b"204 No Content", b"304", b"500 Broken", b"20 OK", b"2000 OK", b"200", b"101 Go")
    )
    version = rng.choice((b"HTTP/1.1",) * 12 + (b"HTTP/1.0", b"HTTP/2", b"HTTP/2.0", b"http/1.1", b"ICY"))
    body = make_input(rng) if rng.random() < 0.6 else bytes(rng.choices(b"ab\r\n0", k=rng.randrange(30)))
    fields = [b"content-type: text/event-stream", b"X-Empty:", b"set-cookie: a=b"][: rng.randrange(4)]
    if rng.random() < 0.6:
        fields.append(
            rng.choice(
                (b"Transfer-Encoding: chunked",) * 4
                + (b"transfer-encoding:CHUNKED ", b"Transfer-Encoding: gzip, chunked")
            )
        )
    if rng.random() < 0.4:
        fields.append(
            b"Content-Length: %d" % rng.choice((len(body), len(body), len(body), len(body) + 1, max(0, len(body) - 1)))
        )
    for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2))):
        fields.insert(rng.randrange(len(fields) + 1), rng.choice(ODD_FIELDS))
    head = line_end.join((version + b" " + status, *fields, b"", b""))
    interim = rng.choice((b"",) * 9 + (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" * 2))
    made = interim + head + body
    if rng.random() < 0.1:
        made = made[: rng.randrange(len(made) + 1)]
    if rng.random() < 0.1:
        at = rng.randrange(len(made) + 1)
        made = made[:at] + bytes(rng.choices(b"\r\n :HT/1", k=1)) + made[at + rng.randrange(2) :]
    return made


async def test_random_responses_in_random_pieces_are_read_as_httpx_reads_them() -> None:
    rng = random.Random(14)
    transport = Transport(httpx.URL(URL), ssl_context=None, connect_timeout_s=1, idle_max=1, idle_expiry_s=1)
    seen = {"same": 0, "both errors": 0, "lenient": 0, "kept": 0}
    for _ in range(2500):
        made = make_response(rng)
        cuts = sorted(rng.randrange(len(made) + 1) for _ in range(rng.randrange(4)))
        pieces = [made[a:b] for a, b in zip([0, *cuts], [*cuts, len(made)], strict=True) if a < b]
        theirs = await by_httpx(pieces)
        ours, kept, is_clean = await by_ours(pieces, transport)
        seen["kept"] += kept
        if ours == theirs:
            seen["both errors" if ours is None else "same"] += 1
        else:
            assert theirs is None, (pieces, ours, theirs)
            assert REPEATED.search(made) or not is_clean, (pieces, ours)
            assert not kept, pieces
            seen["lenient"] += 1
    assert min(seen.values()) > 30, seen
