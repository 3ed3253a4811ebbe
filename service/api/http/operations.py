"""What an operation takes and gives, said once beside its handler, for the OpenAPI document and the docs page."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from service.api.native.wire import Query, RequestBody
from service.errors import LastcallError

H = TypeVar("H", bound=Callable[..., Any])

_ATTRIBUTE = "operation"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One way in which an operation succeeds.

    Attributes:
        body: The JSON body, if there is one.
        streams: Whether it may be an event stream instead (or, without ``body``, always is).
        media_type: Of a body that is neither.
        located: What ``Location`` names, if it is there.
        links: Operations to which the answer leads, by the parameters that it gives them.
    """

    status: int
    description: str
    body: type[msgspec.Struct] | None = None
    streams: bool = False
    media_type: str | None = None
    located: str = ""
    links: tuple[tuple[str, dict[str, str]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation, apart from what its path and docstring say.

    ``errors`` leaves out what every operation may answer (see :mod:`service.api.reference.openapi`). ``resumes`` says
    what the header ``Last-Event-ID`` does, where it does anything.
    """

    id: str
    answers: tuple[Answer, ...]
    errors: tuple[type[LastcallError], ...] = ()
    body: type[RequestBody] | None = None
    query: type[Query] | None = None
    resumes: str = ""
    accepts_stream: bool = False


def operation(**fields: Any) -> Callable[[H], H]:
    """Say what a handler takes and gives; the arguments are :class:`Operation`'s."""
    described = Operation(**fields)

    def attach(handler: H) -> H:
        setattr(handler, _ATTRIBUTE, described)
        return handler

    return attach


def operation_of(handler: Callable[..., Any]) -> Operation:
    """What was said with :func:`operation`."""
    described: Operation = getattr(handler, _ATTRIBUTE)
    return described
