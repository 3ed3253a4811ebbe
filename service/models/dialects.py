"""The dialects of the models that a server has shown to need another one than the usual. Pure."""

from collections import OrderedDict

from service.models.chat_completions import Dialect

MODELS_MAX = 256
"""Bound on the models whose dialect is kept: callers may name any model. A dropped one costs one refusal again."""


class KnownDialects:
    """The dialects that are not the usual one, by model; at most :data:`MODELS_MAX`, the last used ones.

    A refusal alone proves nothing, because a server may repeat a caller's own words in it. So a dialect belongs here
    once the server has answered a request in it.
    """

    def __init__(self) -> None:
        self._by_model: OrderedDict[str, Dialect] = OrderedDict()

    def of(self, model: str) -> Dialect:
        """The dialect in which to ask a model first."""
        dialect = self._by_model.get(model)
        if dialect is None:
            return Dialect()
        self._by_model.move_to_end(model)
        return dialect

    def note_understood(self, model: str, dialect: Dialect) -> None:
        """Keep a dialect that was not known before, because the server has answered in it."""
        self._by_model[model] = dialect
        self._by_model.move_to_end(model)
        if len(self._by_model) > MODELS_MAX:
            self._by_model.popitem(last=False)
