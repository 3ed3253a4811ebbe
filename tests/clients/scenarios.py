"""What a server, or the network before it, may do to a client of the native API, and what the client makes of it.

One table for both clients in ``clients/``. A scenario is what the server does with each request in turn, what the
client is asked to do (steps, see ``client_driver.py`` and ``client_driver.mjs``), and what must have come of it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import trio

from tests.upstreams.raw_server import Connection, Request

Act = Callable[["Exchange"], Any]
Step = Mapping[str, Any]
TURN = f"turn_{'0a' * 16}"
WHERE = {"location": f"/sessions/me/turns/{TURN}", "connection": "close"}
TEXT = "Grüße, \N{GRINNING FACE}\N{FAMILY} und 漢字"


@dataclass
class Exchange:
    """One request of the client, and the connection for its answer."""

    connection: Connection
    request: Request
    closed: trio.Event


@dataclass(frozen=True)
class Scenario:
    """``acts`` are the server's, one for each request, the last one for all further ones.

    Args:
        steps: What the client does.
        expect: The results of the steps: for each the fields that it must have, and their values.
        requests: The method and the target of each request, if they matter.
        headers: Headers that these requests, by their number from 0, must have.
        same: The headers that all POSTs must have alike, with the same body.
        differ: The headers that no two POSTs may have alike.
        bounds: The client's bounds that are not those of all scenarios.
        prefix: A path in the client's address of the server.
    """

    acts: Sequence[Act]
    steps: Sequence[Step]
    expect: Sequence[Mapping[str, Any]]
    requests: Sequence[str] | None = None
    headers: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    same: Sequence[str] = ()
    differ: Sequence[str] = ()
    bounds: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""


BOUNDS = {"pause_s": 0.01, "pause_max_s": 0.02, "patience_s": 20, "silence_s": 20, "timeout_s": 20}
"""Of the client in all scenarios that name no other ones."""


# What a server sends


def frame(seq: int, kind: str, **fields: Any) -> bytes:
    data = json.dumps({"type": kind, "seq": seq, **fields}, ensure_ascii=False)
    return f"id: {seq}\ndata: {data}\n\n".encode()


STARTED = frame(1, "turn.started", session_id="me", turn_id=TURN, model="m")
RETRY = b"retry: 10\n"


def delta(seq: int, text: str) -> bytes:
    return frame(seq, "turn.delta", text=text)


def completed(seq: int, length: int = 0) -> bytes:
    return frame(seq, "turn.completed", finish_reason="stop", usage=None, text_length=length)


WHOLE = RETRY + STARTED + delta(2, TEXT[:9]) + delta(3, TEXT[9:]) + completed(4, len(TEXT))
ALL = [[1, "turn.started", ""], [2, "turn.delta", TEXT[:9]], [3, "turn.delta", TEXT[9:]], [4, "turn.completed", ""]]
SEEN_ALL = {"events": ALL, "text": TEXT, "end": "turn.completed", "turn_id": TURN, "session_id": "me"}


def after(body: bytes, seq: int) -> bytes:
    """The frames after this one."""
    frames = body.removeprefix(RETRY).split(b"\n\n")[:-1]
    return RETRY + b"".join(it + b"\n\n" for it in frames if int(it.split(b"\n")[0][4:]) > seq)


# What a server does


def answers(*pieces: bytes, status: int = 200, headers: Mapping[str, str] = WHERE, whole: bool = True) -> Act:
    """Stream these pieces; if not ``whole``, cut the connection before the end of the answer."""

    async def act(exchange: Exchange) -> None:
        connection = exchange.connection
        await connection.send_head(status, dict(headers))
        for piece in pieces:
            await connection.send_body(piece)
        if whole:
            await connection.end_body()

    return act


# A browser, and a reset, may drop what came shortly before a cut, and the client asks for it again: where a scenario
# looks at what the client saw by then, the answer ends without its last event instead.
def cut(*pieces: bytes, headers: Mapping[str, str] = WHERE) -> Act:
    return answers(*pieces, headers=headers, whole=False)


async def no_answer(exchange: Exchange) -> None:
    """Close the connection without an answer."""


async def resets(exchange: Exchange) -> None:
    """Reset the connection in mid-stream."""
    await cut(RETRY + STARTED + delta(2, TEXT[:9]))(exchange)
    exchange.connection.reset_when_closed()


def hangs(*pieces: bytes) -> Act:
    """Stream these pieces, and be silent then."""

    async def act(exchange: Exchange) -> None:
        await cut(*pieces)(exchange)
        await exchange.connection.wait_closed()
        exchange.closed.set()

    return act


async def hangs_before_the_head(exchange: Exchange) -> None:
    await exchange.connection.wait_closed()


async def is_silent_after_a_post(exchange: Exchange) -> None:
    await (hangs(RETRY + STARTED) if exchange.request.method == "POST" else replays(WHOLE))(exchange)


async def beats(exchange: Exchange) -> None:
    """Be without an event for longer than the client allows silence, but not silent."""
    await cut(RETRY + STARTED)(exchange)
    for _ in range(36):
        await trio.sleep(0.2)
        await exchange.connection.send_body(b": heartbeat\n")
    await exchange.connection.send_body(after(WHOLE, 1))
    await exchange.connection.end_body()


async def sends_while_the_client_is_held_up(exchange: Exchange) -> None:
    await cut(RETRY + STARTED)(exchange)
    await trio.sleep(0.5)
    await exchange.connection.send_body(after(WHOLE, 1))
    await exchange.connection.end_body()


def replays(body: bytes) -> Act:
    """Answer the events after ``Last-Event-ID``, to the end."""

    async def act(exchange: Exchange) -> None:
        seq = int(exchange.request.headers.get("last-event-id", "0"))
        await answers(after(body, seq))(exchange)

    return act


async def cuts_where_the_message_says(exchange: Exchange) -> None:
    """Cut the answer to a POST after as many bytes as its message says; a GET is answered in full."""
    if exchange.request.method == "POST":
        await cut(WHOLE[: int(str(exchange.request.json["input"]))])(exchange)
    else:
        await replays(WHOLE)(exchange)


def refuses(status: int, code: str, headers: Mapping[str, str] | None = None, **fields: Any) -> Act:
    problem = {"type": f"/docs#{code}", "title": "No", "status": status, "code": code, "detail": "It is not to be."}

    async def act(exchange: Exchange) -> None:
        own = {"connection": "close", "x-request-id": "req-of-the-server", "content-type": "application/problem+json"}
        await exchange.connection.send_response(status, problem | fields, own | dict(headers or {}))

    return act


def page_of_a_proxy(status: int) -> Act:
    async def act(exchange: Exchange) -> None:
        headers = {"content-type": "text/html", "connection": "close", "location": "http://127.0.0.1:1/elsewhere"}
        await exchange.connection.send_response(status, b"<html>One moment please", headers)

    return act


def says(body: object, status: int = 200) -> Act:
    async def act(exchange: Exchange) -> None:
        await exchange.connection.send_response(status, body, {"connection": "close"})

    return act


def ended(text: str, state: str = "interrupted", reason: str | None = "crash") -> dict[str, Any]:
    """The record of a turn."""
    where = {"id": TURN, "session_id": "me", "parent": None, "ended_at": "2026-01-31T09:30:01Z"}
    how = {"state": state, "reason": reason, "error": None, "finish_reason": None, "usage": None}
    return {**where, **how, "input": "Hi", "text": text}


def bytes_of_every_form() -> list[bytes]:
    """A stream in every form that the format allows, a byte in each chunk."""
    body = b"\xef\xbb\xbf: a comment\r\nretry: 10\r\n\r\nid: 1\r\n" + STARTED.split(b"\n", 1)[1].replace(b"\n", b"\r\n")
    body = body.replace(b"\r\n\r\n", b"\r\n\n")
    body += b'data: \rdata:{"type":"turn.delta",\rdata: "seq":2,\r\ndata:"text":' + json.dumps(TEXT).encode() + b"}\r\r"
    body += b"event: message\nnonsense\n:\ndata\n" + delta(3, "\u2028\x85 |").replace(b"id: 3\n", b"id: 3\r")
    body += b": heartbeat\n" + completed(4)
    return [body[place : place + 1] for place in range(len(body))]


_EMOJI_AT = WHOLE.index("\N{GRINNING FACE}".encode())
PLACES = sorted(
    {*range(0, len(WHOLE), 11), *range(_EMOJI_AT - 1, _EMOJI_AT + 9), *range(len(WHOLE) - 4, len(WHOLE) + 1)}
)
"""Where an answer is cut: all over, in each byte of two characters, and around the last line ends."""
SEND: Step = {"do": "stream", "args": ["me", "Hi"]}
COME_BACK = f"GET /sessions/me/turns/{TURN}/events"
POST = "POST /sessions/me/turns"
LOOK = f"GET /sessions/me/turns/{TURN}?wait=30"
LONG = "x" * 3_000_000
EMOJI = "a\N{GRINNING FACE}b"

SCENARIOS: dict[str, Scenario] = {
    "a whole stream is read once": Scenario([answers(WHOLE)], [SEND], [SEEN_ALL | {"waits": []}], [POST]),
    "a stream of any form in chunks of one byte": Scenario(
        [answers(*bytes_of_every_form())],
        [{**SEND, "split": True}],
        [{"end": "turn.completed", "text": TEXT + "\u2028\x85 |"}],
        [POST],
    ),
    "a cut at any byte loses nothing and doubles nothing": Scenario(
        [cuts_where_the_message_says],
        [{"do": "stream", "args": ["me", str(place)]} for place in PLACES],
        [SEEN_ALL] * len(PLACES),
    ),
    "a reset in mid-stream is resumed": Scenario([resets, replays(WHOLE)], [SEND], [SEEN_ALL]),
    "a stream that is silent for too long is given up and resumed": Scenario(
        [is_silent_after_a_post],
        [SEND],
        [SEEN_ALL | {"wait_kinds": {"timeout"}}],
        headers={-1: {"last-event-id": "1"}},  # of the last request; a POST may have been given up, too
        bounds={"silence_s": 2},
    ),
    "a call that is not answered is given up and repeated": Scenario(
        [hangs_before_the_head, says(ended("Hi"))],
        [{"do": "get_turn", "args": ["me", TURN]}],
        [{"value": ended("Hi")}],
        bounds={"timeout_s": 2},
    ),
    "a send without an answer is repeated with its key": Scenario(
        [no_answer, no_answer, answers(WHOLE)],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["unreachable", "unreachable"]}],
        [POST, POST, POST],
        same=["idempotency-key"],
    ),
    "each send has a key of its own": Scenario(
        [answers(WHOLE)], [SEND, SEND], [SEEN_ALL] * 2, differ=["idempotency-key"]
    ),
    "a send whose answer ends before its first event is resumed at its turn": Scenario(
        [answers(), replays(WHOLE)], [SEND], [SEEN_ALL], [POST, COME_BACK]
    ),
    "without Location the first event says which turn it is": Scenario(
        [answers(RETRY + STARTED, headers={}), replays(WHOLE)], [SEND], [SEEN_ALL], [POST, COME_BACK]
    ),
    "503 with Retry-After is waited for and repeated with its key": Scenario(
        [refuses(503, "shutting_down", {"retry-after": "1"}), answers(WHOLE)],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["shutting_down"], "waits_at_least": 1}],
        [POST, POST],
        same=["idempotency-key"],
    ),
    "Retry-After may be a date": Scenario(
        [refuses(503, "unknown", {"retry-after": formatdate(4_000_000_000, usegmt=True)})],
        [SEND],
        [{"error": {"status": 503, "code": "unknown"}, "retry_after_at_least": 1_000_000}],
        [POST],
    ),
    "a limit with Retry-After is waited for": Scenario(
        [
            refuses(429, "queue_full", {"retry-after": "0"}),
            refuses(503, "turn_limit", {"retry-after": "0"}),
            answers(WHOLE),
        ],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["queue_full", "turn_limit"]}],
    ),
    "a turn that hangs elsewhere is looked for at its Location": Scenario(
        [refuses(504, "owner_hangs", WHERE, turn_id=TURN), replays(WHOLE)], [SEND], [SEEN_ALL], [POST, COME_BACK]
    ),
    "a turn that moved while it began is looked for at its Location": Scenario(
        [refuses(503, "moved", WHERE | {"retry-after": "0"}), says(ended("Hi"))],
        [{"do": "start_turn", "args": ["me", "Hi"]}],
        [{"value": ended("Hi")}],
        [POST, f"GET /sessions/me/turns/{TURN}"],
    ),
    "a refusal is an error with all that it says": Scenario(
        [refuses(409, "turn_in_progress", turn_id=TURN)],
        [SEND],
        [
            {
                "error": {"status": 409, "code": "turn_in_progress", "title": "No", "detail": "It is not to be."}
                | {"request_id": "req-of-the-server", "turn_id": TURN, "retry_after_s": None},
                "waits": [],
            }
        ],
        [POST],
    ),
    "lost events are replaced by the record of the turn": Scenario(
        [answers(RETRY + STARTED + delta(2, "gone")), refuses(410, "events_lost"), says(ended("kept"))],
        [SEND],
        [
            {
                "events": [*[[1, "turn.started", ""], [2, "turn.delta", "gone"]], [None, "turn.interrupted", "kept"]],
                "text": "kept",
                "end": "turn.interrupted",
            }
        ],
        [POST, COME_BACK, LOOK],
    ),
    "deleted events are replaced by the record of the turn, once it has ended": Scenario(
        [refuses(410, "events_deleted"), says(ended("…") | {"ended_at": None}), says(ended("kept", "completed", None))],
        [{"do": "events", "args": ["me", TURN], "options": {"after": 3, "text": "old"}}],
        [{"events": [[None, "turn.completed", "kept"]], "text": "kept"}],
        [COME_BACK, LOOK, LOOK],
        headers={0: {"last-event-id": "3"}},
    ),
    "204 ends a stream whose events were all seen": Scenario(
        [answers(status=204, headers={"connection": "close", "content-type": "x/y"})],
        [{"do": "events", "args": ["me", TURN], "options": {"after": 4, "text": TEXT}}],
        [{"events": [], "text": TEXT, "end": None, "waits": []}],
        [COME_BACK],
    ),
    "a session that is gone ends a stream": Scenario(
        [answers(RETRY + STARTED), refuses(404, "session_not_found")],
        [SEND],
        [{"events": ALL[:1], "error": {"status": 404, "code": "session_not_found"}}],
        [POST, COME_BACK],
    ),
    "events that come again are yielded once": Scenario(
        [answers(RETRY + STARTED + delta(2, TEXT[:9])), answers(WHOLE)], [SEND], [SEEN_ALL], [POST, COME_BACK]
    ),
    "a clean end without a last event is resumed after the pause that the stream asks for": Scenario(
        [answers(RETRY + STARTED), replays(WHOLE)],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["cut"], "waits_at_most": 0.01}],
        [POST, COME_BACK],
    ),
    "a stream that asks for no pause is asked again with one": Scenario(
        [answers(b"retry: 0\n" + STARTED + delta(2, TEXT[:9])), replays(WHOLE)],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["cut"], "waits_at_least": BOUNDS["pause_s"] / 2}],
    ),
    "a turn that moved is resumed at once, and its text begins again where it says": Scenario(
        [
            answers(RETRY + STARTED + delta(2, EMOJI) + b": moved\n"),
            answers(RETRY + frame(9, "turn.resumed", attempt=2, mode="continue", text_length=2) + b": mov", b"ed"),
            answers(RETRY + delta(10, "c") + completed(11, 3)),
        ],
        [SEND],
        [{"text": EMOJI[:2] + "c", "end": "turn.completed", "waits": []}],
        [POST, COME_BACK, COME_BACK],
        headers={1: {"last-event-id": "2"}, 2: {"last-event-id": "9"}},
    ),
    "the end after a crash says how much of the text is kept": Scenario(
        [
            answers(
                RETRY + STARTED + delta(2, EMOJI) + frame(1 << 30, "turn.interrupted", reason="crash", text_length=2)
            )
        ],
        [SEND],
        [{"text": EMOJI[:2], "end": "turn.interrupted", "waits": []}],
        [POST],
    ),
    "a turn that moves again and again without an event is not asked for without a pause": Scenario(
        [answers(RETRY + STARTED + b": moved\n"), answers(b": moved\n"), answers(b": moved\n"), replays(WHOLE)],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["cut", "cut"]}],
    ),
    "a heartbeat after the hand-over takes it back": Scenario(
        [answers(RETRY + STARTED + b": moved\n: heartbeat\n"), replays(WHOLE)],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["cut"]}],
    ),
    "events of types that are not known are passed on": Scenario(
        [answers(RETRY + STARTED + frame(2, "turn.dreamed", colour="blue") + completed(3))],
        [SEND],
        [{"events": [[1, "turn.started", ""], [2, "turn.dreamed", ""], [3, "turn.completed", ""]]}],
    ),
    "a page of a proxy in place of a stream is passed over once there were events": Scenario(
        [answers(RETRY + STARTED), page_of_a_proxy(200), page_of_a_proxy(502), replays(WHOLE)],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["cut", "malformed_answer", "unknown"]}],
    ),
    "another server is told from this one at once": Scenario(
        [page_of_a_proxy(200)], [SEND], [{"error": {"status": 200, "code": "malformed_answer"}, "waits": []}]
    ),
    "an answer that is no JSON is an error": Scenario(
        [page_of_a_proxy(200)],
        [{"do": "get_session", "args": ["me"]}],
        [{"error": {"status": 200, "code": "malformed_answer"}}],
    ),
    "a redirect is an error": Scenario(
        [page_of_a_proxy(302)], [{"do": "get_session", "args": ["me"]}], [{"error": {"code": "redirected"}}]
    ),
    "patience ends": Scenario(
        [page_of_a_proxy(502)],
        [SEND, {"do": "get_session", "args": ["me"]}],
        [{"error": {"status": 502, "code": "unknown"}}] * 2,
        bounds={"patience_s": 0.1},
    ),
    "a wait that is longer than the patience is not begun": Scenario(
        [refuses(503, "shutting_down", {"retry-after": "3600"})],
        [{"do": "get_session", "args": ["me"]}],
        [{"error": {"status": 503, "code": "shutting_down", "retry_after_s": 3600}, "waits": []}],
        ["GET /sessions/me"],
    ),
    "an event that is no JSON is asked for again": Scenario(
        [answers(RETRY + STARTED + b"data: {oops\n\n" + after(WHOLE, 1)), replays(WHOLE)],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["cut"]}],
        [POST, COME_BACK],
    ),
    "bytes that are no UTF-8 are asked for again": Scenario(
        [answers(RETRY + STARTED + b'data: {"type":"turn.delta","seq":2,"text":"\xff"}\n\n'), replays(WHOLE)],
        [SEND],
        [SEEN_ALL | {"wait_codes": ["cut"]}],
    ),
    "a huge event is read": Scenario(
        [answers(RETRY + STARTED, *(it for it in [delta(2, LONG)]), completed(3, len(LONG)))],
        [SEND],
        [{"text_length": len(LONG), "end": "turn.completed"}],
    ),
    "an event beyond the bound is an error": Scenario(
        [answers(RETRY + STARTED, *([b": heartbeat\n" * 20_000] * 3), b"data: " + b"x" * 150_000, b"x" * 150_000)],
        [SEND],
        [{"events": ALL[:1], "error": {"code": "event_too_large"}}],
        [POST],
        bounds={"event_bytes_max": 200_000},
    ),
    "a deletion without an answer that finds nothing the second time is done": Scenario(
        [no_answer, refuses(404, "session_not_found")],
        [{"do": "delete_session", "args": ["me"]}, {"do": "delete_session", "args": ["me"]}],
        [{"value": None}, {"error": {"status": 404, "code": "session_not_found"}}],
    ),
    "a change with a condition is not repeated if it may have been done": Scenario(
        [no_answer],
        [
            {"do": "rename_session", "args": ["me", "Title"], "options": {"if_match": '"1"'}},
            {"do": "switch_to", "args": ["me", TURN], "options": {"seen_head": TURN}},
        ],
        [{"error": {"code": "unreachable"}, "waits": []}] * 2,
        ["PATCH /sessions/me"] * 2,
        headers={0: {"if-match": '"1"'}},
    ),
    "a change with a condition is repeated if it was refused for a moment": Scenario(
        [refuses(503, "not_ready", {"retry-after": "0"}), says({"id": "me"})],
        [{"do": "rename_session", "args": ["me", "Title"], "options": {"if_match": '"1"'}}],
        [{"value": {"id": "me"}}],
    ),
    "a change without a condition is repeated": Scenario(
        [no_answer, says({"id": "me"})],
        [{"do": "rename_session", "args": ["me", "Title"]}],
        [{"value": {"id": "me"}}],
    ),
    "a cancel that takes long is repeated": Scenario(
        [refuses(503, "turn_ending", WHERE | {"retry-after": "0"}), says(ended("kept", "cancelled", "requested"))],
        [{"do": "cancel", "args": ["me", TURN]}],
        [{"value": ended("kept", "cancelled", "requested")}],
        [f"POST /sessions/me/turns/{TURN}/cancel"] * 2,
    ),
    "a list is read to its last page, also over an empty one": Scenario(
        [
            says({"data": [{"id": "a"}], "next": "1/?&", "partial": False}),
            says({"data": [], "next": "2", "partial": True}),
            says({"data": [{"id": "b"}], "next": None, "partial": False}),
        ],
        [{"do": "search", "args": ["what & where?"], "options": {"metadata": {"team": "blue"}}}],
        [{"value": [{"id": "a"}, {"id": "b"}]}],
    ),
    "a prefix in the address stays, and that of Location does not matter": Scenario(
        [answers(RETRY, headers=WHERE | {"location": f"https://inside/x/sessions/a%2Bb/turns/{TURN}"}), replays(WHOLE)],
        [{"do": "chat", "args": ["Hi"]}],
        [SEEN_ALL | {"session_id": "a+b"}],
        ["POST /ai/chat", f"GET /ai/sessions/a%2Bb/turns/{TURN}/events"],
        prefix="/ai/",
    ),
    "a key, an owner and the id of the request are sent": Scenario(
        [answers(WHOLE)],
        [{"do": "stream", "args": ["me", "Hi"], "options": {"request_id": "mine", "idempotency_key": "k1"}}],
        [SEEN_ALL],
        headers={
            0: {"authorization": "Bearer sesame", "lastcall-owner": "ann", "x-request-id": "mine"}
            | {"idempotency-key": "k1", "accept": "text/event-stream", "content-type": "application/json"}
        },
        options={"api_key": "sesame", "owner": "ann"},
    ),
    "a stream that is left is closed": Scenario(
        [hangs(WHOLE[:-20])], [{**SEND, "leave_after": 2}], [{"events": ALL[:2], "text": TEXT[:9]}], [POST]
    ),
    "a stream that was left goes on in another loop": Scenario(
        [hangs(WHOLE[:-20]), replays(WHOLE)], [{**SEND, "leave_after": 2, "go_on": True}], [SEEN_ALL], [POST, COME_BACK]
    ),
    "a stream whose reader is cancelled is closed": Scenario(
        [hangs(RETRY + STARTED)], [{**SEND, "abort_after": 1}], [{"events": ALL[:1], "aborted": True}], [POST]
    ),
    "a reader that is cancelled in a pause makes no other attempt": Scenario(
        [refuses(503, "shutting_down", {"retry-after": "5"})],
        [{**SEND, "abort_on_wait": True}],
        [{"events": [], "aborted": True}],
        [POST],
    ),
    "an id that a URL cannot have is refused": Scenario(
        [no_answer],
        [{"do": "get_session", "args": [it]} for it in ("", ".", "..")],
        [{"refused": True}] * 3,
        [],
    ),
}


OF_PAGES = {
    "access-control-allow-origin": "*",
    "access-control-expose-headers": "Location, Retry-After, X-Request-ID",
    "access-control-allow-methods": "GET, POST, PATCH, DELETE",
    "access-control-allow-headers": "Authorization, Content-Type, Idempotency-Key, If-Match, Last-Event-ID, "
    "Lastcall-Owner, X-Request-ID",
}
"""What the service sends to the pages of ``cors_origins``."""


HEARTBEATS = Scenario([beats], [SEND], [SEEN_ALL | {"waits": []}], [POST], bounds={"silence_s": 6})
"""Apart from the others: while they run at the same time, a heartbeat may come late."""


async def serve_scenario(scenario: Scenario, connection: Connection, seen: list[Exchange]) -> None:
    """Answer the one request of a connection as the scenario says. What a browser asks before it does not count."""
    connection.always = OF_PAGES
    async with AsyncExitStack() as stack:
        request = await connection.receive_request()
        if request.method == "OPTIONS":
            # On a connection that is used again the browser itself would repeat a request that gets no answer.
            await connection.send_response(200, b"", {"connection": "close"})
            return
        exchange = Exchange(connection, request, trio.Event())
        stack.callback(exchange.closed.set)
        seen.append(exchange)
        await scenario.acts[min(len(seen), len(scenario.acts)) - 1](exchange)
