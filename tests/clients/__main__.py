"""Runs client libraries and proxies against a real server.

``just clients`` installs the pinned versions into a folder of its own and prints the results; ``just clients
--newest`` takes the newest ones instead. ``just clients nginx polyfill`` runs the checks whose names have these words.
``just clients --codex`` runs Codex CLI instead of the others, and installs nothing else: it is large.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import trio

from tests.clients.checking import check
from tests.clients.frameworks import (
    AGENTS_ENDS,
    NPM_ENDS,
    PYDANTIC_ENDS,
    Command,
    cuts,
    framework,
    talk_through_restarts,
)
from tests.clients.frameworks import turns as turns_of
from tests.clients.surroundings import (
    CAP_S,
    CODEX,
    HERE,
    LIBRARIES,
    MissingError,
    install_debian_packages,
    open_cutting_proxy,
    open_express,
    open_haproxy,
    open_model,
    open_nginx,
    probe_status,
)
from tests.node import NODE
from tests.process.lastcall import HYPERCORN_0, SERVE, SSE, Host, open_lastcall

HTTPX_SSE = "0.4.3"
"""The newest version that makes an event of every blank line."""
OPENAPI_PYTHON_CLIENT = "0.29.1"
OPENAI_AGENTS = "0.24.0"
PYDANTIC_AI = "2.68.0"
TSC = (
    *(NODE, "node_modules/.bin/tsc", "--strict", "--skipLibCheck"),
    *("--target", "es2022", "--lib", "es2022,dom,dom.asynciterable"),
    *("--module", "nodenext", "--outDir", "."),
)
TOKENS = 20
PLAIN = ("token ",) * TOKENS
LAST_SEQ = TOKENS + 2
LINE_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj\nk"
KEY_ALONE = "the-key-of-the-clients"
READING_KEY = "the-key-that-may-read"
KEY = {"Authorization": f"Bearer {KEY_ALONE}"}
CALL = quote('get_weather:{"city":"Oslo"}')
REPOSTS_MAX = 20
"""Bound on the POSTs in the four seconds after a completed turn: event-source-plus doubles its wait from 2 ms on."""


@dataclass(frozen=True)
class Surroundings:
    """The packages that are installed for the checks."""

    node: Path
    httpx_sse: str
    openapi_python_client: str
    openai_agents: Command
    pydantic_ai: Command


@asynccontextmanager
async def open_service(
    host: Host = SERVE, *options: str, tokens: tuple[str, ...] = PLAIN, pause_s: float = 0.1, **settings: Any
) -> AsyncIterator[int]:
    """Start a real server with a model behind it, whose turns outlive a cut. Gives its port."""
    settings["disconnect_grace_s"] = 20
    argv = [*host.argv(), *options]
    with tempfile.TemporaryDirectory() as folder:
        async with (
            open_model(tokens, pause_s=pause_s) as model_url,
            open_lastcall(host, Path(folder), argv=argv, model_url=model_url, **settings) as server,
        ):
            assert server.port is not None
            yield server.port


async def call(port: int, method: str, path: str, body: object = None, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=CAP_S) as client:
        return await client.request(method, path, json=body, headers=headers)


async def turns(port: int) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = (await call(port, "GET", "/sessions/me/turns")).json()["data"]
    return data


def check_whole(seen: dict[str, Any]) -> None:
    """Check that each event is there once, in order, to the end, and that none is empty."""
    check(seen["seqs"] == list(range(1, LAST_SEQ + 1)), f"the events it saw are {seen['seqs']}")
    check(seen["last"] == "turn.completed", f"the last event is {seen['last']}")
    check(not seen["empty"], f"{seen['empty']} events are empty")


async def run_library(around: Surroundings, *arguments: str) -> dict[str, Any]:
    command = [NODE, "libraries.mjs", *arguments]
    done = await trio.run_process(command, cwd=around.node, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    check(done.returncode == 0, done.stdout.decode()[-500:])
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


async def reposts(around: Surroundings, library: str) -> str:
    """The library repeats a cut POST with Last-Event-ID: the stream goes on, and the model is called once."""
    async with open_service() as port, open_cutting_proxy(port, cut_after_seq=5) as proxy:
        body = json.dumps({"session_id": "me", "message": "Hi"})
        seen = await run_library(around, library, f"http://127.0.0.1:{proxy.port}/chat", body)
        check_whole(seen)
        started = await turns(port)
        check([turn["state"] for turn in started] == ["completed"], f"the turns are {started}")
        again = [request for request in proxy.requests if b"last-event-id: " in request.lower()]
        check(len(proxy.requests) >= 2 and len(again) == len(proxy.requests) - 1, proxy.requests)
        check(len(again) <= REPOSTS_MAX, f"it came back {len(again)} times")
        bare = seen["statuses"].count(204)
        return f"cut once, came back {len(again)} times, {bare} after the end: one turn, {LAST_SEQ} events, each once"


async def resumes(around: Surroundings, library: str, by: bytes) -> str:
    """The library repeats a cut GET of events: the stream goes on after the last event."""
    async with open_service() as port, open_cutting_proxy(port, cut_after_seq=5) as proxy:
        await call(port, "POST", "/sessions", {"id": "me"})
        started = await call(port, "POST", "/sessions/me/turns", {"input": "Hi", "background": True})
        url = f"http://127.0.0.1:{proxy.port}{started.headers['location']}/events"
        seen = await run_library(around, library, url)
        check_whole(seen)
        resumed = [int(found[1]) for request in proxy.requests if (found := re.search(by + rb"([0-9]+)", request))]
        check(5 <= min(resumed, default=0) < LAST_SEQ, f"it has not resumed with {by!r}: {proxy.requests}")
        asked, state = len(proxy.requests), seen["statuses"][0]
        return f"cut once, resumed with {by.decode()}{resumed[0]}; after the end it is {state}, {asked} requests"


async def fetch_event_source(around: Surroundings) -> str:
    return await reposts(around, "fetch-event-source")


async def event_source_plus(around: Surroundings) -> str:
    return await reposts(around, "event-source-plus")


async def event_source_polyfill(around: Surroundings) -> str:
    return await resumes(around, "event-source-polyfill", b"lastEventId=")


async def eventsource(around: Surroundings) -> str:
    return await resumes(around, "eventsource", b"Last-Event-ID: ")


async def httpx_sse(around: Surroundings) -> str:
    """No event is empty though there are heartbeats, and none is cut at a line end of Unicode."""
    tokens = (LINE_ENDS, *PLAIN[1:])
    async with open_service(tokens=tokens, heartbeat_interval_s=0.1, pause_s=0.25) as port:
        command = ["uv", "run", "--no-project", "--quiet", "--with", around.httpx_sse, "--with", "httpx"]
        script = ["python", str(HERE / "httpx_sse_client.py"), f"http://127.0.0.1:{port}/chat"]
        done = await trio.run_process([*command, *script], capture_stdout=True, stderr=subprocess.STDOUT, check=False)
        check(done.returncode == 0, done.stdout.decode()[-800:])
        seen = json.loads(done.stdout)
        check_whole(seen)
        check(seen["text"].startswith(LINE_ENDS), f"the text is {seen['text'][:40]!r}")
        return f"{seen['version']}: {LAST_SEQ} events with heartbeats between them, none empty, none cut at a line end"


GENERATED = {
    "title": "A title",
    "sessions": 2,
    "turns": ["completed", "completed", "completed"],
    "messages": 4,
    "text": "".join(PLAIN),
    "texts": ["".join(PLAIN)] * 3,
    "last": ["turn.completed"] * 3,
    "code": "session_not_found",
}
"""The results that a generated client must get, for each generator."""


async def openapi_typescript(around: Surroundings) -> str:
    """Types are generated, compiled strictly, and every operation is called with them."""
    async with open_service(api_keys=KEY_ALONE, pause_s=0) as port:
        url = f"http://127.0.0.1:{port}"
        for command in (
            [NODE, "node_modules/.bin/openapi-typescript", f"{url}/openapi.json", "-o", "schema.d.ts"],
            [*TSC, "generated_client.ts"],
        ):
            done = await trio.run_process(
                command, cwd=around.node, capture_stdout=True, stderr=subprocess.STDOUT, check=False
            )
            check(done.returncode == 0, done.stdout.decode()[-1500:])
        done = await trio.run_process(
            [NODE, "generated_client.js", url, KEY_ALONE],
            cwd=around.node,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
        check(done.returncode == 0, done.stdout.decode()[-1500:])
        seen = json.loads(done.stdout)
        document = (await call(port, "GET", "/openapi.json")).json()
        paths = {path: it for path, it in document["paths"].items() if not path.startswith("/admin/")}
        every = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
        check(set(seen.pop("called")) == every, f"these were not called: {every}")
        check(seen == GENERATED, f"it saw {seen}")
        return f"compiled strictly, {len(every)} operations called, three streams read to the end"


async def own_types(around: Surroundings) -> str:
    """The types of the client in clients/js fit a program that uses it, and refuse its mistakes."""
    command = [*TSC, "--noEmit", "typed_calls.ts"]
    done = await trio.run_process(command, cwd=around.node, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    check(done.returncode == 0, done.stdout.decode()[-1500:])
    return "compiled strictly"


async def openapi_python_client(around: Surroundings) -> str:
    """A client is generated without a warning, and every operation is called with it."""
    async with open_service(api_keys=KEY_ALONE, pause_s=0) as port:
        command = ["uv", "run", "--no-project", "--quiet", "--with", around.openapi_python_client]
        script = ["python", str(HERE / "generated_client.py"), f"http://127.0.0.1:{port}", KEY_ALONE]
        done = await trio.run_process([*command, *script], capture_stdout=True, stderr=subprocess.STDOUT, check=False)
        check(done.returncode == 0, done.stdout.decode()[-1500:])
        seen = json.loads(done.stdout)
        called, missed = seen.pop("called"), seen.pop("not_called")
        check(not missed, f"these were not called: {missed}")
        check(seen == GENERATED, f"it saw {seen}")
        return f"generated without a warning, {len(called)} operations called, three streams read to the end"


async def check_streams_live(server: int, through: int, path: str = "/chat", **headers: str) -> None:
    """Tokens come through while the turn runs, and nothing is compressed, lost or doubled."""
    seen: dict[str, Any] = {"seqs": [], "empty": 0, "last": None}
    running = False
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{through}", timeout=CAP_S) as client:
        body = {"session_id": "me", "message": "Hi"}
        async with client.stream("POST", path, json=body, headers=SSE | headers) as response:
            check(response.status_code == 200, f"the status is {response.status_code}")
            check("content-encoding" not in response.headers, f"it is compressed: {response.headers}")
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    event = json.loads(line.removeprefix("data:"))
                    seen["seqs"].append(event["seq"])
                    seen["last"] = event["type"]
                    if event["seq"] == 3:
                        listed = await call(server, "GET", "/sessions/me/turns", **headers)
                        running = listed.json()["data"][-1]["state"] == "running"
    check_whole(seen)
    check(running, "the first token came only after the turn had ended: it was held back")


async def express_with_compression(around: Surroundings) -> str:
    async with open_service() as port, open_express(around.node, port) as express:
        await check_streams_live(port, express)
        listed = await call(express, "GET", "/docs")
        check(listed.headers.get("content-encoding") is not None, "it compresses nothing: this check proves nothing")
        return "tokens come while the turn runs, though it compresses all else"


async def nginx_without_keys(_: Surroundings) -> str:
    async with open_service() as port, open_nginx(port) as nginx:
        refused = await call(nginx, "GET", "/usual/sessions")
        check(refused.status_code == 403, f"with X-Forwarded-For the status is {refused.status_code}")
        probed = await call(nginx, "GET", "/usual/healthz")
        bare = await call(nginx, "GET", "/sessions")
        return (
            f"403 {refused.json()['code']} where it adds the usual headers ({probed.status_code} for /healthz); "
            f"{bare.status_code} from a bare proxy_pass, which cannot be told from a local caller: set api_keys"
        )


async def nginx_with_keys(_: Surroundings) -> str:
    async with open_service(api_keys=KEY_ALONE) as port, open_nginx(port) as nginx:
        await check_streams_live(port, nginx, "/usual/chat", **KEY)
        check((await call(nginx, "GET", "/usual/sessions")).status_code == 401, "it serves without a key")
        return "tokens come while the turn runs, through its default buffering; 401 without a key"


async def nginx_with_a_prefix(_: Surroundings) -> str:
    async with open_service(HYPERCORN_0, "--root-path", "/ai") as port, open_nginx(port) as nginx:
        for path in ("/ai/sessions", "/taken-off/ai/sessions"):
            created = await call(nginx, "POST", path, {})
            location = created.headers.get("location")
            check(location == f"/ai/sessions/{created.json()['id']}", f"{path}: the location is {location}")
        check((await call(nginx, "GET", "/ai/none")).json()["type"].startswith("/ai/docs#"), "a problem's type")
        return "Location has the prefix, whether nginx passes it on or takes it off"


async def haproxy_probe(_: Surroundings) -> str:
    """HAProxy's probe speaks HTTP/1.0 without a Host: the server answers it as ready."""
    async with open_service() as port, open_haproxy(port) as (haproxy, stats):
        with trio.fail_after(CAP_S):
            while (status := await probe_status(stats)) in ("", "INI"):  # noqa: ASYNC110  it is HAProxy's to say
                await trio.sleep(0.1)
        check(status == "L7OK", f"the probe ended with {status}")
        await check_streams_live(port, haproxy)
        return "its probe is answered (L7OK), and tokens come while the turn runs"


OPENAI_CONFIG = f"""
[[api_keys]]
name = "one"
key = "{KEY_ALONE}"
[[api_keys]]
name = "reader"
key = "{READING_KEY}"
may = ["read"]
"""
OPENAI_MODELS = {
    "text": f"scripted:?tokens={TOKENS}&rate=50&first_token_s=0",
    "answer": "scripted:?rate=0&first_token_s=0",
    "tools": f"scripted:?rate=0&first_token_s=0&call={CALL}",
    "endless": "scripted:?tokens=3&silent_after=2&rate=0&first_token_s=0",
    "limited": "scripted:?fail_after=0&fail_code=rate_limited",
    "broken": "scripted:?tokens=3&fail_after=2&rate=0&first_token_s=0",
}


async def openai_npm(around: Surroundings) -> str:
    """OpenAI's own package makes every call, also through a restart of the server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upstreams = [
            f'[[upstreams]]\nname = "{it}"\nurl = "{url}"\nmodels = ["{it}"]' for it, url in OPENAI_MODELS.items()
        ]
        config = folder / "lastcall.toml"
        config.write_text("\n".join([OPENAI_CONFIG, *upstreams]))
        settings: dict[str, Any] = {"LASTCALL_CONFIG_FILE": config, "model": "text", "model_retries_max": 0}
        async with open_lastcall(SERVE, folder, **settings, live_turns_max=1, turn_timeout_s=2) as tiny:
            tiny_url = f"http://127.0.0.1:{tiny.port}/v1"

            def command(url: str) -> list[str]:
                return [NODE, str(around.node / "openai_calls.mjs"), url, tiny_url, KEY_ALONE, READING_KEY]

            seen, stops = await talk_through_restarts(command, **settings)
        return f"{'; '.join(seen['seen'])}; {stops} restart"


async def openai_npm_and_cut_replies(around: Surroundings) -> str:
    return await cuts(lambda *them: [NODE, str(around.node / "openai_cuts.mjs"), *them], NPM_ENDS, streams=2)


async def openai_npm_over_restarts_in_mid_stream(around: Surroundings) -> str:
    """Responses in the background go on after a stop, for a client that streams and for one that polls."""
    tokens = 40
    text = "".join(f"{number} " for number in range(tokens))
    settings = {
        "model_url": f"scripted:?tokens={tokens}&rate=10&first_token_s=0",
        "on_interrupt": "continue",
        "drain_timeout_s": 0,
    }

    def command(url: str) -> list[str]:
        return [NODE, str(around.node / "openai_handover.mjs"), url, text]

    seen, stops = await talk_through_restarts(command, **settings)
    check(stops == 3, f"there were {stops} restarts")
    return f"{'; '.join(seen['seen'])}; {stops} restarts in mid-stream"


async def openai_agents_through_responses(around: Surroundings) -> str:
    return await turns_of(around.openai_agents, "responses")


async def openai_agents_through_chat_completions(around: Surroundings) -> str:
    return await turns_of(around.openai_agents, "chat")


async def openai_agents_and_cut_replies(around: Surroundings) -> str:
    return await cuts(around.openai_agents, AGENTS_ENDS)


async def pydantic_ai_through_chat_completions(around: Surroundings) -> str:
    return await turns_of(around.pydantic_ai, "chat")


async def pydantic_ai_through_responses(around: Surroundings) -> str:
    return await turns_of(around.pydantic_ai, "responses")


async def pydantic_ai_and_cut_replies(around: Surroundings) -> str:
    return await cuts(around.pydantic_ai, PYDANTIC_ENDS)


async def codex_cli(around: Surroundings) -> str:
    """Codex CLI with its defaults does two turns with a command in each, in a network of loopback alone."""
    alone = ["unshare", "--map-root-user", "--net", "--"]
    [codex] = around.node.glob("node_modules/@openai/codex-*/vendor/*/bin/codex")
    probe = await trio.run_process([*alone, "true"], capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    check(probe.returncode == 0, f"this machine does not let this user make a network namespace: {probe.stdout!r}")
    command = [*alone, sys.executable, "-m", "tests.clients.codex.two_turns", str(codex)]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    check(done.returncode == 0, done.stderr.decode()[-1500:])
    return done.stdout.decode()


Checks = tuple[Callable[[Surroundings], Awaitable[str]], ...]
CODEX_CHECKS: Checks = (codex_cli,)
CHECKS: Checks = (
    fetch_event_source,
    event_source_plus,
    event_source_polyfill,
    eventsource,
    httpx_sse,
    openapi_typescript,
    own_types,
    openapi_python_client,
    express_with_compression,
    nginx_without_keys,
    nginx_with_keys,
    nginx_with_a_prefix,
    haproxy_probe,
    openai_npm,
    openai_npm_and_cut_replies,
    openai_npm_over_restarts_in_mid_stream,
    openai_agents_through_responses,
    openai_agents_through_chat_completions,
    openai_agents_and_cut_replies,
    pydantic_ai_through_chat_completions,
    pydantic_ai_through_responses,
    pydantic_ai_and_cut_replies,
)


async def run_checks(checks: Checks, around: Surroundings, words: list[str]) -> int:
    failed = 0
    for it in checks:
        name = it.__name__.replace("_", "-")
        if words and not any(word in name for word in words):
            continue
        began_at = time.monotonic()
        try:
            with trio.fail_after(CAP_S):
                said = "ok      " + name + ": " + await it(around)
        except* Exception as errors:  # noqa: BLE001  the edge of a check
            failed += 1
            said = f"FAILED  {name}: {first_of(errors)!r}"
        print(f"{said} ({time.monotonic() - began_at:.1f} s)", flush=True)
    return failed


def first_of(errors: BaseException) -> BaseException:
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(prog="just clients", description="Run real clients and proxies against a server.")
    parser.add_argument("--newest", action="store_true", help="the newest packages instead of the pinned ones")
    parser.add_argument("--codex", action="store_true", help="Codex CLI alone, which takes 459 MB")
    parser.add_argument("words", nargs="*", help="run the checks whose names have one of these words")
    arguments = parser.parse_args()

    def pin(version: str) -> str:
        return "" if arguments.newest else f"=={version}"

    packages = CODEX if arguments.codex else LIBRARIES
    try:
        around = Surroundings(
            node=packages.install(newest=arguments.newest),
            httpx_sse=f"httpx-sse{pin(HTTPX_SSE)}",
            openapi_python_client=f"openapi-python-client{pin(OPENAPI_PYTHON_CLIENT)}",
            openai_agents=framework("openai_agents_client.py", f"openai-agents{pin(OPENAI_AGENTS)}"),
            pydantic_ai=framework("pydantic_ai_client.py", f"pydantic-ai-slim[openai]{pin(PYDANTIC_AI)}"),
        )
        versions = packages.versions(around.node) | ({} if arguments.codex else install_debian_packages())
    except MissingError as error:
        print(f"FAILED  {error}")
        return 1
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    failed = trio.run(run_checks, CODEX_CHECKS if arguments.codex else CHECKS, around, arguments.words)
    print(f"clients: {failed} failed" if failed else "clients: all is well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
