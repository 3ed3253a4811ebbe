"""Lines of HTTP/1.1 as clients and servers read them, before h11 does.

h11's pattern of a field tries each blank as two of its parts: where a byte follows that h11 refuses, the time grows
with the square of the length, and seconds go by for one head. The patterns here take a time that grows with the length.

Source: h11 0.16, ``_abnf.field_value`` and ``_abnf.chunk_header``.
"""

import re

REFUSED = re.compile(rb"[\0\v\f]|\r(?!\n)")
"""Bytes that h11 refuses in a first line and in fields."""
END_OF_FIELDS = re.compile(rb"\n\r?\n")
CHUNK_HEADER = re.compile(rb"([0-9A-Fa-f]{1,20})(?:;[^\r\n]*|[ \t]*)\r\n")
"""The line with a chunk's size: what h11 accepts, but for carriage returns among extensions."""
