"""Preconditions of a request (RFC 9110, 13): the ETag of a session, and the header that names ETags."""

import re
from collections.abc import Collection

from quart import request

from service.errors import InvalidRequestError
from service.storage.records import SessionRecord
from service.storage.rules import revision_of

TAGS = {
    "type": "string",
    "pattern": r'^(\*|(W/)?"[!#-~]*"(, (W/)?"[!#-~]*")*)$',
}
"""The schema of ``If-Match``."""
# Each alternative begins with another character, so that a long header is read in one pass.
_NEXT = re.compile(r'[ \t]*(?:(W/)?"([!#-~\x80-\xff]*)"[ \t]*)?(?:,|\Z)')


class MalformedHeaderError(InvalidRequestError):
    """A header does not have the form that HTTP gives it; ``field`` is its name."""

    code = "malformed_header"


def etag_of(session: SessionRecord) -> str:
    """Return the ETag of a session: it stands for what PATCH can change, and for nothing else.

    So it is no validator of the whole session, and ``If-None-Match`` is not looked at.
    """
    return quoted(revision_of(session))


def quoted(revision: str) -> str:
    """Return a revision as a strong ETag."""
    return f'"{revision}"'


def read_if_match() -> Collection[str] | None:
    """Return the revisions for which the current request wants its change; None if it takes every revision.

    A weak ETag stands for no revision, because no change may be based on it (RFC 9110, 13.1.1).

    Raises:
        MalformedHeaderError
    """
    if "If-Match" not in request.headers:
        return None
    value = ",".join(request.headers.getlist("If-Match")).strip(" \t")
    return None if value == "*" else {tag for tag, is_weak in _tags_in(value) if not is_weak}


def _tags_in(value: str) -> list[tuple[str, bool]]:
    """Return the tags in the value of ``If-Match``, each with whether it is weak. Raises: MalformedHeaderError."""
    tags: list[tuple[str, bool]] = []
    position = 0
    while position <= len(value):
        part = _NEXT.match(value, position)
        if part is None:
            break
        if part[2] is not None:
            tags.append((part[2], part[1] is not None))
        position = part.end() if part[0].endswith(",") else len(value) + 1
    if position <= len(value) or not tags:
        raise MalformedHeaderError(
            'If-Match takes * or ETags as they were received, with their quotes: If-Match: "0f3a".', field="If-Match"
        )
    return tags
