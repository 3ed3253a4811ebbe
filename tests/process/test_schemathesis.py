"""The OpenAPI document is true: schemathesis finds no request whose answer is not in it, and no 5xx."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import trio

from bench.server_process import ROOT, Launch, open_server
from tests.process.lastcall import SERVE

EXAMPLES = 200
CAP_S = 600


async def test_the_server_does_what_its_openapi_document_says(tmp_path: Path) -> None:
    launch = Launch(SERVE.argv(), env={"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_MODEL_URL": "scripted:?tokens=3"})
    async with open_server(launch, log_path=tmp_path / "log") as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        seen = tmp_path / "answers"
        seed = ["--seed", "1"] if "CI" in os.environ else []
        command = [
            *(str(Path(sys.executable).parent / "schemathesis"), "run", url, "--no-color"),
            *("--phases", "coverage,fuzzing,stateful", "--max-examples", str(EXAMPLES), *seed),
            *("--exclude-checks", "positive_data_acceptance", "--request-timeout", "15", "--workers", "2"),
        ]
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.api.schemathesis_hooks",
            "ANSWERS_SEEN": str(seen),
        }
        with trio.fail_after(CAP_S):
            run = await trio.run_process(
                command, env=env, check=False, capture_stdout=True, stderr=subprocess.STDOUT, cwd=tmp_path
            )
        assert run.returncode == 0, run.stdout.decode()
        async with httpx.AsyncClient() as client:
            document = (await client.get(url)).json()
    answers = Counter(seen.read_text().splitlines())
    for methods in document["paths"].values():
        for operation in methods.values():
            for status in operation["responses"]:
                if status.startswith("2"):
                    assert answers[f"{operation['operationId']} {status}"], f"never answered: {operation['operationId']} {status}"
            if operation["parameters"] or "requestBody" in operation:
                calls = sum(count for answer, count in answers.items() if answer.split()[0] == operation["operationId"])
                assert calls >= EXAMPLES, f"{operation['operationId']} was called {calls} times"
