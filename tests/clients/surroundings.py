"""The surroundings of the server in these checks: a model, a network that cuts, proxies, and packages in a cache."""

import csv
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from tests.node import NODE, NPM

HERE = Path(__file__).parent
NEWEST_MAJOR = {"typescript": "5"}
"""Packages whose newest version does not run with the others: openapi-typescript 7 needs TypeScript 5."""
CAP_S = 300
"""Bounds each check, also on a busy machine: a framework takes seconds to be imported."""
INSTALL_S = 300
_CHUNK = 65536


class MissingError(Exception):
    """A program that the checks need is not there and cannot be installed."""


# Packages


@dataclass(frozen=True)
class NodePackages:
    """The packages of a ``package.json``, and the scripts that use them."""

    of: Path
    scripts: tuple[str, ...] = ()

    def install(self, *, newest: bool) -> Path:
        """Make a folder with the packages and their scripts. Pinned packages are installed once for each lock file."""
        lock = (self.of / "package-lock.json").read_bytes()
        name = f"{self.of.name}-newest" if newest else hashlib.sha256(lock).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"lastcall-clients-{os.getuid()}-{name}"
        if newest:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for script in self.scripts:
            shutil.copy(self.of / script, folder)
        if not (folder / "installed").exists():
            if newest:  # without a version npm takes the newest that this Node.js can run
                (folder / "package.json").write_text('{"private": true}')
                wanted = (f"{it}@{NEWEST_MAJOR[it]}" if it in NEWEST_MAJOR else it for it in self._names())
                command = [*NPM, "install", *wanted]
            else:
                for file in ("package.json", "package-lock.json"):
                    shutil.copy(self.of / file, folder)
                command = [*NPM, "ci"]
            _run([*command, "--no-audit", "--no-fund", "--ignore-scripts"], folder)
            (folder / "installed").touch()
        return folder

    def versions(self, folder: Path) -> dict[str, str]:
        versions = {"node": _run([NODE, "--version"], folder).strip()}
        for package in self._names():
            installed = folder / "node_modules" / package / "package.json"
            versions[package] = json.loads(installed.read_bytes())["version"]
        return versions

    def _names(self) -> list[str]:
        return list(json.loads((self.of / "package.json").read_bytes())["dependencies"])


LIBRARIES = NodePackages(
    HERE,
    (
        *("libraries.mjs", "express_proxy.mjs", "generated_client.ts", "openai_calls.mjs", "openai_cuts.mjs"),
        *("openai_handover.mjs", "typed_calls.ts", "../../clients/js/lastcall.js", "../../clients/js/lastcall.d.ts"),
    ),
)
CODEX = NodePackages(HERE / "codex")
"""Codex CLI is large, and installed only when asked for."""


def install_debian_packages() -> dict[str, str]:
    """Install nginx and HAProxy if they are missing and this user may do it; return their versions."""
    packages = {"nginx": "nginx-light", "haproxy": "haproxy"}
    missing = [package for program, package in packages.items() if not program_path(program)]
    if missing and (os.geteuid() != 0 or shutil.which("apt-get") is None):
        raise MissingError(f"these Debian packages are not installed: {' '.join(missing)}")
    if missing:
        _run(["apt-get", "update", "-qq"], HERE)
        _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], HERE)
    nginx, haproxy = (_run([program_path(name) or name, "-v"], HERE, merged=True).splitlines()[0] for name in packages)
    return {"nginx": nginx.rpartition("/")[2], "haproxy": haproxy.split()[2]}


def program_path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(command: Sequence[str], folder: Path, *, merged: bool = False) -> str:
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environ, check=True, capture_output=True, text=True, timeout=INSTALL_S
        )
    except subprocess.CalledProcessError as error:
        raise MissingError(f"{' '.join(command[:3])}… failed: {(error.stderr or error.stdout)[-500:]}") from error
    return done.stdout + done.stderr if merged else done.stdout


# Around the server


@asynccontextmanager
async def open_model(tokens: Sequence[str], *, pause_s: float = 0) -> AsyncIterator[str]:
    """Serve a model whose reply is these tokens, with a pause after each. Gives its URL."""

    def event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    async def answer(stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        try:
            await stream.send_all(head)
            for token in tokens:
                await stream.send_all(event({"content": token}))
                await trio.sleep(pause_s)
            await stream.send_all(event({}, "stop") + b"data: [DONE]\n\n")
            await stream.send_eof()
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass  # the server has closed the call

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}/v1"
        nursery.cancel_scope.cancel()


class CuttingProxy:
    """A proxy in front of the server that cuts the first stream after an event.

    Attributes:
        requests: The beginning of each request.
    """

    def __init__(self, target: int, *, cut_after_seq: int) -> None:
        self.port = 0
        self.requests: list[bytes] = []
        self._target = target
        self._cut_after = b"id: %d\n" % cut_after_seq
        self._has_cut = False

    async def serve(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self._target)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, client, server, nursery.cancel_scope)
            seen = b""
            async for data in server:
                seen += data
                if not self._has_cut and self._cut_after in seen:
                    self._has_cut = True
                    await client.send_all(data)
                    break
                await client.send_all(data)
            nursery.cancel_scope.cancel()

    async def _pass_on(
        self, client: trio.SocketStream, server: trio.SocketStream, connection: trio.CancelScope
    ) -> None:
        try:
            async for data in client:
                if data.startswith((b"POST ", b"GET ")):
                    self.requests.append(bytes(data))
                await server.send_all(data)
        except trio.BrokenResourceError:
            pass
        connection.cancel()


@asynccontextmanager
async def open_cutting_proxy(target: int, *, cut_after_seq: int) -> AsyncIterator[CuttingProxy]:
    proxy = CuttingProxy(target, cut_after_seq=cut_after_seq)

    async def serve(client: trio.SocketStream) -> None:
        try:
            await proxy.serve(client)
        except* (trio.BrokenResourceError, OSError):
            pass  # the client or the server has closed the connection

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        proxy.port = listener.socket.getsockname()[1]
        yield proxy
        nursery.cancel_scope.cancel()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{}}
http {{
  access_log off; gzip on; gzip_proxied any;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://127.0.0.1:{target}; }}
    location /usual/ {{
      proxy_pass http://127.0.0.1:{target}/;
      proxy_set_header Host $host;
      proxy_set_header X-Real-IP $remote_addr;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto $scheme;
    }}
    location /ai/ {{ proxy_pass http://127.0.0.1:{target}; }}
    location /taken-off/ai/ {{ proxy_pass http://127.0.0.1:{target}/; }}
  }}
}}
"""
HAPROXY = """
global
  stats socket {folder}/haproxy.sock mode 600 level user
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
frontend clients
  bind 127.0.0.1:{port}
  default_backend lastcall
backend lastcall
  option httpchk GET /readyz
  server one 127.0.0.1:{target} check inter 200ms rise 1 fall 1
"""


@asynccontextmanager
async def open_nginx(target: int) -> AsyncIterator[int]:
    """Run nginx in front of a server, with little configuration. Gives its port."""
    options = ("-e", "{folder}/nginx.log", "-p", "{folder}", "-c")
    async with open_proxy("nginx", NGINX, options, target=target) as (port, _):
        yield port


@asynccontextmanager
async def open_haproxy(target: int) -> AsyncIterator[tuple[int, Path]]:
    """Run HAProxy in front of a server, which it probes. Gives its port, and the socket of its statistics."""
    async with open_proxy("haproxy", HAPROXY, ("-db", "-f"), target=target) as (port, folder):
        yield port, folder / "haproxy.sock"


@asynccontextmanager
async def open_proxy(
    program: str,
    template: str,
    options: Sequence[str],
    *,
    log: Path | None = None,
    start_s: float = CAP_S,
    **values: object,
) -> AsyncIterator[tuple[int, Path]]:
    """Run a proxy as a user without rights. Gives its port, and the folder of its files.

    Args:
        template: Its configuration, with the fields ``folder``, ``port`` and those of ``values``.
        options: Those before the path of the configuration, with the field ``folder``.
        log: What it prints; a file in its folder if left out.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        _lay_out(folder, template.format(folder=folder, port=port, **values))
        command = [program_path(program) or program, *(it.format(folder=folder) for it in options), f"{folder}/config"]
        user = {"user": "nobody"} if os.geteuid() == 0 else {}
        log = log or folder / "log"
        async with open_process(command, log=log, **user):
            await wait_listening(port, log, within_s=start_s)
            yield port, folder


def _lay_out(folder: Path, config: str) -> None:
    folder.chmod(0o777)  # nginx runs as another user
    (folder / "config").write_text(config)


@asynccontextmanager
async def open_express(folder: Path, target: int) -> AsyncIterator[int]:
    """Run Express with its compression in front of a server. Gives its port."""
    log = folder / "express.log"
    command = [NODE, "express_proxy.mjs", f"http://127.0.0.1:{target}"]
    async with open_process(command, log=log, cwd=folder):
        with trio.fail_after(CAP_S):
            while not (printed := log.read_text()).endswith("\n"):  # noqa: ASYNC110, ASYNC240
                await trio.sleep(0.02)
        yield int(printed)


@asynccontextmanager
async def open_process(
    command: Sequence[str], *, log: Path, **options: object
) -> AsyncIterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(  # type: ignore[call-overload]  # noqa: ASYNC220  it takes a moment
            command, stdout=output, stderr=output, **options
        )
    try:
        yield process
    finally:
        process.terminate()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
            await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        if process.poll() is None:
            process.kill()
            process.wait()


async def wait_listening(port: int, log: Path, *, within_s: float = CAP_S) -> None:
    with trio.move_on_after(within_s):
        while True:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
            except OSError:
                await trio.sleep(0.05)
            else:
                return
    raise MissingError(f"the proxy does not listen: {log.read_text()[-500:]}")  # noqa: ASYNC240


async def probe_status(stats: Path) -> str:
    """The status of HAProxy's last probe, without the mark that HAProxy adds while the next probe runs."""
    async with await trio.open_unix_socket(str(stats)) as stream:
        await stream.send_all(b"show stat\n")
        told = b"".join([data async for data in stream]).decode()
    rows = csv.DictReader(io.StringIO(told.removeprefix("# ")))
    return next(row["check_status"].removeprefix("* ") for row in rows if row["svname"] == "one")
