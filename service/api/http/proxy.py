"""Forwarding: passes a request about turns that another process runs to that process, their owner.

The owner answers on a Unix socket, or over TLS to other replicas (``service/cluster/peer_transport.py``), to processes
that know the store's secret (``service/cluster/peer_proof.py``). It gets the request once it has proved that it knows
the secret too. The request says for which process it is: any other one refuses it (421), and the owner is looked for
anew. The owner's answer goes to the client as it arrives, heartbeats included, and a client that leaves here has left
the owner too. If the owner dies during a stream, this process recovers its turns, and the stream goes on here up to its
terminal event, in the face in which it began: from the store, or with the turn, if this process adopts that. If the
owner hangs, the client gets an error once the answer is overdue; a stream and a call that waits for a turn end when the
owner's beats are missing (``service/cluster/owner_beats.py``). The client has not left then either: the owner finds the
connection half closed when it goes on.

When this process stops, the owner's turns go on, and their streams end here when the time is over. The clients have not
left: this process closes only its sending side, and the owner gives the clients a moment to come back. The owner does
the same when this process has died (``service/hosting/peer_listener.py``).
"""

import random
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, NamedTuple, cast, get_args

import h11
import structlog
import trio
from quart import current_app, request
from quart.wrappers.response import ResponseBody
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service
from service.api.http.callers import CALLER, caller_headers, current_owner
from service.api.http.end_of_input import leave_at_end_of_input
from service.api.http.event_frames import EncodeFrame
from service.api.http.event_stream import (
    MOVED,
    MOVED_BLOCK,
    EventStream,
    face_stream,
    is_event_stream,
    read_last_event_id,
    read_seen,
)
from service.api.http.face_frames import Face, TurnSource, find_place, open_turn
from service.api.http.held_bytes import hold_answer
from service.api.http.locations import located
from service.api.http.problems import problem_response, refusal_of
from service.api.http.repeats import repeat_is_allowed
from service.api.http.request_body import drop_body, kept_body
from service.api.http.request_id import HEADER_BYTES as REQUEST_ID
from service.api.http.request_id import current_request_id
from service.api.http.request_record import TRACE_FIELDS, record_of
from service.api.http.request_resources import release_after_request
from service.cluster.peer_address import PeerAddress
from service.cluster.peer_client import PEER_GONE, PeerConnection, PeerRequest
from service.cluster.peer_transport import PeerStream
from service.cluster.proxied_requests import ProxiedRequest
from service.errors import (
    EventsLostError,
    LastcallError,
    OwnedElsewhereError,
    OwnerHangsError,
    ShuttingDownError,
    StoreError,
)
from service.freezes import move_on_after
from service.ids import public_id, scoped
from service.sessions.events.streams import StreamSlot
from service.sessions.turns.turn import Watch
from service.storage.records import EndState
from service.supervisor import Service

logger = structlog.get_logger("lastcall.proxy")

PEER = "lastcall.peer"
"""Key in the ASGI scope of a request from another process of this service, which has checked the access already.

The value is a function that tells, once the request has been cut, whether the client may come back.
"""
TELL_ACCEPTED = "lastcall.tell_accepted"
"""Key in the ASGI scope of such a request: a function that tells that process the path of the accepted turn."""
SUCCESSORS = "lastcall.successors"
"""Key of a function that returns the addresses of the processes that serve in this one's place when it stops."""
_LATER = "lastcall.later"
"""Key in a request's ASGI scope: the seconds by which its answer may take longer than a step of the store."""
_LOOK = "lastcall.look"
"""Key in a request's ASGI scope: its answer is as good without the end of the turn for which the answer waits."""
_CUT = "lastcall.cut"
"""Key in a request's ASGI scope: the last frame of a passed-on stream of other events than a turn's that ends early."""
_FACE = "lastcall.face"
"""Key in a request's ASGI scope: the face of the stream that answers the request."""
SLOT = "lastcall.slot"
"""Key in a request's ASGI scope: the slot of the stream that answers the request, taken before any work for it."""
_HOPS = "lastcall-hops"
_HANDED_OVER = "lastcall-handed-over"
"""Header of a request that a process which stops has passed on: any process that serves may answer it."""
_UNTOUCHED = "lastcall-untouched"
"""Header of a refusal to a peer: this process stops and has done nothing of the request, so the peer begins anew."""
INSTANCE = "lastcall-instance"
"""Header of a request to a peer: the process that it is for. Also of the refusal of any other process, with 421."""
FENCE = "lastcall-fence"
"""Header of a request to a peer: the fence with which that process owns the session's turns."""
MISDIRECTED = 421
"""Source: https://www.rfc-editor.org/rfc/rfc9110#section-15.5.20"""
_NO_OWNER = 0
"""Stands for the fence of a process that has no session of the request."""
_HOPS_AT_ONCE = 3
"""Hops without a wait: the owner may change while a request is on its way. After more changes each hop waits."""
_HOPS_MAX = 10
"""After so many hops the request is answered with an error."""
_HOP_WAIT_S = 0.02
_DYING_S = 1.0
"""How long a dying process may hold its lock after its connections have closed."""
_POLL_INTERVAL_S = 0.01
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"date", b"server", b"expect")
)
_SET_ANEW = (
    b"content-length",
    _HOPS.encode(),
    _HANDED_OVER.encode(),
    INSTANCE.encode(),
    FENCE.encode(),
    CALLER,
    REQUEST_ID,
)
_TERMINAL_LINES = tuple(b'data: {"type":"turn.%b"' % end.encode() for end in get_args(EndState))
"""How the second line of a native frame begins that is the last one of its turn."""
_TURN_PATH = re.compile(r"/sessions/([^/]+)/turns/(turn_[0-9a-f]{32})(?:/events)?$")


def is_from_peer() -> bool:
    """Whether the current request came from another process of this service."""
    return PEER in request.scope


def was_passed_to_owner() -> bool:
    """Whether another process has passed the current request on because it takes this one for the session's owner."""
    return is_from_peer() and _HANDED_OVER not in request.headers


def _hops() -> int:
    """How many processes have passed the current request on."""
    return int(request.headers.get(_HOPS, "0")) if is_from_peer() else 0


def _successors() -> Sequence[str]:
    successors: Callable[[], Sequence[str]] = current_app.extensions.get(SUCCESSORS, tuple)
    return successors()


def allow_longer_answer(by_s: float) -> None:
    """Allow the current request ``by_s`` more than a step of the store takes: its answer waits for a turn or its end.

    Call this before the step that may find another process as the owner.
    """
    cast("dict[str, object]", request.scope)[_LATER] = by_s


def allow_look(within_s: float) -> None:
    """Allow the current request to wait ``within_s`` for the end of a turn, though a stop does not wait for the answer.

    Call this before the step that may find another process as the owner.
    """
    allow_longer_answer(within_s)
    cast("dict[str, object]", request.scope)[_LOOK] = True


class FaceStream(NamedTuple):
    """A stream in a face: how it goes on in this process, if the process that sends it dies.

    Both functions are called when there is no current request any more.

    Args:
        face_of: Makes the face for the turn of the stream.
        find_turn: Finds the turn, as the ids of its session, scoped, and of the turn itself, from the ``Location`` of
            the owner's answer, or else from the path of the request. Raises: LastcallError: The stream is cut.
        seen: How many frames the client had seen before this stream.
        end: How a stream that is whole ends: the face's :attr:`Face.end`, or one of several ends.
        cut: The last frame of a stream that ends early, for clients that would take its end for that of a whole stream.
            It is one of the ends, because the owner may send it.
    """

    face_of: Callable[[TurnSource], Face]
    find_turn: Callable[[str], Awaitable[tuple[str, str]]]
    seen: int = 0
    end: bytes | tuple[bytes, ...] = b""
    cut: bytes = b""


def continue_streams_with(face: EncodeFrame | FaceStream) -> None:
    """Let a stream that answers the current request go on in this face, if its owner dies.

    Call this before the step that may find another process as the owner.
    """
    cast("dict[str, object]", request.scope)[_FACE] = face


def note_accepted(path: str) -> None:
    """Note the path of the turn as which the current request was accepted, before a wait for the turn's end."""
    tell = cast("dict[str, Callable[[str], None]]", request.scope).get(TELL_ACCEPTED)
    if tell is not None:
        tell(located(path))


def release_later(watch: Watch) -> None:
    """Release the watch of a stream, or of a call that waits, when the current request is over."""
    if is_from_peer():
        client_returns = _client_returns()
        release_after_request(lambda: watch.release(client_returns=client_returns()))
    else:
        release_after_request(watch.release)


def _client_returns() -> Callable[[], bool]:
    """Return the function under :data:`PEER`, for after the request, when there is no current request any more."""
    return cast("Callable[[], bool]", request.scope.get(PEER, bool))


async def forward(error: OwnedElsewhereError) -> TrioResponse:
    """Pass the current request to the owner that ``error`` names, and return the owner's answer.

    An owner that stops accepts no turn. It lets its own turns of the session end, as ``on_conflict`` of the request
    says, and has this process begin anew. The owner lives no longer than its stop may take, so the loop ends.

    Raises:
        ResourcesExhaustedError: No connection to the owner can be made.
        StoreError: The owner cannot be reached or does not answer in time; or it died or hangs, and may have accepted
            the request; or the owner changed too often.
        OwnerHangsError: The owner accepted the request as a turn, and hangs.
        ShuttingDownError: This process stops before the answer.
    """
    hops = _hops()
    if _HOPS_AT_ONCE <= hops < _HOPS_MAX:
        await trio.sleep(_HOP_WAIT_S * (hops - _HOPS_AT_ONCE + 1))
        try:
            return await _begin_anew()
        except OwnedElsewhereError as newer:
            error = newer
    while True:
        if error.address is None or hops >= _HOPS_MAX:
            raise StoreError(str(error))
        if current_service().sessions.proxied_requests.beats.hangs(error.address):
            raise _no_answer(error.session_id)
        stream = await _connect(error.address)
        if stream is None:
            return await _answer_here(error)
        response = await _answer_from(stream, error, hops=hops)
        if response is not None:
            return response
        await trio.sleep(_HOP_WAIT_S)
        try:
            return await _begin_anew()
        except OwnedElsewhereError as newer:
            error = newer
        except ShuttingDownError as stopping:
            return await hand_over(stopping)


async def hand_over(error: ShuttingDownError) -> TrioResponse:
    """Pass the current request, which this process refuses, to a process that serves in its place.

    If a process has passed the request on because it took this one for the owner, that process is to begin anew.

    Raises:
        ShuttingDownError: There is no such process, or each of them hangs or stops.
        ResourcesExhaustedError, StoreError: As :func:`forward`.
    """
    if not error.untouched:
        raise error
    hops = _hops()
    if not was_passed_to_owner() and hops < _HOPS_MAX:
        beats = current_service().sessions.proxied_requests.beats
        for address in random.sample(_successors(), len(_successors())):
            if beats.hangs(address) or (stream := await _connect(address)) is None:
                continue
            anyone = OwnedElsewhereError("", fence=_NO_OWNER, address=address)
            response = await _answer_from(stream, anyone, hops=hops, handed_over=True)
            if response is not None:
                return response
    if is_from_peer():
        refusal = problem_response(refusal_of(error, scope=cast("dict[str, Any]", request.scope)))
        refusal.headers[_UNTOUCHED] = "1"
        return refusal
    raise error


async def pass_to(address: str, *, cut: bytes) -> TrioResponse | None:
    """Pass the current request, a GET, to the process at this address, and return its answer.

    None if that process has gone, or stops. The stop of this process does not wait for the answer.

    Args:
        cut: The last frame of a stream that ends early, with that process or with this one.

    Raises:
        ResourcesExhaustedError, StoreError: As :func:`forward`.
    """
    scope = cast("dict[str, object]", request.scope)
    scope[_LOOK], scope[_CUT] = True, cut
    stream = await _connect(address)
    if stream is None:
        return None
    itself = OwnedElsewhereError("", fence=_NO_OWNER, address=address)
    return await _answer_from(stream, itself, hops=_hops(), handed_over=True)


async def _connect(address: str) -> PeerStream | None:
    """Connect to a process of the service, as its transport does."""
    return await current_service().sessions.proxied_requests.transport.connect(address)


async def _answer_from(
    stream: PeerStream, error: OwnedElsewhereError, *, hops: int, handed_over: bool = False, is_second: bool = False
) -> TrioResponse | None:
    """Send the current request to the process at the other end of ``stream``, and return its answer.

    None if that process stops and has done nothing of the request.

    Args:
        is_second: An earlier connection to the same address has ended before the request was sent.
    """
    assert error.address is not None
    peer = PeerConnection(stream, address=error.address, secret=current_service().store.peer_secret)
    slot = current_service().sessions.proxied_requests.open_request(error.address, is_look=_LOOK in request.scope)
    release_after_request(partial(_close_peer, peer, slot, _client_returns()))
    logger.debug("asking the owner", session_id=error.session_id, owner=error.fence, method=request.method)
    instance = PeerAddress.parse(error.address).instance
    passed_on = [(_HOPS.encode(), b"%d" % (hops + 1))]
    if handed_over:
        passed_on.append((_HANDED_OVER.encode(), b"1"))
    passed_on.append((INSTANCE.encode(), instance.encode()))
    if error.fence != _NO_OWNER:
        passed_on.append((FENCE.encode(), b"%d" % error.fence))
    answer = await _ask(peer, slot, error.session_id, passed_on)
    if answer is None and not peer.has_asked and not is_second and PeerAddress.parse(error.address).is_far:
        # In a reload a process that ends may have taken this connection from the port that all processes there share.
        peer.close()
        slot.close()
        if (second := await _connect(error.address)) is not None:
            return await _answer_from(second, error, hops=hops, handed_over=handed_over, is_second=True)
    if answer is None:
        if _may_be_repeated(peer):
            return await _answer_here(error)
        await _wait_until_free(current_service(), error.session_id, error.fence)
        raise _unknown_outcome("has died")
    head, body = answer
    if any(name in (_UNTOUCHED.encode(), INSTANCE.encode()) for name, _ in head.headers):
        peer.close()
        slot.close()
        # Another process than the owner has answered at its address, and has done nothing: the owner has gone.
        return await _answer_here(error) if head.status_code == MISDIRECTED else None
    drop_body(request)
    hold_answer(len(body))
    response = TrioResponse(body, head.status_code)
    response.headers.clear()
    response.headers.extend(
        (name.decode(), value.decode("latin-1")) for name, value in head.headers if name not in _HOP_BY_HOP
    )
    if _is_stream(head):
        leave_at_end_of_input()
        face = cast("dict[str, EncodeFrame | FaceStream]", request.scope).get(_FACE)
        if face is None:  # the stream is not a turn's
            response.response = RelayedStream(peer, slot, cut=cast("dict[str, bytes]", request.scope)[_CUT])
            return response
        response.response = proxied = ProxiedStream(
            peer,
            slot,
            fence=error.fence,
            turn_path=response.headers.get("Location") or request.path,
            face=face,
        )
        release_after_request(proxied.close)
    return response


async def _ask(
    peer: PeerConnection, slot: ProxiedRequest, session_id: str, passed_on: Sequence[tuple[bytes, bytes]]
) -> tuple[h11.Response, bytes] | None:
    """Send the current request to the owner, and return its answer; None if the owner dies before its answer."""

    def drop_accepted() -> None:
        if not repeat_is_allowed():  # otherwise another process may have to answer, if the owner dies
            drop_body(request)  # the answer, the turn's end, may take long

    answer = None
    if _answer_timeout_s() == inf:
        leave_at_end_of_input()
    with slot.waiting() as wait, move_on_after(_answer_timeout_s()) as bound:
        answer = await peer.ask(_peer_request(passed_on), is_stream=_is_stream, note_accepted=drop_accepted)
    if wait.cancelled_caught and not slot.owner_hangs:
        raise ShuttingDownError
    if wait.cancelled_caught or bound.cancelled_caught:
        if _may_be_repeated(peer):
            raise _no_answer(session_id)
        raise _hangs(peer.accepted_as) if slot.owner_hangs else _unknown_outcome("does not answer")
    return answer


def _answer_timeout_s() -> float:
    """Return how long the owner may take to answer the current request; a stream's body may take longer."""
    later_s = cast("dict[str, float]", request.scope).get(_LATER, 0)
    return current_service().settings.store_timeout_s + later_s


def _may_be_repeated(peer: PeerConnection) -> bool:
    """Whether the current request may be repeated: the owner did not get it, or may have accepted it already."""
    return request.method != "POST" or repeat_is_allowed() or not peer.has_asked


def _no_answer(session_id: str) -> StoreError:
    if not session_id:
        return StoreError("The process that serves in this one's place does not answer.")
    return StoreError(f"The process that runs the turns of session {public_id(session_id)!r} does not answer.")


def _hangs(accepted_as: str | None) -> LastcallError:
    """Return the error for a request whose owner hangs, and has accepted the request, or may have done so."""
    turn = _TURN_PATH.search(accepted_as or "")
    if turn is None:
        return _unknown_outcome("hangs")
    return OwnerHangsError(session_id=turn[1], turn_id=turn[2])


def _unknown_outcome(what: str) -> StoreError:
    return StoreError(
        f"The process that runs this session's turns {what}, and may have done what the request asks for. With its "
        "Idempotency-Key the request may be repeated; without one look first at what the session has.",
        retry_after_s=None,
    )


async def _answer_here(error: OwnedElsewhereError) -> TrioResponse:
    """Answer the request here after the owner's death: end the owner's turns and run the handler again."""
    await _wait_until_free(current_service(), error.session_id, error.fence)
    return await _begin_anew()


async def _begin_anew() -> TrioResponse:
    """Run the handler of the current request again. Raises the handler's errors."""
    assert request.endpoint is not None
    handler = current_app.view_functions[request.endpoint]
    response = await handler(**(request.view_args or {}))  # type: ignore[misc]
    assert isinstance(response, TrioResponse)
    return response


async def _wait_until_free(service: Service, session_id: str, fence: int) -> None:
    """End the turns that a dead owner left open in a session, and wait while the owner is still dying.

    Raises:
        StoreError: The owner lives.
    """
    with move_on_after(_DYING_S):
        while True:
            await service.sessions.recover()
            owner = await service.store.find_owner(session_id)
            if owner is None or owner.fence != fence:
                return
            await trio.sleep(_POLL_INTERVAL_S)
    raise _no_answer(session_id)


def _close_peer(peer: "PeerConnection", slot: ProxiedRequest, client_returns: Callable[[], bool]) -> None:
    """Close the connection to the owner after the request, in a way that tells whether the client has left."""
    if peer.is_closed:
        slot.close()
        return
    if (slot.was_cut or slot.owner_hangs or client_returns()) and slot.close_after(peer.half_close):
        return
    peer.close()
    slot.close()


class ProxiedStream(ResponseBody):
    """An event stream on its way from the owner to the client, in whole events.

    Args:
        fence: The owner's fence.
        turn_path: The path of the turn whose events the stream has.
        face: The stream's face: the frame of an event, or a :class:`FaceStream`.
    """

    def __init__(
        self,
        peer: "PeerConnection",
        slot: ProxiedRequest,
        *,
        fence: int,
        turn_path: str,
        face: EncodeFrame | FaceStream,
    ) -> None:
        self._service = current_service()  # there is no current request any more when it is sent
        self._peer = peer
        self._slot = slot
        self._fence = fence
        self._turn_path = turn_path
        self._face = face
        self._owner = current_owner()
        self._seq = self._frames_seen = 0
        if isinstance(face, FaceStream):
            self._frames_seen = face.seen
        else:
            self._seq = read_seen(request).seq if request.method == "GET" else read_last_event_id(request) or 0
        self._unsent = b""
        self._has_ended = self._is_cut = self._is_whole = False
        self._rest: EventStream | None = None
        self._watch = Watch(None)
        self._client_returns = _client_returns() if is_from_peer() else bool
        self._scope = cast("dict[str, Any]", request.scope)
        self._stream_slot: StreamSlot = self._scope[SLOT]

    async def __aenter__(self) -> "ProxiedStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass  # the connection to the owner is closed with the request

    def __aiter__(self) -> "ProxiedStream":
        return self

    async def __anext__(self) -> bytes:
        frames = b""
        if self._rest is None and not self._is_cut:
            try:
                frames = await self._receive_frames()
            except PEER_GONE:
                self._rest = None if self._has_ended else await self._open_rest()
        if self._rest is not None:
            return await anext(self._rest)
        frames = frames or self._cut()
        if not frames:
            # A stop of this process ends the stream as a hand-over does: the turn goes on where it runs.
            is_handed_over = self._slot.was_cut and not self._slot.owner_hangs
            self._stream_slot.close(ended=self._is_whole or is_handed_over)
            raise StopAsyncIteration
        return frames

    def _cut(self) -> bytes:
        """The last frame of a stream that has no end; empty if it has one, or needs no such frame."""
        if not isinstance(self._face, FaceStream) or self._has_ended or self._is_cut:
            return b""
        self._is_cut = True
        return self._face.cut

    def close(self) -> None:
        """Hold nothing any more for the rest of the stream: the request is over. Idempotent.

        A stream that has not come to its end counts as aborted.
        """
        self._stream_slot.close()
        if self._rest is not None:
            self._rest.close_long()
        self._watch.release(client_returns=self._client_returns())

    async def _receive_frames(self) -> bytes:
        """Return at least one frame; empty at the end, and if this process stops or the owner hangs.

        The client resumes a stream that ends without a terminal event, elsewhere or later.
        """
        while True:
            data = b""
            with self._slot.waiting():
                data = await self._peer.receive_body()
            if not data:
                return b""
            whole, self._unsent = split_whole(self._unsent + data)
            if whole:
                self._note(whole)
                return whole

    def _note(self, frames: bytes) -> None:
        """Note the frames that go to the client."""
        if isinstance(self._face, FaceStream):
            self._frames_seen += (b"\n" + frames).count(b"\ndata: ")  # no frame has two of these lines
            self._has_ended = bool(self._face.end) and frames.endswith(self._face.end)
            is_cut = bool(self._face.cut) and frames.endswith(self._face.cut)
            self._is_whole = (self._has_ended and not is_cut) or frames.endswith(MOVED_BLOCK + self._face.cut)
            return
        _, found, last = (b"\n" + frames).rpartition(b"\nid: ")
        if found:
            seq, _, rest = last.partition(b"\n")
            self._seq = int(seq)
            self._has_ended = rest.startswith(_TERMINAL_LINES)
        self._is_whole = self._has_ended or frames.endswith(MOVED)

    async def _open_rest(self) -> EventStream | None:
        """Return the rest of a stream whose owner died: of the turn that was recovered, or goes on in this process.

        None if that fails: the stream is cut.
        """
        try:
            session_id, turn_id = await self._find_turn()
        except LastcallError as error:
            logger.warning("a stream was cut with its owner", path=self._turn_path, error=str(error))
            return None
        try:
            await _wait_until_free(self._service, session_id, self._fence)
            rest = await self._go_on(session_id, turn_id)
        except LastcallError as error:
            if isinstance(error, EventsLostError):
                self._service.refusals.count(error.code)
            logger.warning("a stream was cut with its owner", session_id=session_id, turn_id=turn_id, error=str(error))
            return None
        logger.info("a stream goes on here: its owner died", session_id=session_id, turn_id=turn_id)
        return rest

    async def _find_turn(self) -> tuple[str, str]:
        if isinstance(self._face, FaceStream):
            return await self._face.find_turn(self._turn_path)
        turn = _TURN_PATH.search(self._turn_path)  # after the prefix of a proxy
        assert turn is not None
        return scoped(self._owner, turn[1]), turn[2]

    async def _go_on(self, session_id: str, turn_id: str) -> EventStream | None:
        """Open the turn's events, and find the place in them after the frames that the client has.

        None if none is left.
        """
        sessions = self._service.sessions
        slot = self._stream_slot
        if isinstance(self._face, FaceStream):
            turn, log, self._watch = await open_turn(sessions, session_id, turn_id)
            face = self._face.face_of(turn)
            place = await find_place(log, face, seen=self._frames_seen)
            if place.is_lost:
                raise EventsLostError(turn_id, after=self._frames_seen, state="running", text="")
            await log.load_after(place.seq)
            return face_stream(log, slot, face=face, place=place, cut=self._face.cut, scope=self._scope)
        log, self._watch = await sessions.open_events(session_id, turn_id)
        if self._seq < log.last_seq:
            # A client that saw events which were lost goes on with the terminal event.
            self._seq = min(self._seq, log.unbroken_seq)
        if log.has_ended and self._seq >= log.last_seq:
            return None
        await log.load_after(self._seq)
        return EventStream(log, slot, after=self._seq, encode=self._face, opening=b"", scope=self._scope)


class RelayedStream(ResponseBody):
    """A stream on its way from another process to the client, in whole frames.

    Args:
        cut: The last frame if it ends early: because that process ends or hangs, or this one stops.
    """

    def __init__(self, peer: "PeerConnection", slot: ProxiedRequest, *, cut: bytes) -> None:
        self._peer = peer
        self._slot = slot
        self._cut = cut
        self._unsent = b""
        self._has_ended = False

    async def __aenter__(self) -> "RelayedStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass  # the connection to that process is closed with the request

    def __aiter__(self) -> "RelayedStream":
        return self

    async def __anext__(self) -> bytes:
        while not self._has_ended:
            data = None
            with suppress(*PEER_GONE), self._slot.waiting():
                data = await self._peer.receive_body()
            if data is None:
                self._has_ended = True
                return self._cut
            self._has_ended = not data
            whole, self._unsent = split_whole(self._unsent + data)
            if whole:
                return whole
        raise StopAsyncIteration


def split_whole(data: bytes) -> tuple[bytes, bytes]:
    """Split stream data into the part that may be passed on, and the beginning of an event that is not whole yet.

    An event ends with a blank line. A comment, or a ``retry:`` before an event, is whole as a line, so it does not wait
    for the event that follows.
    """
    end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
    while data.startswith((b":", b"retry:"), end) and (line_end := data.find(b"\n", end)) >= 0:
        end = line_end + 1
    return data[:end], data[end:]


def _is_stream(head: h11.Response) -> bool:
    return request.method != "HEAD" and is_event_stream(head.headers)


def _peer_request(passed_on: Sequence[tuple[bytes, bytes]]) -> PeerRequest:
    """Return the current request for the owner, without the headers that belong to its own connection.

    Args:
        passed_on: Headers that say how it was passed on.
    """
    record = record_of(request.scope)
    trace = {} if record is None else record.trace_fields  # without traces here the caller's own fields travel on
    traced = [(name.encode(), value.encode("latin-1")) for name, value in trace.items()]
    left_out = {*_SET_ANEW, *((name.encode() for name in TRACE_FIELDS) if traced else ())}
    headers = [
        (name, value)
        for name, value in request.scope["headers"]
        if name.lower() not in _HOP_BY_HOP and name.lower() not in left_out
    ]
    if not any(name.lower() == b"host" for name, _ in headers):
        headers.append((b"host", b"localhost"))  # on HTTP/2 the host is in :authority
    return PeerRequest(
        method=request.method,
        target=request.scope["raw_path"] + (b"?" + request.query_string if request.query_string else b""),
        headers=[
            *headers,
            *passed_on,
            *traced,
            *caller_headers(),
            (REQUEST_ID, current_request_id().encode()),
        ],
        body=kept_body(request),
    )
