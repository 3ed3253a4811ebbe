"""Options of a turn over HTTP: the form of the text, the effort and ``top_p``; and a model server that refuses one."""

from typing import Any

import pytest
from trio.testing import MockClock

from service.models.client import NO_OPTIONS, Options, TextFormat
from tests.api.inprocess import SSE, Api, open_api

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["degrees", "city"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}
OPTIONS = {"top_p": 0.5, "text_format": FORMAT, "reasoning_effort": "low"}
KEPT = Options(
    top_p=0.5,
    text_format=TextFormat(type="json_schema", name="weather", schema=SCHEMA, strict=True),
    reasoning_effort="low",
)
QUICK = "scripted:?first_token_s=0&rate=0"


async def options_of(api: Api, turn: Any) -> Options:
    return (await api.service.sessions.get_turn(turn["session_id"], turn["id"])).options


async def test_a_text_has_the_form_that_was_asked_for_and_a_retry_asks_the_same(autojump_clock: MockClock) -> None:
    async with open_api(model_url=QUICK) as api:
        path = f"/sessions/{await api.new_session()}/turns"
        turn = (await api.call("POST", path, {"input": "The weather?", **OPTIONS})).json
        assert turn["text"] == '{"degrees":0,"city":"text"}'
        assert await options_of(api, turn) == KEPT
        again = (await api.call("POST", f"{path}/{turn['id']}/retry", {})).json
        assert again["text"] == turn["text"]
        assert await options_of(api, again) == KEPT
        for changed, kept in (
            ({"top_p": 1}, {"top_p": 1.0}),
            ({"reasoning_effort": None}, {"reasoning_effort": None}),
            ({"text_format": {"type": "json_object"}}, {"text_format": TextFormat(type="json_object")}),
            (dict.fromkeys(OPTIONS), dict.fromkeys(OPTIONS)),
        ):
            other = (await api.call("POST", f"{path}/{turn['id']}/retry", changed)).json
            options = await options_of(api, other)
            expected = {name: getattr(KEPT, name) for name in OPTIONS} | kept
            assert {name: getattr(options, name) for name in OPTIONS} == expected
        plain = (await api.call("POST", path, {"input": "Hi", **dict.fromkeys(OPTIONS)})).json
        assert await options_of(api, plain) == NO_OPTIONS
        assert plain["text"].startswith("You said")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"reasoning_effort": "Very High"}, "reasoning_effort"),
        ({"reasoning_effort": ""}, "reasoning_effort"),
        ({"text_format": "json"}, "text_format"),
        ({"text_format": {"type": "text"}}, "text_format.type"),
        ({"text_format": {"name": "x", "schema": {}}}, "text_format.type"),
        ({"text_format": {"type": "json_schema", "name": "x"}}, "text_format.schema"),
        ({"text_format": {"type": "json_schema", "name": "a b", "schema": {}}}, "text_format.name"),
        ({"text_format": {"type": "json_object", "strict": True}}, "text_format.strict"),
        ({"text_format": {"type": "json_schema", "name": "x", "schema": {}, "description": "\0"}}, None),
    ],
)
async def test_options_of_another_form_are_refused_by_name(
    autojump_clock: MockClock, body: dict[str, Any], field: str | None
) -> None:
    async with open_api(model_url=QUICK) as api:
        path = f"/sessions/{await api.new_session()}/turns"
        refused = await api.call("POST", path, {"input": "Hi", **body})
        assert refused.status == 422
        assert refused.json["code"] == "invalid_request"
        if field is not None:
            assert refused.json["field"] == field
        assert (await api.call("GET", path)).json["data"] == []


async def test_a_schema_counts_against_the_bound_of_the_input(autojump_clock: MockClock) -> None:
    async with open_api(model_url=QUICK, input_bytes_max=1024, prompt_bytes_max=4096) as api:
        path = f"/sessions/{await api.new_session()}/turns"
        large = {"type": "json_schema", "name": "x", "schema": {"description": "x" * 1024}}
        (await api.call("POST", path, {"input": "Hi", "text_format": large})).problem(
            413, "input_too_large", "text_format"
        )


@pytest.mark.parametrize("refused", ["text_format", "top_p", "reasoning_effort"])
async def test_a_turn_whose_option_the_model_server_refuses_fails_and_names_it(
    autojump_clock: MockClock, refused: str
) -> None:
    async with open_api(model_url=f"{QUICK}&refuse={refused}") as api:
        path = f"/sessions/{await api.new_session()}/turns"
        streamed = await api.call("POST", path, {"input": "The weather?", **OPTIONS}, headers=SSE)
        error = {
            "code": "parameter_refused",
            "message": f"The scripted model does not take {refused}, as its URL says.",
            "param": refused,
        }
        assert streamed.events[-1]["error"] == error
        turn = (await api.call("GET", streamed.headers["location"])).json
        assert (turn["state"], turn["error"]) == ("failed", error)
        without = {name: value for name, value in OPTIONS.items() if name != refused}
        following = (await api.call("POST", path, {"input": "Once more.", **without})).json
        assert following["state"] == "completed"


async def test_an_error_that_is_about_no_parameter_names_none(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?fail_after=0") as api:
        path = f"/sessions/{await api.new_session()}/turns"
        failed = (await api.call("POST", path, {"input": "Hi", **OPTIONS})).json
        assert failed["error"].keys() == {"code", "message"}
