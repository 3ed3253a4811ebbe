"""The examples of the clients in ``clients/``, on the page about clients, print what the page shows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from bench.server_process import Launch, open_server, python_command
from tests.docs.blocks import COMMAND_TIMEOUT_S, ROOT, mask
from tests.node import NODE

PAGE = (ROOT / "docs/clients.md").read_text()
EXAMPLE = re.compile(r"(?ms)^```(?P<language>python|js)\n(?P<code>.*?)^```\n\n```text\n(?P<shown>.*?)^```$")
EXAMPLES = {found["language"]: found for found in EXAMPLE.finditer(PAGE)}
LINES_MAX = 24
"""A reader takes in an example of this length at a glance."""
COMMANDS = {
    "python": ([sys.executable, "example.py"], ROOT / "clients/python/lastcall_client.py"),
    "js": ([NODE, "example.mjs"], ROOT / "clients/js/lastcall.js"),
}
"""How a language's example runs, and the file that it needs beside it."""


@pytest.mark.parametrize("language", COMMANDS)
async def test_the_example_of_a_client_prints_what_the_page_shows(tmp_path: Path, language: str) -> None:
    example = EXAMPLES[language]
    assert example["code"].count("\n") <= LINES_MAX
    command, client = COMMANDS[language]
    shutil.copy(client, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')  # as in a project of modules
    launch = Launch(python_command("-m", "service", "serve"), env={"LASTCALL_BIND": "127.0.0.1:0"}, folder=tmp_path)
    async with open_server(launch, log_path=tmp_path / "server.log", start_timeout_s=60) as server:
        code = example["code"].replace("localhost:8000", f"127.0.0.1:{server.port}")
        (tmp_path / f"example.{'py' if language == 'python' else 'mjs'}").write_text(code)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LASTCALL_")}
        with trio.fail_after(COMMAND_TIMEOUT_S):
            done = await trio.run_process(
                command, cwd=tmp_path, env=kept, capture_stdout=True, stderr=subprocess.STDOUT, check=False
            )
    assert mask(done.stdout.decode()) == mask(example["shown"])
    assert done.returncode == 0
