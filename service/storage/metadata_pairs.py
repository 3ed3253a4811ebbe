"""What the index of sessions by pairs of their metadata has of each pair, in the same way for every store with rows.

A row has a digest of the pair, so that it is short whatever the pair. The record of the session decides in the end.

The sessions of an owner are in the rows of this owner and in those of all owners. The sessions without an owner are in
rows of their own. So a listing reads no row of a session that its caller must not know, and neither its time nor its
page cursor tells of one; a listing of all sessions merges the two kinds of rows.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

from service.storage.records import SessionRecord

COUNTED_MAX = 1000
"""So many rows of each pair are counted, to begin with the rarest one."""
_DIGEST_BYTES = 16
_NO_OWNER = ""
_ALL_OWNERS = "/"  # no owner's name has a slash

Pair = tuple[bytes, ...]
"""The digests of a pair, one for each kind of rows."""


def pairs_of(session: SessionRecord) -> list[Pair]:
    """The pairs of a session: by each digest it has a row."""
    return _pairs(session.metadata, (session.owner, _ALL_OWNERS) if session.owner else (_NO_OWNER,))


def pairs_asked_for(metadata: Mapping[str, str], owner: str | None) -> list[Pair]:
    """The pairs by which a listing looks for sessions of an owner, or of all if it is None: by any digest of each."""
    return _pairs(metadata, (_NO_OWNER, _ALL_OWNERS) if owner is None else (owner,))


def _pairs(metadata: Mapping[str, str], owners: Sequence[str]) -> list[Pair]:
    return [tuple(_digest(owner, name, value) for owner in owners) for name, value in metadata.items()]


def _digest(*texts: str) -> bytes:
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(4) + encoded)
    return digest.digest()
