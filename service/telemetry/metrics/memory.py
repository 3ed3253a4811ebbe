"""Where the numbers are kept: in memory that the workers of one master share, so that any of them tells the sum.

The memory is a file without a name that goes with its last process (``memfd_create(2)``). Each worker has a slot of it,
and is the only one that writes there. A worker that begins takes the first slot that no living process has, and goes on
with the counts in it. So a count is never lost and never falls, also where a worker was killed; the gauges of a dead
worker do not count. Whether a process has a slot is told by a lock, which the kernel drops with the process.

::

    slot    number of the form | bytes used | entries
    entry   length of the key | how many numbers | whether it is a gauge | key, padded | numbers

Keys are JSON: the name of the metric, the bounds of its buckets, and the values of its labels. A worker of another
version ignores what it does not know. Numbers are doubles at addresses that are multiples of eight: a reader in another
process sees each of them before or after a write, and nothing in between.
"""

import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from math import isnan, nan

import msgspec
import structlog

from service.byte_locks import lock, others_hold
from service.steps import Steps
from service.telemetry.metrics.families import Family

logger = structlog.get_logger("lastcall.metrics")

SLOT_BYTES = 256 * 1024
"""Room for some 1 500 series. Memory is taken by what is used of it."""
SLOTS_MAX = 1024
_FORMAT = 1
_LOCKS_AT = 1 << 40
"""Where the locks of slots begin in the file: beyond those that show the status of workers."""
_HEAD = struct.Struct("=qq")
_ENTRY = struct.Struct("=iii4x")
_WORD = 8

_SERIES_A_STEP = 64

Key = tuple[str, tuple[str, ...]]
"""A series: the name of its metric, and the values of its labels."""


class Memory:
    """The numbers of this process, and of the others that share the file. Any thread may write.

    Args:
        file: A descriptor of the shared file, opened by this process alone, which this object closes; None for a
            process that shares its numbers with no other.
    """

    def __init__(self, file: int | None = None) -> None:
        self._file = file
        self._writing = threading.Lock()
        self._at: dict[tuple[Family, tuple[str, ...]], int] = {}
        self._others: dict[int, _Slot] = {}
        self._is_full = False
        self._number: int | None = None
        shared = None if file is None else self._take_slot(file)
        self._own = _Slot(bytearray(SLOT_BYTES) if shared is None else shared)
        self._numbers = self._own.numbers
        self._begin()

    def __repr__(self) -> str:
        return f"<Memory: slot {self._number}, {len(self._own.entries)} series>"

    def _take_slot(self, file: int) -> mmap.mmap | None:
        """Take the first slot that no process has. None, and numbers of its own, if there is none."""
        try:
            if os.fstat(file).st_size < SLOTS_MAX * SLOT_BYTES:
                os.ftruncate(file, SLOTS_MAX * SLOT_BYTES)
            for number in range(SLOTS_MAX):
                try:
                    lock(file, _LOCKS_AT + number)
                except BlockingIOError:
                    continue
                self._number = number
                return mmap.mmap(file, SLOT_BYTES, offset=number * SLOT_BYTES)
        except OSError as error:
            logger.warning("this process has metrics of its own: no memory can be shared", error=error.strerror)
        return None

    def _begin(self) -> None:
        """Begin a new slot, or go on with that of a process that has ended: with its counts, and not its gauges.

        A gauge is no number until this process sets it, and is not told meanwhile: it may be of a version before.
        """
        if self._own.form != _FORMAT:
            self._own.begin()
        for entry in self._own.read():
            if entry.is_gauge:
                self._numbers[entry.at] = nan

    def close(self) -> None:
        """Give the slot to the next process. Nothing may be written afterwards."""
        for slot in (self._own, *self._others.values()):
            slot.close()
        self._others.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # Writing

    def add(self, family: Family, labels: tuple[str, ...], by: float) -> None:
        with self._writing:
            self._numbers[self._find(family, labels)] += by

    def set(self, family: Family, labels: tuple[str, ...], to: float) -> None:
        with self._writing:
            self._numbers[self._find(family, labels)] = to

    def add_to_buckets(self, family: Family, labels: tuple[str, ...], bucket: int, total: float) -> None:
        """Add one observation, in the bucket with this number."""
        with self._writing:
            at = self._find(family, labels)
            self._numbers[at + bucket] += 1
            self._numbers[at + len(family.bounds) + 1] += total

    def add_all(self, family: Family, labels: tuple[str, ...], counts: Sequence[int], total: float) -> None:
        """Add many observations: how many there are in each bucket, infinity the last, and their sum."""
        with self._writing:
            at = self._find(family, labels)
            for number, count in enumerate(counts):
                if count:
                    self._numbers[at + number] += count
            self._numbers[at + len(counts)] += total

    def make(self, family: Family, labels: tuple[str, ...]) -> None:
        """Have a series exist, at zero if it does not yet."""
        with self._writing:
            self._find(family, labels)

    def _find(self, family: Family, labels: tuple[str, ...]) -> int:
        """Where the numbers of a series are. A series for which there is no room is not told."""
        at = self._at.get((family, labels))
        if at is None:
            key = _key_of(family, labels)
            length = _length_of(family)
            found = self._own.find(key)
            if found is None:
                found = self._own.add(key, length, is_gauge=family.kind == "gauge")
            if found is None:
                if not self._is_full:
                    self._is_full = True
                    logger.warning("there are more series of metrics than fit: further ones are left out")
                return self._own.nowhere
            if isnan(self._numbers[found]):  # a gauge of the process before
                self._numbers[found] = 0
            at = self._at[family, labels] = found
        return at

    # Reading

    @property
    def processes(self) -> int:
        """How many processes have a slot, this one included."""
        return 1 + sum(self._lives(number) for number in self._slots())

    def read(self, families: Sequence[Family]) -> Steps[dict[Family, dict[tuple[str, ...], list[float]]]]:
        """The numbers of all processes, for each series of these metrics."""
        known = {(family.name, family.bounds): family for family in families}
        found: dict[Family, dict[tuple[str, ...], list[float]]] = {family: {} for family in families}
        with self._writing:  # a thread that makes a series reads the slot, too
            self._own.read()
        for slot, is_own, lives in self._all_slots():
            entries = slot.entries if is_own else slot.read()
            for count, entry in enumerate(tuple(entries), 1):  # others may be found meanwhile
                if not count % _SERIES_A_STEP:
                    yield
                family = known.get((entry.name, entry.bounds))
                if family is None or (family.kind == "gauge" and not lives) or (family.across == "own" and not is_own):
                    continue
                numbers = [*map(float, slot.numbers[entry.at : entry.at + entry.length])]
                if isnan(numbers[0]):
                    continue
                before = found[family].get(entry.labels)
                if before is not None:
                    merge: Callable[[float, float], float] = max if family.across == "max" else float.__add__
                    numbers = [merge(one, other) for one, other in zip(before, numbers, strict=True)]
                found[family][entry.labels] = numbers
            yield
        return found

    def _all_slots(self) -> Iterator[tuple["_Slot", bool, bool]]:
        yield self._own, True, True
        for number, slot in list(self._slots().items()):
            yield slot, False, self._lives(number)

    def _slots(self) -> dict[int, "_Slot"]:
        """The slots that other processes have, or had."""
        if self._file is not None and self._number is not None:
            number = len(self._others) + (len(self._others) >= self._number)
            while number < SLOTS_MAX:
                slot = _Slot(mmap.mmap(self._file, SLOT_BYTES, access=mmap.ACCESS_READ, offset=number * SLOT_BYTES))
                if slot.form == 0:  # no process has had it, nor one of those after it
                    slot.close()
                    break
                self._others[number] = slot
                number += 1 + (number + 1 == self._number)
        return self._others

    def _lives(self, number: int) -> bool:
        return self._file is not None and others_hold(self._file, _LOCKS_AT + number)


class _Entry(msgspec.Struct, frozen=True, gc=False):
    """One series in a slot. ``at`` counts in numbers, from the slot's beginning."""

    name: str
    bounds: tuple[float, ...]
    labels: tuple[str, ...]
    at: int
    length: int
    is_gauge: bool


class _Slot:
    """One slot, and the series that were found in it so far: it only grows."""

    def __init__(self, memory: bytearray | mmap.mmap) -> None:
        self._memory = memory
        self._bytes = memoryview(memory)
        self.numbers = self._bytes.cast("d")
        self._words = self._bytes.cast("q")
        self.entries: list[_Entry] = []
        self._by_key: dict[bytes, int] = {}
        self._read_up_to = _HEAD.size
        self.nowhere = len(self.numbers) - 32
        """Where the numbers go that nobody reads: at the end, which no series has."""

    @property
    def form(self) -> int:
        """The number of the form of what is in the slot; 0 if nothing is."""
        return self._words[0]

    @property
    def used(self) -> int:
        """How many bytes are used, from the slot's beginning."""
        return self._words[1]

    def begin(self) -> None:
        """Begin with an empty slot of this version's form."""
        self._words[1] = _HEAD.size
        self._words[0] = _FORMAT

    def close(self) -> None:
        for view in (self.numbers, self._words, self._bytes):
            view.release()
        if isinstance(self._memory, mmap.mmap):
            self._memory.close()

    def read(self) -> list[_Entry]:
        """The series. Those of a slot with another form are not known."""
        if self.form != _FORMAT:
            return []
        used = self.used
        while self._read_up_to < used:
            size, length, is_gauge = _ENTRY.unpack_from(self._bytes, self._read_up_to)
            begin = self._read_up_to + _ENTRY.size
            key = bytes(self._bytes[begin : begin + size])
            at = (begin + _padded(size)) // _WORD
            name, bounds, labels = msgspec.json.decode(key, type=tuple[str, tuple[float, ...], tuple[str, ...]])
            self.entries.append(_Entry(name, bounds, labels, at, length, bool(is_gauge)))
            self._by_key[key] = at
            self._read_up_to = (at + length) * _WORD
        return self.entries

    def find(self, key: bytes) -> int | None:
        self.read()
        return self._by_key.get(key)

    def add(self, key: bytes, length: int, *, is_gauge: bool) -> int | None:
        """Add a series at zero. None if it does not fit. Readers see the series with the last step: the size grows."""
        begin = self.used
        at = (begin + _ENTRY.size + _padded(len(key))) // _WORD
        if at + length > self.nowhere:
            return None
        _ENTRY.pack_into(self._bytes, begin, len(key), length, is_gauge)
        self._bytes[begin + _ENTRY.size : begin + _ENTRY.size + len(key)] = key
        self.numbers[at : at + length] = memoryview(bytes(_WORD * length)).cast("d")
        self._words[1] = (at + length) * _WORD
        return at


def _padded(size: int) -> int:
    return -(-size // _WORD) * _WORD


def _length_of(family: Family) -> int:
    """How many numbers a series has: a histogram has one for each bucket, infinity included, and the sum."""
    return len(family.bounds) + 2 if family.kind == "histogram" else 1


def _key_of(family: Family, labels: tuple[str, ...]) -> bytes:
    assert len(labels) == len(family.labels), f"{family.name} has the labels {family.labels}, not {labels}"
    return msgspec.json.encode((family.name, [float(it) for it in family.bounds], labels))
