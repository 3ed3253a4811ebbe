"""The page of calls, docs/api.md: its sections, and its examples in three languages.

An example is a block of ``sh``, one of ``python`` and one of ``js``, and then the answer that all of them print
(``text``), if they print one. The blocks of one language are one program: what a block defines, the later ones use.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.docs.blocks import COMMAND_TIMEOUT_S, ROOT
from tests.node import NODE

PAGE = ROOT / "docs/api.md"
SERVER = "localhost:8000"
"""The server on the page."""
KEY = "the-key-of-your-server"
"""The API key on the page."""
LANGUAGES = ("sh", "python", "js")
_ANSWER = "text"
_END = "--- end of an example ---"
_HEADING = re.compile(r"^#{2,4} (?P<heading>.+)$")
_OPERATION = re.compile(r"^`(?P<method>[A-Z]+) (?P<path>/\S*)`$")
_FENCE = re.compile(r"^```(?P<language>\w*)$")


@dataclass(frozen=True)
class Example:
    """What one example does in each language. ``line`` is where it begins on the page, ``shown`` its answer there."""

    line: int
    code: Mapping[str, str]
    shown: str | None

    def __str__(self) -> str:
        return f"{PAGE.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading. ``operation`` is its method and path, if it is about one."""

    heading: str
    text: str
    examples: Sequence[Example]

    @property
    def operation(self) -> tuple[str, str] | None:
        found = _OPERATION.match(self.heading)
        return None if found is None else (found["method"], found["path"])


def sections_of(page: str) -> Iterator[Section]:
    """The sections of the page, in order. Raises: ValueError, for blocks that are no example."""
    lines = page.splitlines()
    begins = [number for number, line in enumerate(lines) if _is_heading(lines, number) and line.startswith("##")]
    for begin, end in zip(begins, [*begins[1:], len(lines)], strict=True):
        found = _HEADING.match(lines[begin])
        assert found is not None, lines[begin]
        text = "\n".join(lines[begin + 1 : end]).strip("\n")
        yield Section(found["heading"], text, tuple(_examples(lines[begin + 1 : end], line=begin + 2)))


def _is_heading(lines: Sequence[str], number: int) -> bool:
    fences = [line for line in lines[:number] if line.startswith("```")]
    return len(fences) % 2 == 0 and lines[number].startswith("#")


def _examples(lines: Sequence[str], *, line: int) -> Iterator[Example]:
    blocks = list(_blocks(lines, line=line))
    while blocks:
        begin = blocks[0][0]
        languages = tuple(language for _, language, _ in blocks[:3])
        if languages != LANGUAGES:
            raise ValueError(f"docs/api.md:{begin}: an example is a block of each of {LANGUAGES}, not {languages}")
        code = {language: text for _, language, text in blocks[:3]}
        del blocks[:3]
        shown = blocks.pop(0)[2] if blocks and blocks[0][1] == _ANSWER else None
        yield Example(begin, code, shown)


def _blocks(lines: Sequence[str], *, line: int) -> Iterator[tuple[int, str, str]]:
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        begin = number = number + 1
        if fence is None:
            continue
        while lines[number] != "```":
            number += 1
        yield line + begin - 1, fence["language"], "\n".join(lines[begin:number]) + "\n"
        number += 1


# Programs

_PYTHON_BEGIN = """\
def _print_as_json():
    import builtins, json

    def shown(value):
        builtins.print(value if isinstance(value, str) else json.dumps(value), flush=True)

    return shown


print = _print_as_json()
"""
_JS_BEGIN = """\
{
  const { log } = console;
  console.log = (value) => log(typeof value === "string" ? value : JSON.stringify(value));
}
"""


@dataclass(frozen=True)
class Language:
    """How the blocks of a language become a program.

    ``begin`` lets the program print values as JSON, whose form on a terminal differs from language to language.
    """

    file: str
    begin: str
    end_of_example: str
    command: Callable[[str], Sequence[str]]


_RUN = {
    "sh": Language("program.sh", "", f"printf '\\n%s\\n' '{_END}'\n", lambda file: ["bash", "-e", file]),
    "python": Language("program.py", _PYTHON_BEGIN, f"print({_END!r})\n", lambda file: [sys.executable, file]),
    "js": Language("program.mjs", _JS_BEGIN, f"console.log({_END!r});\n", lambda file: [NODE, file]),
}


def run_examples(
    examples: Sequence[Example], language: str, *, folder: Path, environ: Mapping[str, str], port: int
) -> list[str]:
    """Run the examples of one language as one program, in order, and return what each has printed.

    Args:
        port: The real port of the server that the page has on port 8000.

    Raises:
        AssertionError: The program failed, or complained.
    """
    how = _RUN[language]
    parts = [example.code[language].replace(SERVER, f"localhost:{port}") for example in examples]
    program = how.begin + "".join(part + how.end_of_example for part in parts)
    (folder / how.file).write_text(program)
    done = subprocess.run(
        how.command(how.file),
        cwd=folder,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=COMMAND_TIMEOUT_S,
        text=True,
        check=False,
    )
    *printed, rest = done.stdout.split(f"{_END}\n")
    if done.returncode or done.stderr or len(printed) != len(examples):
        where = examples[min(len(printed), len(examples) - 1)]
        raise AssertionError(f"{where} in {language} ended with {done.returncode}:\n{rest}\n{done.stderr}")
    return printed
