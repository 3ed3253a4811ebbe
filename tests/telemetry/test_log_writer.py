"""The writer of the log neither waits nor raises, for any behaviour of its reader."""

import os
import select
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.telemetry.log_writer import BACKLOG_BYTES_MAX, LogWriter

LINE = "x" * 99 + "\n"


@contextmanager
def writing_to(fd: int) -> Generator[LogWriter]:
    writer = LogWriter(fd)
    try:
        yield writer
    finally:
        writer.close()


@pytest.fixture(params=["pipe", "socket", "pipe that cannot be opened again"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[tuple[int, int]]:
    """The reader's and the writer's end of each kind of output of the log."""
    if request.param == "socket":
        pair = socket.socketpair()
        reader, writer = (os.dup(end.fileno()) for end in pair)
        for end in pair:
            end.close()
    else:
        reader, writer = os.pipe()
    if request.param == "pipe that cannot be opened again":

        def refuse(*args: object) -> int:
            raise PermissionError

        monkeypatch.setattr("service.telemetry.log_writer.os.open", refuse)
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            pass


def read_ready(fd: int) -> bytes:
    found = b""
    while select.select([fd], [], [], 0)[0] and (data := os.read(fd, 65536)):
        found += data
    return found


def fill(writer: LogWriter) -> int:
    """Write without a reader until lines are lost. Returns how many were lost."""
    written = 0
    while not writer._lost:
        writer.write(LINE)
        written += 1
    return written


def test_line_is_there_at_once(ends: tuple[int, int]) -> None:
    reader, writer_end = ends
    with writing_to(writer_end) as writer:
        writer.write("one\n")
        assert read_ready(reader) == b"one\n"


def test_stalled_reader_costs_a_bounded_backlog_and_then_lines_that_are_counted(ends: tuple[int, int]) -> None:
    reader, writer_end = ends
    with writing_to(writer_end) as writer:
        written = fill(writer)
        writer.write(LINE)
        assert writer._backlog_bytes <= BACKLOG_BYTES_MAX
        assert writer.take_lost() == 0, "a line about the loss would be lost now, too"
        kept = b""
        while data := read_ready(reader):
            kept += data
            writer.drain(0)
        assert kept == LINE.encode() * (written - 1), "whole lines, in order"
        assert writer.take_lost() == 2
        assert writer.take_lost() == 0


def test_drain_waits_no_longer_than_it_may(ends: tuple[int, int]) -> None:
    _, writer_end = ends
    with writing_to(writer_end) as writer:
        fill(writer)
        writer.drain(0.02)
        assert writer._backlog


def test_reader_that_has_gone_causes_no_error(ends: tuple[int, int]) -> None:
    reader, writer_end = ends
    with writing_to(writer_end) as writer:
        os.close(reader)
        writer.write("one\n")
        writer.drain(1)
        assert writer.take_lost() == 1


def test_line_longer_than_the_pipe_arrives_whole_and_in_order(ends: tuple[int, int]) -> None:
    reader, writer_end = ends
    with writing_to(writer_end) as writer:
        writer.write("y" * 200_000 + "\n")
        writer.write(LINE)
        found = b""
        while data := read_ready(reader):
            found += data
            writer.drain(0)
        assert found == b"y" * 200_000 + b"\n" + LINE.encode()


def test_shared_pipe_keeps_its_mode(ends: tuple[int, int]) -> None:
    _, writer_end = ends
    with writing_to(writer_end):
        assert os.get_blocking(writer_end)


def test_number_of_a_closed_descriptor_is_never_written_to() -> None:
    reader, writer_end = os.pipe()
    number = os.dup(writer_end)
    os.close(number)
    with writing_to(number) as writer:
        os.dup2(writer_end, number)  # as a client's socket would take it
        writer.write(LINE)
        writer.drain(1)
        assert writer.take_lost() == 1
    for fd in (writer_end, number):
        os.close(fd)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    with path.open("a") as file, writing_to(file.fileno()) as writer:
        writer.write(LINE)
    assert path.read_text() == "before\n" + LINE


def test_text_that_is_not_unicode_is_written_escaped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as file, writing_to(file.fileno()) as writer:
        writer.write("\ud800\n")
    assert path.read_text() == "\\ud800\n"
