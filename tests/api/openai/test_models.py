"""The list of models: those of the settings, and those that a model server lists."""

from trio.testing import MockClock

from tests.api.inprocess import open_api


async def test_the_models_of_all_upstreams_are_listed_and_found(autojump_clock: MockClock) -> None:
    upstreams = [
        {"name": "a", "url": "scripted:?tokens=1", "models": ["small", "org/large:v1"]},
        {"name": "b", "url": "scripted:?tokens=2", "models": ["other"]},
    ]
    async with open_api(upstreams=upstreams) as api:
        reply = await api.call("GET", "/v1/models")
        assert reply.status == 200
        listed = reply.json
        assert listed["object"] == "list"
        assert [it["id"] for it in listed["data"]] == ["small", "org/large:v1", "other"]
        for model in listed["data"]:
            assert model.keys() == {"id", "object", "created", "owned_by"}
            assert (model["object"], type(model["created"])) == ("model", int)
            assert (await api.call("GET", f"/v1/models/{model['id']}")).json == model
        assert (await api.call("GET", "/v1/models/org%2Flarge%3Av1")).json == listed["data"][1]


async def test_one_upstream_lists_the_default_model(autojump_clock: MockClock) -> None:
    async with open_api(model="mine", model_url="scripted:?tokens=1") as api:
        assert "mine" in [it["id"] for it in (await api.call("GET", "/v1/models")).json["data"]]


async def test_a_model_that_is_not_there_is_404_in_the_shape_of_openai(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=1") as api:
        for name in ("none", "a/b", "%C3%BC", "x" * 3000):
            reply = await api.call("GET", f"/v1/models/{name}")
            assert (reply.status, reply.headers["content-type"]) == (404, "application/json")
            error = reply.json["error"]
            assert (error["code"], error["type"], error["param"]) == (
                *("model_not_found", "invalid_request_error", "model"),
            )
            assert len(error["message"]) < 400


async def test_models_take_no_parameters_and_no_other_method(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        for path in ("/v1/models", "/v1/models/x"):
            assert (await api.call("GET", f"{path}?limit=3")).json["error"]["code"] == "unknown_parameter"
            assert (await api.call("DELETE", path)).status == 405
