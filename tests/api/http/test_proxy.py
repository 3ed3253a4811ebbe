"""Requests that another process has to answer. The owner is a script here, with a socket and a row in the store.

It is in the same place as the application, or in another one, which is reached with TLS (``both_ways``).
"""

import errno
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from quart_trio.testing import connections
from quart_trio.wrappers import TrioResponse
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api import app
from service.api.http import proxy
from service.api.http.app_state import held_bytes_of
from service.api.http.proxy import PEER, SUCCESSORS, FaceStream, split_whole
from service.api.native import turns
from service.api.openai.response_events import CUT
from service.cluster import owner_beats, peer_proof, peer_tls, peer_transport
from service.cluster.peer_address import PeerAddress
from service.cluster.peer_certificates import PeerCertificates
from service.cluster.peer_proof import Purpose, check_peer
from service.cluster.peer_socket import socket_name
from service.cluster.peer_tls import TlsStream
from service.cluster.peer_transport import PeerStream, PeerTransport
from service.errors import OwnedElsewhereError, PeerUntrustedError, StoreError, TurnNotFoundError
from service.hosting.peer_listener import client_returns
from service.models.scripted import Script, ScriptedClient
from service.sessions.events.events import Event
from service.sessions.events.replay import Replay
from service.steps import at_once
from service.stop_state import Phase
from service.storage.records import SEQ_AFTER_CRASH, EndResult, TurnRecord
from service.storage.sqlite import SqliteStore, open_sqlite_store
from service.telemetry.metrics.families import STREAMS
from tests.api.counting_face import CountingFace
from tests.api.inprocess import SSE, Api, Reply, leave, open_api
from tests.cluster.certificates import peer_certificates
from tests.descriptors import no_descriptor_left
from tests.storage.rows import T0, a_session, a_turn, ended
from tests.storage.test_store_owners import a_checkpoint

TURN = "turn_" + 32 * "a"
EVENTS = f"/sessions/s/turns/{TURN}/events"
HEAD = b"HTTP/1.1 200 \r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
CAP_S = 60


def chunk(data: str) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data.encode())


def frame(seq: int) -> str:
    return f'id: {seq}\ndata: {{"type":"turn.delta","seq":{seq},"text":"x"}}\n\n'


def answer(body: str, status: int = 200) -> bytes:
    head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nserver: x\r\n\r\n"
    return head.encode() + body.encode()


Way = Literal["unix", "tls"]
WAY: Way = "unix"
both_ways = pytest.mark.parametrize("way", ["unix", "tls"], indirect=True)


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the owner is reached."""
    monkeypatch.setattr(sys.modules[__name__], "WAY", getattr(request, "param", "unix"))


class Owner:
    """The other process: it runs a turn of session ``s``, and sends the answers that a test writes."""

    def __init__(
        self,
        store: SqliteStore,
        listener: trio.socket.SocketType,
        address: str,
        certificates: PeerCertificates | None = None,
        *,
        patch: pytest.MonkeyPatch,
    ) -> None:
        self.store = store
        self.address = address
        self.listener = listener
        self.accepted: list[trio.socket.SocketType] = []
        self.certificates = certificates
        self._patch = patch

    async def take_connection(self) -> tuple[PeerStream, Purpose]:
        """The next connection, and what it is for."""
        accepted, _ = await self.listener.accept()
        self.accepted.append(accepted)
        stream: PeerStream = trio.SocketStream(accepted)
        if self.certificates is not None:
            stream = TlsStream(accepted, self.certificates.server)
        purpose = await check_peer(stream, self.store.peer_secret, address=self.address)
        assert purpose is not None
        return stream, purpose

    async def take(self) -> tuple[PeerStream, bytes]:
        """The next request. A connection for beats in front of the request is closed, as an earlier version does."""
        stream, purpose = await self.take_connection()
        while purpose == "beats":
            await stream.aclose()
            stream, purpose = await self.take_connection()
        head, _, body = (await stream.receive_some()).partition(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(body) < length:
            body += await stream.receive_some()
        return stream, head + b"\r\n\r\n" + body

    async def die(self, stream: PeerStream | None = None) -> None:
        """Die as a process does: the connections close first, and the lock is free a moment later."""
        self.may_take_long_to_die()
        self.listener.close()
        if stream is not None:
            stream.socket.close()
        await trio.sleep(0.05)
        await self.store.aclose()

    def may_take_long_to_die(self) -> None:
        """Let the application wait longer for the lock than any test takes: a busy machine closes a store slowly."""
        self._patch.setattr(proxy, "_DYING_S", CAP_S)


@asynccontextmanager
async def open_owner(
    folder: Path,
    *,
    backlog: int = 10,
    peers: PeerTransport | None = None,
    turn: TurnRecord | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[Api, Owner]]:
    """An application, and the owner of a turn on the same file.

    A drain of the application, and a proof between the two, take longer than any test.
    """
    path = folder / "lastcall.db"
    address = f"@test-{secrets.token_hex(8)}"
    certificates = peer_certificates(folder / "certificates") if WAY == "tls" else None
    family = socket.AF_UNIX if certificates is None else socket.AF_INET
    with trio.fail_after(CAP_S), trio.socket.socket(family) as listener, pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_proof, "_TIMEOUT_S", CAP_S)
        await listener.bind(socket_name(address) if certificates is None else ("127.0.0.1", 0))
        listener.listen(backlog)
        if certificates is not None:
            address = f"tls://127.0.0.1:{listener.getsockname()[1]}/lastcall-{32 * '0'}?place={16 * 'f'}"
        async with (
            open_sqlite_store(path, address=address, close_timeout_s=CAP_S) as store,
            open_api(
                peers=peers or PeerTransport(certificates),
                store_url=f"sqlite:{path}",
                **{"model_url": "scripted:?tokens=3&rate=0&first_token_s=0", "drain_timeout_s": CAP_S} | settings,
            ) as api,
        ):
            await store.create_session(a_session("s", idle_timeout_s=3600), now=T0)
            await store.begin_turn(turn or a_turn(TURN, "s"), now=T0)
            owner = Owner(store, listener, address, certificates, patch=patch)
            yield api, owner
            for accepted in owner.accepted:
                accepted.close()


def returns(stream: PeerStream) -> bool:
    """What the listener of an owner would say of the client behind a connection."""
    return stream.client_returns() if isinstance(stream, TlsStream) else client_returns(stream.socket)


async def ask(api: Api, replies: list[Reply], method: str, path: str, body: object = None, **more: object) -> None:
    replies.append(await api.call(method, path, body, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("secret", [b"another" * 5, None])
async def test_a_process_that_listens_in_an_owners_place_learns_nothing(secret: bytes | None, tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        accepted, _ = await owner.listener.accept()
        async with trio.SocketStream(accepted) as stream:
            if secret is not None:
                assert not await check_peer(stream, secret, address=owner.address)
                assert await stream.receive_some() == b""
        await wait_for(replies)
        replies[0].problem(503, "store_unavailable")
        assert replies[0].headers["retry-after"] == "1", "it was not asked"
        assert (await owner.store.get_turn("s", TURN, now=datetime.now(UTC))).is_open


async def test_an_owners_proof_is_no_other_owners(tmp_path: Path) -> None:
    """A process that took the address of a dead owner passes the requests on to a living owner."""
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        accepted, _ = await owner.listener.accept()
        ours, theirs = trio.socket.socketpair()
        async with trio.SocketStream(accepted) as client, trio.SocketStream(ours) as between:
            living = trio.SocketStream(theirs)
            nursery.start_soon(partial(check_peer, living, owner.store.peer_secret, address="@another"))
            await between.send_all(await client.receive_some())
            await client.send_all(await between.receive_some())
            assert await client.receive_some() == b""
        await wait_for(replies)
        replies[0].problem(503, "store_unavailable")
        await living.aclose()


@both_ways
async def test_a_request_and_its_answer_are_passed_on_unchanged(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        headers = {"Last-Event-ID": "4", "Lastcall-Hops": "3", "Connection": "keep-alive", "Authorization": "Bearer x"}
        headers["X-Request-ID"] = "of-the-caller"
        nursery.start_soon(lambda: ask(api, replies, "GET", f"{EVENTS}?after=2", headers=headers))
        stream, request = await owner.take()
        head = request.decode().lower()
        assert head.startswith(f"get {EVENTS}?after=2 http/1.1\r\n")
        assert "last-event-id: 4\r\n" in head
        assert "lastcall-hops: 1\r\n" in head, "a client's own id is kept"
        assert head.count("x-request-id: ") == head.count("x-request-id: of-the-caller\r\n") == 1
        assert head.count("connection:") == 1
        await stream.send_all(answer('{"a": 1}', 410))
        await wait_for(replies)
        assert (replies[0].status, replies[0].json) == (410, {"a": 1})
        assert replies[0].headers["x-request-id"] == "of-the-caller"
        assert "server" not in replies[0].headers

        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "é"}))
        stream, request = await owner.take()
        assert request.endswith(b'\r\n\r\n{"input": "\\u00e9"}')
        made = request.decode().partition("x-request-id: ")[2].partition("\r\n")[0]
        assert made.startswith("req_"), "an id that is made here is passed on, too"
        await stream.send_all(answer("{}", 409))
        await wait_for(replies, 2)
        assert (replies[1].status, replies[1].headers["x-request-id"]) == (409, made)


@both_ways
async def test_whole_events_and_comments_are_passed_on_at_once_and_a_dead_owners_stream_ends_from_the_store(
    tmp_path: Path,
) -> None:
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        first = frame(1)
        await stream.send_all(HEAD + chunk("retry: 1000\n: heartbeat\n" + first[:10]))
        assert await client.receive() == b"retry: 1000\n: heartbeat\n"
        await stream.send_all(chunk(first[10:] + frame(2) + ": heart"))
        assert await client.receive() == (first + frame(2)).encode()
        await stream.send_all(chunk("beat\n"))
        assert await client.receive() == b": heartbeat\n", "a whole event does not wait for the next one"
        await stream.send_all(chunk(": heartbeat\n" + frame(3)[:-1]) + b"5\r\nabc")  # in mid-chunk
        assert await client.receive() == b": heartbeat\n"
        await owner.die(stream)
        terminal = await client.receive()
        assert terminal.startswith(b'id: 1073741824\ndata: {"type":"turn.interrupted"')
        assert terminal.count(b"id: ") == 1
        assert await client.receive() == b"", "the end of the body"


async def test_a_stream_goes_on_here_with_the_turn_of_a_dead_owner(tmp_path: Path) -> None:
    turn = msgspec.structs.replace(a_turn(TURN, "s"), started_at=datetime.now(UTC), on_interrupt="retry")
    async with open_owner(tmp_path, turn=turn) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk(frame(1) + frame(2)))
        assert await client.receive() == (frame(1) + frame(2)).encode()
        await owner.die(stream)
        rest = b""
        while piece := await client.receive():
            rest += piece
    reply = Reply(200, {}, rest)
    assert [event["type"] for event in reply.events] == ["turn.resumed", *["turn.delta"] * 3, "turn.completed"]
    resumed = {"type": "turn.resumed", "seq": 2 * SEQ_AFTER_CRASH + 1, "attempt": 2, "mode": "retry", "text_length": 0}
    assert reply.events[0] == resumed
    assert api.service.sessions.statistics().streams_open == 0


async def test_the_client_of_a_stream_that_goes_on_here_is_the_turns_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn is cancelled when this client leaves after the time for its return."""
    turn = msgspec.structs.replace(a_turn(TURN, "s"), started_at=datetime.now(UTC), on_interrupt="retry")
    async with open_owner(tmp_path, turn=turn) as (api, owner):
        slow = ScriptedClient(Script(tokens=1000, rate=100, first_token_s=0))
        monkeypatch.setattr(api.service.sessions._acceptance.adoptions, "_client_for", lambda _: slow)
        async with api.open("GET", EVENTS, headers=SSE) as client:
            await client.send_complete()
            stream, _ = await owner.take()
            await stream.send_all(HEAD + chunk(frame(1)))
            assert await client.receive() == frame(1).encode()
            await owner.die(stream)
            while b"turn.delta" not in await client.receive():
                pass
            [adopted] = api.service.sessions.open_turns()
            adopted._return_deadline = trio.current_time()  # the time for the return is over now
            assert isinstance(client, connections.TestHTTPConnection)
            await leave(client)
            record = await adopted.wait_ended()
    assert (record.state, record.reason) == ("cancelled", "disconnected")


@given(st.lists(st.sampled_from(["retry: 1000\n", ": heartbeat\n", frame(1), frame(12)])), st.booleans(), st.data())
def test_whole_events_are_passed_on_with_any_cuts(parts: list[str], begun: bool, data: st.DataObject) -> None:
    end = frame(3)[:-1] if begun else ""
    text = "".join([*parts, end]).encode()
    passed = unsent = b""
    at = 0
    while at < len(text):
        size = data.draw(st.integers(1, len(text) - at))
        piece, unsent = split_whole(unsent + text[at : at + size])
        assert not piece or piece.endswith(b"\n")
        passed += piece
        at += size
    assert (passed, unsent) == ("".join(parts).encode(), end.encode())


@pytest.mark.parametrize(
    ("query", "headers"), [("?after=2", {}), ("?after=1", {"Last-Event-ID": "2"}), ("?after=2", {"Last-Event-ID": ""})]
)
async def test_a_stream_that_its_owner_never_began_goes_on_from_what_the_client_has_seen(
    query: str, headers: dict[str, str], tmp_path: Path
) -> None:
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS + query, headers=SSE | headers) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await owner.store.checkpoint_turns([a_checkpoint(TURN, "x", "x", "x")])
        await stream.send_all(HEAD + chunk("retry: 1000\n"))
        assert await client.receive() == b"retry: 1000\n"
        await owner.die(stream)
        assert (await client.receive()).startswith(frame(3).encode())


@both_ways
async def test_a_stream_of_a_dead_owner_goes_on_in_the_face_in_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(event: Event) -> bytes:
        return b"id: %d\ndata: another face\n\n" % event.seq

    monkeypatch.setattr(turns, "encode_frame", encode)
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk("id: 1\ndata: another face\n\n"))
        assert await client.receive() == b"id: 1\ndata: another face\n\n"
        await owner.die(stream)
        assert await client.receive() == b"id: 1073741824\ndata: another face\n\n"


@pytest.mark.parametrize(
    ("told", "rest"),
    [
        ("", "data: 0 begin\n\ndata: 1 open 0\n\ndata: 2 +\n\ndata: 3 +\n\n"),
        ("data: 0 begin\n\n", "data: 1 open 0\n\ndata: 2 +\n\ndata: 3 +\n\n"),
        (": heartbeat\n\ndata: 0 begin\n\ndata: 1 open 0\n\ndata: 2 +\n\n", "data: 3 +\n\n"),
    ],
)
async def test_a_stream_of_numbered_frames_goes_on_after_those_that_the_dead_owner_has_sent(
    told: str, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_turn(path: str) -> tuple[str, str]:
        assert path == f"/sessions/s/turns/{TURN}/events"
        return "s", TURN

    face = CountingFace()
    monkeypatch.setattr(turns, "encode_frame", FaceStream(lambda _: face, find_turn, end=face.end))
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await owner.store.checkpoint_turns([a_checkpoint(TURN, "x", "x")])
        await stream.send_all(HEAD + chunk(told or ": heartbeat\n\n"))
        assert await client.receive() == (told or ": heartbeat\n\n").encode()
        await owner.die(stream)
        end = SEQ_AFTER_CRASH
        closing = f"data: {end + 1} close 0\n\ndata: {end + 2} end\n\ndata: over\n\n"
        got = b""
        while piece := await client.receive():
            got += piece
        assert got == (rest + closing).encode()


async def test_a_stream_of_numbered_frames_that_has_ended_does_not_end_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_turn(_: str) -> tuple[str, str]:
        raise AssertionError("the stream is over")

    face = CountingFace()
    monkeypatch.setattr(turns, "encode_frame", FaceStream(lambda _: face, find_turn, end=face.end))
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk("data: 0 begin\n\ndata: over\n\n"))
        assert await client.receive() == b"data: 0 begin\n\ndata: over\n\n"
        await owner.die(stream)
        assert await client.receive() == b""


@pytest.mark.parametrize("dies", [True, False], ids=["the owner dies", "the owner ends its answer"])
@pytest.mark.parametrize(
    ("told", "rest"),
    [("data: 0 begin\n\n", b"data: cut\n\n"), ("data: over\n\n", b""), ("data: other end\n\n", b"")],
)
async def test_a_stream_that_nothing_can_go_on_with_tells_that_it_was_cut(
    told: str, rest: bytes, dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_turn(_: str) -> tuple[str, str]:
        raise TurnNotFoundError(TURN)

    ends = (b"data: over\n\n", b"other end\n\n")
    stream_face = FaceStream(lambda _: CountingFace(), find_turn, end=ends, cut=b"data: cut\n\n")
    monkeypatch.setattr(turns, "encode_frame", stream_face)
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk(told))
        assert await client.receive() == told.encode()
        if dies:
            await owner.die(stream)
        else:
            await stream.send_all(b"0\r\n\r\n")
        got = b""
        while piece := await client.receive():
            got += piece
        assert got == rest


@pytest.mark.parametrize("how", ["the owner ends its answer", "the owner dies", "the owner has told it"])
async def test_a_stream_of_a_response_that_was_cut_says_so_once(how: str, tmp_path: Path) -> None:
    path = f"/v1/responses/resp_{32 * 'a'}?stream=true"
    async with open_owner(tmp_path) as (api, owner), api.open("GET", path) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        told = b'data: {"type":"a","sequence_number":0}\n\n'
        if how == "the owner has told it":
            told += CUT
        await stream.send_all(HEAD + chunk(told.decode()))
        assert await client.receive() == told
        if how == "the owner dies":
            await owner.store.mark_deleted("s", now=T0)
            await owner.die(stream)
        else:
            await stream.send_all(b"0\r\n\r\n")
        got = b""
        while piece := await client.receive():
            got += piece
        assert got == (b"" if how == "the owner has told it" else CUT)


async def test_a_stream_of_a_response_whose_rest_cannot_be_read_says_that_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Replay, seq: int) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreError("It hangs.")

    path = f"/v1/responses/resp_{32 * 'a'}?stream=true"
    async with open_owner(tmp_path) as (api, owner), api.open("GET", path) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk(": heartbeat\n\n"))
        assert await client.receive() == b": heartbeat\n\n"
        monkeypatch.setattr(Replay, "load_after", fail)
        await owner.die(stream)
        got = b""
        while piece := await client.receive():
            got += piece
        assert got == CUT


@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
async def test_a_client_that_comes_back_by_post_goes_on_from_what_it_has_seen(prefix: str, tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner):
        headers = SSE | {"Last-Event-ID": "2", "Content-Type": "application/json"}
        client = api.open("POST", f"{prefix}/chat", headers=headers, scope={"root_path": prefix})
        async with client:
            await client.send(b'{"session_id": "s", "message": "Hi"}')
            await client.send_complete()
            stream, request = await owner.take()
            assert b"\r\nlast-event-id: 2\r\n" in request
            await owner.store.checkpoint_turns([a_checkpoint(TURN, "x", "x", "x")])
            location = f"location: {prefix}/sessions/s/turns/{TURN}\r\n\r\n".encode()
            await stream.send_all(HEAD.replace(b"\r\n\r\n", b"\r\n" + location) + chunk("retry: 1000\n"))
            assert await client.receive() == b"retry: 1000\n"
            await owner.die(stream)
            assert (await client.receive()).startswith(frame(3).encode())


async def test_a_client_that_comes_back_by_post_is_answered_here_where_the_owner_dies(tmp_path: Path) -> None:
    """The request starts no turn, so it may be repeated."""
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        body = {"session_id": "s", "message": a_turn(TURN, "s").input_text}
        back = SSE | {"Last-Event-ID": "0"}
        nursery.start_soon(lambda: ask(api, replies, "POST", "/chat", body, headers=back))
        stream, _ = await owner.take()
        await owner.die(stream)
        await wait_for(replies)
        assert replies[0].status == 200
        assert [(event["type"], event["reason"]) for event in replies[0].events] == [("turn.interrupted", "crash")]
        assert len((await api.call("GET", "/sessions/s/turns")).json["data"]) == 1


@pytest.mark.parametrize("after", ["2.0", "2e0", "x", "-1"])
async def test_an_invalid_seq_is_refused_by_its_field(after: str, tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, _):
        reply = await api.call("GET", f"{EVENTS}?after={after}", headers=SSE)
        reply.problem(422, "invalid_request", "after")


async def test_a_stream_that_had_its_end_gets_no_second_one(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk(frame(1 << 30)))
        assert await client.receive() == frame(1 << 30).encode()
        await owner.die(stream)
        assert await client.receive() == b"", "the end of the body"


async def test_a_stream_that_is_passed_on_counts_here_as_ended_or_aborted(tmp_path: Path) -> None:
    terminal = 'id: 2\ndata: {"type":"turn.cancelled","seq":2,"reason":"requested"}\n\n'

    async with open_owner(tmp_path, drain_timeout_s=0) as (api, owner):

        def counted() -> list[float]:
            read = at_once(api.service.gauges.metrics.memory.read([STREAMS]))[STREAMS]
            return [*read["native", "ended"], *read["native", "aborted"]]

        for told, expected in ((terminal, [1, 0]), (": moved\n", [2, 0]), (frame(1), [2, 1])):
            async with api.open("GET", EVENTS, headers=SSE) as client:
                await client.send_complete()
                stream, _ = await owner.take()
                await stream.send_all(HEAD + chunk(told))
                assert await client.receive() == told.encode()
                await stream.send_all(b"0\r\n\r\n")
                assert await client.receive() == b""
            assert counted() == expected
        async with api.open("GET", EVENTS, headers=SSE) as client:
            await client.send_complete()
            stream, _ = await owner.take()
            await stream.send_all(HEAD + chunk(frame(1)))
            assert await client.receive() == frame(1).encode()
            assert isinstance(client, connections.TestHTTPConnection)
            await leave(client)
        assert counted() == [2, 2]
        async with api.open("GET", EVENTS, headers=SSE) as client:
            await client.send_complete()
            stream, _ = await owner.take()
            await stream.send_all(HEAD + chunk(frame(1)))
            assert await client.receive() == frame(1).encode()
            api.service.shutdown.notice("a test")  # the turn runs on, and its client finds it where it runs
            assert await client.receive() == b""
        assert counted() == [3, 2]
        assert api.service.sessions.streams.aborted == 2


@both_ways
async def test_a_stream_that_a_living_owner_cuts_ends(tmp_path: Path) -> None:
    """The client resumes it; no other process ends a turn of an owner that lives."""
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk(frame(1)))
        await client.receive()
        await stream.aclose()
        assert await client.receive() == b"", "the end of the body"
        assert (await owner.store.get_turn("s", TURN, now=datetime.now(UTC))).is_open


@both_ways
async def test_a_request_that_a_dead_owner_did_not_answer_is_answered_here(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "GET", f"/sessions/s/turns/{TURN}"))
        stream, _ = await owner.take()
        await stream.send_all(answer("x" * 100)[:-50])  # an answer that is not whole counts as no answer
        await owner.die(stream)
        await wait_for(replies)
        assert (replies[0].status, replies[0].json["state"], replies[0].json["reason"]) == (200, "interrupted", "crash")


@both_ways
async def test_no_turn_is_started_twice_for_an_owner_that_died(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        body = {"input": "x", "on_conflict": "queue"}
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", body))
        stream, _ = await owner.take()
        await owner.die(stream)
        await wait_for(replies)
        problem = replies[0].problem(503, "store_unavailable")
        assert "has died" in problem["detail"]
        assert "retry-after" not in replies[0].headers
        turns = (await api.call("GET", "/sessions/s/turns")).json["data"]
        assert [turn["state"] for turn in turns] == ["interrupted"]
        assert (await api.call("POST", "/sessions/s/turns", body)).json["state"] == "completed"


@both_ways
async def test_where_a_living_owner_cannot_be_reached_the_answer_is_503_and_nothing_changes(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner):
        owner.listener.close()
        problem = (await api.call("GET", f"/sessions/s/turns/{TURN}")).problem(503, "store_unavailable")
        assert problem["retry_after_s"] == 1
        assert (await owner.store.get_turn("s", TURN, now=datetime.now(UTC))).is_open


@both_ways
async def test_a_process_that_may_open_nothing_more_says_so_and_gives_up_no_owner(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner):
        await api.call("GET", "/sessions")  # opens the files that are opened only once
        with no_descriptor_left():
            problem = (await api.call("GET", f"/sessions/s/turns/{TURN}")).problem(503, "resources_exhausted")
        assert problem["retry_after_s"] == 1
        assert (await owner.store.get_turn("s", TURN, now=datetime.now(UTC))).is_open


@pytest.mark.parametrize(
    ("method", "path", "repeatable"),
    [
        ("GET", f"/sessions/s/turns/{TURN}", True),
        ("GET", "/sessions/s/turns", True),
        ("GET", EVENTS, True),
        ("POST", f"/sessions/s/turns/{TURN}/cancel", True),
        ("DELETE", "/sessions/s", True),
        ("POST", "/sessions/s/turns", False),
        ("POST", "/chat", False),
        ("POST", "/sessions/s/fork", False),
    ],
)
@both_ways
async def test_an_owner_that_hangs_is_not_waited_for_beyond_its_time(
    method: str, path: str, repeatable: bool, tmp_path: Path, mock_clock: MockClock
) -> None:
    bodies: dict[str, object] = {
        "/sessions/s/turns": {"input": "x", "background": True},
        "/chat": {"message": "x", "session_id": "s"},
        "/sessions/s/fork": {},
    }
    body = bodies.get(path) if method == "POST" else None
    settings: dict[str, Any] = {"store_timeout_s": 0.2, "cleanup_timeout_s": 0.2}
    async with open_owner(tmp_path, **settings) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, method, path, body))
        stream, _ = await owner.take()
        assert not replies
        mock_clock.jump(10)
        await wait_for(replies)
        problem = replies[0].problem(503, "store_unavailable")
        assert "does not answer" in problem["detail"]
        assert replies[0].headers.get("retry-after") == ("1" if repeatable else None)
        assert ("may have done" in problem["detail"]) is not repeatable
        assert await stream.receive_some() == b"", "the request no longer waits at the owner"
        assert (await owner.store.get_turn("s", TURN, now=datetime.now(UTC))).is_open
        assert api.service.sessions.proxied_requests.is_idle


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", f"/sessions/s/turns/{TURN}/cancel", None),
        ("DELETE", "/sessions/s", None),
        ("POST", "/sessions/s/turns", {"input": "x", "background": True}),
        ("POST", "/chat", {"message": "x", "session_id": "s"}),
    ],
)
async def test_an_owner_has_longer_for_calls_that_wait_for_more_than_one_step_of_the_store(
    method: str, path: str, body: object, tmp_path: Path, mock_clock: MockClock
) -> None:
    settings: dict[str, Any] = {"store_timeout_s": 0.5, "cleanup_timeout_s": CAP_S}
    async with open_owner(tmp_path, **settings) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, method, path, body))
        stream, _ = await owner.take()
        await pass_time(mock_clock, 0.7)
        await stream.send_all(answer("{}"))
        await wait_for(replies)
        assert replies[0].status == 200


@both_ways
async def test_a_call_that_waits_for_its_turn_and_a_stream_wait_as_long_as_that_takes(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    settings: dict[str, Any] = {"store_timeout_s": 0.2, "cleanup_timeout_s": 0.2}
    async with open_owner(tmp_path, **settings) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        waiting, _ = await owner.take()
        async with api.open("GET", EVENTS, headers=SSE) as client:
            await client.send_complete()
            streaming, _ = await owner.take()
            await streaming.send_all(HEAD + chunk(frame(1)))
            assert await client.receive() == frame(1).encode()
            await pass_time(mock_clock, 1)
            await streaming.send_all(chunk(frame(2)) + b"0\r\n\r\n")
            assert await client.receive() == frame(2).encode()
            assert await client.receive() == b"", "the end of the body"
        await waiting.send_all(answer("{}"))
        await wait_for(replies)
        assert replies[0].status == 200


@pytest.mark.parametrize("is_repeatable", [False, True])
@both_ways
async def test_a_body_is_kept_until_its_owner_has_accepted_it(is_repeatable: bool, tmp_path: Path) -> None:
    """Until then another process may have to answer: this one, if the owner stops."""
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        headers = {"Last-Event-ID": "1"} if is_repeatable else {}
        body = {"input": "x" * 100_000}
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", body, headers=headers))
        stream, sent = await owner.take()
        assert b"x" * 100_000 in sent
        await wait_all_tasks_blocked(0.02)
        assert held_bytes_of(api.app).bytes > 100_000
        if not is_repeatable:
            await stream.send_all(b"HTTP/1.1 103 \r\nlocation: " + EVENTS.encode() + b"\r\n\r\n")
            await until(lambda: held_bytes_of(api.app).bytes == 0)
        await stream.send_all(answer("{}"))
        await wait_for(replies)
        assert replies[0].status == 200
        assert held_bytes_of(api.app).bytes == 0


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats that are missing soon: before any other wait is over, on a clock that the test moves."""
    monkeypatch.setattr(owner_beats, "START_AFTER_S", 0.05)
    monkeypatch.setattr(owner_beats, "BEAT_INTERVAL_S", 0.1)
    monkeypatch.setattr(owner_beats, "SILENCE_S", 0.3)


async def beats_begin(owner: Owner, clock: MockClock) -> PeerStream:
    """The connection for the beats of an owner that a request waits for, once it has waited for a while."""
    clock.jump(owner_beats.START_AFTER_S)
    beating, purpose = await owner.take_connection()
    assert purpose == "beats"
    return beating


@both_ways
async def test_a_stream_whose_owner_hangs_ends_as_one_that_can_be_resumed(
    quick_beats: None, tmp_path: Path, mock_clock: MockClock
) -> None:
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        beating = await beats_begin(owner, mock_clock)
        await stream.send_all(HEAD + chunk(frame(1)))
        assert await client.receive() == frame(1).encode()
        mock_clock.jump(owner_beats.SILENCE_S)
        assert await client.receive() == b"", "the end of the body, without a terminal event"
        assert (await owner.store.get_turn("s", TURN, now=datetime.now(UTC))).is_open

        problem = (await api.call("GET", EVENTS, headers={"Last-Event-ID": "1"})).problem(503, "store_unavailable")
        assert problem["retry_after_s"] == 1
        for method, path in (("POST", "/sessions/s/turns"), ("PATCH", "/sessions/s"), ("DELETE", "/sessions/s")):
            reply = await api.call(method, path, {"input": "x"} if method == "POST" else {"title": "x"})
            if method == "PATCH":
                assert reply.status == 200, "the store answers this call"
            else:
                assert reply.problem(503, "store_unavailable")["retry_after_s"] == 1, "nothing was begun"

        await beating.send_all(b".")  # the owner goes on, and finds that the client may come back
        assert await stream.receive_some() == b""
        assert returns(stream)
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []
            nursery.start_soon(lambda: ask(api, replies, "GET", EVENTS, headers={"Last-Event-ID": "1"}))
            resumed, request = await owner.take()
            assert b"last-event-id: 1" in request.lower()
            await resumed.send_all(HEAD + chunk(frame(2)) + b"0\r\n\r\n")
            await wait_for(replies)
        assert replies[0].body == frame(2).encode()
        assert api.service.sessions.proxied_requests.is_idle


@pytest.mark.parametrize("prefix", ["", "/pre"])
@pytest.mark.parametrize("accepted", [True, False])
@both_ways
async def test_a_call_that_waits_for_a_turn_whose_owner_hangs_is_told_the_turn(
    accepted: bool, prefix: str, quick_beats: None, tmp_path: Path, mock_clock: MockClock
) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        scope = {"root_path": prefix}
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}, scope=scope))
        stream, _ = await owner.take()
        path = f"{prefix}/sessions/s/turns/{TURN}"
        if accepted:
            await stream.send_all(f"HTTP/1.1 103 \r\nlocation: {path}\r\n\r\n".encode())
            await until(lambda: held_bytes_of(api.app).bytes == 0)  # the body is dropped once this was read
        await beats_begin(owner, mock_clock)
        mock_clock.jump(owner_beats.SILENCE_S)
        await wait_for(replies)
        problem = replies[0].json
        if accepted:
            assert (replies[0].status, problem["code"], problem["turn_id"]) == (504, "owner_hangs", TURN)
            assert replies[0].headers["location"] == path
        else:
            assert (replies[0].status, problem["code"]) == (503, "store_unavailable")
            assert "may have done" in problem["detail"]
        assert "retry-after" not in replies[0].headers
        assert await stream.receive_some() == b""
        assert returns(stream), "the client has not left"
        assert api.service.sessions.proxied_requests.is_idle


def stop_beside(api: Api, owner: Owner, patch: pytest.MonkeyPatch) -> None:
    """Let the application stop as in a reload, with the owner as the only process that serves in its place."""
    patch.setitem(api.app.extensions, SUCCESSORS, lambda: [owner.address])
    api.service.shutdown.enter(Phase.DRAINING)


async def let_hang(api: Api, owner: Owner, clock: MockClock) -> None:
    """Make a call that waits for its turn, to an owner that answers neither the call nor a connection for beats."""
    async with trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        await owner.take()
        await beats_begin(owner, clock)
        clock.jump(owner_beats.SILENCE_S)
        await wait_for(replies)
        assert "may have done" in replies[0].problem(503, "store_unavailable")["detail"]


async def test_a_process_that_stops_hands_nothing_over_to_one_that_hangs(
    quick_beats: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    async with open_owner(tmp_path) as (api, owner):
        stop_beside(api, owner, monkeypatch)
        await let_hang(api, owner, mock_clock)
        reply = await api.call("POST", "/sessions/s/turns", {"input": "x"})
        assert reply.problem(503, "shutting_down")["retry_after_s"] == 1, "nothing was begun"
        assert api.service.sessions.proxied_requests.is_idle


@pytest.mark.parametrize("stops", [False, True])
@both_ways
async def test_a_call_that_connects_to_an_owner_as_it_falls_silent_does_not_wait_for_it(
    stops: bool, quick_beats: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    connecting, silent = trio.Event(), trio.Event()

    async def connect_slowly(transport: PeerTransport, address: str) -> PeerStream | None:
        connecting.set()
        await silent.wait()
        return await connect(transport, address)

    connect = PeerTransport.connect

    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        if stops:
            stop_beside(api, owner, monkeypatch)
        replies: list[Reply] = []
        with monkeypatch.context() as patch:
            patch.setattr(PeerTransport, "connect", connect_slowly)
            nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "y"}))
            await connecting.wait()
        await let_hang(api, owner, mock_clock)
        silent.set()
        await wait_for(replies)
        problem = replies[0].problem(503, "store_unavailable")
        assert "does not answer" in problem["detail"]
        assert problem["retry_after_s"] == 1, "nothing was begun"
        assert api.service.sessions.proxied_requests.is_idle


def untouched() -> bytes:
    """The answer of an owner that stops and leaves the next turn to the process that asks."""
    return answer("{}", 503).replace(b"\r\n\r\n", b"\r\nlastcall-untouched: 1\r\n\r\n", 1)


@pytest.mark.parametrize("asked_before", [0, 3])
async def test_a_turn_that_its_owner_leaves_to_others_as_it_stops_is_accepted_here(
    asked_before: int, tmp_path: Path
) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        body = {"input": "x", "on_conflict": "queue"}
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", body))
        for _ in range(asked_before):
            stream, request = await owner.take()
            assert request.endswith(b'"on_conflict": "queue"}'), "the whole request, each time"
            await stream.send_all(untouched())
            assert await stream.receive_some() == b"", "closed before the next connection"
        stream, _ = await owner.take()
        assert not replies
        assert await owner.store.end_turn(ended(a_turn(TURN, "s")), runs=(), now=datetime.now(UTC)) is EndResult.KEPT
        await stream.send_all(untouched())
        await wait_for(replies)
        assert (replies[0].status, replies[0].json["state"], replies[0].json["parent"]) == (200, "completed", TURN)
        assert "lastcall-untouched" not in replies[0].headers
        assert api.service.sessions.proxied_requests.is_idle
        assert held_bytes_of(api.app).bytes == 0


async def test_a_client_that_leaves_while_the_owner_stops_has_started_nothing(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner):
        client = api.open("POST", "/sessions/s/turns", headers={"Content-Type": "application/json"})
        async with client:
            await client.send(b'{"input": "x", "on_conflict": "queue"}')
            await client.send_complete()
            stream, _ = await owner.take()
            await stream.send_all(untouched())
            stream, _ = await owner.take()
            await leave(client)
            assert await stream.receive_some() == b""
        assert await owner.store.end_turn(ended(a_turn(TURN, "s")), runs=(), now=datetime.now(UTC)) is EndResult.KEPT
        assert [turn["id"] for turn in (await api.call("GET", "/sessions/s/turns")).json["data"]] == [TURN]


async def test_a_process_that_stops_meanwhile_as_well_hands_the_request_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        stream, request = await owner.take()
        assert b"lastcall-handed-over" not in request
        stop_beside(api, owner, monkeypatch)
        await stream.send_all(untouched())
        stream, request = await owner.take()
        assert b"\r\nlastcall-handed-over: 1\r\n" in request
        await stream.send_all(answer("{}", 202))
        await wait_for(replies)
        assert replies[0].status == 202


@pytest.mark.parametrize("keys", [(), ("a-plain-key-0123456789",)])
async def test_a_probe_has_no_caller_and_is_handed_over_like_all_others(
    keys: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_owner(tmp_path, api_keys=keys) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        stop_beside(api, owner, monkeypatch)
        nursery.start_soon(lambda: ask(api, replies, "GET", "/readyz"))
        stream, request = await owner.take()
        assert b"lastcall-caller" not in request.lower()
        await stream.send_all(answer("{}", 200))
        await wait_for(replies)
        assert replies[0].status == 200


async def test_where_every_successor_stops_too_new_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        stop_beside(api, owner, monkeypatch)
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions", {}))
        stream, _ = await owner.take()
        await stream.send_all(untouched())
        await wait_for(replies)
        assert replies[0].problem(503, "shutting_down")["retry_after_s"] == 1
        assert "lastcall-untouched" not in replies[0].headers


@pytest.mark.parametrize(("headers", "hops"), [({"Lastcall-Handed-Over": "1", "Lastcall-Hops": "1"}, 2), ({}, 0)])
async def test_work_that_was_handed_over_is_handed_on_and_work_for_its_owner_goes_back(
    headers: dict[str, str], hops: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        stop_beside(api, owner, monkeypatch)
        peer: dict[str, Any] = {"headers": headers, "scope": {PEER: lambda: False}}
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions", {}, **peer))
        if hops:
            stream, request = await owner.take()
            assert b"\r\nlastcall-hops: %d\r\nlastcall-handed-over: 1\r\n" % hops in request
            await stream.send_all(answer("{}", 201))
        await wait_for(replies)
        assert replies[0].status == (201 if hops else 503)
        assert ("lastcall-untouched" in replies[0].headers) is not bool(hops)


async def test_where_the_owner_keeps_changing_the_request_waits_and_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        peer: dict[str, Any] = {"headers": {"Lastcall-Hops": "3"}, "scope": {PEER: lambda: False}}
        body = {"input": "x"}
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", body, **peer))
        stream, request = await owner.take()
        assert b"\r\nlastcall-hops: 4\r\n" in request
        await stream.send_all(answer("{}", 409))
        await wait_for(replies)
        assert replies[0].status == 409

        async def end_meanwhile(error: OwnedElsewhereError) -> TrioResponse:
            await owner.store.end_turn(ended(a_turn(TURN, "s")), runs=(), now=datetime.now(UTC))
            return await proxy.forward(error)

        monkeypatch.setattr(app, "forward", end_meanwhile)
        reply = await api.call("POST", "/sessions/s/turns", body, **peer)
        assert (reply.status, reply.json["state"]) == (200, "completed")


async def test_a_request_is_passed_on_ten_times_at_most(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, _):
        for hops in ("10", "11"):
            reply = await api.call("GET", EVENTS, headers={"Lastcall-Hops": hops}, scope={PEER: lambda: False})
            reply.problem(503, "store_unavailable")


async def test_an_owner_of_another_user_gets_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_owner(tmp_path) as (api, owner):
        ours = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: ours + 1)
        (await api.call("POST", f"/sessions/s/turns/{TURN}/cancel")).problem(503, "store_unavailable")
        accepted, _ = await owner.listener.accept()
        assert await accepted.recv(1) == b""
        accepted.close()


async def test_an_owner_whose_backlog_is_full_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_transport, "CONNECT_TIMEOUT_S", CAP_S)
    async with open_owner(tmp_path, backlog=0) as (api, owner), trio.open_nursery() as nursery:
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(owner.listener.getsockname())
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "GET", f"/sessions/s/turns/{TURN}"))
        await trio.sleep(0.05)
        assert not replies
        (await owner.listener.accept())[0].close()
        waiting.close()
        stream, _ = await owner.take()
        await stream.send_all(answer("{}"))
        await wait_for(replies)
        assert replies[0].status == 200


async def test_an_owner_whose_backlog_stays_full_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_transport, "CONNECT_TIMEOUT_S", 0.1)
    async with open_owner(tmp_path, backlog=0) as (api, owner):
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(owner.listener.getsockname())
            problem = (await api.call("GET", f"/sessions/s/turns/{TURN}")).problem(503, "store_unavailable")
        assert "does not answer" in problem["detail"]
        assert problem["retry_after_s"] == 1


@both_ways
async def test_a_client_that_leaves_has_left_at_the_owner_too(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner):
        client = api.open("POST", f"/sessions/s/turns/{TURN}/cancel")
        async with client:
            await client.send_complete()
            stream, _ = await owner.take()
            await leave(client)
            assert await stream.receive_some() == b""
            assert not returns(stream)


@both_ways
async def test_a_process_that_stops_half_closes_its_connection_to_the_owner(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """The process closes its sending side and waits, so the owner does not take it for a client that has left."""
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk(frame(1)))
        assert await client.receive() == frame(1).encode()
        api.service.sessions.drain.interrupt_all()
        await pass_time(mock_clock, api.service.settings.cleanup_timeout_s + 1)
        assert await client.receive() == b"", "the end of the body"
        assert await stream.receive_some() == b""
        assert returns(stream)
        await stream.send_all(chunk(frame(2)))  # so the process has not closed its receiving side
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.service.sessions.drain.wait_idle)
            await wait_all_tasks_blocked()
            assert nursery.child_tasks, "the drain waits for the owner"
            await stream.aclose()


@both_ways
async def test_an_end_that_the_owner_publishes_at_the_last_moment_still_arrives(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """Both processes stop, and the owner's disk hangs: the owner publishes its ends when its time is nearly over."""
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk(frame(1)))
        assert await client.receive() == frame(1).encode()
        api.service.sessions.drain.interrupt_all()
        await pass_time(mock_clock, api.service.settings.cleanup_timeout_s)
        await stream.send_all(chunk(frame(2)) + b"0\r\n\r\n")
        assert await client.receive() == frame(2).encode()
        assert await client.receive() == b"", "the end of the body"
        await stream.aclose()


@both_ways
async def test_a_request_that_came_from_a_process_that_stops_is_cut_as_its_own(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with open_owner(tmp_path) as (api, owner):
        client = api.open("GET", EVENTS, headers=SSE, scope={PEER: lambda: True})
        async with client:
            await client.send_complete()
            stream, _ = await owner.take()
            await stream.send_all(HEAD + chunk(frame(1)))
            await client.receive()
            await leave(client)
            assert await stream.receive_some() == b""
            await stream.send_all(chunk(frame(2)))
            await stream.aclose()


async def test_a_look_that_waits_is_passed_on_with_the_time_that_it_may_take(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with open_owner(tmp_path, store_timeout_s=0.2) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "GET", f"/sessions/s/turns/{TURN}?wait=1"))
        stream, request = await owner.take()
        assert request.startswith(f"GET /sessions/s/turns/{TURN}?wait=1 ".encode())
        await pass_time(mock_clock, 0.5)
        await stream.send_all(answer("{}"))
        await wait_for(replies)
        assert replies[0].status == 200


@both_ways
async def test_a_stop_does_not_wait_for_a_look_that_waits_at_the_owner(tmp_path: Path) -> None:
    async with open_owner(tmp_path, cleanup_timeout_s=CAP_S) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "GET", f"/sessions/s/turns/{TURN}?wait=30"))
        stream, _ = await owner.take()
        assert api.service.sessions.drain.is_idle
        api.service.shutdown.enter(Phase.INTERRUPTING)
        api.service.sessions.drain.interrupt_all()
        await wait_for(replies)
        replies[0].problem(503, "shutting_down")
        assert replies[0].headers["retry-after"] == "1"
        assert await stream.receive_some() == b"", "the request no longer waits at the owner"
        nursery.start_soon(lambda: ask(api, replies, "GET", f"/sessions/s/turns/{TURN}?wait=30"))
        await wait_for(replies, 2)
        replies[1].problem(503, "shutting_down")


async def test_the_owner_answers_a_fork_at_an_open_turn_and_any_process_one_at_an_ended_turn(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/fork", {"id": "copy"}))
        stream, request = await owner.take()
        assert request.startswith(b"POST /sessions/s/fork ")
        assert request.endswith(b'\r\n\r\n{"id": "copy"}')
        await stream.send_all(answer("{}", 409))
        await wait_for(replies)
        assert replies[0].status == 409

        now = datetime.now(UTC)
        assert await owner.store.end_turn(ended(a_turn(TURN, "s")), runs=(), now=now) is EndResult.KEPT
        await owner.store.begin_turn(a_turn("turn_" + 32 * "b", "s", parent=TURN), now=now)
        assert (await api.call("POST", "/sessions/s/fork", {"id": "copy", "at": TURN})).status == 201

        await owner.die()
        forked = await api.call("POST", "/sessions/s/fork", {"id": "second"})
        assert (forked.status, forked.json["message_count"]) == (201, 3)


async def test_branches_and_heads_on_an_open_path_are_the_owners(tmp_path: Path) -> None:
    branch, newest = f"turn_{32 * 'c'}", f"turn_{32 * 'b'}"
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []

        async def assert_passed_on(method: str, path: str, body: dict[str, object], status: int) -> None:
            nursery.start_soon(lambda: ask(api, replies, method, path, body))
            stream, request = await owner.take()
            assert request.startswith(f"{method} {path} ".encode())
            assert json.loads(request.partition(b"\r\n\r\n")[2]) == body
            await stream.send_all(answer("{}", status))
            await wait_for(replies)
            assert replies.pop().status == status

        await assert_passed_on("PATCH", "/sessions/s", {"head": None}, 409)
        await assert_passed_on("POST", f"/sessions/s/turns/{TURN}/retry", {"temperature": 1}, 200)
        now = datetime.now(UTC)
        assert await owner.store.end_turn(ended(a_turn(TURN, "s")), runs=(), now=now) is EndResult.KEPT
        await owner.store.begin_turn(a_turn(newest, "s", parent=TURN), now=now)
        await assert_passed_on("POST", "/sessions/s/turns", {"input": "x", "parent": None}, 200)
        await assert_passed_on("POST", f"/sessions/s/turns/{TURN}/retry", {}, 200)
        await assert_passed_on("PATCH", "/sessions/s", {"head": TURN, "seen_head": newest}, 409)
        stale = await api.call("PATCH", "/sessions/s", {"head": TURN, "seen_head": TURN})
        assert stale.problem(409, "head_moved")["turn_id"] == newest
        await owner.store.begin_turn(a_turn(branch, "s"), now=now, branches=True)
        assert await owner.store.end_turn(ended(a_turn(branch, "s")), runs=(), now=now) is EndResult.KEPT
        moved = await api.call("PATCH", "/sessions/s", {"head": TURN, "seen_head": branch})
        assert (moved.status, moved.json["status"]) == (200, "running"), "beside the open turn any process moves it"
        tree = (await api.call("GET", "/sessions/s/tree")).json["data"]
        assert [turn["state"] for turn in tree] == ["completed", "running", "completed"]

        await owner.die()
        assert (await api.call("PATCH", "/sessions/s", {"head": newest})).status == 200
        retried = await api.call("POST", f"/sessions/s/turns/{newest}/retry", {})
        assert (retried.json["siblings"], retried.json["parent"]) == ({"place": 2, "count": 2}, TURN)


async def test_messages_are_added_and_deleted_by_the_owner_of_the_open_turn(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        hello = {"items": [{"type": "message", "role": "user", "text": "x"}], "parent": None}
        asked: tuple[tuple[str, str, object], ...] = (
            ("POST", "/sessions/s/messages", hello),
            ("DELETE", f"/sessions/s/turns/{TURN}", None),
        )
        for method, path, body in asked:
            nursery.start_soon(ask, api, replies, method, path, body)
            stream, request = await owner.take()
            assert request.startswith(f"{method} {path} ".encode())
            assert body is None or json.loads(request.partition(b"\r\n\r\n")[2]) == body
            await stream.send_all(answer("{}", 409))
            await wait_for(replies)
            assert replies.pop().status == 409

        await owner.die()
        assert (await api.call("DELETE", f"/sessions/s/turns/{TURN}")).status == 204
        assert (await api.call("GET", "/sessions/s")).json["head"] is None
        assert (await api.call("POST", "/sessions/s/messages", hello)).status == 201


async def wait_for(replies: list[Reply], count: int = 1) -> None:
    await until(lambda: len(replies) >= count)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a change, also while the clock of the test stands still, by which no bound is ever over."""
    for _ in range(CAP_S * 200):
        if condition():
            return
        await trio.to_thread.run_sync(time.sleep, 0.005)
    raise AssertionError("the change has not come")


async def pass_time(clock: MockClock, seconds: float) -> None:
    """Let time pass on a clock that stands still otherwise: until all that was due has been done."""
    clock.jump(seconds)
    await wait_all_tasks_blocked()


WRONG = b"HTTP/1.1 421 \r\nlastcall-instance: another\r\ncontent-length: 0\r\n\r\n"


@both_ways
@pytest.mark.parametrize("accepts", [False, True])
async def test_where_another_process_has_the_address_of_the_owner_the_owner_is_looked_for_anew(
    accepts: bool, tmp_path: Path
) -> None:
    """The other process has done nothing of the request, so a turn may be begun again."""
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        stream, request = await owner.take()
        head = request.decode().lower()
        assert f"\r\nlastcall-instance: {PeerAddress.parse(owner.address).instance}\r\n" in head
        assert f"\r\nlastcall-fence: {owner.store.fence}\r\n" in head
        if not accepts:
            owner.may_take_long_to_die()
            await owner.store.aclose()  # the owner has gone, and its row with it
        await stream.send_all(WRONG)
        if accepts:  # its row is still there
            await wait_for(replies)
            with trio.move_on_after(0.05) as quiet:
                await owner.listener.accept()
            assert quiet.cancelled_caught, "it is asked once"
            assert replies[0].problem(503, "store_unavailable")["retry_after_s"] == 1
            assert (await owner.store.get_turn("s", TURN, now=datetime.now(UTC))).is_open
        else:
            await wait_for(replies)
            assert (replies[0].status, replies[0].json["state"]) == (200, "completed")


async def test_callers_cannot_say_for_which_process_a_request_is(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        headers = {"Lastcall-Instance": "x", "Lastcall-Fence": 16 * "7"}
        nursery.start_soon(lambda: ask(api, replies, "GET", f"/sessions/s/turns/{TURN}", headers=headers))
        stream, request = await owner.take()
        assert request.lower().count(b"lastcall-instance") == request.lower().count(b"lastcall-fence") == 1
        assert 16 * b"7" not in request, "longer than any part of an id by chance"
        await stream.send_all(answer("{}"))
        await wait_for(replies)


@pytest.mark.parametrize("way", ["tls"], indirect=True)
@pytest.mark.parametrize("signed_by", ["another", None], ids=["another authority", "no certificate here"])
async def test_a_replica_that_cannot_be_trusted_gets_no_request(signed_by: str | None, tmp_path: Path) -> None:
    strange = (
        peer_certificates(tmp_path / "strange", signed_by=signed_by, trusts=("ours", signed_by)) if signed_by else None
    )
    async with open_owner(tmp_path, peers=PeerTransport(strange)) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        if strange is not None:
            accepted, _ = await owner.listener.accept()
            assert owner.certificates is not None
            async with TlsStream(accepted, owner.certificates.server) as stream:
                with pytest.raises((PeerUntrustedError, trio.BrokenResourceError)):
                    await stream.do_handshake()
        await wait_for(replies)
        problem = replies[0].problem(503, "store_unavailable")
        assert problem["retry_after_s"] == 1, "nothing was asked"
        assert str(tmp_path) not in problem["detail"]
        assert (await owner.store.get_turn("s", TURN, now=datetime.now(UTC))).is_open


@pytest.mark.parametrize("way", ["tls"], indirect=True)
@pytest.mark.parametrize("ends", ["the owner is silent", "this process stops", "the process in front has died"])
async def test_no_answer_of_a_stranger_at_an_owners_address_harms_this_process(
    ends: str, quick_beats: None, tmp_path: Path, mock_clock: MockClock
) -> None:
    scope: dict[str, Any] = {PEER: lambda: True} if ends == "the process in front has died" else {}
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        client = api.open("GET", EVENTS, headers=SSE, scope=scope)
        async with client:
            await client.send_complete()
            accepted, _ = await owner.listener.accept()
            async with trio.SocketStream(accepted) as stranger:
                await stranger.receive_some()
                if ends == "the owner is silent":
                    await pass_time(mock_clock, owner_beats.START_AFTER_S)
                    await pass_time(mock_clock, owner_beats.SILENCE_S)
                elif ends == "this process stops":
                    api.service.sessions.drain.interrupt_all()
                    await pass_time(mock_clock, api.service.settings.cleanup_timeout_s + 1)
                else:
                    await leave(client)
                with suppress(trio.BrokenResourceError):
                    while await stranger.receive_some():
                        pass
                    await stranger.send_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
                    await stranger.receive_some()
        assert api.service.sessions.proxied_requests.is_idle
        if ends == "the owner is silent":
            beating, _ = await owner.take_connection()
            await beating.send_all(b".")
            await until(lambda: not api.service.sessions.proxied_requests.beats.hangs(owner.address))
        if ends != "this process stops":
            replies: list[Reply] = []
            nursery.start_soon(lambda: ask(api, replies, "GET", f"/sessions/s/turns/{TURN}"))
            stream, _ = await owner.take()
            await stream.send_all(answer('{"a": 1}'))
            await wait_for(replies)
            assert replies[0].json == {"a": 1}, "a later request is passed on"


@pytest.mark.parametrize("way", ["tls"], indirect=True)
async def test_a_connection_that_a_leaving_process_of_the_replica_took_is_made_once_more(tmp_path: Path) -> None:
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        accepted, _ = await owner.listener.accept()
        accepted.close()
        stream, _ = await owner.take()
        await stream.send_all(answer('{"a": 1}'))
        await wait_for(replies)
        assert replies[0].json == {"a": 1}
        assert api.service.sessions.proxied_requests.is_idle

        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        for _ in range(2):
            accepted, _ = await owner.listener.accept()
            accepted.close()
        await wait_for(replies, 2)
        assert replies[1].problem(503, "store_unavailable")["retry_after_s"] == 1, "nothing was asked"


@pytest.mark.parametrize("way", ["tls"], indirect=True)
async def test_a_stream_that_a_late_alert_breaks_ends_as_that_of_a_dead_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_tls, "_broken_by", lambda error: PeerUntrustedError(str(error)))
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk(frame(1)))
        assert await client.receive() == frame(1).encode()
        await stream.socket.send(NO_TLS)
        await owner.die(stream)
        assert b"turn.interrupted" in await client.receive()
        assert await client.receive() == b"", "the end of the body"


@pytest.mark.parametrize("way", ["tls"], indirect=True)
async def test_after_a_late_alert_a_turn_may_have_been_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_tls, "_broken_by", lambda error: PeerUntrustedError(str(error)))
    async with open_owner(tmp_path) as (api, owner), trio.open_nursery() as nursery:
        replies: list[Reply] = []
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "x"}))
        stream, _ = await owner.take()
        await stream.socket.send(NO_TLS)
        await owner.die(stream)
        await wait_for(replies)
        assert "may have done" in replies[0].problem(503, "store_unavailable")["detail"]
        assert "retry-after" not in replies[0].headers


NO_TLS = b"\x17\x03\x03\x00\x20" + 32 * b"x"
"""A record that no key of the connection has made."""


@pytest.mark.parametrize("way", ["tls"], indirect=True)
async def test_where_a_replica_is_out_of_reach_its_streams_end_and_its_turns_go_on(
    quick_beats: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_owner(tmp_path) as (api, owner), api.open("GET", EVENTS, headers=SSE) as client:
        await client.send_complete()
        stream, _ = await owner.take()
        await stream.send_all(HEAD + chunk(frame(1)))
        assert await client.receive() == frame(1).encode()
        beating, _ = await owner.take_connection()

        async def unreachable(*_: object, **__: object) -> trio.SocketStream:
            raise OSError(errno.EHOSTUNREACH, "No route to host")

        with monkeypatch.context() as patch:
            patch.setattr(trio, "open_tcp_stream", unreachable)
            patch.setattr(peer_transport, "_RETRY_S", 0.05)
            assert await client.receive() == b"", "the beats are missing"
            beating.socket.close()
            problem = (await api.call("GET", f"/sessions/s/turns/{TURN}")).problem(503, "store_unavailable")
            assert problem["retry_after_s"] == 1
            assert (await owner.store.get_turn("s", TURN, now=datetime.now(UTC))).is_open
