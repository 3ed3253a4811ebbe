"""The resources of a request are always given back."""

from functools import partial

import pytest

from service.api.http.request_resources import RequestResources


def test_the_last_is_given_back_first_and_each_once() -> None:
    given: list[int] = []
    with RequestResources() as resources:
        for number in (1, 2, 3):
            resources.add(partial(given.append, number))
    assert given == [3, 2, 1]


def test_one_that_breaks_keeps_nothing_else() -> None:
    given: list[int] = []

    def break_down() -> None:
        raise RuntimeError

    resources = RequestResources()
    resources.add(lambda: given.append(1))
    resources.add(break_down)
    resources.add(lambda: given.append(2))
    with pytest.raises(RuntimeError), resources:
        pass
    assert given == [2, 1]
