"""A file of an earlier version serves replays, resumes, exports, forks and new turns; its rows stay as they are."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from service.api.native.event_frames import decode_frame, encode_frame
from service.cli.session_export import read_exported
from service.sessions.commands import NewTurn
from service.settings import Settings
from service.storage.sqlite import maintenance, open_sqlite_store
from service.supervisor import open_service
from tests.sessions.puppet import frames_in
from tests.storage.sqlite import file_exports, old_files
from tests.storage.sqlite.old_files import OldTurn

CRASHED = b'id: 1073741824\ndata: {"type":"turn.interrupted","seq":1073741824,"reason":"crash","text_length":%d}\n\n'


def replayed(turn: OldTurn) -> list[bytes]:
    """The frames of the turn's replay: line ends are escaped, and a crash is told."""
    frames = [encode_frame(decode_frame(frame)) for frame in turn.frames]
    if turn.kind in ("crashed", old_files.RUNNING):
        frames.append(CRASHED % sum(len(item["text"]) for item in turn.output if item["type"] == "message"))
    return frames


def kept_frames(path: Path) -> list[tuple[int, int, bytes]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT turn, after, frames FROM events ORDER BY turn, after").fetchall()


def a_settings(path: Path) -> Settings:
    return Settings(store_url=f"sqlite:{path}", model_url="scripted:?tokens=3&rate=0&first_token_s=0")


async def test_a_file_of_schema_2_goes_on(path: Path) -> None:
    turns = old_files.write(path)
    before = kept_frames(path)
    with trio.fail_after(120):
        async with open_service(a_settings(path)) as service:
            sessions = service.sessions
            for turn in turns:
                expected = replayed(turn)
                replay, _ = await sessions.open_events(turn.session, turn.id)
                assert await frames_in(replay) == expected, turn.kind
                resumed, _ = await sessions.open_events(turn.session, turn.id, after=5)
                assert await frames_in(resumed, after=5) == expected[5:], turn.kind
                record = await sessions.get_turn(turn.session, turn.id)
                assert [(item.id, item.text) for item in record.output] == [
                    (item["id"], item["text"]) for item in turn.output
                ]
            new, watch = await sessions.start_turn(turns[0].session, NewTurn(text="new"))
            with watch:
                assert (await new.wait_ended()).state == "completed"
            replay, _ = await sessions.open_events(turns[0].session, new.id)
            assert len(await frames_in(replay)) == new.log.last_seq
            copy = await sessions.fork_session(turns[0].session)
            copies = (await sessions.list_turns(copy.id, limit=100)).data
            for source, copied in zip([*turns[: old_files.TURNS], None], copies, strict=True):
                replay, _ = await sessions.open_events(copy.id, copied.id)
                frames = await frames_in(replay)
                if source is not None:
                    assert frames[2:] == replayed(source)[2:], source.kind
    rows = kept_frames(path)
    assert rows[: len(before)] == before, "rows of the old form stay as they are"


async def test_an_old_session_is_exported_and_imported_elsewhere(path: Path) -> None:
    turns = old_files.write(path)[: old_files.TURNS]
    async with open_service(a_settings(path)):
        pass
    exported = file_exports.export_session(path, turns[0].session)
    events = [it.events for it in read_exported(exported).turns]
    for turn, told in zip(turns, events, strict=True):
        whole = replayed(turn)
        expected = whole[:-1] if turn.kind in ("crashed", old_files.RUNNING) else whole
        assert [frame.encode() for frame in told] == expected
    there = path.with_name("there.db")
    file_exports.import_session(there, read_exported(exported), now=datetime.now(UTC))
    assert maintenance.check(there) == []
    again = file_exports.export_session(there, turns[0].session)
    assert read_exported(again).turns == tuple(it for it in read_exported(exported).turns if not it.turn.is_open)
    async with open_service(a_settings(there)) as service:
        for turn in turns:
            replay, _ = await service.sessions.open_events(turn.session, turn.id)
            assert await frames_in(replay) == replayed(turn)


@pytest.mark.parametrize("crashes", [1, 2])
async def test_a_store_that_recovers_an_old_file_is_recovered_once(path: Path, crashes: int) -> None:
    old_files.write(path)
    for number in range(crashes):
        async with open_sqlite_store(path) as store:
            ended = await store.recover(now=datetime.now(UTC))
            assert ended == (old_files.SESSIONS if number == 0 else 0)
