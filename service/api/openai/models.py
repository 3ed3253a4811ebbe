"""``/v1/models``: the models that a request may name, as the settings and the model servers list them."""

from typing import Literal

import msgspec
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service, json_response
from service.api.http.operations import Answer, operation
from service.api.openai.errors import UnknownModelError
from service.models.client import ListedModel

blueprint = Blueprint("models", __name__)

_OWNER = "unknown"
"""The owner of a model whose server does not tell it."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model. ``created`` is 0 if its server does not tell it.

    ``{"id": "scripted", "object": "model", "created": 1769851800, "owned_by": "unknown"}``
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str

    @classmethod
    def of(cls, model: ListedModel) -> "Model":
        return cls(id=model.id, created=model.created or 0, owned_by=model.owned_by or _OWNER)


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The models, those of the settings first.

    ``{"object": "list", "data": [{"id": "scripted", "object": "model", "created": 0, "owned_by": "unknown"}]}``
    """

    object: Literal["list"] = "list"
    data: tuple[Model, ...]


@blueprint.get("/v1/models")
@operation(
    id="list_models",
    answers=(
        Answer(
            status=200,
            description="All models.",
            body=ModelList,
            links=(("get_model", {"model": "$response.body#/data/0/id"}),),
        ),
    ),
)
async def list_models() -> TrioResponse:
    """List the models: those that the settings name, and those that a single model server lists itself.

    The list of a server is kept for a minute. A server that does not answer in time adds nothing to the list.
    """
    models = await current_service().models.list()
    return json_response(ModelList(data=tuple(map(Model.of, models))))


@blueprint.get("/v1/models/<path:model>")
@operation(
    id="get_model",
    answers=(Answer(status=200, description="The model.", body=Model),),
    errors=(UnknownModelError,),
)
async def get_model(model: str) -> TrioResponse:
    """Get a model of the list. Its name may have slashes."""
    found = await current_service().models.find(model)
    if found is None:
        raise UnknownModelError(model)
    return json_response(Model.of(found))
