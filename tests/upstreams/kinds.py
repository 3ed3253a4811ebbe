"""The model servers of others that Lastcall is run in front of, each with the way to start it.

All come from PyPI or npm, under a version that is written here, into environments of their own. None of them loads a
model from elsewhere: what infers gets one that is written here (``tiny_model.py``).
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import trio

from tests.clients.surroundings import NodePackages, free_port, open_process, wait_listening
from tests.node import NODE

HERE = Path(__file__).parent
INSTALL_S = 600
START_S = 60
CONTEXT = 4096
"""The tokens that a model of ours takes."""
XLLAMACPP = "2026.10.11549"
GGUF = "0.19.0"
MLX_LM = "0.32.2"
NODE_SERVERS = NodePackages(HERE / "node")
GREETING, THOUGHT, ANSWER = "Good evening, dear guest!", "Be polite.", "There it is 4 °C."
BEGUN, REST = "Welcome to you, my dear", " guest!"
"""The text so far of a reply that no model begins so, and how a model of ours goes on after it."""
CITIES = ("Oslo", "Rome")
"""The cities of the two calls of ``get_weather`` that a model makes where it is offered the function."""


@dataclass
class Running:
    """A model server that runs."""

    url: str  # ends in /v1
    kill: Callable[[], None]


@dataclass(frozen=True)
class Kind:
    """A kind of model server.

    Args:
        name: The name in the table, and on the command line.
        package: What is installed for it.
        version: The version of the package.
        what: What the server does, in few words.
        open: Installs the package, and runs the server with a folder for its files.
        model: The model to ask for.
        goes_on: Whether a reply has no end, if the request has instructions.
    """

    name: str
    package: str
    version: str
    what: str
    open: Callable[[Path], AbstractAsyncContextManager[Running]]
    model: str = "tiny"
    goes_on: bool = False

    @property
    def head(self) -> str:
        """The head of its column."""
        if self.name == self.package:
            return f"{self.name} {self.version}"
        return f"{self.name} ({self.package} {self.version})"


@asynccontextmanager
async def _running(command: Sequence[str], log: Path, *, says: str) -> AsyncIterator[Running]:
    """Run a server, and wait until it has printed its address after these words."""
    address = re.compile(rf"{says} *(http://[\w.]+:\d+)")
    async with open_process(command, log=log, cwd=log.parent) as process:
        with trio.move_on_after(START_S):
            while process.poll() is None:
                if found := address.search(log.read_text()):  # noqa: ASYNC240  it takes a moment
                    yield Running(f"{found[1]}/v1", process.kill)
                    return
                await trio.sleep(0.05)
        raise RuntimeError(f"{log.stem} did not start: {log.read_text()[-2000:]}")  # noqa: ASYNC240


async def _python_with(*packages: str) -> str:
    """Install packages into an environment of their own, unless they are there, and return its Python."""
    wanted = "-".join((sys.version.partition(" ")[0], *packages))
    name = f"lastcall-upstreams-{os.getuid()}-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    python, installed = folder / "bin/python", folder / "installed"
    if not installed.exists():  # noqa: ASYNC240  it takes a moment
        with trio.fail_after(INSTALL_S):
            await trio.run_process(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)])
            await trio.run_process(["uv", "pip", "install", "--quiet", "--python", str(python), *packages])
        installed.touch()  # noqa: ASYNC240
    return str(python)


@asynccontextmanager
async def _llama_cpp(folder: Path) -> AsyncIterator[Running]:
    python = await _python_with(f"xllamacpp=={XLLAMACPP}", f"gguf=={GGUF}", "numpy")
    model = str(folder / "tiny.gguf")
    with trio.fail_after(START_S):
        await trio.run_process([python, str(HERE / "tiny_model.py"), model, str(CONTEXT)])
    command = [python, str(HERE / "llama_cpp_server.py"), model, str(CONTEXT)]
    async with _running(command, folder / "llama.cpp.log", says="Running on") as running:
        yield running


@asynccontextmanager
async def _mlx(folder: Path) -> AsyncIterator[Running]:
    python = await _python_with(f"mlx-lm=={MLX_LM}", "mlx[cpu]", "tokenizers", "safetensors", "numpy")
    model, port, log = str(folder / "tiny"), free_port(), folder / "mlx_lm.log"
    with trio.fail_after(START_S):
        await trio.run_process([python, str(HERE / "tiny_model.py"), model, str(CONTEXT)])
    command = [python, "-m", "mlx_lm", "server", "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    (folder / "hub").mkdir()  # it lists the models in this folder, too, and wants it to be there
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_CACHE": str(folder / "hub")}
    async with open_process(command, log=log, cwd=folder, env=os.environ | offline) as process:
        await wait_listening(port, log)
        yield Running(f"http://127.0.0.1:{port}/v1", process.kill)


@asynccontextmanager
async def _aimock(folder: Path) -> AsyncIterator[Running]:
    calls = [{"name": "get_weather", "arguments": json.dumps({"city": city})} for city in CITIES]
    as_json = json.dumps({"city": CITIES[0], "degrees": 4})
    fixtures = [
        {"match": {"hasToolResult": True}, "response": {"content": ANSWER}},
        {"match": {"toolName": "get_weather"}, "response": {"toolCalls": calls, "reasoning": THOUGHT}},
        {"match": {"responseFormat": "json_schema"}, "response": {"content": as_json}},
        {"match": {"responseFormat": "json_object"}, "response": {"content": as_json}},
        {"match": {}, "response": {"content": GREETING, "reasoning": THOUGHT}},
    ]
    (folder / "fixtures.json").write_text(json.dumps({"fixtures": fixtures}))
    packages = await trio.to_thread.run_sync(lambda: NODE_SERVERS.install(newest=False))
    cli = packages / "node_modules/@copilotkit/aimock/dist/cli.js"
    command = [NODE, str(cli), "--port", "0", "--fixtures", str(folder / "fixtures.json")]
    async with _running(command, folder / "aimock.log", says="listening on") as running:
        yield running


_FAKELLM = """
version: 1
rules:
  - name: answer
    when: {{tool_result_contains: "4"}}
    respond: {{content: "{answer}"}}
  - name: calls
    when: {{tools_include: get_weather}}
    respond:
      tool_calls:
        - {{name: get_weather, arguments: {{city: {cities[0]}}}}}
        - {{name: get_weather, arguments: {{city: {cities[1]}}}}}
  - name: greeting
    respond: {{content: "{greeting}"}}
"""


@asynccontextmanager
async def _fakellm(folder: Path) -> AsyncIterator[Running]:
    config = folder / "fakellm.yaml"
    config.write_text(_FAKELLM.format(answer=ANSWER, cities=CITIES, greeting=GREETING))
    program = str(Path(sys.executable).with_name("fakellm"))
    command = [program, "serve", "--port", "0", "--config", str(config)]
    async with _running(command, folder / "fakellm.log", says="Uvicorn running on") as running:
        yield running


@asynccontextmanager
async def _llmock(folder: Path) -> AsyncIterator[Running]:
    program = str(Path(sys.executable).with_name("llmock"))
    async with _running([program, "serve", "--port", "0"], folder / "llmock.log", says="Uvicorn running on") as running:
        yield running


KINDS = (
    Kind("llama.cpp", "xllamacpp", XLLAMACPP, "infers, with a model of one layer", _llama_cpp, goes_on=True),
    Kind("mlx-lm", "mlx-lm", MLX_LM, "infers, with a model of one layer", _mlx, model="default_model", goes_on=True),
    Kind("aimock", "@copilotkit/aimock", "1.43.0", "plays scripted replies", _aimock, model="gpt-5"),
    Kind("fakellm", "fakellm", version("fakellm"), "plays scripted replies", _fakellm),
    Kind("llmock", "llmock", version("llmock"), "echoes, and calls what it is offered", _llmock, model="gpt-4o"),
)
