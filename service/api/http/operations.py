"""Descriptions of operations, beside their handlers, for the OpenAPI document and the docs page."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from service.api.http.wire_types import Query, RequestBody
from service.errors import LastcallError
from service.setting_types import Permission

H = TypeVar("H", bound=Callable[..., Any])

_ATTRIBUTE = "operation"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One way in which an operation succeeds.

    Attributes:
        body: The type of the JSON body, if there is one: a wire type, or a union of some.
        streams: Whether the answer may be an event stream instead (or, without ``body``, always is).
        media_type: The type of a body that is neither JSON nor an event stream.
        located: The thing that ``Location`` names, if the answer has this header.
        tagged: Whether the answer has a session's ``ETag``.
        events: What the events of its stream are, if they are not the native API's.
        links: Operations to which the answer leads, with the parameters that the answer gives them.
    """

    status: int
    description: str
    body: Any = None
    streams: bool = False
    media_type: str | None = None
    located: str = ""
    tagged: bool = False
    links: tuple[tuple[str, dict[str, str]], ...] = ()
    events: str = ""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """The description of an operation, in addition to its path and docstring.

    ``errors`` leaves out the errors that every operation may answer (see :mod:`service.api.reference.openapi`).
    ``keyed`` says whether it reads the header ``Idempotency-Key``; ``resumes`` describes the effect of the header
    ``Last-Event-ID``, if the operation reads it; ``preconditions`` those of the headers that name ETags.
    ``is_described`` is False for a file that is no call of the API: the OpenAPI document leaves it out.
    ``needs`` has the permissions of which one is enough, in place of those that the method needs; such a call is about
    no owner.
    """

    id: str
    answers: tuple[Answer, ...]
    errors: tuple[type[LastcallError], ...] = ()
    body: type[RequestBody] | None = None
    query: type[Query] | None = None
    keyed: bool = False
    resumes: str = ""
    preconditions: tuple[tuple[str, str], ...] = ()
    accepts_stream: bool = False
    is_described: bool = True
    needs: tuple[Permission, ...] = ()


def operation(**fields: Any) -> Callable[[H], H]:
    """Describe a handler; the arguments are those of :class:`Operation`."""
    described = Operation(**fields)

    def attach(handler: H) -> H:
        setattr(handler, _ATTRIBUTE, described)
        return handler

    return attach


def operation_of(handler: Callable[..., Any]) -> Operation:
    """Return the description that :func:`operation` attached to a handler."""
    described: Operation = getattr(handler, _ATTRIBUTE)
    return described
