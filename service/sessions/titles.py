"""Titles: a model writes one for a session that has none, when the first turn of its conversation is complete.

The call is no turn: it is in no tree, it has no events, and it does not use the session. Its tokens count in the
session's usage. A title that a caller sets meanwhile stays, and no title tells of messages that were deleted meanwhile.
A call that fails leaves the session without a title, and one line in the log; it is not repeated. A turn may be one
that gives no title (``may_title``): its session was made for it alone.
"""

import re
import unicodedata
from collections.abc import Callable

import structlog
import trio
from apsw import unicode

from service.clock import Clock
from service.errors import LastcallError, ModelError, SessionNotFoundError
from service.freezes import move_on_after
from service.models.client import Finished, Message, ModelClient, ModelRequest, ModelStream, TextDelta, Usage
from service.sessions.turns.turn import Turn
from service.sessions.turns.turn_metrics import count_tokens
from service.settings import Settings
from service.stop_state import Phase, StopState
from service.storage.records import SessionRecord, TitleSource, TurnRecord
from service.storage.store import Store
from service.storage.store_deadline import answered_within
from service.telemetry.log_context import log_context
from service.telemetry.metrics.metrics import Metrics

logger = structlog.get_logger("lastcall.title")

CALLS_MAX = 4
"""How many titles are written at once."""
WAITING_MAX = 1000
"""How many sessions wait for a title or get one; above it a session gets none."""
TIMEOUT_S = 30.0
"""How long one call may take, from the request on."""
TITLE_LENGTH_MAX = 80
"""The code points of a title."""
_INPUT_LENGTH_MAX = 2000
_REPLY_LENGTH_MAX = 1000
_ANSWER_LENGTH_MAX = 4000
"""The code points of an answer that are looked at; an answer is not read any further. Reasoning may be in front."""
_TOKENS_MAX = 1000
_INSTRUCTION = (
    "Write a title for the conversation: at most six words, in the language of the conversation, in plain text and "
    "without quotation marks. Answer with the title alone."
)
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_LABEL = re.compile(r"title\s*[:\uff1a]\s*", re.IGNORECASE)
_OPENING_QUOTES = "\"'`\u201c\u201e\u201d\u2018\u00ab\u00bb\u300c\u300e"
_CLOSING_QUOTES = "\"'`\u201d\u201c\u201d\u2019\u00bb\u00ab\u300d\u300f"
_QUOTES = dict(zip(_OPENING_QUOTES, _CLOSING_QUOTES, strict=True))
_KEPT_FORMATS = "\u200c\u200d"
"""Characters without a width that belong to words and to emojis."""


class Titles:
    """Writes titles, a few at once.

    Args:
        nursery: The nursery of the sessions supervisor. A failure of a title's task is logged there and ends nothing.
        stop: A stop cancels all calls, and does not wait for them.
        metrics: Counts their tokens.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        store: Store,
        client_for: Callable[[str], ModelClient],
        clock: Clock,
        settings: Settings,
        stop: StopState,
        metrics: Metrics | None = None,
    ) -> None:
        self._nursery = nursery
        self._store = store
        self._client_for = client_for
        self._clock = clock
        self._settings = settings
        self._stop = stop
        self._metrics = metrics or Metrics()
        self._places = trio.Semaphore(CALLS_MAX)
        self._scopes: dict[str, trio.CancelScope] = {}

    def __repr__(self) -> str:
        return f"<Titles: {len(self._scopes)} to be written>"

    def note_ended(self, turn: Turn) -> None:
        """Note that a turn has ended: the session may need a title now. Begins the call, and does not wait for it."""
        if self._settings.title_model is None or not (turn.is_opening and turn.stored and turn.state == "completed"):
            return
        if turn.is_ephemeral or not turn.may_title:
            return
        if turn.session_id in self._scopes or len(self._scopes) >= WAITING_MAX or self._stop.phase >= Phase.DRAINING:
            return
        scope = self._scopes[turn.session_id] = trio.CancelScope()
        record = turn.record()
        request, source = _request_for(record, self._settings.title_model), TitleSource.of(record)
        self._nursery.start_soon(self._run, turn.session_id, request, source, scope, name=f"title of {turn.session_id}")

    def cancel(self, session_id: str) -> None:
        """Cancel the call for a session, if there is one: the session is deleted."""
        if session_id in self._scopes:
            self._scopes[session_id].cancel()

    async def _run(self, session_id: str, request: ModelRequest, source: TitleSource, scope: trio.CancelScope) -> None:
        """The task of one title. Its failure ends nothing else."""
        try:
            with log_context(session_id=session_id), scope, self._stop.until(Phase.DRAINING):
                async with self._places:
                    await self._write(session_id, request, source)
        except SessionNotFoundError:
            pass
        except LastcallError as error:
            # The words of the model's server may quote the conversation.
            told = error.message if isinstance(error, ModelError) else str(error)
            logger.warning("no title was written", session_id=session_id, error=told)
        except Exception:
            logger.exception("the title of a session crashed", session_id=session_id)
        finally:
            del self._scopes[session_id]

    async def _write(self, session_id: str, request: ModelRequest, source: TitleSource) -> None:
        with answered_within(self._settings.store_timeout_s):
            session = await self._store.get_session(session_id, now=self._clock())
        if session.title is not None:
            return
        answer = _Answer()
        failure: ModelError | None = None
        try:
            await self._ask(request, answer)
        except ModelError as error:
            failure = error  # what was counted by then was paid for
        count_tokens(self._metrics, self._client_for(request.model).name, request.model, answer.usage)
        await self._keep(session, answer, source)
        if failure is not None:
            raise failure

    async def _ask(self, request: ModelRequest, answer: "_Answer") -> None:
        """Take the model's answer. Raises: ModelError."""
        try:
            with move_on_after(TIMEOUT_S) as bound:
                async with self._client_for(request.model).stream(request) as stream:
                    await answer.take(stream)
        except ModelError as error:
            answer.usage = answer.usage or error.usage
            raise
        if bound.cancelled_caught:
            raise ModelError("turn_timeout", f"The model did not write a title within {TIMEOUT_S:g} seconds.")
        if answer.title is None:
            raise ModelError("upstream_protocol", "The model answered with nothing that can be a title.")

    async def _keep(self, session: SessionRecord, answer: "_Answer", source: TitleSource) -> None:
        if answer.title is not None or answer.usage is not None:
            with answered_within(self._settings.store_timeout_s):
                await self._store.keep_title(
                    session, answer.title, usage=answer.usage, now=self._clock(), source=source
                )


class _Answer:
    """What has come of a model's answer.

    Attributes:
        title: The title, once the answer is whole.
        usage: What the upstream has counted.
    """

    def __init__(self) -> None:
        self.title: str | None = None
        self.usage: Usage | None = None

    async def take(self, stream: ModelStream) -> None:
        """Take the answer to its end, or as much of it as is read."""
        text = ""
        try:
            while True:
                for event in await stream.receive():
                    if isinstance(event, TextDelta):
                        text += event.text
                    elif isinstance(event, Finished):
                        self.title = title_of(text)
                        return
                if len(text) > _ANSWER_LENGTH_MAX:
                    self.title = title_of(text)
                    return
        finally:
            self.usage = stream.usage


def _request_for(turn: TurnRecord, model: str) -> ModelRequest:
    said, reply = turn.input_text[:_INPUT_LENGTH_MAX], turn.text[:_REPLY_LENGTH_MAX]
    prompt = (Message("system", _INSTRUCTION), Message("user", f"The user:\n{said}\n\nThe assistant:\n{reply}"))
    return ModelRequest(model=model, prompt=prompt, max_output_tokens=_TOKENS_MAX)


def title_of(answer: str) -> str | None:
    """The title in a model's answer: one line of plain text, without quotation marks around it. None if there is none.

    Models write their thoughts in front of it, a label, Markdown, a full stop. Controls that would change how other
    text is shown are left out, and no character that consists of several code points is cut in two.
    """
    lines = _THOUGHTS.sub("", answer[:_ANSWER_LENGTH_MAX], count=1).splitlines()
    for line in filter(str.strip, lines):
        text = "".join(filter(_is_plain, line))
        text = " ".join(text.split()).lstrip("#>*- ").strip("*_ ")
        text = _LABEL.sub("", text, count=1) if _LABEL.match(text) else text
        text = _unquoted(text.strip("*_ "))
        if text.endswith((".", "。")) and not text.endswith(".."):
            text = text[:-1]
        text = _unquoted(text)
        if any(map(_says_something, text)):
            return _cut(text)
    return None


def _is_plain(character: str) -> bool:
    """Whether a character may be in a title: no control, no half of a surrogate pair, no private character."""
    return character in _KEPT_FORMATS or character.isspace() or unicodedata.category(character)[0] != "C"


def _says_something(character: str) -> bool:
    """Whether a character is a letter, a number or a picture."""
    category = unicodedata.category(character)
    return category[0] in "LN" or category == "So"


def _unquoted(text: str) -> str:
    """The text without quotation marks around all of it."""
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not set(text[1:-1]) & {text[0], text[-1]}:
        text = text[1:-1].strip()
    return text


def _cut(text: str) -> str:
    """The beginning of a text that is too long, to the end of a word if there is one, and with an ellipsis."""
    if len(text) <= TITLE_LENGTH_MAX:
        return text
    end = 0
    while (after := unicode.grapheme_next_break(text, end)) < TITLE_LENGTH_MAX:
        end = after
    start = text[: end or TITLE_LENGTH_MAX - 1]
    words = start.rpartition(" ")[0]
    return (words if len(words) > TITLE_LENGTH_MAX // 2 else start).rstrip(" ,;:-") + "…"
