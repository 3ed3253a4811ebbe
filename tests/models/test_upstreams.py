"""From a model's name to the client that serves it."""

import pytest

from service.errors import InvalidRequestError
from service.models.scripted import Script, ScriptedClient
from service.models.upstreams import Upstreams

ONE = ScriptedClient(Script(), name="one")
TWO = ScriptedClient(Script(), name="two")


def test_a_single_upstream_serves_every_model() -> None:
    upstreams = Upstreams(ONE)
    assert upstreams.client_for("anything") is ONE
    assert list(upstreams.models) == []


def test_several_upstreams_serve_their_own_models() -> None:
    upstreams = Upstreams(by_model={"a": ONE, "b": TWO, "c": TWO})
    assert [upstreams.client_for(model) for model in "abc"] == [ONE, TWO, TWO]
    assert list(upstreams.models) == ["a", "b", "c"]


def test_a_model_that_no_upstream_serves_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"'d'.* a, b") as caught:
        Upstreams(by_model={"a": ONE, "b": TWO}).client_for("d")
    assert caught.value.field == "model"
