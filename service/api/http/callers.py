"""Who calls, what the caller may do, and whose sessions the call is about.

=================  =====================================================================================================
``read``           GET and HEAD
``talk``           all other calls about sessions and turns, and what ``read`` allows
``metrics``        ``/metrics``, and nothing else
``administer``     act for other owners, with the header ``Lastcall-Owner`` or the field ``owner`` of a new session; and
                   see the sessions of all owners in listings. What is done there needs ``read`` or ``talk`` as well.
                   The calls under ``/admin`` need this alone, and so does ``/metrics``
=================  =====================================================================================================

The id in a path is a public one. :func:`admit` makes the scoped id of it, so a handler never has another owner's
session in its hands. A request from another process of the service tells who called there, and what the caller may do:
that process has checked the key, and has proved that it is one of this service.
"""

from collections.abc import Collection
from typing import cast

from quart import Request, request

from service.api.http.request_record import record_of
from service.api_keys import PLAIN, Caller
from service.errors import InvalidRequestError, RefusedError
from service.ids import is_owner_name, is_scoped_id, is_turn_id, scoped
from service.setting_types import Permission
from service.telemetry.log_context import add_to_log_context

OWNER = "Lastcall-Owner"
"""Header with the owner for whom the caller acts; empty for sessions without an owner."""
CALLER = b"lastcall-caller"
"""Header of a request from another process of the service: the caller there."""
NEEDED = {"GET": "read", "HEAD": "read", "OPTIONS": "read"}
"""What a call needs, by its method; all other methods need ``talk``."""
_CALLER, _OWNER = "lastcall.caller", "lastcall.owner"
"""Keys in a request's ASGI scope."""


class NotPermittedError(RefusedError):
    """The caller's key is valid, and may not do this."""

    code = "not_permitted"


def needed_for(method: str) -> Permission:
    """Return what a call of this method needs."""
    return cast("Permission", NEEDED.get(method, "talk"))


def admit(admitted: Request, caller: Caller, *, needs: Collection[Permission] = ()) -> None:
    """Let a caller's request pass to its handler: note whose sessions it is about, and make the scoped id of its path.

    Args:
        needs: The permissions of which the caller must have one; by default those that the method needs.

    Raises:
        NotPermittedError
        InvalidRequestError: The header names no owner.
    """
    needed = needed_for(admitted.method)
    if admitted.endpoint is not None and not caller.may & frozenset(needs or (needed, "talk")):
        named = " or ".join(map(repr, needs or (needed,)))
        raise NotPermittedError(f"This API key may not do this: it needs the permission {named} (`may`).")
    scope = cast("dict[str, object]", admitted.scope)
    owner = _owner_in(admitted, caller)
    scope[_CALLER] = caller
    if (record := record_of(scope)) is not None:
        record.caller = caller
    scope[_OWNER] = caller.name if owner is None else owner
    if admitted.view_args and "session_id" in admitted.view_args:
        admitted.view_args["session_id"] = scoped(current_owner(), admitted.view_args["session_id"])
        _name_work(admitted.view_args["session_id"], admitted.view_args.get("turn_id"))


def _name_work(session_id: str, turn_id: str | None) -> None:
    """Have the lines of the request name the session and the turn of its path, if these are ids."""
    if is_scoped_id(session_id):
        add_to_log_context(session_id=session_id, turn_id=turn_id if turn_id and is_turn_id(turn_id) else None)


def _owner_in(admitted: Request, caller: Caller) -> str | None:
    """Return the owner in the header of a request; None without the header."""
    given = admitted.headers.getlist(OWNER)
    if not given:
        return None
    _check_administers(caller, f"leave the header {OWNER} out")
    if len(given) > 1 or not (given[0] == "" or is_owner_name(given[0])):
        raise InvalidRequestError(
            "This header should be the name of one owner: 1-128 of A-Z a-z 0-9 _ . ~ @ | : + = -; "
            "or empty, for sessions without an owner.",
            field=OWNER,
        )
    return given[0]


def _check_administers(caller: Caller, instead: str) -> None:
    if "administer" not in caller.may:
        raise NotPermittedError(
            f"This API key may not act for other owners: {instead}, or send a key that may `administer`."
        )


def current_caller() -> Caller:
    """Return who sent the current request."""
    return cast("dict[str, Caller]", request.scope)[_CALLER]


def current_owner() -> str:
    """Return the owner whose sessions the current request is about; empty for sessions without an owner."""
    return cast("dict[str, str]", request.scope)[_OWNER]


def owner_of_new(named: str | None) -> str:
    """Return the owner of a session that the current request creates.

    Args:
        named: The owner in the body, if there is one.

    Raises:
        NotPermittedError
        InvalidRequestError: The header names another one.
    """
    if named is None:
        return current_owner()
    _check_administers(current_caller(), "leave the field `owner` out")
    if OWNER in request.headers and named != current_owner():
        raise InvalidRequestError(f"The header {OWNER} names another owner.", field="owner")
    return named


def listed_owner() -> str | None:
    """Return the owner whose sessions the current request lists; None for those of all owners."""
    if "administer" in current_caller().may and OWNER not in request.headers:
        return None
    return current_owner()


def caller_headers() -> tuple[tuple[bytes, bytes], ...]:
    """Return :data:`CALLER` of the current request; nothing for a request that needs no key, which has no caller."""
    caller = cast("dict[str, Caller]", request.scope).get(_CALLER)
    return () if caller is None else ((CALLER, f"{' '.join(sorted(caller.may))};{caller.name}".encode()),)


def caller_at_peer(value: str | None) -> Caller:
    """Return the caller whom another process tells. A process of an earlier version tells none: it knows no names."""
    if value is None:
        return PLAIN
    may, _, name = value.partition(";")
    return Caller(name, frozenset(cast("list[Permission]", may.split())))
