"""Compressed bodies: every form of gzip and deflate that servers send, any cut, and the bounds."""

import gzip
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.models.inflate import PIECE_BYTES_MAX, InflateError, Inflater, inflate

TEXT = b"".join(b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number for number in range(3000))


def zlib_like(wbits: int) -> Callable[[bytes], bytes]:
    def compress(text: bytes) -> bytes:
        compressor = zlib.compressobj(wbits=wbits)
        return compressor.compress(text) + compressor.flush()

    return compress


FORMATS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("gzip", lambda text: gzip.compress(text[:100]) + gzip.compress(b"") + gzip.compress(text[100:])),
    ("gzip", lambda text: gzip.compress(text) + bytes(64)),
    ("gzip", lambda text: gzip.compress(text) + b"whatever"),
    ("deflate", zlib_like(15)),
    ("deflate", zlib_like(9)),
    ("deflate", zlib_like(-15)),
    ("deflate", gzip.compress),
    ("gzip", zlib_like(15)),
    ("gzip", bytes),
]


def read(encoding: str, *chunks: bytes) -> bytes:
    inflater, pieces = Inflater(encoding), []
    for chunk in chunks:
        inflater.feed(chunk)
        while inflater.has_more:
            pieces.append(inflater.take())
    assert all(len(piece) <= PIECE_BYTES_MAX for piece in pieces)
    return b"".join(pieces)


@pytest.mark.parametrize(("encoding", "compress"), FORMATS)
def test_every_format_is_read_whole_and_byte_by_byte(encoding: str, compress: Callable[[bytes], bytes]) -> None:
    body = compress(TEXT)
    assert read(encoding, body) == TEXT
    assert read(encoding, *(body[at : at + 1] for at in range(len(body)))) == TEXT


@given(
    format_=st.sampled_from(FORMATS),
    texts=st.lists(st.binary(max_size=40), min_size=1, max_size=6),
    data=st.data(),
)
def test_any_text_comes_out_of_any_cut(
    format_: tuple[str, Callable[[bytes], bytes]], texts: list[bytes], data: st.DataObject
) -> None:
    encoding, compress = format_
    text = b"data:" + b"".join(text * 999 for text in texts)
    body = compress(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    assert read(encoding, *(body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True))) == text


@pytest.mark.parametrize("wbits", [31, 15, -15])
def test_flushed_data_is_there_at_once(wbits: int) -> None:
    compressor = zlib.compressobj(wbits=wbits)
    inflater = Inflater("gzip" if wbits == 31 else "deflate")
    for text in (b"data: one\n\n", b"data: two\n\n"):
        inflater.feed(compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH))
        came = b""
        while inflater.has_more:
            came += inflater.take()
        assert came == text


@pytest.mark.parametrize("compress", [gzip.compress, zlib_like(15), zlib_like(-15)])
def test_a_body_that_was_cut_off_gives_the_data_before_the_cut(compress: Callable[[bytes], bytes]) -> None:
    encoding = "gzip" if compress is gzip.compress else "deflate"
    whole = compress(TEXT)
    for length in range(0, len(whole), 97):
        assert TEXT.startswith(read(encoding, whole[:length]))
    assert inflate(whole[:-9], encoding, bytes_max=1000) == TEXT[:1000]


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", b"\x1f\x8bnot gzip"),
        ("gzip", gzip.compress(TEXT, mtime=0)[:-8] + bytes(8)),
        ("deflate", b"data: as it is\n\n"),
        ("deflate", zlib.compress(TEXT)[:-4] + bytes(4)),
    ],
)
def test_a_damaged_body_is_an_error(encoding: str, body: bytes) -> None:
    with pytest.raises(InflateError, match="damaged"):
        read(encoding, body)
    assert inflate(body, encoding, bytes_max=1000)


def test_a_bomb_is_an_error_before_it_takes_memory() -> None:
    compressor = zlib.compressobj(wbits=31)
    inflater = Inflater("gzip")
    taken = 0

    def take_all() -> None:
        nonlocal taken
        for _ in range(1000):
            inflater.feed(compressor.compress(bytes(1_000_000)))
            while inflater.has_more:
                taken += len(inflater.take())

    with pytest.raises(InflateError, match="too large"):
        take_all()
    assert taken < 25_000_000


def test_endless_empty_members_take_bounded_steps() -> None:
    inflater = Inflater("gzip")
    inflater.feed(gzip.compress(b"") * 1000 + gzip.compress(b"end"))
    takes = []
    while inflater.has_more:
        takes.append(inflater.take())
    assert takes[-1] == b"end"
    assert len(takes) > 100


@pytest.mark.parametrize("wbits", [31, 15, -15])
def test_all_data_of_a_part_is_there_before_the_next_part_arrives(wbits: int) -> None:
    body = zlib_like(wbits)(bytes(300_000) + TEXT)
    for length in range(2, 400):
        whole = zlib.decompressobj(wbits).decompress(body[:length])
        assert read("gzip" if wbits == 31 else "deflate", body[:length]) == whole
