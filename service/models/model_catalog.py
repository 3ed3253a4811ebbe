"""The models that callers may name: those of the settings, and those that a model server lists itself.

A list of a server is asked for when a caller wants it, kept for a while, and shared by all callers.
"""

from collections.abc import Sequence

import structlog
import trio

from service.errors import ModelError
from service.models.client import ListedModel, ListsModels, ModelClient
from service.models.upstreams import Upstreams

FRESH_S = 60.0
"""How long a server's list is shown before it is asked for again."""
RETRY_S = 5.0
"""How long after a failure the server is not asked again; the list before stays until then."""
TIMEOUT_S = 5.0
"""Bound on the answer of one server."""

logger = structlog.get_logger("lastcall.models")


class ModelCatalog:
    """The models of a service.

    Where the settings name several upstreams, they name all models that can be asked for; the servers' lists only add
    what they know of these. A single upstream may be asked for every model that it has.

    Args:
        default_model: The model of turns that name none.
    """

    def __init__(self, upstreams: Upstreams, *, default_model: str) -> None:
        self._upstreams = upstreams
        self._default_model = default_model
        self._lists: dict[ModelClient, _ModelList] = {}

    async def list(self) -> Sequence[ListedModel]:
        """The models, those of the settings first. Bounded in time; a server that does not answer adds nothing.

        Never raises: what a model server does wrong is in the log.
        """
        routes = dict(self._upstreams.routes)
        default = self._upstreams.default
        if default is not None:
            routes[self._default_model] = default
        listed = await self._ask(dict.fromkeys(routes.values()))
        found = {
            name: next((it for it in listed[client] if it.id == name), ListedModel(id=name))
            for name, client in routes.items()
        }
        for model in () if default is None else listed[default]:
            found.setdefault(model.id, model)
        return tuple(found.values())

    async def find(self, model: str) -> ListedModel | None:
        """The model of this name, as :meth:`list` has it; None if it has no such model."""
        return next((it for it in await self.list() if it.id == model), None)

    async def _ask(self, clients: dict[ModelClient, None]) -> dict[ModelClient, Sequence[ListedModel]]:
        """The lists of all clients, which are asked at the same time."""
        listed: dict[ModelClient, Sequence[ListedModel]] = {}

        async def ask(client: ModelClient) -> None:
            listed[client] = await self._lists.setdefault(client, _ModelList(client)).get()

        async with trio.open_nursery() as nursery:  # the caller's own: it ends within the bounds of the lists
            for client in clients:
                nursery.start_soon(ask, client)
        return listed


class _ModelList:
    """The list of one server."""

    def __init__(self, client: ModelClient) -> None:
        self._client = client
        self._models: Sequence[ListedModel] = ()
        self._asking = trio.Lock()
        self._fresh_until = -1.0

    async def get(self) -> Sequence[ListedModel]:
        """The list; the one before, or an empty one, if the server does not give it. One caller asks, others wait."""
        with trio.move_on_after(2 * TIMEOUT_S):  # callers before this one may leave, one after the other
            async with self._asking:
                if trio.current_time() >= self._fresh_until:
                    await self._refresh()
        return self._models

    async def _refresh(self) -> None:
        client = self._client
        problem = "it did not answer in time"
        with trio.move_on_after(TIMEOUT_S):
            try:
                self._models = await client.list_models() if isinstance(client, ListsModels) else ()
            except ModelError as error:
                problem = error.message
            else:
                self._fresh_until = trio.current_time() + FRESH_S
                return
        self._fresh_until = trio.current_time() + RETRY_S
        logger.info("a model server did not tell its models", upstream=client.name, problem=problem)
