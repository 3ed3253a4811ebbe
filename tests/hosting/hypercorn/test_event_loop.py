"""No bytes of a request block the event loop: the worst requests and mixtures, on real sockets."""

import random
import struct
from collections.abc import Iterable
from typing import Any, cast

import h2.connection
import hpack
import pytest
import trio
from hypercorn.config import Config
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.worker_context import WorkerContext

from service.hosting.hypercorn.connections import HEAD_BYTES_MAX, BoundedDecoder
from service.hosting.hypercorn.http1_connection import HEAD_PIECE_BYTES
from service.settings import Settings
from tests.longest_step import STEP_MAX_S, LongestStep, watching_steps
from tests.service.serving import serving

SETTINGS = Settings(store_url="memory:", model_url="scripted:?tokens=1")
BODY_BYTES = SETTINGS.body_bytes_max - 100
CAP_S = 60
TRIES = 3
"""A request whose step took too long is sent again: caches and a shared core cost processor time, too."""


async def exchange(port: int, data: bytes, longest: LongestStep, *, ends: bool = True) -> bytes:
    """Send all data, and read until the server closes or sends nothing more. Returns the received bytes."""
    received = bytearray()
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            longest.leave_out()
            try:
                await stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        with trio.move_on_after(CAP_S if ends else 0.1) as silence:
            while True:
                try:
                    part = await stream.receive_some()
                except trio.BrokenResourceError:
                    break
                if not part:
                    break
                received += part
                silence.deadline = trio.current_time() + (CAP_S if ends else 0.1)
        nursery.cancel_scope.cancel()
    assert not (ends and silence.cancelled_caught), data[:100]
    return bytes(received)


async def longest_steps(requests: Iterable[tuple[str, bytes]], *, ends: bool = True) -> dict[str, float]:
    """Send each request on its own connection. Returns the longest step, in ms, of each that blocked the loop."""
    too_long: dict[str, float] = {}
    async with serving(SETTINGS) as server:
        await exchange(server.port, request("GET", "/openapi.json"), LongestStep())
        with watching_steps() as longest:
            for name, data in requests:
                for _ in range(TRIES):
                    longest.reset()
                    await exchange(server.port, data, longest, ends=ends)
                    if longest.seconds < STEP_MAX_S:
                        break
                else:
                    too_long[f"{name} ({longest.task_name})"] = longest.seconds * 1000
            answer = await exchange(server.port, request("GET", "/healthz"), longest)
            assert answer.startswith(b"HTTP/1.1 200")
    return too_long


def request(method: str, target: str, body: bytes = b"", *fields: bytes, host: bytes = b"localhost") -> bytes:
    head = [
        f"{method} {target} HTTP/1.1".encode(),
        b"Host: " + host,
        b"Connection: close",
        *([b"Content-Type: application/json", b"Content-Length: %d" % len(body)] if body else []),
        *fields,
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def filled(fragment: str, before: str = "", after: str = "") -> bytes:
    """A body of the largest accepted size, filled with one repeated fragment."""
    room = BODY_BYTES - len((before + after).encode())
    return (before + fragment * (room // len(fragment.encode())) + after).encode()


BODIES: dict[str, bytes] = {
    "numbers": filled("0,", "[", "0]"),
    "fractions": filled("1.5,", "[", "0]"),
    "powers": filled("1e5,", "[", "0]"),
    "numbers of 4300 digits": filled("9" * 4300 + ",", "[", "0]"),
    "numbers of 300 digits": filled("9" * 300 + ",", "[", "0]"),
    "one number": filled("9"),
    "one fraction": filled("9", "0."),
    "one exponent": filled("9", "1e"),
    "lists": filled("[],", "[", "[]]"),
    "objects": filled("{},", "[", "{}]"),
    "texts": filled('"",', "[", '""]'),
    "deep": filled("["),
    "deep, again and again": filled("[" * 900 + "]" * 900 + ",", "[", "0]"),
    "wide": b"{" + b",".join(b'"%x":0' % n for n in range(BODY_BYTES // 11)) + b"}",
    "one key": filled('"a":0,', "{", '"a":0}'),
    "white space": filled(" "),
    "line ends": filled("\n", "", "x"),
    "quotes": filled('"'),
    "long text": filled("a", '{"title":"', '"}'),
    "long text in escapes": filled("\\u0041", '{"title":"', '"}'),
    "long text in escapes and not": filled("\\n\N{GRINNING FACE}", '{"title":"', '"}'),
    "long text in surrogates": filled("\\ud83d\\ude00", '{"title":"', '"}'),
    "long text in halves of surrogates": filled("\\ud83d", '{"title":"', '"}'),
    "long text of structure": filled("[{,:", '{"title":"', '"}'),
    "long text of structure and quotes": filled('\\"\\\\,', '{"title":"', '"}'),
    "the longest text": b'{"system_message":"' + b"\\u0001" * SETTINGS.input_bytes_max + b'"}',
    "a long id": filled("a", '{"id":"', '"}'),
    "a long turn id": filled("turn_", '{"parent":"', '"}'),
    "a long name": filled("a", '{"', '":1}'),
    "a long name like an error": filled(" - at `$", '{"', '":1}'),
    "a long name like a field": filled("field `", '{"', '":1}'),
    "a long name of halves of surrogates": filled("\\ud800", '{"', '":1}'),
    "metadata": b'{"metadata":{' + b",".join(b'"%x":"0"' % n for n in range(9000)) + b',"z":1}}',
    "metadata, far more": b'{"metadata":{' + b",".join(b'"%x":"0"' % n for n in range(100_000)) + b',"z":1}}',
    "a key twice below a long name": filled(
        "n", '{"', '":[' + ",".join(['{"a":[1]}'] * 4000) + ',{"b":1,"b":2}]}'
    ),
    "a key twice below long names": filled(
        "n", '{"', '":{"k":' + ('{"' + "k" * 1000 + '":') * 700 + '{"b":1,"b":2}' + "}" * 702
    ),
}  # fmt: skip


def chunked(chunks: Iterable[bytes], extension: bytes = b"", trailers: bytes = b"") -> bytes:
    framed = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    head = request("POST", "/sessions", b"", b"Content-Type: application/json", b"Transfer-Encoding: chunked")
    return head + framed + b"0\r\n" + trailers + b"\r\n"


def split_line_end(blank: bytes) -> bytes:
    """A chunk whose line end comes in two pieces, because the server takes so many bytes first; then a long header."""
    head = request("POST", "/sessions", b"", b"Content-Type: application/json", b"Transfer-Encoding: chunked")
    size = HEAD_PIECE_BYTES - len(head) - len(b"abc\r\n\r")
    return head + b"%03x\r\n%b\r\n0;%b\n\r\n" % (size, b" " * size, blank * 15_000)


HEADS: dict[str, bytes] = {
    "many fields": request("GET", "/sessions", b"", *[b"a:b"] * 3000),
    "far too many fields": request("GET", "/sessions", b"", *[b"a:"] * 15_000),
    "a folded field": request("GET", "/sessions", b"", b"a: b" + b"\r\n b" * 3000),
    "a field of spaces": request("GET", "/sessions", b"", b"a: b" + b" " * 15_000 + b"\x01"),
    **{
        f"a field of {blank!r} that ends with {end!r}": request("GET", "/sessions", b"", b"a:" + blank * 15_000 + end)
        for blank in (b" ", b"\t")
        for end in (b"\0", b"\v", b"\f", b"\rx")
    },
    "a field of words": request("GET", "/sessions", b"", b"a: " + b"b " * 7500 + b"\x01"),
    "a long name": request("GET", "/sessions", b"", b"a" * 15_000 + b": b"),
    "accepts much": request("POST", "/chat", b"{}", b"Accept: text/event-stream," + b"a/b;q=0.1," * 1500),
    "accepts quotes": request("POST", "/chat", b"{}", b'Accept: text/event-stream;a="' + b"\\" * 15_000),
    "a long type": request("POST", "/sessions", b"{}", b"Content-Type: application/json;" + b"a=b;" * 3700),
    "many cookies": request("GET", "/sessions", b"", b"Cookie: " + b"a=b;" * 3700),
    "a long key": request("GET", "/sessions", b"", b"Authorization: Bearer " + b"a" * 15_000),
    "an id of an event": request("GET", "/sessions/a/turns/b/events", b"", b"Last-Event-ID: " + b"9" * 15_000),
    "a long host": request("GET", "/sessions", host=b"a." * 7500),
    "a strange host": request("GET", "/sessions", host="é".encode() * 7500),
    "many parameters": request("GET", "/sessions?" + "a&" * 8000),
    "many parameters in escapes": request("GET", "/sessions?" + "%ff&" * 4000),
    "many parameters where none is taken": request("GET", "/sessions/a?" + "%ff&" * 4000),
    "a long parameter": request("GET", "/sessions?a=" + "%ff" * 5000),
    "a long path": request("GET", "/sessions/" + "a/" * 7500),
    "a path in escapes": request("GET", "/sessions/" + "%0a" * 5000),
    "a long URL": request("GET", "http:" + "/" * 15_000),
    "a long method": request("A" * 15_000, "/"),
    "no request": b"\xff" * 200_000,
    "empty lines": b"\r\n" * 100_000,
    "many requests at once": request("GET", "/healthz").replace(b"close", b"keep-alive") * 500 + request("GET", "/"),
    "a websocket": request(
        "GET", "/", b"", b"Upgrade: websocket", b"Connection: upgrade", b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: a", b"Sec-WebSocket-Extensions: " + b"permessage-deflate," * 700
    ),
    "chunks of a byte": chunked([b" "] * 50_000),
    "chunks of a byte with extensions": chunked([b" "] * 50_000, b";a"),
    "a long extension": chunked([b" "] * 1000, b";" + b"a" * 1000),
    **{f"an extension of {blank!r} after a line end in two pieces": split_line_end(blank) for blank in (b" ", b"\t")},
    "many trailers": chunked([b"{}"], trailers=b"a:b\r\n" * 3000),
    **{
        f"an extension of {blank!r} that ends with {end!r}": chunked([b"{}"], b";" + blank * 15_000 + end)
        for blank in (b" ", b"\t")
        for end in (b"\0", b"\v", b"\f", b"\rx", b"\nx")
    },
    **{
        f"a trailer of {blank!r} that ends with {end!r}": chunked([b"{}"], trailers=b"a:" + blank * 30_000 + end)
        for blank in (b" ", b"\t")
        for end in (b"\0\r\n", b"\v\r\n", b"\f\r\n", b"\rx\r\n", b"\nx\r\n")
    },
    "an extension of spaces without an end": request(
        "POST", "/sessions", b"", b"Transfer-Encoding: chunked"
    ) + b"2;" + b" " * 15_000,
    "the docs": request("GET", "/docs"),
}  # fmt: skip


@pytest.mark.usefixtures("connections")
async def test_no_body_holds_the_event_loop() -> None:
    assert not await longest_steps((name, request("POST", "/sessions", body)) for name, body in BODIES.items())


@pytest.mark.usefixtures("connections")
async def test_no_head_and_no_framing_holds_the_event_loop() -> None:
    assert not await longest_steps(HEADS.items())


@pytest.mark.usefixtures("connections")
async def test_a_head_of_http_1_is_bounded_though_it_comes_in_one_piece() -> None:
    async with serving(SETTINGS) as server:
        for length, status in ((15_000, b"200"), (22_000, b"431"), (60_000, b"431")):
            data = request("GET", "/healthz", b"", b"a: " + b"a" * length)
            assert (await exchange(server.port, data, LongestStep())).split()[1] == status


@pytest.mark.usefixtures("connections")
async def test_no_mixture_of_a_head_s_parts_holds_the_event_loop() -> None:
    chance = random.Random(4711)
    words = [
        "/",
        "//",
        "?",
        "&",
        "=",
        ";",
        ",",
        ":",
        "%",
        "%41",
        "%ff",
        "%0a",
        "+",
        "a",
        "a=b",
        '"',
        "\\",
        "*",
        ".",
        "@",
    ]
    names = ["Accept", "Content-Type", "Cookie", "Host", "Authorization", "Last-Event-ID", "Origin", "Expect", "X-A"]
    calls = ["/sessions", "/sessions?", "/sessions/a?", "/chat?", "/sessions/a/turns/b/events?after="]

    def mixture() -> tuple[str, bytes]:
        fragment = "".join(chance.choices(words, k=chance.randint(1, 6)))
        long = fragment * (14_000 // len(fragment))
        if chance.random() < 0.5:
            target = chance.choice(calls) + long
            return target[:60], request(chance.choice(["GET", "POST"]), target)
        field = f"{chance.choice(names)}: application/json {long}"
        return field[:60], request("POST", "/chat", b"{}", field.encode())

    assert not await longest_steps(mixture() for _ in range(60))


@pytest.mark.usefixtures("connections")
async def test_no_page_of_large_texts_holds_the_event_loop() -> None:
    text = b"\\u0001" * SETTINGS.input_bytes_max
    turn = request("POST", "/sessions/a/turns", b'{"input":"' + text + b'"}')
    sessions = [
        request("POST", "/sessions", b'{"id":"%b","system_message":"%b"}' % (name, text)) for name in (b"a", b"b", b"c")
    ]
    pages = [f"/sessions{rest}?limit=100" for rest in ("", "/a/turns", "/a/messages")]
    requests = [*sessions, *[turn] * 10, *(request("GET", page) for page in pages)]
    assert not await longest_steps((f"{place}", data) for place, data in enumerate(requests))


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream_id) + payload


DATA, HEADERS, PRIORITY, RESET, FRAME_SETTINGS, PING, WINDOW, CONTINUATION, UNKNOWN = 0, 1, 2, 3, 4, 6, 8, 9, 0xBB
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(FRAME_SETTINGS, 0, 0)


def fields(*more: tuple[str, str], method: str = "GET", path: str = "/healthz") -> bytes:
    pseudo = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "localhost")]
    return bytes(hpack.Encoder().encode([*pseudo, *more], huffman=True))


def head_of(stream_id: int, block: bytes, *, ends: bool = True) -> bytes:
    """The frames of a head: HEADERS, and as many CONTINUATION frames as its length needs."""
    first, *others = [block[start : start + 16_000] for start in range(0, len(block), 16_000)]
    frames = frame(HEADERS, int(ends) | (0 if others else 4), stream_id, first)
    for index, part in enumerate(others, 1):
        frames += frame(CONTINUATION, 4 if index == len(others) else 0, stream_id, part)
    return frames


UPLOAD = PREFACE + head_of(1, fields(("content-type", "application/json"), method="POST", path="/sessions"), ends=False)
WITH_REQUEST = PREFACE + head_of(1, fields())
HTTP2: dict[str, bytes] = {
    "pings": WITH_REQUEST + frame(PING, 0, 0, b"12345678") * 5000,
    "settings": WITH_REQUEST + frame(FRAME_SETTINGS, 0, 0) * 5000,
    "full settings": WITH_REQUEST + frame(FRAME_SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535) * 2700) * 10,
    "windows": WITH_REQUEST + frame(WINDOW, 0, 0, struct.pack(">I", 1)) * 5000,
    "unknown frames": WITH_REQUEST + frame(UNKNOWN, 0, 0) * 5000,
    "a body in bytes": UPLOAD + frame(DATA, 0, 1, b" ") * 5000,
    "a body of nothing": UPLOAD + frame(DATA, 0, 1) * 5000,
    "priorities": WITH_REQUEST
    + b"".join(frame(PRIORITY, 0, 3 + 2 * n, struct.pack(">IB", 1 + 2 * n, 10)) for n in range(900)),
    "requests that are given up": PREFACE
    + b"".join(head_of(1 + 2 * n, fields()) + frame(RESET, 0, 1 + 2 * n, struct.pack(">I", 8)) for n in range(1000)),
    "requests at once": PREFACE + b"".join(head_of(1 + 2 * n, fields()) for n in range(100)),
    "a long field": PREFACE + head_of(1, fields(("a", "0" * 100_000))),
    "many fields": PREFACE + head_of(1, fields(*((f"a{n}", "b") for n in range(1700)))),
    "tiny fields": PREFACE + head_of(1, fields() + b"\x00\x01a\x00" * 12_000),
    "a field, again": PREFACE + head_of(1, fields() + b"\x40\x01a\x7f\x81\x1e" + b"b" * 4000 + b"\xbe" * 12_000),
    "table sizes": PREFACE + head_of(1, b"\x20" * 16_000),
    "a path in escapes": PREFACE + head_of(1, fields(path="/sessions?" + "%ff&" * 3500)),
    "no frames": PREFACE + b"\xff" * 100_000,
}  # fmt: skip


@pytest.mark.usefixtures("connections")
async def test_no_frames_of_http_2_hold_the_event_loop() -> None:
    assert not await longest_steps(HTTP2.items(), ends=False)


def decoded(decoder: Any, block: bytes) -> list[Any]:
    return list(decoder.decode(block, raw=True))


@pytest.mark.usefixtures("connections")
def test_a_head_of_http_2_is_bounded_as_one_of_http_1_is() -> None:
    largest = fields(("a", "\x01" * (HEAD_BYTES_MAX // 4)))
    assert decoded(BoundedDecoder(), largest)
    assert isinstance(h2.connection.H2Connection().decoder, BoundedDecoder)
    with pytest.raises(hpack.OversizedHeaderListError):
        decoded(h2.connection.H2Connection().decoder, fields(*((f"a{n}", "b") for n in range(600))))
    with pytest.raises(hpack.OversizedHeaderListError):
        decoded(BoundedDecoder(), fields() + b"\x00\x01a\x00" * HEAD_BYTES_MAX)
    assert decoded(BoundedDecoder(), b"\x20\x3f\xe1\x1f" + fields())
    with pytest.raises(hpack.HPACKDecodingError):
        decoded(BoundedDecoder(), b"\x20" * 3 + fields())


@pytest.mark.removal
def test_hypercorns_setting_still_does_not_bound_the_heads_of_http_2() -> None:
    """This test fails once the setting bounds the first head; then the patch of h2's default is no longer needed."""
    config = Config.from_mapping(h2_max_header_list_size=HEAD_BYTES_MAX)
    nothing = cast("Any", None)
    protocol = H2Protocol(nothing, config, WorkerContext(None), *[nothing] * 6)
    protocol.connection.initiate_connection()
    assert protocol.connection.decoder.max_header_list_size > HEAD_BYTES_MAX


@pytest.mark.removal
def test_the_bounded_decoder_is_still_needed() -> None:
    """This test fails once hpack refuses a third table size; then :class:`BoundedDecoder` needs no count of its own."""
    assert decoded(hpack.Decoder(), b"\x20" * 1000 + fields())
