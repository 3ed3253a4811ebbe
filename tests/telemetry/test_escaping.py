"""No data from outside forges a line of the log, a field of a line or the output of a terminal."""

import json
import logging
import unicodedata
from collections.abc import Callable

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from service.telemetry.escaping import escape, escape_json, escape_value
from tests.kept_log import FORMATS, Format, kept_log

BAD = [
    "\n",
    "\r",
    "\x1b[2J",
    "\0",
    "\x7f",
    "\x85",
    "\x9b2J",
    "\u2028",
    "\u2029",
    "\u202e",
    "\u2066",
    "\u200f",
    "\ud800",
    "\U000e0041",
]
TEXTS = st.lists(
    st.sampled_from([*BAD, "2026-01-01T00:00:00Z [error] forged", '"', "'", "\\", " ", "=", "a", "é"])
).map("".join) | st.text(st.characters(codec=None))


def logged(log_format: Format, write: Callable[[], object]) -> str:
    """The log's text of the lines that ``write`` logs."""
    with kept_log(log_format) as read:
        write()
        return read()


def as_json_keeps(text: str) -> str:
    """Two halves of a surrogate pair side by side are one character in JSON."""
    kept: str = json.loads(json.dumps(text))
    return kept


def is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") or unicodedata.bidirectional(character) in (
        *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
    )


def test_every_control_character_line_end_and_change_of_direction_is_escaped() -> None:
    unsafe = [chr(code) for code in range(0x110000) if is_unsafe(chr(code))]
    assert len(unsafe) > 2000
    assert "".join(map(escape, unsafe)).isascii()
    assert all(json.loads(f'"{escape_json(it)}"') == it for it in unsafe if it >= " ")
    assert escape("Grüße, 世界 \N{GRINNING FACE}") == "Grüße, 世界 \N{GRINNING FACE}"
    assert escape("a\nb\x1b[0m\u2028") == r"a\nb\x1b[0m\u2028"


@pytest.mark.parametrize("log_format", FORMATS)
@given(text=TEXTS)
def test_no_text_forges_a_line_through_any_logger(log_format: Format, text: str) -> None:
    def write() -> None:
        structlog.get_logger("lastcall.tests").warning(text, value=text, nested={"of": [text]}, error=ValueError(text))
        structlog.get_logger("lastcall.tests").warning("told", **{f"a{text}": 1})
        logging.getLogger("hypercorn.error").warning("got %s", text)
        logging.getLogger("somebody").warning("got %s", text, extra={"extra": text})

    lines = logged(log_format, write).split("\n")
    assert lines.pop() == ""
    assert len(lines) == 4
    assert not any(map(is_unsafe, "".join(lines)))
    if log_format == "json":
        kept = as_json_keeps(text)
        first, _, third, fourth = map(json.loads, lines)
        assert (first["message"], first["value"], first["nested"]) == (kept, kept, {"of": [kept]})
        assert third["message"] == fourth["message"] == f"got {kept}"


@pytest.mark.parametrize("log_format", FORMATS)
@given(text=TEXTS)
def test_no_error_forges_a_line_in_its_traceback(log_format: Format, text: str) -> None:
    def write() -> None:
        try:
            raise ValueError(text)
        except ValueError:
            structlog.get_logger("lastcall.tests").exception("failed")
            logging.getLogger("hypercorn.error").exception("failed")

    written = logged(log_format, write)
    assert not any(map(is_unsafe, written.replace("\n", "")))
    begun = [line for line in written.split("\n") if line and not line.startswith("    ")]
    assert len(begun) == 2
    assert all("failed" in line for line in begun)


@given(TEXTS)
def test_a_value_on_a_line_is_one_word_or_quoted(text: str) -> None:
    shown = escape_value(text)
    assert shown == text or shown[0] == shown[-1] in "'\""
    if shown == text:
        assert not set(shown) & set(" ='\"\\")
