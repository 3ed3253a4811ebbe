"""OpenAI-compatible servers from PyPI, which this project did not write, as subprocesses on a free port."""

import ctypes
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_START_TIMEOUT_S = 60.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RUNNING = re.compile(r"Uvicorn running on (http://127\.0\.0\.1:\d+)")


@contextmanager
def running_fakellm(directory: Path, config: str = "version: 1\nrules: []\n") -> Iterator[str]:
    """Run fakellm with a configuration (its YAML); gives the URL without a path.

    By default it answers each prompt with a fingerprint of it, word by word, 10 ms apart.
    """
    path = directory / "fakellm.yaml"
    path.write_text(config)
    with _running(["fakellm", "serve", "--port", "0", "--config", str(path)], directory / "fakellm.log") as url:
        yield url


@contextmanager
def running_llmock(directory: Path, *options: str) -> Iterator[str]:
    """Run llmock; gives the URL without a path. Faults can be posted to its ``/_llmock/scenario``."""
    with _running(["llmock", "serve", "--port", "0", *options], directory / "llmock.log") as url:
        yield url


def script_llmock(url: str, *behaviors: dict[str, object]) -> None:
    """Tell llmock what to do with its next requests, such as ``{"type": "fail", "status": 503}``."""
    body = json.dumps({"behaviors": behaviors}).encode()
    with urllib.request.urlopen(f"{url}/_llmock/scenario", body, timeout=_START_TIMEOUT_S) as response:
        response.read()


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[str]:
    program = Path(sys.executable).with_name(command[0])
    prctl = ctypes.CDLL(None).prctl
    with log.open("wb") as output:
        server = subprocess.Popen(
            [program, *command[1:]],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            # A test run that is itself killed cannot tidy up. The fork runs nothing but this one system call.
            preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
        )
    try:
        yield _wait_running(server, log)
    finally:
        server.kill()
        server.wait()


def _wait_running(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        running = _RUNNING.search(log.read_text())
        if running:
            return running[1]
        time.sleep(0.02)
    raise RuntimeError(f"{log.stem} did not start: {log.read_text()[-2000:]}")
