"""The events of turns that were kept by versions 1 and 2 of the schema: encoded as the frames of a stream.

Such rows stay as they are; they are read into runs.
"""

from collections.abc import Iterator, Sequence

import msgspec

from service.storage.pieces import QUEUED, STARTED, Run, length_bytes
from service.storage.records import Item

_ITEM_TYPES = {"turn.delta": "message", "turn.reasoning": "reasoning"}
_OPENINGS = {"turn.queued": QUEUED, "turn.started": STARTED}

_frames: msgspec.msgpack.Decoder[list[bytes]] = msgspec.msgpack.Decoder(list[bytes])


class _Event(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


_event: msgspec.json.Decoder[_Event] = msgspec.json.Decoder(_Event)


def read_frames(blob: bytes, output: Sequence[Item]) -> Iterator[tuple[Run, str]]:
    """The events of a row, but the terminal event: each with its text, which is empty if it has none."""
    items: dict[str, int] = {item.type: index for index, item in enumerate(output)}
    for frame in _frames.decode(blob):
        event = _event.decode(frame[frame.index(b"data: ") + 6 :])
        if event.type in _OPENINGS:
            yield Run(_OPENINGS[event.type]), ""
        elif event.type in _ITEM_TYPES:
            yield Run(items[_ITEM_TYPES[event.type]], length_bytes(len(event.text))), event.text
