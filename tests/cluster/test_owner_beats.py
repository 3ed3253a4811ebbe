"""The beats of owners. The owner is a script here, and time passes only where a test lets it pass."""

import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.cluster import peer_socket
from service.cluster.owner_beats import BEAT_INTERVAL_S, SILENCE_S, START_AFTER_S, OwnerBeats, send_beats
from service.cluster.peer_proof import check_peer
from service.cluster.peer_socket import socket_name
from service.cluster.peer_transport import PeerTransport
from service.freezes import LATE_S, watch_for_freezes

SECRET = b"s" * 32
STEP_S = 0.8 * LATE_S

Kind = Literal["beats", "an earlier version"]


class Request:
    """A request that waits for the owner."""

    def __init__(self) -> None:
        self.ended = 0

    def end_for_silence(self) -> None:
        self.ended += 1


class Scene:
    """An owner, and the process that listens to its beats."""

    def __init__(self, beats: OwnerBeats, address: str, listener: trio.socket.SocketType, clock: MockClock) -> None:
        self.beats = beats
        self.address = address
        self.listener = listener
        self.request = Request()
        self.connections = 0
        self.open: list[trio.SocketStream] = []
        self._clock = clock

    async def serve(self, kind: Kind, *, by_itself: bool, nursery: trio.Nursery) -> None:
        """Take connections. Their beats are sent ``by_itself``, or else by the test."""
        with suppress(OSError, trio.ClosedResourceError):  # closed by the test
            while True:
                accepted, _ = await self.listener.accept()
                self.connections += 1
                stream = trio.SocketStream(accepted)
                if kind == "an earlier version":
                    await check_peer(stream, SECRET, address=self.address)
                    await stream.aclose()
                    continue
                assert await check_peer(stream, SECRET, address=self.address) == "beats"
                self.open.append(stream)
                if by_itself:
                    nursery.start_soon(send_beats, stream)

    async def let_pass(self, seconds: float) -> None:
        """Let time pass while the event loop is never late."""
        until = trio.current_time() + seconds
        while trio.current_time() < until:
            self._clock.jump(min(STEP_S, until - trio.current_time()))
            await wait_all_tasks_blocked()


@asynccontextmanager
async def open_scene(
    clock: MockClock, kind: Kind | None = "beats", *, by_itself: bool = True, backlog: int = 10
) -> AsyncIterator[Scene]:
    """A request waits for an owner of this kind; without a kind the owner takes no connection."""
    address = f"@test-{secrets.token_hex(8)}"
    with watch_for_freezes(clock=trio.current_time, cpu_clock=lambda: 0), trio.socket.socket(socket.AF_UNIX) as door:
        await door.bind(socket_name(address))
        door.listen(backlog)
        async with trio.open_nursery() as nursery:
            scene = Scene(OwnerBeats(nursery, secret=lambda: SECRET, transport=PeerTransport()), address, door, clock)
            if kind is not None:
                nursery.start_soon(lambda: scene.serve(kind, by_itself=by_itself, nursery=nursery))
            scene.beats.add(scene.request, address)
            try:
                yield scene
            finally:
                nursery.cancel_scope.cancel()
                for stream in scene.open:
                    stream.socket.close()


async def test_an_owner_that_beats_is_waited_for_without_end(mock_clock: MockClock) -> None:
    async with open_scene(mock_clock) as scene:
        await scene.let_pass(10 * SILENCE_S)
        assert scene.connections == 1
        assert (scene.request.ended, scene.beats.hangs(scene.address)) == (0, False)


async def test_an_owner_that_misses_three_beats_hangs_until_it_is_heard_again(mock_clock: MockClock) -> None:
    async with open_scene(mock_clock, by_itself=False) as scene:
        await scene.let_pass(START_AFTER_S + BEAT_INTERVAL_S)
        await scene.open[0].send_all(b".")
        await scene.let_pass(SILENCE_S - 0.1)
        assert (scene.request.ended, scene.beats.hangs(scene.address)) == (0, False)
        await scene.let_pass(0.2)
        assert (scene.request.ended, scene.beats.hangs(scene.address)) == (1, True)
        scene.beats.discard(scene.request, scene.address)
        await scene.let_pass(10 * SILENCE_S)
        assert scene.beats.hangs(scene.address), "it is still listened to, though no request waits for it"
        assert scene.connections == 1
        await scene.open[0].send_all(b".")
        await wait_all_tasks_blocked()
        assert not scene.beats.hangs(scene.address)


async def test_a_request_to_an_owner_that_hangs_already_ends_at_once(mock_clock: MockClock) -> None:
    """The owner may fall silent between a look at :meth:`OwnerBeats.hangs` and the request."""
    async with open_scene(mock_clock, by_itself=False) as scene:
        await scene.let_pass(START_AFTER_S + SILENCE_S + 0.1)
        late, later = Request(), Request()
        scene.beats.add(late, scene.address)
        assert (scene.request.ended, late.ended) == (1, 1)
        await scene.open[0].send_all(b".")
        await wait_all_tasks_blocked()
        scene.beats.discard(scene.request, scene.address)
        scene.beats.add(later, scene.address)
        scene.beats.discard(late, scene.address)
        await scene.let_pass(SILENCE_S - 0.1)
        assert later.ended == 0
        await scene.let_pass(0.2)
        assert (late.ended, later.ended) == (1, 1), "the owner is silent again"


async def test_an_owner_that_does_not_even_take_the_connection_hangs(mock_clock: MockClock) -> None:
    async with open_scene(mock_clock, None) as scene:
        await scene.let_pass(START_AFTER_S + SILENCE_S + 0.1)
        assert (scene.request.ended, scene.beats.hangs(scene.address)) == (1, True)


async def test_an_owner_whose_backlog_is_full_hangs(mock_clock: MockClock) -> None:
    async with open_scene(mock_clock, None, backlog=0) as scene:
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(socket_name(scene.address))
            with trio.fail_after(100):
                while await peer_socket_is_taken(scene.address):
                    pass
            await scene.let_pass(START_AFTER_S + SILENCE_S + 0.1)
            assert (scene.request.ended, scene.beats.hangs(scene.address)) == (1, True)


async def peer_socket_is_taken(address: str) -> bool:
    """Whether the backlog takes one more connection, which is closed but stays in the backlog."""
    stream = await trio.open_unix_socket(socket_name(address))
    taken = peer_socket.user_of_peer(stream.socket) >= 0
    stream.socket.close()
    return taken


async def test_an_owner_of_an_earlier_version_is_not_taken_for_one_that_hangs(mock_clock: MockClock) -> None:
    async with open_scene(mock_clock, "an earlier version") as scene:
        await scene.let_pass(10 * SILENCE_S)
        assert scene.connections > 1
        assert (scene.request.ended, scene.beats.hangs(scene.address)) == (0, False)


async def test_an_owner_that_dies_while_it_hangs_does_not_hang_any_more(mock_clock: MockClock) -> None:
    """The requests then find out that it is dead, and recover its turns."""
    async with open_scene(mock_clock, by_itself=False) as scene:
        await scene.let_pass(START_AFTER_S + SILENCE_S + 0.1)
        assert scene.beats.hangs(scene.address)
        scene.listener.close()
        scene.open[0].socket.close()
        await wait_all_tasks_blocked()
        assert not scene.beats.hangs(scene.address)


async def test_a_freeze_of_this_process_is_no_silence_of_the_owner(mock_clock: MockClock) -> None:
    async with open_scene(mock_clock, by_itself=False) as scene:
        await scene.let_pass(START_AFTER_S + BEAT_INTERVAL_S)
        await scene.open[0].send_all(b"..........")
        mock_clock.jump(1000)
        await wait_all_tasks_blocked()
        await scene.let_pass(SILENCE_S - 0.1)
        assert (scene.request.ended, scene.beats.hangs(scene.address)) == (0, False)
        await scene.let_pass(0.2)
        assert (scene.request.ended, scene.beats.hangs(scene.address)) == (1, True)


async def test_a_request_that_is_answered_soon_needs_no_beats(mock_clock: MockClock) -> None:
    async with open_scene(mock_clock) as scene:
        await scene.let_pass(START_AFTER_S / 2)
        scene.beats.discard(scene.request, scene.address)
        await scene.let_pass(10 * SILENCE_S)
        assert scene.connections == 0
        scene.beats.add(scene.request, scene.address)
        await scene.let_pass(10 * SILENCE_S)
        assert (scene.connections, scene.request.ended) == (1, 0)


async def test_nothing_listens_once_no_request_waits(mock_clock: MockClock) -> None:
    async with open_scene(mock_clock, by_itself=False) as scene:
        await scene.let_pass(START_AFTER_S + BEAT_INTERVAL_S)
        scene.beats.discard(scene.request, scene.address)
        await wait_all_tasks_blocked()
        assert await scene.open[0].receive_some() == b"", "the connection is closed"


@pytest.mark.parametrize("reads", [True, False])
async def test_beats_end_with_their_listener(reads: bool, mock_clock: MockClock) -> None:
    """A listener that is gone, and one that hangs: its end of the connection takes no more beats at some time."""
    ours, theirs = trio.socket.socketpair()
    with theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_beats, trio.SocketStream(ours))
            await wait_all_tasks_blocked()
            if reads:
                theirs.close()
            with trio.CancelScope() as bound:
                for _ in range(300):
                    mock_clock.jump(BEAT_INTERVAL_S)
                    await wait_all_tasks_blocked()
                    if not nursery.child_tasks:
                        bound.cancel()
            assert not nursery.child_tasks
