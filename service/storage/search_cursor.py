"""The page cursors of a search: sealed, because the numbers of documents count those of other owners, too."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import blake2b
from struct import Struct

import msgspec

from service.errors import InvalidRequestError

_HALF_BYTES = 8
_TAG_BYTES = 8
_ROUNDS = 4
_NUMBERS = Struct(">qq")


class SearchPosition(msgspec.Struct, frozen=True):
    """A place among the documents of a search, by number, the highest first.

    ``newest`` is the number of the first document that the search has shown: sessions that were shown have a document
    from there to this place. It is not the highest number of all, which moves with the documents of other owners.
    """

    document: int
    newest: int


class SearchCursors:
    """Makes and reads cursors that only the holders of the same secret can read. One position has one cursor."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def encode(self, position: SearchPosition) -> str:
        """The position as a word that is safe in a URL."""
        numbers = _NUMBERS.pack(position.document, position.newest)
        left, right = numbers[:_HALF_BYTES], numbers[_HALF_BYTES:]
        for turn in range(_ROUNDS):  # a Feistel network: each round is undone by itself
            left, right = right, _xor(left, self._hash(right, turn))
        sealed = left + right
        return urlsafe_b64encode(sealed + self._hash(sealed, _ROUNDS)).decode().rstrip("=")

    def decode(self, cursor: str) -> SearchPosition:
        """Raises: InvalidRequestError (``after``), if the text is not a page cursor of a search here."""
        try:
            given = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
            sealed, tag = given[:-_TAG_BYTES], given[-_TAG_BYTES:]
            if len(sealed) != _NUMBERS.size or tag != self._hash(sealed, _ROUNDS):
                raise ValueError
            left, right = sealed[:_HALF_BYTES], sealed[_HALF_BYTES:]
            for turn in reversed(range(_ROUNDS)):
                left, right = _xor(right, self._hash(left, turn)), left
            position = SearchPosition(*_NUMBERS.unpack(left + right))
            if self.encode(position) != cursor:
                raise ValueError
        except ValueError:
            raise InvalidRequestError("This cursor is not one that a search here gave out.", field="after") from None
        return position

    def _hash(self, part: bytes, turn: int) -> bytes:
        return blake2b(part, key=self._secret, salt=bytes((turn,)), digest_size=_HALF_BYTES).digest()


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
