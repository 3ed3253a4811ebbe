r"""The compact form of a turn's events: runs of the lengths of their texts.

A model's reply arrives as many small pieces. What such a piece says is its item and its length, because the texts of
all pieces together are the texts of the items. So a turn's events are kept as *runs*: successive pieces of one output
item, or one event of another kind, whose fields are in the turn's record.

The lengths of a run are bytes, one for each piece that is shorter than 255 code points. A byte of 255 stands for 255
code points of a piece that goes on in the next byte: ``b"\x03\x05"`` is two pieces of three and five code points,
``b"\xff\x01"`` one of 256. So a sum of the bytes is a length of text.
"""

from collections.abc import Iterable, Sequence

import msgspec

QUEUED = -1
"""The run of a turn that waited for others."""
STARTED = -2
"""The run of the beginning of the turn's work."""
CALL = -3
"""The run of the opening of the call with the item's index 0; ``CALL - index`` is that of the call with an index."""

_GOES_ON = 255


class Run(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Successive pieces of the output item with the index ``item``; or, below 0, one event of another kind."""

    item: int
    lengths: bytes = b""

    @property
    def events(self) -> int:
        """The number of events."""
        return 1 if self.item < 0 else len(self.lengths) - self.lengths.count(_GOES_ON)

    @property
    def length(self) -> int:
        """The code points of the pieces' texts."""
        return 0 if self.item < 0 else sum(self.lengths)

    def pieces(self) -> Sequence[int]:
        """The lengths of the pieces, one by one."""
        if _GOES_ON not in self.lengths:
            return self.lengths
        lengths, length = [], 0
        for byte in self.lengths:
            length += byte
            if byte < _GOES_ON:
                lengths.append(length)
                length = 0
        return lengths

    def after(self, events: int) -> "Run":
        """The run without its first events, which are fewer than all."""
        if events == 0:
            return self
        if _GOES_ON not in self.lengths:
            return Run(self.item, self.lengths[events:])
        return run_of(self.item, self.pieces()[events:])


_packed: msgspec.msgpack.Decoder[list[Run]] = msgspec.msgpack.Decoder(list[Run])


def run_of(item: int, lengths: Iterable[int]) -> Run:
    """The run of an item's pieces with these lengths."""
    return Run(item, b"".join(map(length_bytes, lengths)))


def length_bytes(length: int) -> bytes:
    """The length of one piece, as it stands in a run."""
    return bytes((length,)) if length < _GOES_ON else b"\xff" * (length // _GOES_ON) + bytes((length % _GOES_ON,))


def pack(runs: Sequence[Run]) -> bytes:
    return msgspec.msgpack.encode(runs)


def unpack(packed: bytes) -> list[Run]:
    return _packed.decode(packed)


def join(runs: Iterable[Run]) -> list[Run]:
    """The same events in as few runs as possible."""
    joined: list[Run] = []
    lengths: list[bytes] = []
    for run in runs:
        if run.item >= 0 and joined and joined[-1].item == run.item:
            lengths.append(run.lengths)
            continue
        _end_run(joined, lengths)
        joined.append(run)
        lengths = [run.lengths]
    _end_run(joined, lengths)
    return joined


def _end_run(joined: list[Run], lengths: list[bytes]) -> None:
    if len(lengths) > 1:
        joined[-1] = Run(joined[-1].item, b"".join(lengths))


def count(runs: Iterable[Run]) -> int:
    """The number of events."""
    return sum(run.events for run in runs)
