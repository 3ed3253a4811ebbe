"""A terminal whose keys are read at once, and not echoed."""

import os
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

_INPUT, _LOCAL = 0, 3
"""The places of the flags in what ``tcgetattr`` returns."""
_READ_BYTES = 65536


TerminalMode = list[int | list[bytes | int]]
"""A mode of a terminal, as ``tcgetattr`` returns it."""


def set_mode(fd: int, mode: TerminalMode) -> None:
    """Put a terminal into this mode."""
    with suppress(termios.error):  # the terminal has gone
        termios.tcsetattr(fd, termios.TCSANOW, mode)


def set_raw(fd: int, *, signals: bool) -> None:
    """Have keys sent as they are pressed, without an echo.

    Args:
        signals: Ctrl+C, Ctrl+Z and Ctrl+\\ send their signals, and are no keys.
    """
    with suppress(termios.error):  # the terminal has gone
        mode = termios.tcgetattr(fd)
        mode[_INPUT] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
        mode[_LOCAL] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
        mode[_LOCAL] = mode[_LOCAL] | termios.ISIG if signals else mode[_LOCAL] & ~termios.ISIG
        termios.tcsetattr(fd, termios.TCSANOW, mode)


@contextmanager
def raw_mode(fd: int) -> Iterator[TerminalMode]:
    """Take the terminal over, with its signals, and give it back as it was: the mode that it had is yielded."""
    before = termios.tcgetattr(fd)
    try:
        set_raw(fd, signals=True)
        yield before
    finally:
        set_mode(fd, before)


async def read_keys(fd: int) -> bytes:
    """What was typed, as soon as there is something; empty if the terminal has gone."""
    await trio.lowlevel.wait_readable(fd)
    try:
        return os.read(fd, _READ_BYTES)
    except OSError:
        return b""
