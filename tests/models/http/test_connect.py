"""Deadlines of connecting."""

import httpx
import pytest
import trio
from trio.testing import MockClock

from service.freezes import watch_for_freezes
from service.models.http.connect import connect


@pytest.mark.parametrize(("frozen", "expected"), [(False, httpx.ConnectTimeout), (True, httpx.ConnectError)])
async def test_connecting_has_a_deadline_that_a_freeze_moves(
    frozen: bool,
    expected: type[Exception],
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the freeze the server has refused; the answer is there before the deadline is looked at."""
    refused = trio.Event()

    async def wait_for_refusal(host: str, port: int) -> trio.SocketStream:
        assert (host, port) == ("model.test", 80)
        await refused.wait()
        raise OSError("refused")

    errors: list[Exception] = []

    async def run() -> None:
        try:
            await connect("model.test", 80, ssl_context=None, connect_timeout_s=5)
        except httpx.TransportError as error:
            errors.append(error)

    monkeypatch.setattr(trio, "open_tcp_stream", wait_for_refusal)
    with watch_for_freezes(clock=trio.current_time, cpu_clock=lambda: 0, counts_frozen_time=lambda: not frozen):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(100)
            await trio.testing.wait_all_tasks_blocked()
            refused.set()
    assert [type(error) for error in errors] == [expected]
