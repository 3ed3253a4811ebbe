"""How a reply is shown where a restart or a crash of the server has changed what counts."""

import os
import pty
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from lastcall_client import Event, LastcallError, Waiting

from service.cli.reply_views import PlainView, ReplyView, TerminalView
from service.cli.terminal.output import Output
from tests.cli.terminals import Screen, set_size

Step = tuple[str, dict[str, Any], str] | Waiting
"""An event with the reply that counts after it, or a lost connection."""
AWAY = Waiting(1, 2.5, LastcallError("The stream has ended before its turn.", code="cut"))
DONE: Step = ("turn.completed", {"finish_reason": "stop"}, "")


def delta(text: str) -> Step:
    return ("turn.delta", {"text": text}, "")


async def _show(view: ReplyView, steps: Sequence[Step]) -> None:
    for seq, step in enumerate(steps, 1):
        if isinstance(step, Waiting):
            view.wait(step)
        else:
            kind, data, text = step
            await view.show(Event(kind, None if data.get("replaces") else seq, {"type": kind, **data}), text)


async def shown(*steps: Step, columns: int = 40) -> str:
    """What a terminal shows of a reply."""
    master, slave = pty.openpty()
    set_size(slave, columns, 20)
    try:
        output = Output(encoding="utf-8", fd=slave)
        assert output.is_terminal
        screen = Screen(columns, 20)
        await _show(TerminalView(output), steps)
        await output.write("\x00")
        written = ""
        while not written.endswith("\x00"):
            written += os.read(master, 65536).decode()
        screen.feed(written.removesuffix("\x00"))
        return screen.text()
    finally:
        os.close(master)
        os.close(slave)


def printed(capfd: pytest.CaptureFixture[str], *steps: Step) -> tuple[str, str, bool]:
    """What goes to standard output and to standard error, and whether that is the reply."""

    async def show() -> PlainView:
        view = PlainView(Output(encoding="utf-8"))
        await _show(view, steps)
        return view

    view = trio.run(show)
    out, err = capfd.readouterr()
    return out, err, view.is_exact


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.parametrize("column", [*range(36, 45), 80, 81])
async def test_a_lost_connection_is_told_below_the_text_which_then_goes_on_in_its_place(column: int) -> None:
    text = "1234567890" * 9
    told = await shown(delta(text[:column]), AWAY)
    assert told.endswith("\nconnection lost: The stream has ended …")
    after = await shown(delta(text[:column]), AWAY, AWAY, delta(text[column:]), DONE)
    lines = [text[at : at + 40] for at in range(0, 90, 40)]
    assert after.splitlines()[:3] == lines
    assert after.replace("\n", "")[90:].endswith(" s · connection lost, and resumed (1)")


async def test_a_part_that_a_crash_took_back_is_told_on_a_terminal() -> None:
    resumed: Step = ("turn.resumed", {"text_length": 11}, "Head\nkept t")
    after = await shown(delta("Head\nkept text that is lost"), resumed, delta("ail"), DONE)
    assert after.splitlines()[:4] == [
        "Head",
        "kept text that is lost",
        "the server has lost the end of this repl",
        "y: it goes on after",
    ]
    assert after.splitlines()[4] == "kept tail"
    anew = await shown(delta("lost"), ("turn.resumed", {"text_length": 0}, ""), delta("New"), DONE)
    assert anew.splitlines()[:4] == ["lost", "the server has lost this reply: it begin", "s anew", "New"]
    whole: Step = ("turn.interrupted", {"reason": "crash", "replaces": "events_lost"}, "Some more")
    assert (await shown(delta("Some"), whole)).splitlines()[0] == "Some more"


def test_lines_that_are_not_printed_yet_can_be_taken_back_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    resumed: Step = ("turn.resumed", {"text_length": 5}, "one\ntw")
    steps = (delta("one\ntwo th"), AWAY, AWAY, resumed, delta("enty"), DONE)
    out, err, is_exact = printed(capfd, *steps)
    assert (out, is_exact) == ("one\ntwenty\n", True)
    assert err == (
        "lastcall: connection lost (The stream has ended before its turn.); trying again\n"
        "lastcall: the server is back, and the reply goes on\n"
    )


def test_the_line_that_has_begun_is_printed_if_the_reply_is_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    async def show() -> None:
        view = PlainView(Output(encoding="utf-8"))
        await _show(view, [delta("one\ntw"), delta("o")])
        await view.cut_off()

    trio.run(show)
    assert capfd.readouterr() == ("one\ntwo\n", "")


def test_lines_that_a_crash_took_back_after_they_were_printed_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    resumed: Step = ("turn.resumed", {"text_length": 2}, "on")
    out, err, is_exact = printed(capfd, delta("one\ntwo\n"), resumed, delta("ly"), DONE)
    assert (out, is_exact) == ("one\ntwo\nly\n", False)
    assert "took back lines that are printed already" in err


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (
            ("turn.failed", {"error": {"code": "upstream_error", "message": "no\x1b[2J\nway"}}),
            r"failed: upstream_error: no\x1b[2J way",
        ),
        (("turn.interrupted", {"reason": "shutdown"}), "interrupted: the server was stopped; what came so far is kept"),
        (("turn.cancelled", {"reason": "superseded"}), "cancelled: superseded"),
    ],
)
def test_an_end_that_is_no_completion_is_told_on_standard_error(
    end: tuple[str, dict[str, Any]], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out, err, _ = printed(capfd, delta("so far"), (*end, "so far"))
    assert (out, err) == ("so far\n", f"lastcall: {line}\n")


async def test_reasoning_and_calls_have_lines_of_their_own() -> None:
    steps: list[Step] = [
        ("turn.reasoning", {"text": "Hm\nhm"}, ""),
        delta("Yes"),
        ("turn.call", {"name": "get\x07"}, ""),
    ]
    assert (await shown(*steps, DONE)).splitlines()[:4] == ["Hm", "hm", "Yes", "calls get\\x07"]
