"""The resources of a request are always released."""

from functools import partial

import pytest

from service.api.http.request_resources import RequestResources


def test_the_last_resource_is_released_first_and_each_once() -> None:
    given: list[int] = []
    with RequestResources() as resources:
        for number in (1, 2, 3):
            resources.add(partial(given.append, number))
    assert given == [3, 2, 1]


def test_an_error_in_one_release_does_not_stop_the_others() -> None:
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
