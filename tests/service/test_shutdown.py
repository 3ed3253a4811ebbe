"""The phases of the shutdown, in the whole tree, with one thing that hangs, refuses or breaks at exactly one place."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from service import supervisor
from service.errors import ModelError, ShuttingDownError, StoreError
from service.models.client import NO_OPTIONS, ModelEvent, ModelRequest, Options, TakeEvents, TextDelta, relay_received
from service.sessions.commands import NewSession, NewTurn
from service.sessions.events.outcome import Interrupted
from service.sessions.turns.turn import Turn
from service.settings import Settings
from service.shutdown import LATE_CLOSE_S, PHASE_MARGIN_S, Host, Shutdown, ShutdownReport
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from service.storage.records import EndResult
from service.supervisor import Service, open_service
from tests.sessions.puppet import frames_of

CLEANUP_S, RELEASE_S, DRAIN_S = 3.0, 5.0, 10.0
MOMENT_S = 0.5
"""What the phases may take in all where nothing is in the way."""


class Model:
    """A client whose replies go on until a test says otherwise."""

    name = "model"
    usage = None

    def __init__(self) -> None:
        self.finish = trio.Event()
        self.on_leaving: Callable[[], Any] = trio.lowlevel.checkpoint

    def can_continue(self, text: str, options: Options = NO_OPTIONS) -> bool:
        return False

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncIterator["Model"]:
        self._said = False
        try:
            yield self
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await self.on_leaving()

    async def relay(self, take: TakeEvents) -> None:
        await relay_received(self, take)

    async def receive(self) -> Sequence[ModelEvent]:
        if not self._said:
            self._said = True
            return [TextDelta("so far")]
        await self.finish.wait()
        raise ModelError("upstream_error", "The end that this test asked for.")

    async def aclose(self) -> None: ...


class Replaceable(Host):
    """A host whose steps a test replaces."""

    def __init__(self) -> None:
        self.closing: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.closing_at_once: Callable[[], bool] = lambda: False
        self.clients_gone: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    async def close_listeners(self) -> None:
        await self.closing()

    def close_listeners_at_once(self) -> bool:
        return self.closing_at_once()

    async def wait_clients_gone(self) -> None:
        await self.clients_gone()


class Stage:
    """A service with one running turn, and what its stop gave."""

    def __init__(self) -> None:
        self.model = Model()
        self.host = Replaceable()
        self.store = MemoryStore()
        self.close_client: Callable[[], Any] = trio.lowlevel.checkpoint
        self.close_store: Callable[[], Any] = trio.lowlevel.checkpoint
        self.shutdown = Shutdown(
            Settings(
                drain_timeout_s=DRAIN_S, cleanup_timeout_s=CLEANUP_S, release_timeout_s=RELEASE_S, lame_duck_timeout_s=0
            )
        )

    @asynccontextmanager
    async def open_store(self, *_: object) -> AsyncIterator[MemoryStore]:
        yield self.store
        await self.close_store()

    @asynccontextmanager
    async def open_client(self, *_: object, **__: object) -> AsyncIterator[Model]:
        yield self.model
        await self.close_client()

    async def start_turn(self, service: Service) -> Turn:
        session = await service.sessions.create_session(NewSession())
        turn, _ = await service.sessions.start_turn(session.id, NewTurn(text="Hi", on_disconnect="continue"))
        await turn.log.wait_beyond(1)
        return turn

    @asynccontextmanager
    async def open(self, **settings: Any) -> AsyncIterator[Service]:
        given = {"drain_timeout_s": DRAIN_S, "cleanup_timeout_s": CLEANUP_S, "release_timeout_s": RELEASE_S} | settings
        self.shutdown = Shutdown(Settings(**given), self.host)
        async with open_service(self.shutdown._settings, shutdown=self.shutdown) as service:
            yield service

    async def stop(self, notice: str = "test") -> None:
        self.shutdown.notice(notice)
        with trio.fail_after(1000):
            await self.shutdown.reached(Phase.RELEASING)

    def report(self) -> ShutdownReport:
        return self.shutdown.report(tasks_left=0)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(supervisor, "_open_store", stage.open_store)
    monkeypatch.setattr(supervisor, "open_scripted", stage.open_client)
    return stage


async def test_without_a_turn_nothing_is_waited_for(autojump_clock: MockClock, stage: Stage) -> None:
    async with stage.open():
        began = trio.current_time()
        await stage.stop()
    assert trio.current_time() == began
    assert stage.report() == ShutdownReport(
        reason="test",
        phases_ms=dict.fromkeys(["notice", "lame_duck", "draining", "interrupting", "releasing", "total"], 0.0),
        turns_finished=0,
        turns_interrupted=0,
        turns_suspended=0,
        turns_lost=0,
        streams_ended=0,
        streams_aborted=0,
        connections_aborted=0,
        clients_closed=1,
        tasks_left=0,
        faults=(),
    )


async def test_a_turn_that_ends_within_the_drain_is_finished(autojump_clock: MockClock, stage: Stage) -> None:
    async with stage.open() as service, trio.open_nursery() as nursery:
        turn = await stage.start_turn(service)
        nursery.start_soon(stage.stop)
        await trio.sleep(DRAIN_S / 2)
        assert stage.shutdown.phase is Phase.DRAINING
        stage.model.finish.set()
    assert turn.record().state == "failed"
    report = stage.report()
    assert (report.turns_finished, report.turns_interrupted, report.faults) == (1, 0, ())
    assert report.phases_ms["draining"] == pytest.approx(DRAIN_S / 2 * 1000)


async def test_a_turn_that_does_not_end_within_the_drain_is_interrupted_and_keeps_its_reply(
    autojump_clock: MockClock, stage: Stage
) -> None:
    async with stage.open() as service:
        turn = await stage.start_turn(service)
        await stage.stop()
        assert turn.log.closed
    record = turn.record()
    assert (record.state, record.reason, record.text) == ("interrupted", "shutdown", "so far")
    report = stage.report()
    assert (report.turns_finished, report.turns_interrupted, report.faults) == (0, 1, ())
    assert report.phases_ms["draining"] == pytest.approx(DRAIN_S * 1000)


@pytest.mark.parametrize(
    ("lame_duck_timeout_s", "total_s", "waited_s"),
    [(0, 15, 15 - CLEANUP_S - RELEASE_S - 1), (4, 15, 6), (50, 15, 6), (0, 2, 0), (50, 2, 0), (4, 100, 4 + DRAIN_S)],
)
async def test_a_total_below_the_sum_shortens_what_is_waited_for_and_not_the_ends(
    autojump_clock: MockClock, stage: Stage, lame_duck_timeout_s: float, total_s: float, waited_s: float
) -> None:
    async with stage.open(lame_duck_timeout_s=lame_duck_timeout_s, shutdown_timeout_s=total_s) as service:
        turn = await stage.start_turn(service)
        began = trio.current_time()
        await stage.stop()
        assert trio.current_time() - began == pytest.approx(waited_s)
    assert turn.record().state == "interrupted"
    assert stage.report().faults == ()


async def test_a_queued_turn_is_interrupted_while_the_one_before_it_may_finish(
    autojump_clock: MockClock, stage: Stage
) -> None:
    async with stage.open() as service, trio.open_nursery() as nursery:
        turn = await stage.start_turn(service)
        queued, _ = await service.sessions.start_turn(
            turn.session_id, NewTurn(text="And?", on_conflict="queue", on_disconnect="continue")
        )
        nursery.start_soon(stage.stop)
        await trio.sleep(1)
        assert (queued.record().state, queued.record().reason) == ("interrupted", "shutdown")
        assert turn.record().state == "running"
        stage.model.finish.set()
    report = stage.report()
    assert (report.turns_finished, report.turns_interrupted) == (1, 1)


async def test_in_a_replaced_process_queued_turns_have_the_rest_of_the_drain(
    autojump_clock: MockClock, stage: Stage
) -> None:
    """They were accepted before the reload, and may well come to their own end."""
    async with stage.open() as service:
        turn = await stage.start_turn(service)
        queue = NewTurn(text="And?", on_conflict="queue", on_disconnect="continue")
        queued, last = [(await service.sessions.start_turn(turn.session_id, queue))[0] for _ in range(2)]
        stage.shutdown.notice("the master reloads", is_replaced=True)
        await trio.sleep(1)
        service.sessions.drain.interrupt_late(last)  # as if the reload had begun within its acceptance
        assert [it.record().state for it in (turn, queued, last)] == ["running", "queued", "queued"]
        stage.model.finish.set()
        await queued.log.wait_closed()
        stage.model.finish = trio.Event()
        await stage.shutdown.reached(Phase.RELEASING)
    assert [it.record().state for it in (turn, queued, last)] == ["failed", "failed", "interrupted"]
    assert stage.report().phases_ms["draining"] == pytest.approx(DRAIN_S * 1000)


async def test_a_stream_that_begins_while_the_clients_of_a_replaced_process_leave_has_the_whole_drain(
    autojump_clock: MockClock, stage: Stage
) -> None:
    """No turn is open here, so nothing else holds the drain: the stream is passed on from another process."""
    async with stage.open() as service, trio.open_nursery() as nursery:

        async def begin_and_end() -> None:
            proxied = service.sessions.proxied_requests.open_request("@owner")
            with proxied.waiting():
                await trio.sleep(DRAIN_S - 1)
            assert not proxied.was_cut
            assert stage.shutdown.phase is Phase.DRAINING
            proxied.close()

        async def bring_one_more() -> None:
            stage.host.clients_gone = trio.lowlevel.checkpoint
            nursery.start_soon(begin_and_end)
            await trio.sleep(0.1)

        stage.host.clients_gone = bring_one_more
        stage.shutdown.notice("the master reloads", is_replaced=True)
        with trio.fail_after(1000):
            await stage.shutdown.reached(Phase.RELEASING)
        assert trio.current_time() == pytest.approx(DRAIN_S - 1, abs=MOMENT_S)
    assert stage.report().faults == ()


async def test_clients_that_stay_hold_a_replaced_process_no_longer_than_its_drain(
    autojump_clock: MockClock, stage: Stage
) -> None:
    stage.host.clients_gone = trio.sleep_forever
    async with stage.open():
        stage.shutdown.notice("the master reloads", is_replaced=True)
        await stage.shutdown.reached(Phase.RELEASING)
        assert trio.current_time() == pytest.approx(DRAIN_S, abs=MOMENT_S)


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_clients_are_waited_for_only_while_others_serve(
    autojump_clock: MockClock, stage: Stage, is_replaced: bool
) -> None:
    """Otherwise no answer would become of a request that these clients send."""
    asked: list[float] = []

    async def stay() -> None:
        asked.append(trio.current_time())
        with stage.shutdown.while_replaced():
            await trio.sleep_forever()

    stage.host.clients_gone = stay
    async with stage.open():
        stage.shutdown.notice("a signal", is_replaced=is_replaced)
        await trio.sleep(1)
        assert asked == ([0] if is_replaced else [])
        stage.shutdown.notice("the master stops")
        await stage.shutdown.reached(Phase.RELEASING)
        assert trio.current_time() == pytest.approx(1, abs=MOMENT_S)


async def test_queued_turns_of_a_replaced_process_end_once_the_whole_service_stops(
    autojump_clock: MockClock, stage: Stage
) -> None:
    """Otherwise they would begin to ask their models after the stop."""
    async with stage.open() as service:
        running = await stage.start_turn(service)
        new = NewTurn(text="Next", on_disconnect="continue", on_conflict="queue")
        queued, _ = await service.sessions.start_turn(running.session_id, new)
        stage.shutdown.notice("the master reloads", is_replaced=True)
        await trio.sleep(1)
        assert queued.record().state == "queued"
        stage.shutdown.notice("the master stops")
        await queued.log.wait_closed()
        assert queued.record().state == "interrupted"
        assert not running.log.closed
        assert trio.current_time() == pytest.approx(1, abs=MOMENT_S)
        running.cut_short(Interrupted("shutdown"))
    assert stage.report().faults == ()


async def test_a_second_press_skips_the_drain_and_the_lame_duck(autojump_clock: MockClock, stage: Stage) -> None:
    async with stage.open(lame_duck_timeout_s=50) as service, trio.open_nursery() as nursery:
        await stage.start_turn(service)
        began = trio.current_time()
        nursery.start_soon(stage.stop)
        await trio.sleep(1)
        stage.shutdown.hurry()
    assert trio.current_time() - began == pytest.approx(1, abs=MOMENT_S)
    assert stage.report().turns_interrupted == 1


@pytest.mark.parametrize("has_caller", [True, False])
async def test_an_adoption_that_the_store_does_not_answer_keeps_the_sessions_from_closing_no_longer_than_the_phases(
    autojump_clock: MockClock, stage: Stage, has_caller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a database hangs after a failover, and the pods are stopped."""

    async def hang(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(stage.store, "adopt_turns", hang)
    refused: list[Exception] = []
    async with trio.open_nursery() as callers, stage.open(store_timeout_s=300) as service:
        await service.sessions.create_session(NewSession(id="s"))
        acceptance = service.sessions._acceptance

        async def adopt() -> None:
            try:
                if has_caller:
                    await acceptance.adopt("s")
                else:  # it leaves, and the store's step goes on
                    with service.sessions._active.holding("s") as session:
                        await acceptance.adoptions.adopt(session, within_s=1)
            except (ShuttingDownError, StoreError) as error:
                refused.append(error)

        callers.start_soon(adopt)
        await trio.sleep(2)
        await stage.stop()
        releasing_at = trio.current_time()
    assert trio.current_time() - releasing_at <= MOMENT_S
    assert [type(it) for it in refused] == [ShuttingDownError if has_caller else StoreError]


async def test_later_notices_change_nothing(autojump_clock: MockClock, stage: Stage) -> None:
    async with stage.open() as service, trio.open_nursery() as nursery:
        await stage.start_turn(service)
        began = trio.current_time()
        nursery.start_soon(stage.stop, "first")
        await trio.sleep(DRAIN_S - 1)
        stage.shutdown.notice("second")
    assert trio.current_time() - began == pytest.approx(DRAIN_S, abs=MOMENT_S)
    assert stage.report().reason == "first"


async def test_new_work_is_taken_until_the_lame_duck_is_over(autojump_clock: MockClock, stage: Stage) -> None:
    async with stage.open(lame_duck_timeout_s=5, drain_timeout_s=0) as service, trio.open_nursery() as nursery:
        nursery.start_soon(stage.stop)
        await trio.sleep(4)
        await service.sessions.create_session(NewSession())
        await trio.sleep(2)
        with pytest.raises(ShuttingDownError):
            await service.sessions.create_session(NewSession())


async def test_the_listeners_close_after_the_drain_and_before_the_first_interrupt(
    autojump_clock: MockClock, stage: Stage
) -> None:
    async with stage.open() as service:
        turn = await stage.start_turn(service)

        async def close_listeners() -> None:
            assert stage.shutdown.phase is Phase.CLOSING
            assert turn.end is None

        stage.host.closing = close_listeners
        await stage.stop()
    assert stage.report().faults == ()


async def test_the_report_counts_the_closing_as_interrupting_and_no_turn_from_before_the_notice(
    autojump_clock: MockClock, stage: Stage
) -> None:
    async def close_listeners() -> None:
        await trio.sleep(2)

    stage.host.closing = close_listeners
    async with stage.open() as service:
        stage.model.finish.set()
        await (await stage.start_turn(service)).wait_ended()
        await stage.stop()
    report = stage.report()
    assert (report.phases_ms["draining"], report.phases_ms["interrupting"]) == (0, 2000)
    assert (report.turns_finished, report.turns_interrupted) == (0, 0)


async def test_without_a_drain_the_notice_itself_interrupts(autojump_clock: MockClock, stage: Stage) -> None:
    async with stage.open(drain_timeout_s=0) as service:
        turn = await stage.start_turn(service)
        closed: list[bool] = []

        def close_listeners_at_once() -> bool:
            closed.append(turn.end is None)
            return True

        stage.host.closing_at_once = close_listeners_at_once
        stage.shutdown.notice("test")
        assert turn.end == Interrupted("shutdown")
        await stage.shutdown.reached(Phase.RELEASING)
    assert closed == [True]
    report = stage.report()
    assert report.faults == ()
    assert report.turns_interrupted == 1


@pytest.mark.parametrize("waiting", [{"drain_timeout_s": 1}, {"lame_duck_timeout_s": 1, "drain_timeout_s": 0}])
async def test_with_a_drain_the_notice_interrupts_nothing(
    autojump_clock: MockClock, stage: Stage, waiting: dict[str, float]
) -> None:
    async with stage.open(**waiting) as service:
        turn = await stage.start_turn(service)
        stage.host.closing_at_once = lambda: True
        stage.shutdown.expect_notice(lambda: None)
        stage.shutdown.notice("test")
        assert turn.end is None
        assert not service.sessions.streams.open_stream().is_ends_only()
        await stage.shutdown.reached(Phase.RELEASING)


async def test_a_stream_that_would_write_has_an_expected_notice_arrive(autojump_clock: MockClock, stage: Stage) -> None:
    async with stage.open(drain_timeout_s=0) as service:
        turn = await stage.start_turn(service)
        stage.host.closing_at_once = lambda: True
        slot = service.sessions.streams.open_stream()
        assert not slot.is_ends_only()
        stage.shutdown.expect_notice(lambda: stage.shutdown.notice("test"))
        assert turn.end is None
        assert slot.is_ends_only()
        assert turn.end == Interrupted("shutdown")
        assert slot.is_ends_only(), "the second time nothing happens"
        await stage.shutdown.reached(Phase.RELEASING)
    assert stage.report().turns_interrupted == 1


async def test_listeners_that_need_time_to_close_are_waited_for(autojump_clock: MockClock, stage: Stage) -> None:
    async with stage.open(drain_timeout_s=0) as service:
        turn = await stage.start_turn(service)
        stage.host.closing_at_once = lambda: False
        stage.shutdown.expect_notice(lambda: None)
        assert service.sessions.streams.open_stream().is_ends_only()
        stage.shutdown.notice("test")
        assert turn.end is None
        await stage.shutdown.reached(Phase.RELEASING)
    assert turn.record().state == "interrupted"


async def test_listeners_that_do_not_close_are_a_fault_and_stop_nothing(
    autojump_clock: MockClock, stage: Stage
) -> None:
    async def close_listeners() -> None:
        raise OSError("they are stuck")

    async with stage.open() as service:
        stage.host.closing = close_listeners
        turn = await stage.start_turn(service)
        await stage.stop()
    assert turn.record().state == "interrupted"
    [fault] = stage.report().faults
    assert "they are stuck" in fault


async def test_a_store_that_hangs_at_the_last_write_costs_the_cleanup_and_no_more(
    autojump_clock: MockClock, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object, **__: object) -> bool:
        await trio.sleep_forever()
        raise AssertionError

    async with stage.open(drain_timeout_s=0, store_timeout_s=1000) as service:
        turn = await stage.start_turn(service)
        monkeypatch.setattr(stage.store, "end_turn", hang)
        began = trio.current_time()
        await stage.stop()
        assert trio.current_time() - began <= CLEANUP_S + PHASE_MARGIN_S
        assert turn.log.closed
        assert b'"stored":false' in frames_of(turn.log)[-1]
    assert stage.report().faults[-1] == "the end of 1 turns is not in the store"


async def test_a_store_that_refuses_once_gets_the_end_a_second_time(
    autojump_clock: MockClock, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, refusals = stage.store.end_turn, iter([StoreError("not now")])

    async def refuse_once(*args: Any, **options: Any) -> EndResult:
        for error in refusals:
            raise error
        return await keep(*args, **options)

    async with stage.open(drain_timeout_s=0) as service:
        turn = await stage.start_turn(service)
        monkeypatch.setattr(stage.store, "end_turn", refuse_once)
        await stage.stop()
        stored = await service.sessions.get_turn(turn.session_id, turn.id)
    assert stored.state == "interrupted"
    assert stage.report().faults == ()


async def test_a_store_that_refuses_for_good_is_a_fault(
    autojump_clock: MockClock, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> bool:
        raise StoreError("the disk is full")

    async with stage.open(drain_timeout_s=0) as service:
        await stage.start_turn(service)
        monkeypatch.setattr(stage.store, "end_turn", refuse)
        await stage.stop()
    report = stage.report()
    assert any("the disk is full" in fault for fault in report.faults)
    assert not report.clean
    assert report.clients_closed == 1


async def test_a_turn_whose_cleanup_breaks_is_a_fault_and_has_its_end(autojump_clock: MockClock, stage: Stage) -> None:
    async def break_down() -> None:
        raise RuntimeError("the reply cannot be closed")

    stage.model.on_leaving = break_down
    async with stage.open(drain_timeout_s=0) as service:
        turn = await stage.start_turn(service)
        await stage.stop()
    assert turn.record().state == "interrupted"
    assert stage.report().faults == ("1 turns crashed; the log has the errors",)


async def test_a_model_server_that_ignores_the_close_costs_its_own_bound(
    autojump_clock: MockClock, stage: Stage
) -> None:
    stage.model.on_leaving = trio.sleep_forever
    async with stage.open(drain_timeout_s=0) as service:
        turn = await stage.start_turn(service)
        began = trio.current_time()
        await stage.stop()
        assert trio.current_time() - began == pytest.approx(1, abs=MOMENT_S)
    assert turn.record().state == "interrupted"
    assert stage.report().turns_interrupted == 1


async def test_a_turn_whose_model_client_does_not_let_go_has_its_end_all_the_same(
    autojump_clock: MockClock, stage: Stage
) -> None:
    """Beyond any bound, shielded: its task comes back when the phases are long over."""

    async def hang() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(100)

    stage.model.on_leaving = hang
    with capture_logs() as logged:
        async with stage.open(drain_timeout_s=0) as service:
            turns = [await stage.start_turn(service) for _ in range(3)]
            began = trio.current_time()
            await stage.stop()
            assert trio.current_time() - began <= CLEANUP_S + PHASE_MARGIN_S
            for turn in turns:
                assert turn.log.closed
                assert (await service.sessions.get_turn(turn.session_id, turn.id)).state == "interrupted"
            assert service.sessions.statistics().turns_running == 0
            assert service.sessions.statistics().turns_interrupted == 3, "once each, though their tasks end yet"
    assert not [line for line in logged if line["log_level"] in ("error", "critical")], "nor twice"
    assert stage.report().faults == ("3 turns did not end within cleanup_timeout_s",)
    assert stage.report().turns_interrupted == 3


@pytest.mark.parametrize("what", ["close_client", "close_store"])
async def test_a_part_that_hangs_at_its_close_costs_the_release_and_is_a_fault(
    autojump_clock: MockClock, stage: Stage, what: str
) -> None:
    setattr(stage, what, trio.sleep_forever)
    async with stage.open():
        began = trio.current_time()
        await stage.stop()
    assert trio.current_time() - began == pytest.approx(RELEASE_S)
    [fault] = stage.report().faults
    assert "took longer than release_timeout_s" in fault


async def test_parts_that_hang_share_the_release(autojump_clock: MockClock, stage: Stage) -> None:
    stage.close_client = stage.close_store = trio.sleep_forever
    async with stage.open():
        began = trio.current_time()
        await stage.stop()
    assert trio.current_time() - began == pytest.approx(RELEASE_S + LATE_CLOSE_S)
    assert len(stage.report().faults) == 2


@pytest.mark.parametrize("what", ["close_client", "close_store"])
async def test_a_part_that_breaks_at_its_close_stops_nothing(
    autojump_clock: MockClock, stage: Stage, what: str
) -> None:
    async def break_down() -> None:
        raise RuntimeError("it broke")

    setattr(stage, what, break_down)
    async with stage.open():
        await stage.stop()
    [fault] = stage.report().faults
    assert "it broke" in fault
    assert stage.report().clients_closed == 1


async def test_tasks_that_are_left_are_a_fault(autojump_clock: MockClock, stage: Stage) -> None:
    async with stage.open():
        await stage.stop()
    report = stage.shutdown.report(tasks_left=2)
    assert report.tasks_left == 2
    assert report.faults == ("2 tasks were left",)


async def test_a_notice_before_the_tree_stands_is_kept(autojump_clock: MockClock, stage: Stage) -> None:
    shutdown = Shutdown(Settings())
    shutdown.notice("early")
    async with open_service(Settings(), shutdown=shutdown) as service:
        with pytest.raises(ShuttingDownError):
            await service.sessions.create_session(NewSession())
        await shutdown.reached(Phase.RELEASING)
    assert shutdown.report(tasks_left=0).reason == "early"
