"""Events are the same after they were kept, in any cut, in any store, and after a restart."""

import gc
import tempfile
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import apsw
import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.native.event_frames import encode_frame
from service.errors import OwnedElsewhereError, SessionNotFoundError
from service.models.client import (
    ArgumentsDelta,
    CallOpened,
    EncryptedReasoning,
    FunctionTool,
    ModelEvent,
    ReasoningDelta,
    TextDelta,
    Tools,
)
from service.sessions.events import outcome
from service.sessions.events.events import TurnDelta, TurnInterrupted
from service.sessions.events.replay import Replay, Replays
from service.sessions.turns.turn import Turn
from service.settings import Settings
from service.storage import event_rows, pieces
from service.storage.pieces import Run
from service.storage.records import SEQ_AFTER_CRASH, Checkpoint, Item, TurnRecord
from service.storage.sqlite import event_pages, open_sqlite_store
from service.storage.store import Store
from tests.sessions.puppet import Puppet, frames_in, frames_of
from tests.storage.rows import T0, a_session, a_turn, at, ended, said

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["x" * 254, "x" * 255, "é" * 256, "\U0001f600" * 300, "\u2028\x85\r\n"]
)
told_events = st.one_of(
    st.builds(TextDelta, texts),
    st.builds(ReasoningDelta, texts),
    st.builds(EncryptedReasoning, texts),
    st.builds(CallOpened, st.just(0), call_id=texts, name=texts),
    st.builds(ArgumentsDelta, st.integers(0, 3), texts),
)


def run_turn(told: Iterable[ModelEvent]) -> Iterator[Turn]:
    """A turn that takes what a model tells; gives the turn after each event."""
    client = Puppet()
    turn = Turn(a_turn(), client=client, system_message=None, on_disconnect="continue", settings=Settings())
    turn.start(T0)
    yield turn
    calls = 0
    for event in told:
        if isinstance(event, CallOpened):
            turn.take([msgspec.structs.replace(event, number=calls)])
            calls += 1
        elif not isinstance(event, ArgumentsDelta):
            turn.take([event])
        elif calls:
            turn.take([msgspec.structs.replace(event, number=event.number % calls)])
        yield turn


async def a_replay(store: Store, turn: TurnRecord, *, after: int = 0) -> Replay:
    async def read_turn(with_texts: bool) -> TurnRecord:
        return await store.get_turn(turn.session_id, turn.id, now=T0, with_texts=with_texts)

    return await Replays(store, store_timeout_s=5).open(turn.session_id, turn.id, after=after, read_turn=read_turn)


@settings(max_examples=25, deadline=None)
@given(
    told=st.lists(told_events, max_size=25),
    repeats=st.integers(1, 5),
    cuts=st.tuples(st.sets(st.integers(0, 120), max_size=4), st.sampled_from([8, 300, 64 * 1024])),
    crashes=st.booleans(),
    after=st.integers(0, 40),
)
def test_kept_and_replayed_after_a_restart_a_turn_is_the_same_frames(
    told: list[ModelEvent], repeats: int, cuts: tuple[set[int], int], *, crashes: bool, after: int
) -> None:
    checkpoints, row_length = cuts

    async def keep(store: Store) -> tuple[Turn, TurnRecord]:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        record = a_turn()
        for number, turn in enumerate(run_turn(told * repeats)):
            checkpoint = turn.checkpoint() if number in checkpoints else None
            if checkpoint is not None:
                await store.checkpoint_turns([checkpoint])
                turn.note_checkpoint(checkpoint)
                record = turn.record()
        if not crashes:
            turn.decide(outcome.Completed("stop"))
            record = turn.finish(T0)
            await store.end_turn(record, runs=turn.log.runs(), now=T0, after=turn.stored_seq)
            turn.conclude(record, stored=True)
        return turn, record

    async def run(path: Path) -> None:
        async with open_sqlite_store(path) as store:
            turn, record = await keep(store)
        async with open_sqlite_store(path) as store:
            await store.recover(now=at(1))
            kept = await store.get_turn("s", "t", now=T0)
            assert kept.output == record.output
            expected = frames_of(turn.log)
            if crashes:
                terminal = TurnInterrupted(seq=SEQ_AFTER_CRASH, reason="crash", text_length=len(kept.text))
                expected = [*expected[: turn.stored_seq], encode_frame(terminal)]
            start = min(after, len(expected) - 1)
            assert await frames_in(await a_replay(store, kept, after=start), after=start) == expected[start:]
            copy = await store.fork_session("s", at=None, copy_id="copy", now=T0)
            assert copy.head is not None
            copied = await store.get_turn("copy", copy.head, now=T0)
            for old, new in (("s", "copy"), ("t", copied.id), *zip(ids(kept), ids(copied), strict=True)):
                expected = [frame.replace(f'"{old}"'.encode(), f'"{new}"'.encode()) for frame in expected]
            assert await frames_in(await a_replay(store, copied)) == expected

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(event_pages, "ROW_LENGTH_MAX", row_length)
        trio.run(run, Path(folder, "kept.db"))


def ids(turn: TurnRecord) -> list[str]:
    return [item.id for item in turn.output]


@pytest.mark.parametrize("recovered", ["later", "between the two reads"])
async def test_the_events_of_a_dead_owner_are_read_again_once_its_turn_has_ended(path: Path, recovered: str) -> None:
    """The first error, and with it all that its frames hold, stays while the caller tries again."""
    async with open_sqlite_store(path) as store:
        replays = Replays(store, store_timeout_s=5)

        async def read_turn(with_texts: bool) -> TurnRecord:
            if recovered != "later":
                await store.recover(now=at(1))
            turn = await store.get_turn("s", "t", now=T0, with_texts=with_texts)
            if turn.is_open:
                raise OwnedElsewhereError("s", fence=1, address=None)
            return turn

        error: OwnedElsewhereError | None = None
        async with open_sqlite_store(path) as owner:
            await owner.create_session(a_session(), now=T0)
            await owner.begin_turn(a_turn(), now=T0)
            growth = Checkpoint(
                session_id="s",
                turn_id="t",
                after=0,
                runs=said("one "),
                text="one ",
                items=(Item(id="out", role="assistant", text=""),),
            )
            await owner.checkpoint_turns([growth])
            if recovered == "later":
                try:
                    await replays.open("s", "t", after=0, read_turn=read_turn)
                except OwnedElsewhereError as refused:
                    error = refused
                assert error is not None
            more = msgspec.structs.replace(growth, after=1, runs=said("two "), text="two ", items=())
            await owner.checkpoint_turns([more])
        if recovered == "later":
            await store.recover(now=at(1))
        replay = await replays.open("s", "t", after=0, read_turn=read_turn)
        assert await frames_in(replay) == [
            encode_frame(TurnDelta(seq=1, text="one ")),
            encode_frame(TurnDelta(seq=2, text="two ")),
            encode_frame(TurnInterrupted(seq=SEQ_AFTER_CRASH, reason="crash", text_length=8)),
        ]
        del error


async def test_a_replay_holds_no_input_and_no_large_field_of_its_turn(path: Path) -> None:
    large = 256 * 1024
    tools = Tools(functions=(FunctionTool(name="f", description="d" * large),))
    turn = msgspec.structs.replace(a_turn(texts=["i" * large]), tools=tools)
    end = ended(turn, text="Hi")
    reasoning = msgspec.structs.replace(
        end.output[0], id="r", type="reasoning", text="", encrypted="e" * large, upstream=f'"{"u" * large}"'
    )
    end = msgspec.structs.replace(end, output=(*end.output, reasoning), last_seq=3)
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(turn, now=T0)
        await store.end_turn(end, runs=said("H", "i"), now=T0)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            replay = await a_replay(store, end)
            await store.get_session("s", now=T0)  # the thread that read the turn's record has dropped it after that
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(await frames_in(replay)) == 3
        assert after - before < large // 2


async def test_a_turn_that_an_earlier_version_kept_without_events_is_replayed_as_its_end(path: Path) -> None:
    crashed = msgspec.structs.replace(ended(a_turn(), "interrupted", text=""), reason="crash", last_seq=SEQ_AFTER_CRASH)
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        await store.end_turn(crashed, runs=(), now=T0)
    with closing(apsw.Connection(str(path))) as db:
        db.execute("UPDATE turns SET runs = NULL")
    async with open_sqlite_store(path) as store:
        terminal = TurnInterrupted(seq=SEQ_AFTER_CRASH, reason="crash", text_length=0)
        assert await frames_in(await a_replay(store, crashed)) == [encode_frame(terminal)]


LONG = 1024 * 1024
TOKENS = [f"{number:03d} " for number in range(1000)] * (LONG // 4000)


async def _keep_long_turn(store: Store) -> TurnRecord:
    await store.create_session(a_session(idle_timeout_s=1e9), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    turn = msgspec.structs.replace(ended(a_turn(), text="".join(TOKENS)), last_seq=len(TOKENS) + 1)
    await store.end_turn(turn, runs=said(*TOKENS), now=T0)
    return turn


async def test_forty_replays_of_a_long_turn_hold_a_page_each(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_sqlite_store(path) as store:
        turn = await _keep_long_turn(store)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            replays = [await a_replay(store, turn, after=number * 1000) for number in range(40)]
            gc.collect()
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        page = event_rows.ROW_LENGTH_MAX * 1.5
        assert after - before < 40 * page
        assert peak - before < 44 * page, "no replay reads the whole turn, not even for a moment"

        rows_read: list[bytes] = []

        def unpack(packed: bytes) -> list[Run]:
            rows_read.append(packed)
            return unpack_really(packed)

        unpack_really = pieces.unpack
        monkeypatch.setattr(pieces, "unpack", unpack)
        for number in (39, 20, 0):
            rows_read.clear()
            seq = (number + 200) * 1000
            await replays[number].load_after(seq)
            event = replays[number].read_after(seq)[0]
            assert isinstance(event, TurnDelta)
            assert event.text == TOKENS[seq]
            assert len(rows_read) <= 4, "a page costs the rows that it is on, and the last one"


@pytest.mark.parametrize("after", [0, 1234, len(TOKENS) - 1, len(TOKENS)])
async def test_a_long_turn_is_replayed_whole_from_anywhere(path: Path, after: int) -> None:
    async with open_sqlite_store(path) as store:
        turn = await _keep_long_turn(store)
        assert (await store.get_turn("s", "t", now=T0)) == turn
        frames = await frames_in(await a_replay(store, turn, after=after), after=after)
        assert frames[:-1] == [
            encode_frame(TurnDelta(seq=seq, text=text)) for seq, text in enumerate(TOKENS[after:], after + 1)
        ]
        assert len(frames) == len(TOKENS) - after + 1


async def test_a_replay_of_a_session_that_is_removed_meanwhile_ends_after_its_page(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        replay = await a_replay(store, await _keep_long_turn(store))
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
        seq = 0
        while events := replay.read_after(seq):
            seq = events[-1].seq
        assert 1000 < seq < 20_000
        with pytest.raises(SessionNotFoundError):
            await replay.load_after(seq)
