"""The scopes of tasks are told rightly, and a look changes nothing. These tests fail first with another Trio."""

import inspect

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.telemetry.cancel_scopes import is_cancelled, is_over, scopes_in, was_cancelled, was_left


def test_trio_still_tells_no_scopes_of_a_task() -> None:
    """Once Trio tells them, ``service/telemetry/cancel_scopes.py`` can ask it."""
    public = {name for name in dir(trio.lowlevel.Task) if not name.startswith("_")}
    assert not {name for name in public if "scope" in name or "cancel" in name}


def test_trio_still_cancels_a_scope_that_is_asked_whether_it_was_cancelled() -> None:
    assert "self._cancel(" in inspect.getsource(trio.CancelScope.cancel_called.fget)  # type: ignore[attr-defined]


async def test_the_scopes_of_a_task_are_told_from_the_outermost_and_those_of_its_nurseries_with_them() -> None:
    seen: list[trio.lowlevel.Task] = []

    async def child() -> None:
        seen.append(trio.lowlevel.current_task())
        with trio.CancelScope() as inner:
            assert scopes_in(seen[0]) == [inner]
            await trio.sleep_forever()

    us = trio.lowlevel.current_task()
    before = scopes_in(us)
    with trio.CancelScope() as outer, trio.CancelScope() as middle:
        async with trio.open_nursery() as nursery:
            assert scopes_in(us) == [*before, outer, middle, nursery.cancel_scope]
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            assert len(scopes_in(seen[0])) == 1, "what is around its nursery belongs to other tasks"
            assert not is_over(seen[0])
            assert not is_cancelled(seen[0])
            outer.cancel()
            assert is_cancelled(seen[0])
            assert not was_left(outer)
            assert not was_left(nursery.cancel_scope)
    assert scopes_in(us) == before
    assert was_left(outer)
    assert was_left(nursery.cancel_scope)
    assert (is_over(seen[0]), scopes_in(seen[0]), is_cancelled(seen[0])) == (True, [], False)


async def test_a_task_without_scopes_of_its_own_has_none() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        await wait_all_tasks_blocked()
        (task,) = nursery.child_tasks
        assert scopes_in(task) == []
        nursery.cancel_scope.cancel()


async def test_a_look_at_a_scope_whose_deadline_has_passed_does_not_cancel_it(mock_clock: MockClock) -> None:
    with trio.CancelScope(deadline=trio.current_time() + 1) as scope:
        mock_clock.jump(2)  # the event loop has not looked at its deadlines since
        assert not was_cancelled(scope)
        scope.deadline = trio.current_time() + 10  # as a lagging deadline does
        await trio.lowlevel.checkpoint()
    assert not was_cancelled(scope)
    scope.cancel()
    assert was_cancelled(scope)
