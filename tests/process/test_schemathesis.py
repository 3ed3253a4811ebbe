"""The OpenAPI document is true: schemathesis finds no request whose answer is not in it, and no 5xx."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from bench.server_process import ROOT, Launch, open_server
from tests.process.lastcall import SERVE

pytestmark = pytest.mark.parallel

IN_CI = "CI" in os.environ
EXAMPLES = 200 if IN_CI else 20
"""How often each operation that takes anything is called, at least. A few seconds' worth at a developer's desk."""
CAP_S = 900
MODEL = "scripted:?tokens=3&rate=0&first_token_s=0"
NOT_MET = {("openapi", "200"), ("start_turn", "204"), ("chat", "204")}
"""The one it has read itself; the others take the id of the last event of a turn, and its input."""
CREATORS = ("create_session", "start_turn")


class Schemathesis:
    """Runs against one server, and the answers that they have seen."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._seen = folder / "answers"
        self._folder = folder

    async def run(self, *arguments: str) -> None:
        command = [
            *(str(Path(sys.executable).parent / "schemathesis"), "run", self.url, "--no-color"),
            *("--max-examples", str(EXAMPLES), "--request-timeout", "15", *arguments),
            # Ours is in place of the one, see the hooks. The other does not know of an id that is chosen once more.
            *("--exclude-checks", "positive_data_acceptance,use_after_free"),
            *("--exclude-operation-id", "root"),  # it is a redirect, and schemathesis follows those
            *(("--seed", "1") if IN_CI else ()),
        ]
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.api.schemathesis_hooks",
            "ANSWERS_SEEN": str(self._seen),
        }
        run = await trio.run_process(
            command, env=env, check=False, capture_stdout=True, stderr=subprocess.STDOUT, cwd=self._folder
        )
        assert run.returncode == 0, run.stdout.decode()

    def answers(self) -> Counter[tuple[str, str]]:
        """How often which operation was answered with which status."""
        lines = {line for line in self._seen.read_text().splitlines() if line}
        return Counter((operation, status) for _, operation, status in map(str.split, lines))

    def calls(self, operation_id: str) -> int:
        return sum(count for (called, _), count in self.answers().items() if called == operation_id)


async def test_the_server_does_what_its_openapi_document_says(tmp_path: Path) -> None:
    env = {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_STORE_URL": "memory:", "LASTCALL_MODEL_URL": MODEL}
    launch = Launch(SERVE.argv(), env=env)
    with trio.fail_after(CAP_S):
        async with open_server(launch, log_path=tmp_path / "log") as server:
            url = f"http://127.0.0.1:{server.port}/openapi.json"
            async with httpx.AsyncClient() as client:
                operations = operations_of((await client.get(url)).json())
            schemathesis = Schemathesis(url, tmp_path)
            await schemathesis.run("--phases", "coverage,fuzzing", "--workers", "2")
            await schemathesis.run("--phases", "stateful")  # alone: another worker would delete what it has made
            for operation_id, operation in operations.items():
                if not (operation["parameters"] or "requestBody" in operation):
                    continue
                if schemathesis.calls(operation_id) < EXAMPLES:
                    # It sends no input twice, and deletes little of what it creates: where it ran out, once more.
                    included = {operation_id} if operation_id == "delete_session" else {operation_id, *CREATORS}
                    await schemathesis.run("--phases", "fuzzing", *(f"--include-operation-id={it}" for it in included))
                    assert schemathesis.calls(operation_id) >= EXAMPLES, operation_id
    answers = schemathesis.answers()
    for operation_id, operation in operations.items():
        for status in operation["responses"]:
            if IN_CI and status.startswith("2") and (operation_id, status) not in NOT_MET:
                assert answers[operation_id, status], f"{operation_id} was never answered with {status}"


def operations_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        operation["operationId"]: operation for methods in document["paths"].values() for operation in methods.values()
    }
