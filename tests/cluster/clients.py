"""Clients of a cluster that talk, come back after each cut, and note what they were told.

They do what docs/client-guide.md says: a POST without an answer is sent again with its key, a stream without a terminal
event is resumed, and each attempt may go to another replica.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from urllib.parse import urlsplit

import msgspec
import trio

from tests.cluster.calls import CALL_S, Answer, NoAnswerError, Stream, call, open_call
from tests.cluster.cluster import KEY, Door
from tests.cluster.history import (
    Accepted,
    Call,
    Created,
    Deleted,
    Deleting,
    Done,
    Event,
    GaveUp,
    History,
    Lost,
    Paused,
    Refused,
    Saw,
    Titled,
    Told,
    Unanswered,
)

SILENCE_S = 6
"""A stream that is silent for so long is dead: heartbeats come each second."""
PATIENCE_S = 90
"""A call that has had no good answer for so long is given up: faults are shorter."""
PAUSE_MAX_S = 1.0
COPIES = 8
"""How many equal POSTs are sent at once."""
AUTH = {"Authorization": f"Bearer {KEY}"}
_SSE = {"Accept": "text/event-stream"}
_PASSING = (502, 503, 504)

_view_numbers = count(1)


class GivenUpError(Exception):
    """A call has had no good answer for too long, or a final one. It is noted."""


@dataclass
class Load:
    """What the clients are to do. ``doors`` are asked by chance for each attempt."""

    doors: Callable[[], Sequence[Door]]
    history: History
    seed: int
    tokens: tuple[int, int] = (5, 60)
    rate: float = 20
    on_interrupt: Sequence[str] = ("fail",)
    """One of them, by chance, is that of each new turn."""
    is_over: bool = False
    """Set it to let each client end its turn and leave."""


class Client:
    """One client, whose sessions are its own. Its choices depend on the seed alone."""

    def __init__(self, load: Load, name: str) -> None:
        self.name = name
        self._longest_s = 0.0
        self._view = View(load.history)
        self._load = load
        self._history = load.history
        self._luck = Random(f"{load.seed} {name}")
        self._numbers = count(1)

    @property
    def longest_s(self) -> float:
        """The longest pause on a turn that it has started as a stream."""
        return max(self._longest_s, self._view.longest_s)

    def forget_pauses(self) -> None:
        self._longest_s = self._view.longest_s = 0

    async def run(self) -> None:
        """Have sessions of all kinds until the load is over."""
        while not self._load.is_over:
            try:
                await self._have_session()
            except* GivenUpError:
                pass  # the checker tells whether that may be

    async def have_streams(self) -> None:
        """Have one conversation, each turn of it as a stream, until the load is over."""
        session = await self.create()
        while not self._load.is_over:
            try:
                await self.stream(session)
            except* GivenUpError:
                pass  # the checker tells whether that may be

    async def _have_session(self) -> None:
        session = await self.create()
        for _ in range(self._luck.randint(1, 6)):
            if self._load.is_over:
                return
            act = self._luck.choices(
                (self.stream, self.follow_in_background, self.wait, self.cancel, self.send_copies, self.set_title),
                (6, 3, 2, 2, 1, 2),
            )[0]
            await act(session)
        if self._luck.random() < 0.3:
            await self.delete(session)

    # Sessions

    async def create(self) -> str:
        key = self._new_key()
        answer = await self._repeat("create", "", "POST", "/sessions", {}, key=key)
        session: str = msgspec.json.decode(answer.body)["id"]
        self._history.add(Created(session=session, key=key))
        return session

    async def set_title(self, session: str) -> None:
        title = self._new_key()

        def unknown() -> None:
            self._history.add(Titled(session=session, title=title, is_known=False))

        await self._repeat("title", session, "PATCH", f"/sessions/{session}", {"title": title}, on_unknown=unknown)
        self._history.add(Titled(session=session, title=title))

    async def delete(self, session: str) -> None:
        self._history.add(Deleting(session=session))
        await self._repeat("delete", session, "DELETE", f"/sessions/{session}", good=(204, 404))
        self._history.add(Deleted(session=session))

    # Turns

    async def stream(self, session: str) -> None:
        """Start a turn and follow it; sometimes with a second client."""
        text, key = self._new_input(), self._new_key()
        self._view = view = View(self._history)
        try:
            await self._start_and_follow(session, text, key, view)
        finally:
            self._longest_s = max(self._longest_s, view.longest_s)

    async def _start_and_follow(self, session: str, text: str, key: str, view: "View") -> None:
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(PATIENCE_S) as patience:
                for attempt in count():
                    if await self._start_stream(session, text, key, view):
                        break
                    await self._pause(attempt)
            if patience.cancelled_caught:
                self._give_up("turn", session)
            if self._luck.random() < 0.3:
                nursery.start_soon(self.follow, session, view.turn, View(self._history, view.turn))
            if not view.is_over:
                await self.follow(session, view.turn, view)

    async def follow_in_background(self, session: str) -> None:
        turn = await self.start(session)
        await self.follow(session, turn, View(self._history, turn))

    async def wait(self, session: str) -> None:
        turn = await self.start(session)
        await self.wait_for(session, turn)

    async def cancel(self, session: str) -> None:
        turn = await self.start(session)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.follow, session, turn, View(self._history, turn))
            await trio.sleep(self._luck.uniform(0, 2))
            answer = await self._repeat("cancel", session, "POST", f"/sessions/{session}/turns/{turn}/cancel")
            self._note_end("cancel", answer)

    async def send_copies(self, session: str) -> None:
        """Send equal POSTs at once, to all replicas."""
        text, key = self._new_input(), self._new_key()
        async with trio.open_nursery() as nursery:
            for _ in range(COPIES):
                nursery.start_soon(self.start, session, text, key)

    async def start(self, session: str, text: str = "", key: str = "") -> str:
        """Start a turn in the background."""
        text, key = text or self._new_input(), key or self._new_key()
        body = {"input": text, "background": True, "on_conflict": "queue", "on_interrupt": self._on_interrupt(text)}
        answer = await self._repeat("turn", session, "POST", f"/sessions/{session}/turns", body, key=key)
        turn: str = msgspec.json.decode(answer.body)["id"]
        self._note_accepted(session, turn, text, key)
        return turn

    async def wait_for(self, session: str, turn: str) -> None:
        """Wait for the end of a turn without a stream."""
        path = f"/sessions/{session}/turns/{turn}?wait=5"
        with trio.move_on_after(PATIENCE_S):
            while not self._note_end("wait", await self._repeat("wait", session, "GET", path)):
                pass
            return
        self._give_up("wait", session, turn)

    async def follow(self, session: str, turn: str, view: "View") -> None:
        """Have a view of all events of a turn, across cuts."""
        path = f"/sessions/{session}/turns/{turn}/events"
        with trio.move_on_after(PATIENCE_S + 30):
            for attempt in count():
                headers = AUTH | {"Last-Event-ID": str(view.seen)}
                seen = view.seen
                try:
                    async with open_call(self._door(), "GET", path, headers) as stream:
                        if await self._continue(session, view, stream):
                            break
                except NoAnswerError:
                    self._history.add(Unanswered(call="events", session=session))
                await self._pause(0 if view.seen > seen else attempt)
            view.close()
            if view.lost:
                await self.wait_for(session, turn)
            return
        self._give_up("events", session, turn)

    async def _start_stream(self, session: str, text: str, key: str, view: "View") -> bool:
        """One attempt. Whether the turn is accepted, and its stream has ended in whatever way."""
        body = {"input": text, "on_disconnect": "continue", "on_conflict": "queue"}
        body["on_interrupt"] = self._on_interrupt(text)
        headers = {**AUTH, **_SSE, "Idempotency-Key": key}
        try:
            async with open_call(self._door(), "POST", f"/sessions/{session}/turns", headers, body) as stream:
                if stream.status == 200:
                    view.turn = urlsplit(stream.headers["location"]).path.rpartition("/")[2]
                    self._note_accepted(session, view.turn, text, key)
                    await view.read(stream)
                    return True
                if stream.status == 204:
                    raise AssertionError("204 without Last-Event-ID")
                self._refused("turn", session, await stream.whole())
        except NoAnswerError:
            self._history.add(Unanswered(call="turn", session=session))
        return bool(view.turn)

    async def _continue(self, session: str, view: "View", stream: Stream) -> bool:
        """Go on with a view. Whether it is over."""
        if stream.status == 200:
            await view.read(stream)
            return view.is_over
        answer = await stream.whole()
        if stream.status == 204:
            view.note_done()
            return True
        if _code(answer) == "events_lost":
            view.note_lost()
            return True
        self._refused("events", session, answer)
        return False

    # Calls

    async def _repeat(
        self,
        name: Call,
        session: str,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str = "",
        good: Sequence[int] = (),
        on_unknown: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Call until there is a good answer.

        Raises:
            GivenUpError: There is none, or a final refusal.
        """
        headers = AUTH | ({"Idempotency-Key": key} if key else {})
        with trio.move_on_after(PATIENCE_S):
            for attempt in count():
                try:
                    answer = await call(self._door(), method, path, headers, body, within_s=CALL_S)
                except NoAnswerError:
                    self._history.add(Unanswered(call=name, session=session))
                    on_unknown()
                else:
                    if answer.status in (good or (200, 201, 202)):
                        return answer
                    if answer.status != 503 or "retry-after" not in answer.headers:
                        on_unknown()
                    self._refused(name, session, answer)
                await self._pause(attempt)
        self._give_up(name, session)
        raise AssertionError("unreachable")

    def _refused(self, name: Call, session: str, answer: Answer) -> None:
        """Note a refusal. Raises: GivenUpError, if it is final."""
        headers = answer.headers
        refusal = Refused(
            call=name,
            session=session,
            status=answer.status,
            code=_code(answer),
            retry_after="retry-after" in headers,
            location="location" in headers,
        )
        self._history.add(refusal)
        if answer.status not in (*_PASSING, 429):
            raise GivenUpError

    def _give_up(self, name: Call, session: str, turn: str = "") -> None:
        self._history.add(GaveUp(call=name, session=session, turn=turn))
        raise GivenUpError

    async def _pause(self, attempt: int) -> None:
        await trio.sleep(min(PAUSE_MAX_S, 0.05 * 2 ** min(attempt, 10)) * self._luck.uniform(0.5, 1))

    def _door(self) -> Door:
        return self._luck.choice(self._load.doors())

    # Notes

    def _note_accepted(self, session: str, turn: str, text: str, key: str) -> None:
        self._history.add(Accepted(session=session, turn=turn, input=text, key=key))

    def _note_end(self, name: Call, answer: Answer) -> bool:
        """Note a turn that has ended. Whether it has."""
        turn = msgspec.json.decode(answer.body)
        if turn["ended_at"] is None:
            return False
        told = Told(
            call=name,
            turn=turn["id"],
            state=turn["state"],
            reason=turn["reason"] or "",
            text=turn["text"],
            stored=turn.get("stored", True),
        )
        self._history.add(told)
        return True

    def _on_interrupt(self, text: str) -> str:
        """The same for each copy and each repetition of a request."""
        return Random(text).choice(self._load.on_interrupt)

    def _new_key(self) -> str:
        return f"{self.name}-{next(self._numbers)}"

    def _new_input(self) -> str:
        tokens = self._luck.randint(*self._load.tokens)
        return f"{self._new_key()} tokens={tokens} rate={self._load.rate}"


class View:
    """A client's way through the events of a turn, and the longest pause on it.

    Attributes:
        seen: The seq of the last event.
        is_over: Whether the terminal event has come, or the client was told that there is nothing more.
        longest_s: The longest time without an event, also before the first one; not while the turn is queued.
    """

    def __init__(self, history: History, turn: str = "") -> None:
        self.turn = turn
        self.seen = 0
        self.is_over = self.is_closed = False
        self.lost = False
        self._history = history
        self._number = next(_view_numbers)
        self.longest_s = 0.0
        self._heard_at: float | None = trio.current_time()

    async def read(self, stream: Stream) -> None:
        """Read a stream up to its end. Raises: NoAnswerError."""
        events = stream.events(silence_s=SILENCE_S)
        try:
            async for event in events:
                self._note(event)
        finally:
            await events.aclose()

    def _note(self, event: Event) -> None:
        self._measure()
        if event.type == "turn.queued":
            self._heard_at = None
        self._history.add(Saw(view=self._number, turn=self.turn, event=event))
        self.seen = event.seq
        if event.is_terminal:
            self.is_over = True
            self.close()

    def _measure(self) -> None:
        now = trio.current_time()
        if self._heard_at is not None:
            self.longest_s = max(self.longest_s, now - self._heard_at)
        self._heard_at = now

    def note_done(self) -> None:
        self._measure()
        self._history.add(Done(view=self._number, turn=self.turn, seq=self.seen))
        self.is_over = True

    def note_lost(self) -> None:
        self._measure()
        self._history.add(Lost(view=self._number, turn=self.turn))
        self.is_over = self.lost = True

    def close(self) -> None:
        """Note the longest pause, once."""
        if not self.is_closed:
            self.is_closed = True
            self._history.add(Paused(view=self._number, turn=self.turn, longest_s=round(self.longest_s, 3)))


def _code(answer: Answer) -> str:
    """The code of a problem; empty for the answer of a proxy."""
    try:
        code = msgspec.json.decode(answer.body).get("code", "")
    except (msgspec.DecodeError, AttributeError):
        return ""
    return str(code)
