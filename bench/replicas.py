"""Several processes on one store: what a forward costs, and what a key makes that all of them get at once."""

import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import msgspec
import trio

from bench.contenders import Contender
from bench.plan import Request
from bench.rows import spread
from bench.server_process import ServerProcess, open_server, python_command
from bench.stage import Place
from bench.store_rows import StoreRow
from bench.wire import ResponseParser

KEYED = 8
"""Equal calls with one key, at once."""
_OF_USERS = ("--user", "--map-root-user")
_PACED = "scripted:?tokens=100000&rate=20&first_token_s=0"
_SETTLE_S = 1.0


def makes_namespaces() -> bool:
    """Whether this user may make namespaces of users. In one each, replicas count as on different machines."""
    try:
        return subprocess.run(["unshare", *_OF_USERS, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def apart(command: Sequence[str]) -> list[str]:
    """A command that runs in a namespace of users of its own."""
    return ["unshare", *_OF_USERS, *command]


async def measure(
    contender: Contender,
    place: Place,
    store: Mapping[str, str],
    *,
    kind: str,
    tls: bool,
    count: int,
    keyed: int,
    streams: int,
    window_s: float,
) -> list[StoreRow]:
    """Run processes on one store, and measure both.

    Args:
        store: The settings of the store.
        tls: Let the processes reach each other as on different machines.
        count: The number of processes.
        keyed: Groups of equal calls.
        streams: Streams that are read through their owner and through another process at once.
    """
    many = f"{count} process{'es, TLS' if tls else 'es' if count > 1 else ''}"
    new_row = partial(StoreRow, store=kind, repeat=0)
    async with _open_replicas(contender, place, {**store, "LASTCALL_MODEL_URL": _PACED}, count=count, tls=tls) as ports:
        took_ms, lost = await _measure_keyed(ports, times=keyed)
        rows = [new_row(what=f"{KEYED} equal keyed POSTs, {many}", n=len(took_ms), lost=lost, took_ms=spread(took_ms))]
        if count > 1:
            later_ms, lost = await _measure_forwards(ports[0], ports[1], streams=streams, window_s=window_s)
            rows.append(
                new_row(
                    what=f"forwarded event, {streams} streams, {many}",
                    n=len(later_ms),
                    lost=lost,
                    took_ms=spread(later_ms),
                )
            )
    return rows


async def _measure_keyed(ports: Sequence[int], *, times: int) -> tuple[list[float], int]:
    """Send equal calls with one key to all processes at once. Returns how long all took, and how often they made
    anything but one turn."""
    took_ms: list[float] = []
    lost = 0
    for number in range(times):
        session = f"k{number}"
        await _call(ports[0], "/sessions", {"id": session})
        made: set[str] = set()

        async def post(port: int, session: str = session, made: set[str] = made) -> None:
            body = {"input": "Well?", "background": True}
            turn = await _call(port, f"/sessions/{session}/turns", body, {"Idempotency-Key": session})
            made.add(turn["id"])

        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for port in islice(cycle(ports), KEYED):
                nursery.start_soon(post, port)
        took_ms.append((time.perf_counter() - began) * 1000)
        kept = await _call(ports[-1], f"/sessions/{session}/turns", method="GET")
        lost += len(made) != 1 or {it["id"] for it in kept["data"]} != made
        await _call(ports[-1], f"/sessions/{session}/turns/{made.pop()}/cancel", {})
    return took_ms, lost


async def _measure_forwards(owner: int, other: int, *, streams: int, window_s: float) -> tuple[list[float], int]:
    """Compare when each event comes. Returns how much later it comes through the other process, and how many streams
    gave nothing."""
    came: list[dict[int, dict[bytes, float]]] = [{owner: {}, other: {}} for _ in range(streams)]
    paths = []
    for number in range(streams):
        await _call(owner, "/sessions", {"id": f"f{number}"})
        turn = await _call(owner, f"/sessions/f{number}/turns", {"input": "Well?", "background": True})
        paths.append(f"/sessions/f{number}/turns/{turn['id']}/events")
    began_at = time.monotonic()
    with trio.move_on_after(window_s + _SETTLE_S):
        async with trio.open_nursery() as nursery:
            for path, times in zip(paths, came, strict=True):
                for port in (owner, other):
                    nursery.start_soon(_note_events, port, path, times[port])
    later_ms: list[float] = []
    lost = 0
    for times in came:
        both = times[owner].keys() & times[other].keys()
        # Those before come from a replay.
        settled = [it for it in both if times[owner][it] > began_at + _SETTLE_S]
        later_ms += [(times[other][it] - times[owner][it]) * 1000 for it in settled]
        lost += not settled
    return later_ms, lost


@asynccontextmanager
async def _open_replicas(
    contender: Contender, place: Place, settings: Mapping[str, str], *, count: int, tls: bool = False
) -> AsyncIterator[list[int]]:
    """Processes on one store, all on the server's core. Yields their ports."""
    async with AsyncExitStack() as stack:
        servers: list[ServerProcess | None] = [None] * count

        async def start(number: int) -> None:
            env = dict(contender.env) | dict(settings)
            if tls:
                env |= _peer_settings(place.folder)
            launch = replace(contender, env=env, store_env=None).launch(
                upstream_url="http://127.0.0.1:9/v1", store=place.folder, cpus=place.server_cpus
            )
            if tls:
                launch = replace(launch, argv=apart(launch.argv))
            log = place.folder / f"replica-{time.monotonic_ns()}-{number}.log"
            servers[number] = await stack.enter_async_context(open_server(launch, log_path=log, start_timeout_s=60))

        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(start, number)
        yield [server.port for server in servers if server is not None]


def _peer_settings(folder: Path) -> dict[str, str]:
    """Settings of a replica with a certificate that ``lastcall certificates`` makes, as users make it."""
    made = folder / "peers"
    if not made.exists():
        subprocess.run(
            python_command("-m", "service", "certificates", str(made), "--host", "replica"),
            check=True,
            capture_output=True,
        )
    files = {"CERTFILE": "replica.crt", "KEYFILE": "replica.key", "CAFILE": "ca.crt"}
    env = {f"LASTCALL_PEER_{name}": str(made / file) for name, file in files.items()}
    return env | {"LASTCALL_PEER_BIND": "127.0.0.1:0"}


async def _note_events(port: int, path: str, times: dict[bytes, float]) -> None:
    """Read a stream for ever, and note when the event of each id came."""
    request = Request(method="GET", path=path, headers={"Accept": "text/event-stream"})
    response, rest = ResponseParser(), b""
    connection = await trio.open_tcp_stream("127.0.0.1", port)
    async with connection:
        await connection.send_all(_encode(request))
        while data := await connection.receive_some():
            now = time.monotonic()
            *lines, rest = (rest + response.feed(data)).split(b"\n")
            times |= {line: now for line in lines if line.startswith(b"id: ")}


async def _call(
    port: int, path: str, body: object = None, headers: Mapping[str, str] | None = None, *, method: str = "POST"
) -> dict[str, Any]:
    """The body of a whole, successful answer."""
    content = "" if body is None else msgspec.json.encode(body).decode()
    request = Request(method=method, path=path, headers={**(headers or {}), "Connection": "close"}, body=content)
    response, received = ResponseParser(), b""
    connection = await trio.open_tcp_stream("127.0.0.1", port)
    async with connection:
        await connection.send_all(_encode(request))
        while not response.complete:
            data = await connection.receive_some()
            assert data, "the server has closed the connection"
            received += response.feed(data)
    assert response.status in (200, 201, 202), received
    decoded: dict[str, Any] = msgspec.json.decode(received)
    return decoded


def _encode(request: Request) -> bytes:
    headers = {"Host": "127.0.0.1", **request.headers}
    if request.body:
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(request.body.encode()))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{request.method} {request.path} HTTP/1.1\r\n{lines}\r\n{request.body}".encode()
