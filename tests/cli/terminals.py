"""A program on a pseudo-terminal, with a small model of its screen; and a server that the tests of a module share."""

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.kept_server import kept_server

CAP_S = 60
"""Bound of each wait: a program takes a second to start, and many times that on a busy machine."""
KEY, ADMIN_KEY = "sesame-of-the-terminal", "sesame-of-an-operator"
API_KEYS = f"""
api_keys = [
  "{KEY}",
  {{ name = "operator", key = "{ADMIN_KEY}", may = ["administer"] }},
]
"""
_TOKEN = re.compile(
    r"\x1b\[(?P<private>\??)(?P<numbers>[0-9;]*)(?P<final>[A-Za-z])|(?P<control>[\x00-\x1f\x7f])|(?P<text>.)", re.DOTALL
)
_CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""A terminal turns Ctrl+C into a signal for the session that it controls."""


class Screen:
    """What a terminal shows, of the sequences that Lastcall's commands use. Any other one is an AssertionError.

    ``history`` are the lines that were scrolled off the top.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[list[str]] = [[] for _ in range(rows)]
        self.history: list[str] = []
        self.row = self.column = 0
        self.styles: set[str] = set()
        self.modes: set[str] = set()
        self._wraps = True
        self._rest = ""

    def feed(self, text: str) -> None:
        text = self._rest + text
        cut = re.search(r"\x1b(\[[0-9;?]*)?$", text)
        self._rest = cut[0] if cut else ""
        for token in _TOKEN.finditer(text.removesuffix(self._rest) if self._rest else text):
            if token["final"]:
                self._sequence(token["private"], token["numbers"], token["final"])
            elif token["control"]:
                self._control(token["control"])
            else:
                self._put(token["text"])

    def resize(self, columns: int, rows: int) -> None:
        """Change the size. The lines that do not fit any more are lost."""
        self.columns, self.rows = columns, rows
        self.lines = [*self.lines, *([] for _ in range(rows))][:rows]
        self.row, self.column = min(self.row, rows - 1), min(self.column, columns)

    def text(self) -> str:
        """All lines, those that were scrolled off first."""
        return "\n".join([*self.history, *map(_joined, self.lines)]).rstrip()

    def _put(self, character: str) -> None:
        if unicodedata.category(character) in ("Mn", "Me", "Cf"):
            return
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.column + width > self.columns:
            if not self._wraps:
                return
            self.column = 0
            self._line_feed()
        line = self.lines[self.row]
        line += [" "] * (self.column + width - len(line))
        line[self.column : self.column + width] = [character, *[""] * (width - 1)]
        self.column += width

    def _line_feed(self) -> None:
        if self.row == self.rows - 1:
            self.history.append(_joined(self.lines.pop(0)))
            self.lines.append([])
        else:
            self.row += 1

    def _control(self, control: str) -> None:
        match control:
            case "\r":
                self.column = 0
            case "\n":
                self._line_feed()
            case "\t":
                self.column = min(self.columns - 1, self.column // 8 * 8 + 8)
            case _:
                raise AssertionError(f"the terminal got {control!r}")

    def _sequence(self, private: str, numbers: str, final: str) -> None:
        count = int(numbers) if numbers.isdigit() else 1
        match private + final:
            case "m":
                self.styles.add(numbers)
            case "A":
                self.row = max(0, self.row - count)
            case "C":
                self.column = min(self.columns - 1, self.column + count)
            case "H" if not numbers:
                self.row = self.column = 0
            case "K" if not numbers:
                del self.lines[self.row][self.column :]
            case "J":
                first = 0 if numbers == "2" else self.row
                if numbers != "2":
                    del self.lines[self.row][self.column :]
                for row in range(first if numbers == "2" else first + 1, self.rows):
                    self.lines[row] = []
            case "?h" | "?l":
                (self.modes.add if final == "h" else self.modes.discard)(numbers)
                self._wraps = final == "h" if numbers == "7" else self._wraps
            case _:
                raise AssertionError(f"the terminal got the sequence {private}{numbers}{final}")


def _joined(line: list[str]) -> str:
    return "".join(line).rstrip()


class Terminal:
    """A program on a terminal. ``raw`` is all that was read of its output."""

    def __init__(self, process: trio.Process, master: int, screen: Screen) -> None:
        self.process = process
        self.screen = screen
        self.raw = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._pieces: deque[str] = deque()
        self._master = trio.lowlevel.FdStream(os.dup(master))
        self._fd = master

    async def type(self, text: str) -> None:
        """Press these keys."""
        await self._master.send_all(text.encode())

    async def shows(self, wanted: str | Callable[[str], bool]) -> str:
        """Read on until the screen shows a text, if only for a moment, and return all of its text at that moment."""
        with trio.move_on_after(CAP_S):
            while not (wanted(self.screen.text()) if callable(wanted) else wanted in self.screen.text()):
                if not await self._draw():
                    break
        shown = self.screen.text()
        assert wanted(shown) if callable(wanted) else wanted in shown, shown
        return shown

    async def ends(self) -> int:
        """Read to the end, and return the exit code: negative for a signal."""
        with trio.fail_after(CAP_S):
            while await self._draw():
                pass
            return await self.process.wait()

    def is_echoing(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size, of which the program is told by SIGWINCH."""
        set_size(self._fd, columns, rows)
        self.screen.resize(columns, rows)

    async def _draw(self) -> bool:
        """Draw the next piece of the output, or wait for one: a text may be there only up to the next sequence.

        Returns False at the end of the output.
        """
        if not self._pieces:
            try:
                data = await self._master.receive_some(65536)
            except trio.BrokenResourceError:  # EIO: the program has closed the terminal
                return False
            text = self._decoder.decode(data)  # a read may end within a character
            self.raw += text
            self._pieces += re.split(r"(?=[\x1b\r])", text)
            if not data:
                return False
        self.screen.feed(self._pieces.popleft())
        return True

    async def aclose(self) -> None:
        await self._master.aclose()


@asynccontextmanager
async def open_terminal(
    *arguments: str, folder: Path, columns: int = 80, rows: int = 24, has_keys: bool = True, **environ: str
) -> AsyncIterator[Terminal]:
    """Run ``lastcall`` with these arguments on a terminal; it is killed on leaving.

    Args:
        has_keys: The terminal is the program's standard input, too.
    """
    master, slave = pty.openpty()
    set_size(master, columns, rows)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LASTCALL_", "NO_COLOR"))}
    env = kept | {"TERM": "xterm-256color", "LASTCALL_API_KEY": KEY, "PYTHONIOENCODING": "utf-8"} | environ
    command = [sys.executable, "-S", "-c", _CONTROLLED, "-m", "service", *arguments]
    process = await trio.lowlevel.open_process(
        command,
        stdin=slave if has_keys else subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        cwd=folder,
        env=env,
        start_new_session=True,
    )
    os.close(slave)
    terminal = Terminal(process, master, Screen(columns, rows))
    try:
        yield terminal
    finally:
        process.kill()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CAP_S):
            await process.wait()
            await terminal.aclose()
        os.close(master)


def set_size(fd: int, columns: int, rows: int) -> None:
    """Set the size of a terminal."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


# A server


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, *, key: str = KEY) -> Any:
        """The JSON of an answer."""
        return self._answer("GET", path, None, key)

    def post(self, path: str, body: object) -> Any:
        """The JSON of an answer."""
        return self._answer("POST", path, body, KEY)

    def _answer(self, method: str, path: str, body: object, key: str) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{self.url}{path}"
        answer = httpx.request(method, url, json=body, headers=headers, timeout=CAP_S, trust_env=False)
        assert answer.is_success, answer.text
        return answer.json()


@contextmanager
def serving(folder: Path, settings: Mapping[str, str], *, config: str = "", port: int = 0) -> Iterator[Served]:
    """Run a server with the keys of these tests until the block is left; it may be stopped in the block."""
    settings = {"bind": f"127.0.0.1:{port}", "store_url": f"sqlite:{folder}/lastcall.db"} | dict(settings)
    with kept_server(folder, settings, config=API_KEYS + config) as (url, process):
        yield Served(url, process)
