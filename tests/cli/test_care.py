"""The commands that take care of what is kept, beside a service that writes to it."""

import io
import json
import sys
from contextlib import closing
from pathlib import Path

import pytest
import trio

from service.cli import main
from service.sessions.new import NewSession, NewTurn
from service.settings import Settings
from service.storage.sqlite import database
from service.supervisor import open_service

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one session, ``s``, of one turn, that the settings name by a relative path."""
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:kept.db")
    trio.run(fill)
    return Path("kept.db").absolute()


async def fill() -> None:
    settings = Settings(store_url="sqlite:kept.db", model_url="scripted:?tokens=5&rate=0&first_token_s=0")
    with trio.fail_after(20):
        async with open_service(settings) as service:
            await service.sessions.create_session(NewSession(id="s", title="é"))
            turn, watch = await service.sessions.start_turn("s", NewTurn(text="hi"))
            with watch:
                await turn.wait_ended()


def test_what_was_exported_is_imported_by_another_store(
    file: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", "s"]) == 0
    exported = capsys.readouterr().out
    assert json.loads(exported)["session"]["title"] == "é"
    assert main(["backup", "copy.db"]) == 0
    assert "copy.db" in capsys.readouterr().out

    assert main(["import"]) == 78  # what is not JSON is told in a line
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(exported.encode())))
    assert main(["import"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("lastcall: A session 's' exists already")

    Path("exported.json").write_text(exported.replace('"id":"s"', '"id":"s2"').replace("turn_", "turn_f"))
    assert main(["import", "exported.json"]) == 0
    assert capsys.readouterr().out == "s2\n"
    assert main(["export", "s2"]) == 0
    assert main(["export", "nobody"]) == 1
    assert main(["import", "nothing.json"]) == 78
    assert "nothing.json cannot be read" in capsys.readouterr().err


def test_a_backup_is_a_store_and_never_replaces_a_file(
    file: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["backup", "copy.db"]) == 0
    assert main(["backup", "copy.db"]) == 78
    assert "copy.db is there already" in capsys.readouterr().err
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:copy.db")
    assert main(["check"]) == 0
    assert main(["export", "s"]) == 0


def test_vacuum_and_check_say_what_they_found(file: Path, capsys: Output) -> None:
    assert main(["vacuum"]) == 0
    assert capsys.readouterr().out.endswith("bytes smaller\n")
    assert main(["check"]) == 0
    assert capsys.readouterr().out == f"{file} is whole\n"
    with closing(database.connect(file)) as db:
        db.pragma("foreign_keys", False)
        db.execute("DELETE FROM sessions")
    assert main(["check"]) == 1
    assert "has lost its sessions" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["vacuum"], ["backup", "copy.db"], ["export", "s"], ["import"], ["check"]])
def test_where_nothing_is_kept_there_is_nothing_to_take_care_of(
    command: list[str], capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASTCALL_STORE_URL", "memory:")
    assert main(command) == 78
    assert "where nothing is kept" in capsys.readouterr().err
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:absent.db")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
    assert main(command) == 78
    assert not Path("absent.db").exists()
