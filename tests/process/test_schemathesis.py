"""The OpenAPI document is true: schemathesis finds no 5xx and no answer that the document does not have."""

import faulthandler
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
from service.api.http.callers import OWNER
from tests.process.lastcall import SERVE

pytestmark = [pytest.mark.parallel, pytest.mark.long]

IN_CI = "CI" in os.environ
EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "200" if IN_CI else "20"))
"""The least number of calls of each operation that takes input. On a developer's machine: a few seconds of calls."""
IS_WHOLE = EXAMPLES >= 200
"""Whether so many calls are made that each documented answer is met."""
CAP_S = 1500
"""The bound of the test, in place of pytest's for all tests: alone on two cores it takes some six minutes."""
ANSWER_S = 60
"""Bound of an answer, and of the start. Not a promise: other tests run on the same machine."""
MODEL = "scripted:?tokens=3&rate=0&first_token_s=0"
NOT_MET = {
    *(("openapi", "200"), ("start_turn", "204"), ("retry_turn", "204"), ("chat", "204")),
    *(("get_conversation_item", "200"), ("delete_conversation_item", "200")),
}
"""schemathesis reads ``openapi`` itself. The others need the id of a turn's last event and the turn's input, or an item
of a conversation, whose fields the schema does not tell."""
LEFT_OUT = ("stream_live_tree", "drain")
"""A stream that ends with the server, and the call that ends the server."""
CREATORS = ("create_session", "start_turn")
SEEDS = 6
"""In CI the runs have fixed seeds below this one, and those beyond the first run only for answers that were not met."""


class Schemathesis:
    """Runs of schemathesis against one server, and the answers that these runs have seen."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._seen = folder / "answers"
        self._folder = folder

    async def run(self, *arguments: str) -> None:
        command = [
            *(str(Path(sys.executable).parent / "schemathesis"), "run", self.url, "--no-color"),
            *("--max-examples", str(EXAMPLES), "--request-timeout", str(ANSWER_S), *arguments),
            # Checks of ours replace the first two (see the hooks). The last does not expect an id to be used again.
            *("--exclude-checks", "positive_data_acceptance,negative_data_rejection,use_after_free"),
            *(it for operation_id in LEFT_OUT for it in ("--exclude-operation-id", operation_id)),
            *(("--seed", "1") if IN_CI and "--seed" not in arguments else ()),
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

    async def run_some(self, phases: str, operation_ids: set[str], *, seed: int) -> None:
        included = (f"--include-operation-id={it}" for it in sorted(operation_ids))
        await self.run("--phases", phases, "--seed", str(seed), *included)

    def answers(self) -> Counter[tuple[str, str]]:
        """The number of answers by operation and status."""
        lines = {line for line in self._seen.read_text().splitlines() if line}
        return Counter((operation, status) for _, operation, status in map(str.split, lines))

    def calls(self, operation_id: str) -> int:
        return sum(count for (called, _), count in self.answers().items() if called == operation_id)


async def test_the_server_does_what_its_openapi_document_says(tmp_path: Path) -> None:
    env = {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_STORE_URL": "memory:", "LASTCALL_MODEL_URL": MODEL}
    launch = Launch(SERVE.argv(), env=env)
    faulthandler.cancel_dump_traceback_later()
    with trio.fail_after(CAP_S):
        async with open_server(launch, log_path=tmp_path / "log", start_timeout_s=ANSWER_S) as server:
            url = f"http://127.0.0.1:{server.port}/openapi.json"
            async with httpx.AsyncClient(timeout=ANSWER_S) as client:
                operations = operations_of((await client.get(url)).json())
            schemathesis = Schemathesis(url, tmp_path)
            await schemathesis.run("--phases", "coverage,fuzzing", "--workers", "1")
            await schemathesis.run("--phases", "stateful")  # alone: another would delete its sessions
            for operation_id, operation in operations.items():
                names = {it["name"] for it in operation["parameters"]} - {OWNER}  # which the hooks leave out
                if not (names or "requestBody" in operation):
                    continue
                if schemathesis.calls(operation_id) < EXAMPLES:
                    # Beside others some operations get few calls: two of 200, when creators were beside them.
                    await schemathesis.run("--phases", "fuzzing", f"--include-operation-id={operation_id}")
                    assert schemathesis.calls(operation_id) >= EXAMPLES, operation_id
            for seed in range(2, SEEDS if IS_WHOLE else 2):
                # schemathesis draws at random: answers that its runs have not met may come in further runs.
                if unmet := {operation_id for operation_id, _ in unmet_by(schemathesis.answers(), operations)}:
                    await schemathesis.run_some("fuzzing", {*CREATORS, *unmet}, seed=seed)
                    # Without the creators, beside which few calls lead to these operations.
                    await schemathesis.run_some("stateful", {*unmet, *leading_to(unmet, operations)}, seed=seed)
    if IS_WHOLE:
        assert not unmet_by(schemathesis.answers(), operations)


def unmet_by(answers: Counter[tuple[str, str]], operations: dict[str, Any]) -> set[tuple[str, str]]:
    """The operations and statuses of success in the document that no run has met."""
    documented = {(it, status) for it, operation in operations.items() for status in operation["responses"]}
    return {(it, status) for it, status in documented - NOT_MET if status.startswith("2") and not answers[it, status]}


def leading_to(operation_ids: set[str], operations: dict[str, Any]) -> set[str]:
    """The operations whose answers have what calls of these need, as the links of the document say."""
    return {
        it
        for it, operation in operations.items()
        for response in operation["responses"].values()
        for link in response.get("links", {}).values()
        if link["operationId"] in operation_ids
    }


def operations_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        operation["operationId"]: operation
        for methods in document["paths"].values()
        for operation in methods.values()
        if operation["operationId"] not in LEFT_OUT
    }
