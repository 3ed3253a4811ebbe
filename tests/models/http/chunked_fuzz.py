"""Random bytes for the decoder of chunked bodies, against a reference. The test of it is in ``test_body.py``.

``python -m tests.models.http.chunked_fuzz 10000000`` tries so many inputs, with another seed each time.
"""

import random
import re
import sys
import time
from dataclasses import dataclass

import h11

from service.models.http.body import ChunkedBody

_SIZES = (b"0", b"1", b"2", b"3", b"5", b"a", b"1F", b"003", b"", b"-1", b"0x2", b" 2", b"g", b"1_0", b"fffff")
_LINE_ENDS = (b"\r\n",) * 60 + (b"\n", b"\r", b"\r\r\n", b"\n\r", b"", b" \r\n", b"\t\r\n", b" \n")
_EXTENSIONS = (b"",) * 20 + (b";a", b";a=b") * 5 + (b' ;a="\r"', b";", b";\n", b" ", b"\x00", b";\xff")
_TRAILERS = (b"",) * 8 + (
    b"x: y\r\n",
    b"x:\r\n",
    b"x: y\n",
    b" fold\r\n",
    b"no field\r\n",
    b"a: \x00\r\n",
    b"\xff: a\r\n",
)
_BYTES = b"\r\n0a;: x\x00"

_REFERENCE_SIZE = re.compile(rb"([0-9A-Fa-f]{1,20})(;[^\r\n]*)?[ \t]*")
_REFERENCE_TRAILER = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+:[^\r\n\0]*")


@dataclass(frozen=True)
class Read:
    body: bytes
    is_over: bool
    is_clean: bool
    failed: bool


def make_input(rng: random.Random) -> bytes:
    """Chunks that are mostly right."""
    parts: list[bytes] = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        data = rng.choice((b"x", b"ab", b"\r\n", b"12345", b"0\r\n\r\n"))
        size = b"%x" % len(data) if rng.random() < 0.9 else rng.choice(_SIZES)
        parts += (size, rng.choice(_EXTENSIONS), rng.choice(_LINE_ENDS), data, rng.choice(_LINE_ENDS))
    parts += (b"0", rng.choice(_EXTENSIONS), rng.choice(_LINE_ENDS), rng.choice(_TRAILERS), rng.choice(_LINE_ENDS))
    if rng.random() < 0.1:
        parts.append(rng.choice((b"HTTP/1.1 200 OK\r\n", b"0", b"\r\n")))
    if rng.random() < 0.2:
        rng.shuffle(parts)
    made = b"".join(parts)
    if made and rng.random() < 0.3:
        at = rng.randrange(len(made))
        made = (
            made[:at]
            + rng.choice((b"", _BYTES[(x := rng.randrange(len(_BYTES))) : x + 1]))
            + made[at + rng.randrange(2) :]
        )
    return made


def read(pieces: list[bytes]) -> Read:
    """What the decoder reads; bytes after an end are given to it, too, if they are in the last piece."""
    decoder, body = ChunkedBody(), []
    for piece in pieces:
        if decoder.is_over:
            decoder.is_clean = False
        if decoder.is_over or decoder.failure:
            break
        body.append(decoder.feed(piece))
    return Read(b"".join(body), decoder.is_over, decoder.is_clean, decoder.failure is not None)


def strictly(made: bytes) -> bytes | None:
    """The body, if the input is one whole body in its strict form; else None."""
    body, rest = b"", made
    while True:
        line, found, rest = rest.partition(b"\r\n")
        size = _REFERENCE_SIZE.fullmatch(line)
        if not found or size is None:
            return None
        length = int(size[1], 16)
        if not length:
            break
        body += rest[:length]
        if len(rest) < length or rest[length : length + 2] != b"\r\n":
            return None
        rest = rest[length + 2 :]
    while True:
        line, found, rest = rest.partition(b"\r\n")
        if not found:
            return None
        if not line:
            return None if rest else body
        if not _REFERENCE_TRAILER.fullmatch(line):
            return None


def by_h11(made: bytes) -> bytes | None:
    """The body as h11 reads it; None if it is not whole, or is followed by other bytes."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    reader.receive_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + made)
    body = b""
    try:
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return None
            if isinstance(event, h11.Data):
                body += event.data
    except h11.RemoteProtocolError:
        return None
    return None if reader.trailing_data[0] else body


def check(made: bytes, rng: random.Random, *, with_h11: bool) -> None:
    """Compare one input with the reference, and with itself in pieces."""
    whole = read([made])
    cuts = sorted(rng.randrange(len(made) + 1) for _ in range(rng.randrange(1, 5)))
    pieces = [made[a:b] for a, b in zip([0, *cuts], [*cuts, len(made)], strict=True) if a < b]
    assert read(pieces) == whole, (made, cuts)
    expected = strictly(made)
    if expected is not None:
        assert whole == Read(expected, is_over=True, is_clean=True, failed=False), made
    else:
        assert not (whole.is_over and whole.is_clean), made
    if with_h11 and (as_h11 := by_h11(made)) is not None:
        assert (whole.body, whole.is_over) == (as_h11, True), made


def fuzz(count: int, *, seed: int, h11_every: int = 20) -> int:
    """Try so many inputs. Returns how many of them are whole bodies in their strict form."""
    rng = random.Random(seed)
    strict = 0
    for number in range(count):
        made = make_input(rng)
        check(made, rng, with_h11=number % h11_every == 0)
        strict += strictly(made) is not None
    return strict


if __name__ == "__main__":
    total, step, start = int(sys.argv[1]), 100_000, time.monotonic()
    first_seed = random.SystemRandom().randrange(2**40)
    strict_count = 0
    for begun in range(0, total, step):
        strict_count += fuzz(min(step, total - begun), seed=first_seed + begun)
        line = f"{begun + step} inputs from seed {first_seed}, {strict_count} strict, {time.monotonic() - start:.0f} s"
        print(line, flush=True)  # noqa: T201
