"""The commands in the documents print the output that the documents show."""

import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from bench.server_process import Launch, open_server, python_command
from tests.docs.blocks import DOCUMENTS, ROOT, Block, agrees, blocks_of, run

BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
NOT_RUN = {
    "CONTRIBUTING.md": ["makes an environment in the checkout"],
    "README.md": [
        "serves until it is stopped",
        "the tests that run this would run themselves",
        "needs a model server",
        "binds the machine's addresses",
    ],
    "docs/admin.md": ["needs a server", "needs a server", "needs a server"],
    "docs/traces.md": ["installs into an environment, and needs a collector"],
    "bench/README.md": ["measures for minutes", "measures for minutes"],
    "docs/operations.md": [
        "installs into /opt",
        "installs into /opt",
        "needs a store in /var/lib",
        "needs a store in /var/lib",
    ],
    "docs/own-model.md": ["two servers in two terminals"],
    "examples/README.md": ["two servers in two terminals", "talks with the reader"],
}
"""The reasons of the blocks that do not run, by document. Another such block needs a line here."""


def test_the_blocks_that_do_not_run_are_these() -> None:
    reasons: dict[str, list[str]] = {}
    for block in BLOCKS:
        if block.norun is not None:
            reasons.setdefault(str(block.document), []).append(block.norun)
    assert reasons == NOT_RUN


CANCELLED = {"README.md": "What is a cancel scope?"}
"""The message of the turn that a document cancels by one of its next commands."""
SLEEP = r"""
sleep() {  # a reader waits for seconds until the reply has begun; a busy machine may take longer
  until session=$(curl -s localhost:8000/sessions | grep -o 'sess_[0-9a-f]*' | head -1) &&
    curl -s "localhost:8000/sessions/$session/turns" | grep -q '"text":"0 '
  do command sleep 0.1
  done
}
"""


@asynccontextmanager
async def serving(folder: Path, document: Path, *, needed: bool) -> AsyncIterator[int | None]:
    """Run the server that the reader of a document has started; give its port."""
    if not needed:
        yield None
        return
    env = {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_LOG_FORMAT": "json", "PYTHONPATH": str(ROOT)}
    cancelled = CANCELLED.get(str(document))
    module = ("service",) if cancelled is None else ("tests.docs.held_reply", cancelled)
    launch = Launch(python_command("-m", *module, "serve"), env=env, folder=folder)
    async with open_server(launch, log_path=folder / "server.log", start_timeout_s=60) as server:
        yield server.port


def environ() -> dict[str, str]:
    """The environment of a reader: the project's commands are on the path, and no setting is made."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LASTCALL_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def asks_the_server(block: Block) -> bool:
    """Whether a block needs the server that runs already, and does not start one."""
    return re.search(r"\b(localhost|127\.0\.0\.1):8000\b", block.text) is not None and not starts_a_server(block)


def starts_a_server(block: Block) -> bool:
    return re.search(r"\blastcall serve\b|\bhypercorn\b", block.text) is not None


RUN = [document for document in DOCUMENTS if any(it.document == document and not it.norun for it in BLOCKS)]


@pytest.mark.parametrize("document", RUN, ids=str)
async def test_a_document_shows_the_output_of_its_commands(document: Path, tmp_path: Path, port: int) -> None:
    blocks = [block for block in BLOCKS if block.document == document and block.norun is None]
    async with serving(tmp_path, document, needed=any(map(asks_the_server, blocks))) as served:
        for block in blocks:
            block_port, before = (port, SLEEP) if starts_a_server(block) else (served, "")
            type_in = partial(run, block, folder=tmp_path, environ=environ(), server_port=block_port, before=before)
            printed = await trio.to_thread.run_sync(type_in)
            if block.language == "console":
                for command, shown, output in zip(block.commands, block.outputs, printed, strict=True):
                    assert agrees(shown, output), f"{block}: {command}\nshown:\n{shown}\nprinted:\n{output}"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nb\n", "a\nc\n", False),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nb\nc\n", False),
        (
            '{"id":"turn_' + "0" * 32 + '","at":"2026-01-31T09:30:00Z"}\n',
            '{"id":"turn_' + "f" * 32 + '","at":"2027-02-01T00:00:00.5Z"}\n',
            True,
        ),
        ('{"id":"turn_' + "0" * 32 + '"}\n', '{"id":"sess_' + "f" * 32 + '"}\n', False),
    ],
)
def test_an_output_is_compared_line_by_line_without_ids_and_times(shown: str, printed: str, *, same: bool) -> None:
    assert agrees(shown, printed) is same
