"""A server that several tests share: it lives in a fixture, outside of the event loop of any test.

A test that signals its server and looks at the end of it takes :func:`bench.server_process.open_server`.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.server_process import python_command

CAP_S = 120
"""Bound of the start and of the end: each takes a second, and many times that on a busy machine."""
SERVE = ("-m", "service", "serve")
_LISTENS = re.compile(r"Running on (http://[0-9.:]+)")


@contextmanager
def kept_server(
    folder: Path, settings: Mapping[str, str], *, config: str = "", command: Sequence[str] = SERVE
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server until the block is left: its URL and its process. It may be stopped in the block.

    It has to end by itself or by the SIGTERM of the leaving, with the exit code 0 and without a traceback in its log.

    Args:
        folder: Its working directory, where its log and its ``lastcall.toml`` are.
        settings: By their names in lower case. Without others: a store in memory, a free port of this machine, and time
            for the stop also on a busy machine.
        config: The content of ``lastcall.toml``.
        command: The arguments of Python, which write the line ``Running on http://…``.
    """
    own = {"bind": "127.0.0.1:0", "store_url": "memory:", "log_format": "json", "release_timeout_s": "30"}
    settings = own | dict(settings)
    (folder / "lastcall.toml").write_text(config)
    env = {name: value for name, value in os.environ.items() if not name.startswith("LASTCALL_")}
    env |= {f"LASTCALL_{name.upper()}": value for name, value in settings.items()}
    log = folder / f"server-{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            python_command(*command), env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + CAP_S
        while (found := _LISTENS.search(log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield found[1], process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(CAP_S) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait(CAP_S)
