"""What can go wrong, as types. They say what happened and know nothing of HTTP.

::

    LastcallError
    ├── StartupError                 the service cannot start; one line says why
    │   └── SettingsError            a setting is wrong: its name, its value, what is allowed
    ├── RefusedError                 the caller asked for something that cannot be had
    │   ├── InvalidRequestError      a field is missing, malformed or too large (``field``)
    │   ├── SessionNotFoundError     never existed, deleted or expired
    │   ├── SessionExistsError       the chosen id is taken
    │   ├── TurnNotFoundError
    │   ├── TurnInProgressError      a turn is running or queued, and is in the way
    │   ├── EventsLostError          a resume inside events that a crash took
    │   ├── ResumeConflictError      a resume of a turn that the session has not begun last
    │   ├── OwnedElsewhereError      the session's turns run in another process (``fence``, ``address``)
    │   └── LimitError               a bound is reached; try later (``retry_after_s``)
    │       ├── TurnLimitError       ``live_turns_max``
    │       ├── QueueFullError       ``queued_turns_max``
    │       ├── StreamLimitError     ``streams_max``
    │       ├── SessionLimitError    ``memory_sessions_max``
    │       └── ShuttingDownError    no new work: the service is about to stop
    ├── StoreError                   the store refused, hung or broke
    │   └── ResourcesExhaustedError  the system gives this process no more descriptors or buffers
    └── ModelError                   the upstream failed (``code``, ``retryable``, ``retry_after_s``)

Foreign exceptions become one of these once, where they enter: model clients raise
:class:`ModelError` only, stores raise :class:`StoreError` and the ``Session*`` ones only.
"""

import errno
from typing import Final

from service.failure_codes import FailureCode

NOTHING_LEFT = "no file descriptor left, or no memory for a connection (its operator may raise the limit: ulimit -n)"
"""What such a process has, as a part of a sentence."""
_EXHAUSTION = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def is_exhaustion(code: int | None) -> bool:
    """Whether an ``errno`` says that the system has no descriptor or buffer left, for the process or at all."""
    return code in _EXHAUSTION


class LastcallError(Exception):
    """The root. ``str(error)`` is one sentence that may be shown to a caller: no secret and no path in it."""


INTERNAL_ERROR: Final = "internal_error"
"""The code of what is a fault of this service: an answer with status 500, or the end of a turn."""
INTERNAL_ERROR_MESSAGE = "Something in this service broke; its log says what."
"""All that callers learn of such a fault."""


class StartupError(LastcallError):
    """The service cannot start."""


class SettingsError(StartupError):
    """A setting has a value that is not allowed."""


class RefusedError(LastcallError):
    """What the caller asked for cannot be had. ``code`` is stable and part of the API."""

    code = "refused"


class InvalidRequestError(RefusedError):
    """A part of the request is not allowed.

    ``field`` names it as a path into the body (``metadata.team``), or a parameter or header.
    """

    code = "invalid_request"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class SessionNotFoundError(RefusedError):
    code = "session_not_found"

    def __init__(self, session_id: str) -> None:
        super().__init__(f"There is no session {session_id!r}: it never existed, was deleted or has expired.")
        self.session_id = session_id


class SessionExistsError(RefusedError):
    code = "session_exists"

    def __init__(self, session_id: str) -> None:
        super().__init__(f"A session {session_id!r} exists already; choose another id or leave it out.")
        self.session_id = session_id


class TurnNotFoundError(RefusedError):
    code = "turn_not_found"

    def __init__(self, turn_id: str) -> None:
        super().__init__(f"This session has no turn {turn_id!r}.")
        self.turn_id = turn_id


class HeadMovedError(LastcallError):
    """Another process has accepted a turn since the session's head was looked at: look again. Callers never see it."""


class TurnInProgressError(RefusedError):
    code = "turn_in_progress"

    def __init__(self, turn_id: str, *, instead: str = 'send "on_conflict": "queue" or "supersede"') -> None:
        super().__init__(
            f"Turn {turn_id!r} is still running or queued in this session; wait for it, cancel it, or {instead}."
        )
        self.turn_id = turn_id


class EventsLostError(RefusedError):
    """The events after this cursor went with a crash; the turn's record is what remains."""

    code = "events_lost"

    def __init__(self, turn_id: str, *, after: int, state: str, text: str) -> None:
        super().__init__(f"Events of turn {turn_id!r} after {after} were lost in a crash; its state and text are here.")
        self.turn_id = turn_id
        self.after = after
        self.state = state
        self.text = text


class ResumeConflictError(RefusedError):
    """A client comes back to a turn that is not the session's newest one, or to none.

    ``turn_id`` and ``session_id`` name the newest turn, where there is one; ``field`` is what speaks against it.
    """

    code = "resume_conflict"

    def __init__(self, message: str, *, field: str, session_id: str | None = None, turn_id: str | None = None) -> None:
        super().__init__(f"{message} Without Last-Event-ID this call starts a turn.")
        self.field = field
        self.session_id = session_id
        self.turn_id = turn_id


class OwnedElsewhereError(RefusedError):
    """The session has open turns that another process runs: what decides about them is to be asked there.

    ``address`` is where it answers, None if it did not say; ``fence`` is its number among the store's owners.
    """

    code = "owned_elsewhere"
    retry_after_s = 1

    def __init__(self, session_id: str, *, fence: int, address: str | None) -> None:
        super().__init__(f"The turns of session {session_id!r} run in another process of this service.")
        self.session_id = session_id
        self.fence = fence
        self.address = address


class LimitError(RefusedError):
    """A bound is reached and the same request may succeed after ``retry_after_s`` seconds."""

    code = "limit"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TurnLimitError(LimitError):
    code = "turn_limit"


class QueueFullError(LimitError):
    code = "queue_full"


class StreamLimitError(LimitError):
    code = "stream_limit"


class SessionLimitError(LimitError):
    code = "session_limit"


class ShuttingDownError(LimitError):
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("This server is shutting down and takes no new work; try again, another one will answer.")


class StoreError(LastcallError):
    """The store could not do it. ``retry_after_s`` is set where it may pass by itself."""

    code: FailureCode = "store_unavailable"

    def __init__(self, message: str, *, retry_after_s: int | None = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ResourcesExhaustedError(StoreError):
    """The system has no descriptor or buffer left for what the store, or the way to another process, needs."""

    code: FailureCode = "resources_exhausted"

    def __init__(self) -> None:
        super().__init__(f"This server has {NOTHING_LEFT}; try again.")


class ModelError(LastcallError):
    """The model server failed. Becomes ``turn.failed`` with this ``code`` and message.

    Args:
        code: Stable, part of the API: :mod:`service.failure_codes` has all of them with their meaning.
        message: What happened and what to do, for a user, in words of ours; never a secret, never a traceback.
        upstream_words: What the upstream gave as the reason, as a sentence that follows on the message. An operator
            may keep it from callers (``upstream_words``); secrets are taken out of it already.
        retryable: Whether the same request may succeed a moment later. Only honoured before the
            first token.
        retry_after_s: Seconds the upstream asked to wait, if it did.
        tokens: With ``context_too_long``, how many the upstream counted, if it says so.
        tokens_max: How many it takes, if it says so.
    """

    def __init__(
        self,
        code: FailureCode,
        message: str,
        *,
        upstream_words: str = "",
        retryable: bool = False,
        retry_after_s: float | None = None,
        tokens: int | None = None,
        tokens_max: int | None = None,
    ) -> None:
        super().__init__(f"{message} {upstream_words}".rstrip())
        self.code: FailureCode = code
        self.message = message
        self.upstream_words = upstream_words
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.tokens = tokens
        self.tokens_max = tokens_max
