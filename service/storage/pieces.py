r"""The compact form of a turn's events: runs of the lengths of their texts.

A model's reply arrives as many small pieces. What such a piece says is its item and its length, because the texts of
all pieces together are the texts of the items. So a turn's events are kept as *runs*: successive pieces of one output
item, or one event of another kind, whose fields are in the turn's record.

The lengths of a run are bytes, one for each piece that is shorter than 255 code points. A byte of 255 stands for 255
code points of a piece that goes on in the next byte: ``b"\x03\x05"`` is two pieces of three and five code points,
``b"\xff\x01"`` one of 256. So a sum of the bytes is a length of text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Literal

import msgspec

QUEUED = -1
"""The run of a turn that waited for others."""
STARTED = -2
"""The run of the beginning of the turn's work."""
CALL = -3
"""The run of the opening of the call with the item's index 0; ``CALL - index`` is that of the call with an index."""
RESUMED = -(1 << 40)
"""The run of a resumption (:class:`Resumed`), below the runs of all calls."""

_GOES_ON = 255
_RUN_COST = 16
"""The least cost of a run, because a run takes memory and time whatever its length."""


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
        return self if events == 0 else Run(self.item, self.lengths[self.end_of(events) :])

    def end_of(self, events: int, start: int = 0) -> int:
        """The offset in ``lengths`` at which so many events end, which begin at ``start``; at most the run's end.

        Visits the bytes of these events only.
        """
        end = start + events
        while start < end:
            start, end = end, end + self.lengths.count(_GOES_ON, start, end)
        return min(end, len(self.lengths))

    @property
    def size(self) -> int:
        """The larger of its length in code points and its length in bytes."""
        return max(self.length, len(self.lengths))

    @property
    def cost(self) -> int:
        """What the run takes in memory and time, in code points of text."""
        return max(self.size, _RUN_COST)


class Resumed(msgspec.Struct, frozen=True, array_like=True):
    """The beginning of another attempt at a turn.

    The seq of any other event is the one after that of the event before it. That of a resumption may be higher: events
    were lost with a process, or those of the earlier attempts were dropped.

    Attributes:
        attempt: From 2.
        text_length: The code points of the reply so far that stay: all in the mode ``continue``, none in ``retry``.
    """

    seq: int
    attempt: int
    mode: Literal["retry", "continue"]
    text_length: int = 0


_resumed: msgspec.msgpack.Decoder[Resumed] = msgspec.msgpack.Decoder(Resumed)


def resumed_run(resumed: Resumed) -> Run:
    return Run(RESUMED, msgspec.msgpack.encode(resumed))


def resumed_of(run: Run) -> Resumed:
    """The resumption of a run whose item is :data:`RESUMED`."""
    return _resumed.decode(run.lengths)


_packed: msgspec.msgpack.Decoder[list[Run]] = msgspec.msgpack.Decoder(list[Run])


def run_of(item: int, lengths: Sequence[int]) -> Run:
    """The run of an item's pieces with these lengths."""
    if max(lengths, default=0) < _GOES_ON:
        return Run(item, bytes(lengths))
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


def last_seq(runs: Iterable[Run], begins: int = 0) -> int:
    """The seq of the last event; that of the event before the first one is ``begins``."""
    seq = begins
    for run in runs:
        seq = resumed_of(run).seq if run.item == RESUMED else seq + run.events
    return seq


def skip(runs: Iterable[Run], seq: int, *, begins: int = 0) -> Iterator[Run]:
    """The runs after a seq.

    Args:
        begins: The seq of the event before the first one.
    """
    for run in runs:
        if run.item == RESUMED:
            begins = resumed_of(run).seq - 1
        events = run.events
        skipped = min(max(seq - begins, 0), events)
        begins += events
        if skipped < events:
            yield run.after(skipped)


def text_of(
    runs: Iterable[Run],
    texts: Sequence[str],
    *,
    after: int = 0,
    begins: int = 0,
    events: float = inf,
    starts: Mapping[int, int] | None = None,
) -> str:
    """The texts of the pieces after a seq, in the order of their arrival.

    Args:
        runs: All runs of the turn, or successive ones.
        texts: The texts of the items.
        begins: The seq of the event before the first one.
        events: How many events to take.
        starts: Where in the texts of their items the runs begin, if not at the beginning.
    """
    parts: list[str] = []
    ends = dict(starts or {})
    for run in runs:
        if events <= 0:
            break
        if run.item == RESUMED:
            begins = resumed_of(run).seq - 1
        skipped = min(max(after - begins, 0), run.events)
        begins += run.events
        start = ends.get(run.item, 0)
        ends[run.item] = end = start + run.length
        if skipped < run.events:
            taken = run.after(skipped)
            start = end - taken.length
            if events < taken.events:
                end -= taken.after(int(events)).length
            events -= taken.events
            if run.item >= 0:
                parts.append(texts[run.item][start:end])
    return "".join(parts)


def texts_by_item(runs: Iterable[Run], text: str) -> Iterator[tuple[int, str]]:
    """The texts of runs, each with its item."""
    start = 0
    for run in runs:
        if run.item >= 0:
            end = start + run.length
            yield run.item, text[start:end]
            start = end


def are_of(runs: Sequence[Run], texts: Sequence[str]) -> bool:
    """Whether the pieces are exactly these items' texts."""
    lengths = [0] * len(texts)
    for run in runs:
        if run.item >= len(texts):
            return False
        if run.item >= 0:
            lengths[run.item] += run.length
    return lengths == [len(text) for text in texts]


def split(runs: Iterable[Run], text: str, *, length_max: int) -> Iterator[tuple[list[Run], str]]:
    """Runs and their text in parts of at most this cost; more only for a single piece."""
    runs = list(runs)
    if runs and sum(run.cost for run in runs) <= length_max:  # nearly always
        yield join(runs), text[: sum(run.length for run in runs)]
        return
    part: list[Run] = []
    size = start = end = 0
    for run in runs:
        for few in _cut(run, length_max // 4):
            cost = few.size if part and part[-1].item == few.item >= 0 else few.cost
            if part and size + cost > length_max:
                yield join(part), text[start:end]
                part, size, start = [], 0, end
            part.append(few)
            size += cost
            end += few.length
    if part:
        yield join(part), text[start:end]


def _cut(run: Run, length_max: int) -> Iterator[Run]:
    """A run in runs of at most so many code points and events, or of single pieces."""
    if run.item < 0 or (run.length <= length_max and len(run.lengths) <= length_max):
        yield run
        return
    lengths = run.lengths
    start = 0
    while start < len(lengths):
        end = start + max(length_max // 64, 1)
        while end < len(lengths) and lengths[end - 1] == _GOES_ON:
            end += 1
        few = Run(run.item, lengths[start:end])
        if few.length <= length_max:
            yield few
        else:
            yield from (Run(run.item, length_bytes(length)) for length in few.pieces())
        start = end
