"""The error types of the service. They say what happened and know nothing of HTTP.

::

    LastcallError
    ├── StartupError                 the service cannot start; one line says why
    │   └── SettingsError            a setting is wrong: its name, its value, what is allowed
    ├── RefusedError                 the caller asked for something that cannot be had
    │   ├── InvalidRequestError      a field is missing, malformed or too large (``field``)
    │   │   └── NothingAskedError    a turn without an input, on a path that asks nothing
    │   ├── SessionNotFoundError     the session never existed, was deleted or has expired
    │   ├── SessionExistsError       the chosen id is taken
    │   ├── TurnNotFoundError        the session has no such turn
    │   ├── ItemNotFoundError        the session has no such item
    │   ├── NodeNotFoundError        the live tree has no such node
    │   ├── WorkerNotFoundError      the server has no such worker
    │   ├── TurnInProgressError      a running or queued turn is in the way
    │   │   └── TurnsSuspendedError  the session's open turns wait for a process that adopts them
    │   ├── TurnMovedError           a turn goes on in another process (``session_id``, ``turn_id``)
    │   ├── TurnEndingError          a turn is ending, and its end takes long (``session_id``, ``turn_id``)
    │   ├── EventsLostError          a resume inside events that a crash lost
    │   ├── EventsDeletedError       a replay of a turn of which an item was deleted
    │   ├── ResumeConflictError      a resume of a turn that is not the newest turn of its session
    │   ├── OwnedElsewhereError      the session's turns run in another process (``fence``, ``address``)
    │   ├── OwnerHangsError          the call waits for a turn whose owner hangs (``session_id``, ``turn_id``)
    │   ├── PreconditionFailedError  the session is not as the caller saw it last (``revision``)
    │   ├── KeyReusedError           an idempotency key that came with another request before
    │   ├── MadeIsGoneError          what the call with this idempotency key made is gone
    │   ├── HeadMovedError           the session's head is another turn than the caller saw (``turn_id``)
    │   └── LimitError               a limit is reached; try later (``retry_after_s``)
    │       ├── TurnLimitError       ``live_turns_max``
    │       ├── QueueFullError       ``queued_turns_max``
    │       ├── BranchLimitError     ``branches_max``
    │       ├── StreamLimitError     ``streams_max``
    │       ├── SessionLimitError    ``memory_sessions_max``
    │       ├── ReportsUnavailableError  the file of past shutdowns cannot be read now
    │       └── ShuttingDownError    no new work: the service is about to stop
    ├── RepeatedError                an earlier call with this idempotency key made something; callers never see this
    ├── StoreError                   the store refused, hung or broke
    │   ├── PeerUntrustedError       another process of the service and this one do not accept each other (``reason``)
    │   ├── ResourcesExhaustedError  the system gives this process no more descriptors or buffers
    │   ├── EditedMeanwhileError     a part of what was copied was deleted meanwhile; the store works
    │   └── StoreLostError           the store's file was deleted or replaced: another process may serve another file
    └── ModelError                   the upstream failed (``code``, ``retryable``, ``retry_after_s``)

The module that calls a library turns the library's exceptions into these types. Model clients raise
:class:`ModelError` only. Stores raise :class:`StoreError`, :class:`RepeatedError` and subclasses of
:class:`RefusedError`.
"""

import errno
from typing import Any, Final

from service.failure_codes import FailureCode
from service.ids import public_id

NOTHING_LEFT = "no file descriptor left, or no memory for a connection (its operator may raise the limit: ulimit -n)"
"""A part of error texts: the state of a process that has reached a limit of the system."""
_EXHAUSTION = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def is_exhaustion(code: int | None) -> bool:
    """Whether an ``errno`` says that the process or the system has no descriptor or buffer left."""
    return code in _EXHAUSTION


class LastcallError(Exception):
    """The root of all errors here. ``str(error)`` is one sentence for a caller, without a secret or a path."""


INTERNAL_ERROR: Final = "internal_error"
"""The code of a fault of this service, in an answer with status 500 or in the end of a turn."""
INTERNAL_ERROR_MESSAGE = "Something in this service broke; its log has the cause."
"""The only text about such a fault that a caller sees."""


class StartupError(LastcallError):
    """The service cannot start."""


class SettingsError(StartupError):
    """A setting has a value that is not allowed."""


class RefusedError(LastcallError):
    """The service refuses the caller's request. ``code`` is stable and part of the API."""

    code = "refused"


class InvalidRequestError(RefusedError):
    """A part of the request is not allowed.

    ``field`` names this part: a path into the body (``metadata.team``), a parameter or a header.
    """

    code = "invalid_request"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NothingAskedError(InvalidRequestError):
    """A turn without an input was to answer what its path ends with, and this is not the user's."""

    def __init__(self) -> None:
        super().__init__(
            "There is nothing to answer: the conversation has no item, or ends with one of the model, or with one that "
            "its server has refused. Send an input.",
            field="input",
        )


class SessionNotFoundError(RefusedError):
    code = "session_not_found"

    def __init__(self, session_id: str) -> None:
        super().__init__(
            f"There is no session {public_id(session_id)!r}: it never existed, was deleted or has expired."
        )
        self.session_id = session_id


class SessionExistsError(RefusedError):
    code = "session_exists"

    def __init__(self, session_id: str) -> None:
        super().__init__(f"A session {public_id(session_id)!r} exists already; choose another id or leave it out.")
        self.session_id = session_id


class TurnNotFoundError(RefusedError):
    code = "turn_not_found"

    def __init__(self, turn_id: str) -> None:
        super().__init__(f"This session has no turn {turn_id!r}.")
        self.turn_id = turn_id


class ItemNotFoundError(RefusedError):
    code = "item_not_found"

    def __init__(self, item_id: str) -> None:
        super().__init__(f"This session has no item {item_id!r}.")
        self.item_id = item_id


class HeadMovedError(RefusedError):
    """The session's head is not the turn that the caller saw; ``turn_id`` is the head, None if there is none."""

    code = "head_moved"

    def __init__(self, head: str | None) -> None:
        now = "has no head" if head is None else f"has the head {head!r}"
        super().__init__(f"This session {now}, and not the one in `seen_head`: read the session, and decide again.")
        self.turn_id = head


class RepeatedError(LastcallError):
    """An earlier call with the same idempotency key has made something: a session, or a turn of a session.

    Args:
        fingerprint: The fingerprint of that call.
        turn_id: The turn that the call made, the last one of several; None if it made a session without a turn.
        first_turn_id: The first one of several turns.
        is_gone: Whether what was made was deleted, or has expired.
    """

    def __init__(
        self,
        *,
        fingerprint: bytes,
        session_id: str,
        turn_id: str | None,
        first_turn_id: str | None = None,
        is_gone: bool,
    ) -> None:
        super().__init__(f"A call with this idempotency key has made {turn_id or session_id!r} already.")
        self.fingerprint = fingerprint
        self.session_id = session_id
        self.turn_id = turn_id
        self.first_turn_id = first_turn_id
        self.is_gone = is_gone


class KeyReusedError(RefusedError):
    """The idempotency key came with another request before: another method, path or body."""

    code = "idempotency_key_reused"
    field = "Idempotency-Key"

    def __init__(self) -> None:
        super().__init__(
            "This Idempotency-Key came with another request before: a key belongs to one method, path and body. "
            "Send a new key with a new request, and the same body with a repetition."
        )


class MadeIsGoneError(RefusedError):
    """The call with this idempotency key was accepted before, and what it made is gone."""

    code = "idempotency_key_spent"
    field = "Idempotency-Key"

    def __init__(self, *, session_id: str, turn_id: str | None) -> None:
        session = f"session {public_id(session_id)!r}"
        made = session if turn_id is None else f"turn {turn_id!r} of {session}"
        super().__init__(
            f"The call with this Idempotency-Key made {made}, which was deleted or has expired. "
            "Send a new key to make another."
        )


class NodeNotFoundError(RefusedError):
    code = "node_not_found"

    def __init__(self) -> None:
        super().__init__("There is no such node in the live tree, or not any more.")


class WorkerNotFoundError(RefusedError):
    code = "worker_not_found"

    def __init__(self) -> None:
        super().__init__("This server has no worker with this process id, or not any more.")


class TurnInProgressError(RefusedError):
    code = "turn_in_progress"

    def __init__(self, turn_id: str, *, instead: str = 'send "on_conflict": "queue" or "supersede"') -> None:
        super().__init__(
            f"Turn {turn_id!r} is still running or queued in this session; wait for it, cancel it, or {instead}."
        )
        self.turn_id = turn_id


class TurnsSuspendedError(TurnInProgressError):
    """The open turns of a session wait for a process that adopts them. ``turn_id`` is the first of them."""


class TurnEndingError(RefusedError):
    """A turn is ending, cancelled or as was decided before, and its end takes longer than the caller waits."""

    code = "turn_ending"
    retry_after_s = 1

    def __init__(self, *, session_id: str, turn_id: str) -> None:
        super().__init__(
            f"Turn {turn_id!r} is ending, but its end takes longer than usual: repeat this call, or ask for the "
            "turn at its URL (Location) later."
        )
        self.session_id = session_id
        self.turn_id = turn_id


class TurnMovedError(RefusedError):
    """The call waits for a turn that has left this process, which stops or was taken for dead."""

    code = "turn_moved"
    retry_after_s = 1

    def __init__(self, *, session_id: str, turn_id: str) -> None:
        super().__init__(
            f"Turn {turn_id!r} has left this process, which stops or was taken for dead: the turn goes on in another "
            "process, or has its end there. It was accepted: do not repeat this call without its Idempotency-Key, ask "
            "for the turn at its URL (Location)."
        )
        self.session_id = session_id
        self.turn_id = turn_id


class EventsLostError(RefusedError):
    """A crash lost the events after the seq ``after``; only the turn's record remains."""

    code = "events_lost"

    def __init__(self, turn_id: str, *, after: int, state: str, text: str) -> None:
        super().__init__(f"Events of turn {turn_id!r} after {after} were lost in a crash; its state and text are here.")
        self.turn_id = turn_id
        self.after = after
        self.state = state
        self.text = text


class EventsDeletedError(RefusedError):
    """An item of the turn's reply was deleted, and the turn's events with it; only the rest of the turn remains."""

    code = "events_deleted"

    def __init__(self, turn_id: str) -> None:
        super().__init__(f"A part of the reply of turn {turn_id!r} was deleted, and the turn's events with it.")
        self.turn_id = turn_id


class ResumeConflictError(RefusedError):
    """A client resumes a turn that is not the session's newest turn, or that does not exist.

    ``turn_id`` and ``session_id`` name the newest turn, if there is one. ``field`` names the part of the request that
    does not fit the newest turn.
    """

    code = "resume_conflict"

    def __init__(self, message: str, *, field: str, session_id: str | None = None, turn_id: str | None = None) -> None:
        super().__init__(f"{message} Without Last-Event-ID this call starts a turn.")
        self.field = field
        self.session_id = session_id
        self.turn_id = turn_id


class OwnedElsewhereError(RefusedError):
    """Another process, the owner, runs the open turns of the session; send requests about these turns to the owner.

    ``address`` is the owner's address, None if the owner did not give one; ``fence`` is its number among the store's
    owners.
    """

    code = "owned_elsewhere"
    retry_after_s = 1

    def __init__(self, session_id: str, *, fence: int, address: str | None) -> None:
        super().__init__(f"The turns of session {public_id(session_id)!r} run in another process of this service.")
        self.session_id = session_id
        self.fence = fence
        self.address = address


class OwnerHangsError(RefusedError):
    """The call waits for a turn whose owner hangs. The turn was accepted; ``turn_id`` and ``session_id`` name it."""

    code = "owner_hangs"

    def __init__(self, *, session_id: str, turn_id: str) -> None:
        super().__init__(
            f"The process that runs turn {turn_id!r} hangs. The turn was accepted: do not repeat this call, "
            "ask for the turn at its URL (Location) later."
        )
        self.session_id = session_id
        self.turn_id = turn_id


class PreconditionFailedError(RefusedError):
    """The session has none of the revisions that the caller takes a change for; ``revision`` is the one that it has."""

    code = "precondition_failed"

    def __init__(self, revision: str) -> None:
        super().__init__(
            "The session has changed since you read it: get the session again, and decide again what to change."
        )
        self.revision = revision


class LimitError(RefusedError):
    """A limit is reached; the same request may succeed after ``retry_after_s`` seconds."""

    code = "limit"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TurnLimitError(LimitError):
    code = "turn_limit"


class QueueFullError(LimitError):
    code = "queue_full"


class BranchLimitError(LimitError):
    code = "branch_limit"


class StreamLimitError(LimitError):
    code = "stream_limit"


class SessionLimitError(LimitError):
    code = "session_limit"


class ReportsUnavailableError(LimitError):
    """The disk with the reports of past shutdowns refuses or hangs. ``reason`` is a part of the sentence."""

    code = "reports_unavailable"

    def __init__(self, reason: str) -> None:
        super().__init__(f"The reports of past shutdowns cannot be read: {reason}.", retry_after_s=10)


class ShuttingDownError(LimitError):
    """The service is about to stop. With ``untouched`` nothing of the request was done: another process may do it."""

    code = "shutting_down"

    def __init__(self, *, untouched: bool = False) -> None:
        super().__init__("This server is shutting down and takes no new work; try again: another process may answer.")
        self.untouched = untouched


class StoreError(LastcallError):
    """The store could not do a step. ``retry_after_s`` is set where the fault may pass by itself.

    With ``outcome_is_unknown`` the step was a call's write to a conversation, and the store may have done it.
    """

    code: FailureCode = "store_unavailable"

    def __init__(self, message: str, *, retry_after_s: int | None = 1) -> None:
        super().__init__(message)
        self.outcome_is_unknown = False
        self.retry_after_s = retry_after_s


class StoreLostError(StoreError):
    """The store that this process has open is not the store that its name leads to: nothing can be kept here."""


class EditedMeanwhileError(StoreError):
    """A caller deleted a part of a conversation while it was copied. This says nothing of the store."""

    def __init__(self) -> None:
        super().__init__("A part of this conversation was deleted while it was copied; try again.")


class PeerUntrustedError(StoreError):
    """The certificate of another replica is not accepted here, or that of this replica is not accepted there."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "The replica that runs the turns of this session cannot be asked: a certificate is not accepted."
        )
        self.reason = reason


class ResourcesExhaustedError(StoreError):
    """The system has no descriptor or buffer left for the store, or for a connection to another process."""

    code: FailureCode = "resources_exhausted"

    def __init__(self) -> None:
        super().__init__(f"This server has {NOTHING_LEFT}; try again.")


class ModelError(LastcallError):
    """The model server failed. The turn ends as ``turn.failed`` with this ``code`` and message.

    Args:
        code: Stable, part of the API: :mod:`service.failure_codes` has all codes with their meaning.
        message: What happened and what to do, for a user, in words of this service; never a secret or a traceback.
        upstream_words: The upstream's own reason, as a sentence that follows the message. Secrets are removed from it
            already. An operator may keep this text from callers (``upstream_words``).
        retryable: Whether the same request may succeed a moment later. Has no effect after the first token.
        retry_after_s: The wait in seconds that the upstream asked for; None if it did not ask for one.
        tokens: With ``context_too_long``, the tokens that the upstream counted; None if it does not say.
        tokens_max: The tokens that the upstream takes; None if it does not say.
        parameter: With ``parameter_refused``, the parameter of the request that the upstream does not take.
        may_be_continuation: Whether what the upstream refuses may be to go on with a reply, where it was asked to.

    Attributes:
        usage: What the upstream has counted for replies that failed before their first token
            (:class:`~service.models.client.Usage`); None if it has not counted, as nearly always.
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
        parameter: str | None = None,
        may_be_continuation: bool = False,
    ) -> None:
        super().__init__(f"{message} {upstream_words}".rstrip())
        self.code: FailureCode = code
        self.message = message
        self.upstream_words = upstream_words
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.tokens = tokens
        self.tokens_max = tokens_max
        self.parameter = parameter
        self.may_be_continuation = may_be_continuation
        self.usage: Any = None
