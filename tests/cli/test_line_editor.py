"""Typing a message: what keys send, what they do to the text, and where it is on the screen."""

import pytest

from service.cli.terminal.cells import Column, cells, cut, padded
from service.cli.terminal.keys import Key, KeyDecoder
from service.cli.terminal.line_editor import LineEditor, Outcome
from service.cli.terminal.markdown import MarkdownColours


def decoded(*pieces: bytes, encoding: str = "utf-8") -> list[Key | str]:
    decoder = KeyDecoder(encoding)
    return [key for piece in pieces for key in decoder.feed(piece)]


def typed(*keys: Key | str, text: str = "") -> str:
    """The text after these keys, with the cursor as ``|``."""
    editor = LineEditor()
    editor.begin(text)
    for key in keys:
        assert editor.press(key) is None
    return f"{editor.text[: editor.at]}|{editor.text[editor.at :]}"


def test_keys_and_texts_may_be_cut_anywhere() -> None:
    sent = "a世\x1b[D\x1b[1;5C\x7f\x1bOA\x1b[200~x\r\n\x1b[31m\ty\x1b[201~\r\x1b[99;99z".encode()
    whole = decoded(sent)
    assert whole[0] == "a世"
    assert whole[1:] == [Key.LEFT, Key.WORD_RIGHT, Key.BACKSPACE, Key.UP, "x\n\x1b[31m\ty", Key.ENTER]
    by_bytes = decoded(*(bytes([it]) for it in sent))
    assert by_bytes == ["a", "世", *whole[1:]]
    assert decoded(b"\xe4", encoding="iso8859-1") == ["ä"]
    assert decoded(b"\xff\x1b[" + b"1" * 40, b"x") == ["\ufffd", "x"]


@pytest.mark.parametrize(
    ("keys", "after"),
    [
        ((Key.LEFT, Key.LEFT, "X"), "one tX|wo"),
        ((Key.WORD_LEFT, Key.BACKSPACE), "one|two"),
        ((Key.WORD_LEFT, Key.WORD_LEFT, Key.WORD_RIGHT, Key.DELETE), "one|two"),
        ((Key.DELETE_WORD,), "one |"),
        ((Key.LEFT, Key.DELETE_TO_BEGIN), "|o"),
        ((Key.HOME, Key.RIGHT, Key.DELETE_TO_END), "o|"),
        ((Key.NEW_LINE, "three", Key.HOME, Key.UP, Key.END), "one two|\nthree"),
        ((Key.NEW_LINE, Key.UP, Key.RIGHT, Key.DOWN, "x"), "one two\nx|"),
        ((Key.HOME, Key.LEFT, Key.BACKSPACE, Key.END_OF_INPUT), "|ne two"),
        ((Key.INTERRUPT,), "|"),
        (("e\u0301", Key.LEFT, Key.DELETE), "one two|"),
    ],
)
def test_a_key_changes_the_text_and_the_place_of_the_cursor(keys: tuple[Key | str, ...], after: str) -> None:
    assert typed(*keys, text="one two") == after


def test_keys_that_end_a_message_do_so_only_where_they_can() -> None:
    editor = LineEditor()
    editor.begin()
    assert editor.press(Key.ENTER) is None  # there is nothing to send
    assert editor.press(Key.INTERRUPT) is Outcome.INTERRUPTED
    assert editor.press(Key.END_OF_INPUT) is Outcome.LEFT
    editor.press("text")
    assert editor.press(Key.SUSPEND) is Outcome.SUSPENDED
    assert editor.press(Key.ENTER) is Outcome.SENT


def test_arrows_show_the_messages_before_and_keep_the_one_that_was_begun() -> None:
    editor = LineEditor()
    for message in ("first", "second", "second"):
        editor.remember(message)
    editor.begin()
    editor.press("begun")
    seen = []
    for key in (Key.UP, Key.UP, Key.UP, Key.DOWN, Key.DOWN, Key.DOWN):
        editor.press(key)
        seen.append(editor.text)
    assert seen == ["second", "first", "first", "second", "begun", "begun"]


def test_a_message_is_laid_out_in_cells() -> None:
    editor = LineEditor()
    editor.begin("ab世界\x1bc\n\td")
    layout = editor.layout(first="> ", width=6)
    assert list(layout.rows) == ["> ab世", "界\\x1b", "c", "      ", "d"]
    editor.begin("12345")
    layout = editor.layout(first="> ", width=6)
    assert (list(layout.rows), layout.row, layout.column) == (["> 1234", "5"], 1, 1)
    editor.begin("\n".join("abcdefgh"))
    window = editor.layout(first="> ", width=6).window(3)
    assert (list(window.rows), window.row, window.column) == (["  f", "  g", "  h"], 2, 3)


def test_texts_are_cut_at_cells_and_not_at_characters() -> None:
    assert [cut("世界世界", width) for width in (8, 7, 4, 1, 0)] == ["世界世界", "世界世…", "世…", "…", ""]
    assert padded("é\u0301", 3) == "é\u0301  "
    assert [cells(it) for it in ("plain", "世", "e\u0301", "\u200d", "\ud800")] == [5, 2, 1, 0, 1]


def test_the_column_is_where_the_terminal_has_its_cursor() -> None:
    column = Column()
    at = []
    for text in ("abc", "世", "é", "x", "\n", "a\tb", "\t\t", "c", "one\ntwo\n"):
        column.pass_over(text, width=6)
        at.append(column.at)
    assert at == [3, 5, 6, 1, 0, 1, 6, 1, 0]


def test_markdown_gets_colours_and_loses_nothing() -> None:
    text = "# Head\nplain `code` and ``a ` b`` on\n```py\n# no head `x`\n```\nlast"
    colours = MarkdownColours(lambda part, style: f"<{style}:{part}>")
    assert colours.feed(text) == (
        "<bold:# Head>\nplain <cyan:`><cyan:code><cyan:`> and <cyan:``><cyan:a ><cyan:`><cyan: b><cyan:``> on\n"
        "<cyan:```><cyan:py>\n<cyan:# no head ><cyan:`><cyan:x><cyan:`>\n<cyan:```>\nlast"
    )
    in_pieces = MarkdownColours(lambda part, _: part)
    assert "".join(map(in_pieces.feed, text)) == text
