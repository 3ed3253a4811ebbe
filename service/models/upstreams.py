"""The choice of a model client by a model's name."""

from collections.abc import Iterable, Mapping

from service.errors import InvalidRequestError
from service.models.client import ModelClient


class Upstreams:
    """The model clients of a service.

    Args:
        default: Answers for every model that ``by_model`` does not have: a single upstream knows best
            which models it serves.
        by_model: The client of each model, where several upstreams are configured.
    """

    def __init__(
        self, default: ModelClient | None = None, *, by_model: Mapping[str, ModelClient] | None = None
    ) -> None:
        self._default = default
        self._by_model = dict(by_model or {})

    @property
    def default(self) -> ModelClient | None:
        """The client for every model that :attr:`routes` does not have."""
        return self._default

    @property
    def routes(self) -> Mapping[str, ModelClient]:
        """The clients of the models that are known by name, in the settings' order."""
        return self._by_model

    @property
    def models(self) -> Iterable[str]:
        """The models that are known by name, in the settings' order."""
        return tuple(self._by_model)

    @property
    def clients(self) -> tuple[ModelClient, ...]:
        """Each client once."""
        return tuple(dict.fromkeys([*self._by_model.values(), *([self._default] if self._default else [])]))

    def client_for(self, model: str) -> ModelClient:
        """The client that serves a model.

        Raises:
            InvalidRequestError: No upstream has this model.
        """
        client = self._by_model.get(model, self._default)
        if client is None:
            known = ", ".join(self._by_model)
            raise InvalidRequestError(f"No upstream serves the model {model!r}; there are: {known}.", field="model")
        return client
