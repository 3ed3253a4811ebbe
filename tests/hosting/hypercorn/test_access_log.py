"""hypercorn's access log, in our log: no request can forge an entry."""

import json
import unicodedata

import pytest
import trio
from quart_trio import QuartTrio

from service.api.http.request_body import BoundedRequest
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.telemetry.escaping import escape
from tests.hosting.conftest import Serve
from tests.kept_log import FORMATS, Format, kept_log

REQUEST = (
    b"GET /a%0A2026-01-01T00:00:00Z%20[error]%20forged%1B[2J%22%20200%205%20%22x%E2%80%A8%C2%85%C2%9B HTTP/1.1\r\n"
    b'Host: a\r\nUser-Agent: x" 1 \\" \x9b\xe2\x80\xa8\r\nConnection: close\r\n\r\n'
)


@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.usefixtures("connections")
async def test_a_request_s_target_and_fields_forge_nothing(serve: Serve, log_format: Format) -> None:
    app = QuartTrio("test")
    app.asgi_http_class = AsgiRequest
    app.request_class = BoundedRequest
    with kept_log(log_format) as read, trio.fail_after(20):
        async with serve(app, accesslog="-") as server, await server.connect() as stream:
            await stream.send_all(REQUEST)
            assert b" 404 " in b"".join([part async for part in stream])
        written = read()
    (line,) = [line for line in written.split("\n") if "forged" in line]
    assert not any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in line)
    shown = escape(json.loads(line)["message"]) if log_format == "json" else line
    assert r"/a\n2026-01-01T00:00:00Z [error] forged\x1b[2J\" 200 5 \"x\u2028\x85\x9b 1.1" in shown
    assert r'"x\" 1 \\\" ' in shown
