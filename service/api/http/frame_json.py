"""JSON that is one line to every client, for the ``data:`` of an event stream."""

import msgspec

_LINE_ENDS = tuple((end.encode(), b"\\u%04x" % ord(end)) for end in ("\x85", "\u2028", "\u2029"))
_encode = msgspec.json.encode


def frame_json(value: object) -> bytes:
    """JSON with U+0085, U+2028 and U+2029 as ``\\u`` escapes; JSON itself escapes all other line ends.

    A client that splits lines as Python's ``str.splitlines`` does (httpx, and so httpx-sse) would cut an event there.
    :class:`msgspec.Raw` in the value has to be without white space between its tokens.
    """
    json = _encode(value)
    if not json.isascii():
        for line_end, escape in _LINE_ENDS:
            json = json.replace(line_end, escape)
    return json
