"""Reading a query string, strictly, into its wire type."""

from typing import TypeVar

from quart import Request

from service.api.strict_json import convert, shown
from service.api.wire import Query
from service.errors import InvalidRequestError

Q = TypeVar("Q", bound=Query)


def read_query(request: Request, kind: type[Q]) -> Q:
    """The query string as a ``kind``.

    Raises:
        InvalidRequestError
    """
    values = request.args.to_dict(flat=False)
    for name, given in values.items():
        if len(given) > 1:
            raise InvalidRequestError("This parameter may be given once.", field=shown(name))
    return convert({name: given[0] for name, given in values.items()}, kind, strict=False)
