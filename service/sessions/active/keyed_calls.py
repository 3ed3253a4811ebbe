"""Calls with idempotency keys: of the calls with one key in this process, one at a time asks for acceptance.

The others wait for its outcome and share it. So a repetition never meets the conflicts and limits that the first call
itself brings about, and never gives up a turn whose first client has just left. The store decides between processes:
each step checks its key first of all.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import trio

from service.clock import Clock
from service.errors import (
    KeyReusedError,
    MadeIsGoneError,
    OwnedElsewhereError,
    RefusedError,
    RepeatedError,
    SessionNotFoundError,
    StoreError,
    TurnNotFoundError,
)
from service.storage.records import IdempotencyKey
from service.storage.store import Store
from service.storage.store_deadline import answered_within

T = TypeVar("T")


class _Share(Generic[T]):
    """The share of a call that waits in the result of the first one: what ``take`` makes of it."""

    def __init__(self, take: Callable[[T], T]) -> None:
        self.take = take
        self.results: list[T] = []


class _FirstCall:
    """A call that asks for acceptance, while others with the same key wait for it."""

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.ended = trio.Event()
        self.repeated: RepeatedError | None = None
        self.shares: list[_Share[Any]] = []

    def accept(self, result: object) -> None:
        """Give each call that waits its share, in the step in which this one was accepted."""
        for share in self.shares:
            share.results.append(share.take(result))


def check_repeated(error: RepeatedError, key: IdempotencyKey) -> None:
    """Check that a call repeats the earlier call with its key.

    Raises:
        KeyReusedError: It is another request.
        MadeIsGoneError: What the earlier call made is gone.
    """
    if error.fingerprint != key.fingerprint:
        raise KeyReusedError
    if error.is_gone:
        raise MadeIsGoneError(session_id=error.session_id, turn_id=error.turn_id)


@contextmanager
def gone_if_not_found(error: RepeatedError) -> Iterator[None]:
    """Say of what an earlier call has made that it is gone, where a look at it does not find it any more."""
    try:
        yield
    except (SessionNotFoundError, TurnNotFoundError):
        raise MadeIsGoneError(session_id=error.session_id, turn_id=error.turn_id) from None


class KeyedCalls:
    """The calls with keys that are under way in this process."""

    def __init__(self, store: Store, *, clock: Clock, store_timeout_s: float) -> None:
        self._store = store
        self._clock = clock
        self._timeout_s = store_timeout_s
        self._first: dict[tuple[str, str], _FirstCall] = {}

    async def once(
        self,
        key: IdempotencyKey | None,
        call: Callable[[float], Awaitable[T]],
        *,
        take_share: Callable[[T], T] = lambda result: result,
        give_back: Callable[[T], object] = lambda _: None,
    ) -> T:
        """Make a call, or share the result of the call with the same key that is under way. Without a key: just call.

        There is no checkpoint between the result and the return. The answer comes within ``store_timeout_s``.

        Args:
            call: Takes the seconds within which it must answer: half of ``store_timeout_s`` or more.
            take_share: What a call that waited gets of the result.
            give_back: Called for the share of a call that was cancelled meanwhile.

        Raises:
            RepeatedError: An earlier call, here or elsewhere, has made something. It was the same request.
            KeyReusedError, MadeIsGoneError: As :func:`check_repeated`.
            StoreError: Also if the first call was refused so late that this one cannot begin any more.
        """
        if key is None:
            return await call(self._timeout_s)
        name = (key.caller, key.key)
        asked_at = trio.current_time()
        while (first := self._first.get(name)) is not None:
            share = await self._share_of(first, key, _Share(take_share), give_back, asked_at)
            if share.results:
                return share.results[0]
        mine = self._first[name] = _FirstCall(key.fingerprint)
        try:
            result = await self._call(key, call, asked_at)
            mine.accept(result)
            return result
        except RepeatedError as error:
            mine.repeated = error
            check_repeated(error, key)
            raise
        finally:
            del self._first[name]
            mine.ended.set()

    async def check(self, key: IdempotencyKey) -> None:
        """Check that no earlier call with a key has made anything. Raises: As :meth:`once`."""
        try:
            with answered_within(self._timeout_s):
                await self._store.check_key(key, now=self._clock())
        except RepeatedError as error:
            check_repeated(error, key)
            raise

    async def _share_of(
        self,
        first: _FirstCall,
        key: IdempotencyKey,
        share: _Share[T],
        give_back: Callable[[T], object],
        asked_at: float,
    ) -> _Share[T]:
        """Wait for the first call, and return the share in its result; an empty one if it was refused."""
        is_same = first.fingerprint == key.fingerprint
        if is_same:
            first.shares.append(share)
        try:
            with answered_within(max(asked_at + self._timeout_s - trio.current_time(), 0)):
                await first.ended.wait()
        except BaseException:
            for result in share.results:
                give_back(result)
            raise
        finally:
            if is_same:
                first.shares.remove(share)
        if first.repeated is not None:
            check_repeated(first.repeated, key)
            raise first.repeated.with_traceback(None)
        if not share.results and trio.current_time() > asked_at + self._timeout_s / 2:
            raise StoreError("The first call with this Idempotency-Key was not accepted in time; try again.")
        return share

    async def _call(self, key: IdempotencyKey, call: Callable[[float], Awaitable[T]], asked_at: float) -> T:
        """Make a call. It is refused only if no earlier call with the key, anywhere, has made anything."""
        try:
            return await call(max(asked_at + self._timeout_s - trio.current_time(), self._timeout_s / 2))
        except OwnedElsewhereError:
            raise  # the owner is asked next, and the step that named it has checked the key
        except (RefusedError, StoreError) as error:
            refusal = error
        left_s = asked_at + self._timeout_s - trio.current_time()
        if left_s > 0:
            with answered_within(left_s):
                await self._store.check_key(key, now=self._clock())
        raise refusal
