"""The shutdown scenario measures fakes with known behaviour rightly, and its report agrees with the rows."""

from pathlib import Path

import msgspec
import pytest
import trio

from bench.contenders import Contender
from bench.machine import look_at_machine
from bench.plan import LoadResult
from bench.rows import RowFile, percentile, read_rows, summarize
from bench.server_process import python_command
from bench.shutdown import ShutdownRow, _add_books, _add_log, run_case, steady
from bench.shutdown_report import cells_of, write_markdown
from bench.stage import Place
from bench.upstream import ReplyBook
from bench.wire import StreamEnd, StreamResult

MISBEHAVING = str(Path(__file__).with_name("misbehaving.py"))
ERROR_S = 0.2
"""The largest error of a measured time, where the machine adds none."""


async def run_fake(folder: Path, *arguments: str, cap_s: float = 60) -> ShutdownRow:
    fake = Contender("fake", "Fake", python_command(MISBEHAVING, *arguments), relays=False)
    with trio.fail_after(180):
        return await run_case(fake, steady(3), Place(folder, None, None), repeat=0, cap_s=cap_s)


@pytest.mark.serial
async def test_a_fake_that_exits_after_a_known_delay_is_measured_within_the_stated_error(tmp_path: Path) -> None:
    """What a busy machine adds is no error of the harness, so the smallest error of up to three runs counts."""
    errors_s: list[float] = []
    while len(errors_s) < 3 and min(errors_s, default=ERROR_S) >= ERROR_S:
        row = await run_fake(tmp_path, "--delay", "0.7", "--exit-code", "3")
        assert row.gone_s is not None
        assert row.last_stream_s is not None
        assert row.gone_s >= 0.7
        assert row.last_stream_s >= 0
        assert (row.exit_code, row.killed, row.failed) == (3, False, None)
        assert row.ends == {"terminal": 3}
        assert row.terminals == {"interrupted": 3}
        assert row.rss_idle_mib > 1
        errors_s.append(max(row.gone_s - 0.7, row.last_stream_s))
    assert min(errors_s) < ERROR_S


@pytest.mark.parametrize("end", ["clean", "truncated", "reset"])
async def test_how_a_fakes_streams_end_is_in_the_row(tmp_path: Path, end: str) -> None:
    row = await run_fake(tmp_path, "--chat", end, "--delay", "0.2")
    assert row.ends == {end: 3}
    assert row.terminals == {}


async def test_a_fake_that_does_not_leave_is_killed_at_the_cap_and_the_row_says_so(tmp_path: Path) -> None:
    row = await run_fake(tmp_path, "--delay", "60", "--chat", "open", cap_s=0.5)
    assert (row.killed, row.gone_s, row.exit_code) == (True, None, -9)
    assert row.ends == {"truncated": 3}


async def test_the_log_lines_of_a_fake_are_counted(tmp_path: Path) -> None:
    said = "Traceback (most recent call last):\nasyncio.CancelledError\nasyncio.exceptions.CancelledError: x\nbye\n"
    row = await run_fake(tmp_path, "--say", said)
    assert (row.log_tracebacks, row.log_cancelled, row.log_lines) == (1, 2, 5)


def test_lines_of_single_requests_are_no_noise() -> None:
    row = ShutdownRow(contender="c", label="C", case="x", streams=2, repeat=0, settings={}, command=[])
    lines = [
        'INFO:     127.0.0.1:5 - "POST /chat HTTP/1.1" 200 OK',
        '127.0.0.1:5 - - [28/Nov/2026:19:00:00 +0000] "POST /chat 1.1" 200 - "-" "-"',
        '{"level": "info", "message": "127.0.0.1:5 - - [x] \\"GET /healthz 1.1\\" 200 - \\"-\\"", "pid": 1}',
        '{"level": "warning", "message": "turn ended", "outcome": "failed"}',
        "INFO:     Shutting down",
        '{"level": "info", "message": "serving", "attempt": "curl -N http://127.0.0.1:1/chat"}',
        "Traceback (most recent call last):",
    ]
    _add_log(row, "\n".join(lines))
    assert (row.log_request_lines, row.log_lines, row.log_tracebacks) == (4, 3, 1)


async def test_a_contender_that_does_not_start_gets_a_row_without_a_crash(tmp_path: Path) -> None:
    row = await run_fake(tmp_path, "--no-such-option")
    assert row.failed is not None
    assert "no-such-option" in row.failed


def test_tokens_lost_are_those_that_the_model_sent_and_no_client_received() -> None:
    row = ShutdownRow(contender="c", label="C", case="x", streams=2, repeat=0, settings={}, command=[])
    streams = [
        StreamResult(group="streams", number=0, tokens=5, end=StreamEnd.TRUNCATED),
        StreamResult(group="streams", number=1, tokens=9, end=StreamEnd.TERMINAL),
    ]
    books = [
        ReplyBook(message="streams0 rate=20", tokens=8, closed_at=10.5),
        ReplyBook(message="streams1 rate=20", tokens=9, closed_at=11),
    ]
    _add_books(row, LoadResult(streams=streams), books, 10.0, relays=True)
    assert row.tokens_lost == 3
    assert row.upstream_closed_s == 1


def test_percentiles_are_figures_that_were_measured() -> None:
    figures = [float(number) for number in range(1, 101)]
    assert (percentile(figures, 50), percentile(figures, 99), percentile([7.0], 99)) == (50, 99, 7)
    assert summarize([None, 2.0, 1.0, 3.0]) == summarize([3.0, 2.0, 1.0])
    assert summarize([None]) is None


def test_the_report_agrees_with_the_rows(tmp_path: Path) -> None:
    def row(contender: str, **changes: object) -> ShutdownRow:
        plain = ShutdownRow(
            contender=contender,
            label=contender.title(),
            case="steady-2",
            streams=2,
            repeat=0,
            settings={},
            command=["x"],
        )
        return msgspec.structs.replace(plain, **changes)

    rows = [
        row("good", gone_s=0.1, exit_code=0, ends={"terminal": 2}),
        row("good", gone_s=0.3, exit_code=0, ends={"terminal": 1, "reset": 1}),
        row("bad", killed=True, exit_code=-9, ends={"truncated": 2}, log_tracebacks=4),
        row("ugly", failed="no such module"),
    ]
    cells = {cell.label: cell for cell in cells_of(rows)["steady-2"]}
    assert cells["Good"].proper_share == 0.75
    assert cells["Good"].gone_text() == "0.100 / 0.300 / 0.300"
    assert cells["Bad"].gone_text() == "killed 1/1"
    assert cells["Ugly"].gone_text() == "failed to start"
    report = write_markdown(look_at_machine(server_cpus="0", client_cpus="1"), rows, cap_s=20, plotted=False)
    assert "| Good | 2 | 0.100 / 0.300 / 0.300 | - | 3 terminal, 1 reset | 0 | 0/0/0 |" in report
    assert "| Bad | 1 | killed 1/1 | - | 2 truncated | -9 | 4/0/0 |" in report
    file = RowFile(tmp_path / "new folder" / "rows.jsonl")
    for one in rows:
        file.append(one)
    assert [line["contender"] for line in read_rows(file.path)] == ["good", "good", "bad", "ugly"]
