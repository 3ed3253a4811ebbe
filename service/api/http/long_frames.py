"""Long frames: events that repeat the whole texts of a reply, which may have megabytes.

A face marks the place of a whole text in such a frame (:func:`whole_text`). A stream reads the frame in pieces of some
ten KiB, and other tasks run between them. The texts are encoded piece by piece when the first stream comes to them,
once for all streams that read them at the same time, and are held while one of these does.
"""

from collections.abc import Callable, Iterator, Sequence

from service.api.http.frame_json import frame_json
from service.api.http.held_bytes import RequestBytes
from service.sessions.events.event_log import Events

LONG = 32 * 1024
"""Frames are long if they repeat texts of more code points than this."""
_PIECE_BYTES = 64 * 1024
_MARK = b"\0"
"""Around the index of an item, in the place of its text. JSON has no such byte: in a text it is escaped."""


def whole_text(index: int) -> bytes:
    """Stands in a frame for the JSON of the whole text of the output item with this index."""
    return b'"%b%d%b"' % (_MARK, index, _MARK)


def are_long(frames: Sequence[bytes]) -> bool:
    """Whether whole texts are to be put into one of these frames."""
    return any(_MARK in frame for frame in frames)


class WholeTexts:
    """The texts of a reply as JSON, in pieces, for the streams that read long frames of one log.

    Args:
        text_of: The text of the output item with an index, in pieces. It does not grow any more.
        held: Counts the pieces until the last of these streams has ended.
    """

    def __init__(self, text_of: Callable[[int], Iterator[str]], held: RequestBytes) -> None:
        self._text_of = text_of
        self._held = held
        self._texts: dict[int, Iterator[str]] = {}
        self._pieces: dict[int, list[bytes]] = {}
        self.streams = 0

    def __repr__(self) -> str:
        return f"<WholeTexts: {len(self._texts)} texts, {self.streams} streams>"

    def pieces_of(self, index: int) -> Iterator[bytes]:
        """The JSON of a text without its quotes. A piece that no stream has had yet is encoded now."""
        if index not in self._texts:
            self._texts[index] = self._text_of(index)
            self._pieces[index] = []
        text, pieces = self._texts[index], self._pieces[index]
        place = 0
        while True:
            if place == len(pieces):
                piece = next(filter(None, text), "")
                if not piece:
                    return
                pieces.append(frame_json(piece)[1:-1])
                self._held.add(len(pieces[-1]))
            yield pieces[place]
            place += 1

    def forget(self) -> None:
        """Hold no text any more. Each is there again when it is read again."""
        self._texts.clear()
        self._pieces.clear()
        self._held.release()


class LongFrames:
    """The long frames of one event, for one stream.

    Attributes:
        is_over: Whether all of them were taken.
    """

    def __init__(self, frames: Sequence[bytes], texts: WholeTexts) -> None:
        self._texts: WholeTexts | None = texts
        texts.streams += 1
        self._parts = _parts_of(frames, texts)
        self._next = next(self._parts, b"")
        self.is_over = not self._next

    def __repr__(self) -> str:
        return f"<LongFrames of {self._texts!r}{', over' if self.is_over else ''}>"

    def take(self) -> bytes:
        """The next piece."""
        pieces: list[bytes] = []
        size = 0
        while self._next and size < _PIECE_BYTES:
            pieces.append(self._next)
            size += len(self._next)
            self._next = next(self._parts, b"")
        self.is_over = not self._next
        return b"".join(pieces)

    def close(self) -> None:
        """Read no more. Idempotent."""
        texts, self._texts = self._texts, None
        if texts is None:
            return
        self._parts, self._next = iter(()), b""
        texts.streams -= 1
        if not texts.streams:
            texts.forget()


def _parts_of(frames: Sequence[bytes], texts: WholeTexts) -> Iterator[bytes]:
    for frame in frames:
        for place, part in enumerate(frame.split(_MARK)):
            if place % 2:
                yield from texts.pieces_of(int(part))
            elif part:
                yield part


def texts_of(log: Events, text_of: Callable[[int], Iterator[str]], held: RequestBytes) -> WholeTexts:
    """The whole texts of a log's reply: those that other streams read, if there are such."""
    texts = log.beside.get(WholeTexts)
    if not isinstance(texts, WholeTexts) or not texts.streams:
        texts = log.beside[WholeTexts] = WholeTexts(text_of, held.beside())
    return texts
