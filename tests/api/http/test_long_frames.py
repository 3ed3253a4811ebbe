"""Frames that repeat whole texts are read piece by piece, and each text is encoded once for all streams."""

from collections.abc import Iterator

import pytest

from service.api.http import long_frames
from service.api.http.frame_json import frame_json
from service.api.http.held_bytes import HeldBytes, RequestBytes
from service.api.http.long_frames import LongFrames, WholeTexts, are_long, texts_of, whole_text
from service.sessions.events.event_log import EventLog

TEXTS = ["é\u2028\x00" * 1000, "", "x" * 50]
FRAMES = [b"a", b"b:" + whole_text(0) + b"!", b"c:" + whole_text(1) + whole_text(2) + whole_text(0), b"end"]
ESCAPED = "é\\u2028\\u0000".encode() * 1000
WHOLE = b'ab:"%b"!c:"""%b""%b"end' % (ESCAPED, b"x" * 50, ESCAPED)


def text_of(index: int) -> Iterator[str]:
    text = TEXTS[index]
    yield ""
    for start in range(0, len(text), 7):
        yield text[start : start + 7]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pieces that were encoded."""
    pieces: list[str] = []
    encode = frame_json

    def count(text: str) -> bytes:
        pieces.append(text)
        return encode(text)

    monkeypatch.setattr(long_frames, "frame_json", count)
    monkeypatch.setattr(long_frames, "_PIECE_BYTES", 100)
    return pieces


def read(frames: LongFrames) -> bytes:
    pieces = []
    while not frames.is_over:
        pieces.append(frames.take())
    assert all(0 < len(piece) < 200 for piece in pieces)
    return b"".join(pieces)


def test_frames_without_whole_texts_are_not_long() -> None:
    assert are_long(FRAMES)
    assert not are_long([b"a", b'{"text":"\\u0000"}'])


def test_streams_that_read_at_the_same_time_encode_each_piece_once(encoded: list[str]) -> None:
    log, held = EventLog(bytes_max=1 << 20), HeldBytes()
    streams = [LongFrames(FRAMES, texts_of(log, text_of, RequestBytes(held))) for _ in range(3)]
    first = streams[0].take()
    assert 0 < len(encoded) < 30, "no more than the piece needs"
    assert {first + read(streams[0]), read(streams[1]), read(streams[2])} == {WHOLE}
    assert "".join(encoded) == TEXTS[0] + TEXTS[2]
    assert held.bytes == len(ESCAPED) + 50
    for stream in streams:
        stream.close()
        stream.close()
        assert (held.bytes == 0) == (stream is streams[-1])


def test_a_stream_that_is_left_in_the_middle_holds_nothing(encoded: list[str]) -> None:
    log, held = EventLog(bytes_max=1 << 20), HeldBytes()
    stream = LongFrames(FRAMES, texts_of(log, text_of, RequestBytes(held)))
    stream.take()
    assert held.bytes
    stream.close()
    assert held.bytes == 0
    again = LongFrames(FRAMES, texts_of(log, text_of, RequestBytes(held)))
    assert read(again) == WHOLE
    again.close()
    kept = log.beside[WholeTexts]
    assert isinstance(kept, WholeTexts)
    assert not kept._pieces, "the log does not keep what nobody reads"
