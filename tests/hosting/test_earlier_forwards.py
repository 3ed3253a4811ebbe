"""Processes of this version and of an earlier one pass requests on to each other.

``tests/cluster/fixtures/forwards_N.json`` has the bytes of requests and answers between two processes of a version,
with ``{turn}`` in place of the turn's id. The first file is of the last version whose store had schema 1; ``just
freeze`` has written the others (:mod:`tests.cluster.freeze`). The proof that comes before is written here as it was in
the first one. None of this ever changes.
"""

import hmac
import json
import re
import secrets
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import h11
import pytest
import trio

from service.cluster.peer_address import PeerAddress
from service.cluster.peer_socket import socket_name
from tests.api.http.test_proxy import TURN, open_owner
from tests.api.inprocess import Reply
from tests.cluster.freeze import FIXTURES, requests_now, shape
from tests.hosting.hosts import KEYED, SERVE, open_host

FORWARDS: dict[int, dict[str, dict[str, str]]] = {
    int(path.stem.rpartition("_")[2]): json.loads(path.read_text()) for path in sorted(FIXTURES.glob("forwards_*.json"))
}
CAP_S = 30
NEW_SESSION = (
    b"POST /sessions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 10\r\n"
    b'connection: close\r\n\r\n{"id":"s"}'
)
TURN_ID = re.compile(r"turn_[0-9a-f]{32}")
_PASSED_ON = ("accept", "last-event-id", "idempotency-key", "content-type")


class Answer(NamedTuple):
    """What a client sees of an answer. ``accepted``: the turns that it named before its head."""

    status: int
    media_type: str
    accepted: list[str]
    body: str


def answer_of(data: bytes, *, turn: str) -> Answer:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    connection.receive_data(b"")
    accepted: list[str] = []
    head, body = None, b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Event), "the answer is not whole"
        if isinstance(event, h11.InformationalResponse):
            accepted += [value.decode() for name, value in event.headers if name == b"location"]
        elif isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
    assert head is not None
    media_type = dict(head.headers).get(b"content-type", b"").decode()
    return Answer(
        head.status_code,
        media_type,
        [it.replace(turn, "{turn}") for it in accepted],
        body.decode().replace(turn, "{turn}"),
    )


def frozen(number: int, name: str, part: str, turn: str, *, instance: str = "", fence: int = 0) -> bytes:
    text = FORWARDS[number][name][part].replace("{turn}", turn)
    return text.replace("{instance}", instance).replace("{fence}", str(fence)).encode("latin-1")


def digest(secret: bytes, role: bytes, address: str, of_peer: bytes, of_owner: bytes) -> bytes:
    return hmac.digest(secret, b"\0".join((role, address.encode(), of_peer + of_owner)), "sha256")


async def receive(stream: trio.SocketStream, length: int) -> bytes:
    received = b""
    while len(received) < length:
        more = await stream.receive_some(length - len(received))
        assert more, "the other end has closed"
        received += more
    return received


async def ask(address: str, secret: bytes, request: bytes) -> bytes:
    """Pass a request on as the earlier version did. Returns all bytes of the answer."""
    async with await trio.open_unix_socket(socket_name(address)) as stream:
        ours = secrets.token_bytes(32)
        await stream.send_all(ours)
        theirs = await receive(stream, 32)
        assert await receive(stream, 32) == digest(secret, b"owner", address, ours, theirs)
        await stream.send_all(digest(secret, b"peer", address, ours, theirs) + request)
        answer = b""
        while more := await stream.receive_some():
            answer += more
        return answer


async def test_what_this_version_sends_is_written_down(tmp_path: Path) -> None:
    """Fails when what processes send each other has changed: then ``just freeze`` writes another file.

    The files before stay, so that this version and those before go on to understand each other. A file that no release
    has may be written anew instead: ``python -m tests.cluster.freeze N``.
    """
    sent = await requests_now(tmp_path)
    kept = FORWARDS[max(FORWARDS)]
    assert {name: shape(request) for name, request in sent.items()} == {
        name: shape(parts["request"]) for name, parts in kept.items()
    }


@pytest.mark.parametrize("number", FORWARDS)
async def test_requests_of_an_earlier_version_are_answered_as_it_answered_them(number: int, tmp_path: Path) -> None:
    path = tmp_path / "lastcall.db"
    settings = KEYED | {"model_url": "scripted:?tokens=2&rate=20&first_token_s=0"}
    async with open_host(tmp_path, SERVE, store_url=f"sqlite:{path}", **settings) as server:
        with closing(sqlite3.connect(path)) as db:
            fence, address = db.execute("SELECT fence, address FROM owners").fetchone()
        instance = PeerAddress.parse(address).instance
        secret = path.with_name("lastcall.db-owners").read_bytes()  # noqa: ASYNC240
        turn = ""
        with trio.fail_after(CAP_S):
            await ask(address, secret, NEW_SESSION)
            for name in FORWARDS[number]:
                request = frozen(number, name, "request", turn, instance=instance, fence=fence)
                data = await ask(address, secret, request)
                turn = turn or TURN_ID.findall(data.decode())[0]
                check_alike(
                    answer_of(data, turn=turn), answer_of(frozen(number, name, "answer", TURN), turn=TURN), name
                )
        assert "Traceback" not in server.log()


def check_alike(found: Answer, expected: Answer, name: str) -> None:
    assert found[:3] == expected[:3], name
    match expected.media_type:
        case "text/event-stream":
            assert events_in(found.body) == events_in(expected.body), name
        case "application/json":
            got, wanted = json.loads(found.body), json.loads(expected.body)
            assert wanted.keys() <= got.keys(), name
            for field in {"session_id", "state", "input", "text", "usage"} & wanted.keys():
                assert got[field] == wanted[field], f"{name}: {field}"
        case _:
            assert found.body == expected.body == "", name


def events_in(body: str) -> list[dict[str, Any]]:
    """The events of a stream, without what differs from run to run. A later version may add fields."""
    events = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]
    kept = ("type", "seq", "text", "turn_id", "session_id", "text_length")
    return [{name: event[name] for name in kept if name in event} for event in events]


class EarlierOwner:
    """Answers the request of a process of this version with the bytes of an earlier one."""

    def __init__(self, secret: bytes, address: str, listener: trio.socket.SocketType) -> None:
        self._secret = secret
        self._address = address
        self._listener = listener

    async def answer(self, data: bytes) -> None:
        while True:
            accepted, _ = await self._listener.accept()
            async with trio.SocketStream(accepted) as stream:
                if not await self._is_request(stream):
                    continue
                request = b""
                while not _is_whole(request):
                    more = await stream.receive_some()
                    assert more
                    request += more
                await stream.send_all(data)
                return

    async def _is_request(self, stream: trio.SocketStream) -> bool:
        theirs, ours = await receive(stream, 32), secrets.token_bytes(32)
        await stream.send_all(ours + digest(self._secret, b"owner", self._address, theirs, ours))
        proof = await receive(stream, 32)
        assert proof in {digest(self._secret, role, self._address, theirs, ours) for role in (b"peer", b"beats")}
        return proof == digest(self._secret, b"peer", self._address, theirs, ours)


def _is_whole(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    return bool(end) and len(body) >= int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])


@pytest.mark.parametrize(("number", "name"), [(number, name) for number, of_it in FORWARDS.items() for name in of_it])
async def test_answers_of_an_earlier_version_reach_the_client(number: int, name: str, tmp_path: Path) -> None:
    head, _, body = frozen(number, name, "request", TURN).decode("latin-1").partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    method, target, _ = first.split(" ")
    headers = dict(_named(lines))
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []

        async def call() -> None:
            raw = body.encode("latin-1") or None
            replies.append(await api.call(method, target, raw=raw, headers=headers))

        nursery.start_soon(call)
        earlier = EarlierOwner(owner.store.peer_secret, owner.address, owner.listener)
        await earlier.answer(frozen(number, name, "answer", TURN))
    expected = answer_of(frozen(number, name, "answer", TURN), turn=TURN)
    assert replies[0].status == expected.status
    assert replies[0].headers.get("content-type", "") == expected.media_type
    assert replies[0].body.decode().replace(TURN, "{turn}") == expected.body


def _named(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    for line in lines:
        name, _, value = line.partition(": ")
        if name in _PASSED_ON:
            yield name, value
