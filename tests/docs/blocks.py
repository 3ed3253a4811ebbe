"""The shell blocks of the documents: found, run and compared with the output that the document shows.

A block is fenced with ``sh`` (commands, one after the other) or with ``console`` (``$ command``, then its output). One
that cannot run says so in its fence: ``sh norun: needs a network``.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = tuple(
    sorted(
        path.relative_to(ROOT)
        for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench/README.md", ROOT / "examples/README.md")
        if path.exists() and path.name not in ("CHANGELOG.md", "api.md")
    )
)
"""The documents with commands of a shell. Those of docs/api.md are run by tests.docs.test_api_page."""
COMMAND_TIMEOUT_S = 300
"""Bound of the commands of a block, or of a whole page; not a promise of the server."""

_FENCE = re.compile(r"^```(?P<language>sh|console)(?: norun: (?P<norun>.+))?$")
_SHELL_FENCE = re.compile(r"^\s*```\s*(?:sh|bash|shell|console)\b")
_END = "--- end of a command ---"


@dataclass(frozen=True)
class Block:
    """A shell block. ``line`` is where its fence stands, from 1."""

    document: Path
    line: int
    language: str
    norun: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands that the reader types."""
        return [command for command, _ in self._parts()] if self.language == "console" else [self.text]

    @property
    def outputs(self) -> list[str]:
        """The output that the document shows for each command of a ``console`` block."""
        return [output for _, output in self._parts()]

    def _parts(self) -> Iterator[tuple[str, str]]:
        for part in re.split(r"(?m)^\$ ", self.text)[1:]:
            command, output = re.match(r"((?:[^\n]*\\\n)*[^\n]*\n?)(.*)\Z", part, re.DOTALL).groups()  # type: ignore[union-attr]
            yield command.rstrip("\n"), output


def blocks_of(document: Path) -> Iterator[Block]:
    """The shell blocks of a document, in order. Raises: ValueError, for a fence that is neither run nor excused."""
    lines = (ROOT / document).read_text().splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if (fence := _FENCE.match(line)) is None:
            if _SHELL_FENCE.match(line):
                raise ValueError(f"{document}:{number}: a shell block begins with ```sh or ```console, not with {line}")
            continue
        begun = number
        while lines[number] != "```":
            number += 1
        yield Block(document, begun, fence["language"], fence["norun"], "\n".join(lines[begun:number]) + "\n")
        number += 1


def run(
    block: Block, *, folder: Path, environ: Mapping[str, str], server_port: int | None, before: str = ""
) -> list[str]:
    """Run a block's commands in one shell, and return the output of each.

    Args:
        server_port: The real port of the server that the document has on port 8000; None if the block starts its own.
        before: What the shell runs before, and does not print.

    Raises:
        AssertionError: A command of an ``sh`` block failed.
    """
    script = before + f"\necho '{_END}'\n".join([*block.commands, ""])
    if server_port is not None:
        script = re.sub(r"\b(localhost|127\.0\.0\.1):8000\b", rf"\1:{server_port}", script)
    options = ["-e"] if block.language == "sh" else []
    done = subprocess.run(
        ["bash", *options, "-c", script],
        cwd=folder,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=COMMAND_TIMEOUT_S,
        text=True,
        check=False,
    )
    output = done.stdout if server_port is None else done.stdout.replace(f":{server_port}", ":8000")
    if block.language == "sh":
        assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{output}"
    return output.split(f"{_END}\n")[:-1]


_MASKS = (
    (re.compile(r"\b(turn|sess|msg)_[0-9a-f]{32}\b"), r"\1_*"),
    (re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"), "TIME"),
    (re.compile(r"\b\d+\.\d+\b"), "NUMBER"),
    (re.compile(r'(?m)(^id: |"(?:seq|text_length)":|"pid": )\d+'), r"\1NUMBER"),
)


def mask(text: str) -> str:
    """The text without the parts that differ between runs: ids, times, fractions, and the length of a stream."""
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text.strip("\n")


def agrees(shown: str, printed: str) -> bool:
    """Whether the printed text is the text that a document shows; a line ``...`` stands for any lines."""
    pattern = r"(?:.*\n)*".join(re.escape(part) for part in re.split(r"(?m)^\.\.\.\n", mask(shown) + "\n"))
    return re.fullmatch(pattern, mask(printed) + "\n") is not None
