"""Lists in a query string, in the forms in which clients send them. The tests of calls have texts, numbers and maps."""

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta
from quart import request

from service.api.http.query_params import read_query
from service.api.http.wire_types import Query
from service.errors import InvalidRequestError
from tests.api.inprocess import request_context


class Colours(Query, frozen=True, kw_only=True):
    """``?colour=red&colour=blue``"""

    colour: Annotated[tuple[Literal["red", "blue"], ...], Meta(max_length=3)] = ()
    limit: int = 1


class Labelled(Query, frozen=True, kw_only=True):
    """``?label.size=large``"""

    label: dict[str, str] = msgspec.field(default_factory=dict)


@pytest.mark.parametrize("query", ["label[size]=large", "label.size=large"])
async def test_a_map_is_read_in_both_forms(query: str) -> None:
    async with request_context(f"/?{query}"):
        assert read_query(request, Labelled).label == {"size": "large"}


async def test_a_key_with_brackets_has_the_form_with_a_dot() -> None:
    async with request_context("/?label.][a=1&label.[b]=2"):
        assert read_query(request, Labelled).label == {"][a": "1", "[b]": "2"}


@pytest.mark.parametrize("query", ["label[][a]=1", "label[a=1", "label[a]b=1", "label[a][b]=1", "label[[a]]=1"])
async def test_brackets_within_brackets_are_refused(query: str) -> None:
    async with request_context(f"/?{query}"):
        with pytest.raises(InvalidRequestError, match=r"no label\[key\]=value") as refused:
            read_query(request, Labelled)
    assert refused.value.field == query.removesuffix("=1")


async def read(query: str) -> Any:
    async with request_context(f"/?{query}"):
        return read_query(request, Colours)


@pytest.mark.parametrize(
    ("query", "colours"),
    [
        ("", ()),
        ("limit=3", ()),
        ("colour=red", ("red",)),
        ("colour=red&colour=blue&colour=red", ("red", "blue", "red")),
        ("colour[]=red&limit=2&colour[]=blue", ("red", "blue")),
        ("colour[0]=red&colour[1]=blue", ("red", "blue")),
        ("colour%5B%5D=blue", ("blue",)),
    ],
)
async def test_a_list_is_read_in_every_form(query: str, colours: tuple[str, ...]) -> None:
    assert (await read(query)).colour == colours


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("colour=green", "colour[0]"),
        ("colour[]=red&colour[]=", "colour[1]"),
        ("colour=red&colour=red&colour=red&colour=red", "colour"),
        ("colours=red", "colours"),
        ("colour[=red", "colour["),
        ("limit=1&limit=1", "limit"),
    ],
)
async def test_a_list_that_is_wrong_is_refused_by_its_name(query: str, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await read(query)
    assert refused.value.field == field
