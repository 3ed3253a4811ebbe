"""The commands for the store, beside a service that writes to it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from service.cli import store_commands
from service.cli.main import main
from service.sessions.commands import NewSession, NewTurn
from service.settings import Settings
from service.storage.sqlite import database
from service.supervisor import open_service

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one session ``s`` of one turn; the settings name the store by a relative path."""
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:kept.db")
    trio.run(fill)
    return Path("kept.db").absolute()


async def fill() -> None:
    settings = Settings(store_url="sqlite:kept.db", model_url="scripted:?tokens=5&rate=0&first_token_s=0")
    with trio.fail_after(60):
        async with open_service(settings) as service:
            await service.sessions.create_session(NewSession(id="s", title="é"))
            turn, watch = await service.sessions.start_turn("s", NewTurn(text="hi"))
            with watch:
                await turn.wait_ended()


def test_an_exported_session_is_imported_by_another_store(
    file: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", "s"]) == 0
    exported = capsys.readouterr().out
    assert json.loads(exported)["session"]["title"] == "é"
    assert main(["backup", "copy.db"]) == 0
    assert "copy.db" in capsys.readouterr().out

    assert main(["import"]) == 78  # input that is not JSON is refused in one line
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(exported.encode())))
    assert main(["import"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"lastcall: A session 's' is in {file} already; delete it first, or name another store")

    Path("exported.json").write_text(
        exported.replace('"id":"s"', '"id":"s2"')
        .replace('"session_id":"s"', '"session_id":"s2"')
        .replace(r"\"session_id\":\"s\"", r"\"session_id\":\"s2\"")
    )
    assert main(["import", "exported.json"]) == 0
    assert capsys.readouterr().out == "s2\n"
    assert main(["export", "s2"]) == 0
    assert main(["export", "nobody"]) == 1
    assert main(["import", "nothing.json"]) == 78
    assert "nothing.json cannot be read" in capsys.readouterr().err


def test_an_import_gives_a_session_to_an_owner_and_keeps_the_owner_that_it_has(file: Path, capsys: Output) -> None:
    def exported(session: str) -> str:
        assert main(["export", session]) == 0
        return capsys.readouterr().out

    Path("bare.json").write_text(bare := exported("s"))
    assert main(["import", "--owner", "ann@example.org", "bare.json"]) == 0
    assert capsys.readouterr().out == "ann@example.org/s\n"
    Path("owned.json").write_text(owned := exported("ann@example.org/s"))
    assert [json.loads(it)["turns"][0]["events"] for it in (owned, bare)] == [
        json.loads(bare)["turns"][0]["events"]
    ] * 2
    assert main(["import", "--store", "sqlite:other.db", "owned.json"]) == 0
    assert main(["export", "--store", "sqlite:other.db", "ann@example.org/s"]) == 0
    assert capsys.readouterr().out == f"ann@example.org/s\n{owned}"
    assert main(["import", "--store", "sqlite:other.db", "--owner", "", "owned.json"]) == 0
    assert main(["export", "--store", "sqlite:other.db", "s"]) == 0
    assert capsys.readouterr().out == f"s\n{bare}"

    assert main(["import", "owned.json"]) == 1
    assert f"A session 'ann@example.org/s' is in {file} already" in capsys.readouterr().err
    assert main(["export", "bob/s"]) == 1
    assert capsys.readouterr().err == f"lastcall: There is no session 'bob/s' in {file}.\n"
    assert main(["import", "--owner", "a/b", "bare.json"]) == 78
    assert capsys.readouterr().err.startswith("lastcall: --owner: 'a/b' should be 1 to 128 of")


BEYOND: dict[str, Callable[[Any, Any], object]] = {
    "idle_timeout_s 1e+300 of the session: Expected a number <= 31536000": lambda session, _: session.update(
        idle_timeout_s=1e300
    ),
    "idle_timeout_s -5.0 of the session": lambda session, _: session.update(idle_timeout_s=-5),
    f"title '{'x' * 79}… of the session": lambda session, _: session.update(title="x" * 10_000),
    "title 'a\\x00' of the session": lambda session, _: session.update(title="a\0"),
    "metadata {'k": lambda session, _: session.update(metadata={"k" * 65: "v"}),
    "model '' of the session": lambda session, _: session.update(model=""),
    "system_message 'xxx": lambda session, _: session.update(system_message="x" * 2000),
    "model '' of turn 'turn_": lambda _, turn: turn.update(model=""),
    "temperature 2.5 of turn": lambda _, turn: turn.update(temperature=2.5),
    "max_output_tokens 0 of turn": lambda _, turn: turn.update(max_output_tokens=0),
    "message_count 2 of the session is not 1": lambda _, turn: turn.update(input=[]),
}


@pytest.mark.parametrize("problem", BEYOND)
@pytest.mark.usefixtures("file")
def test_an_import_takes_no_more_into_a_session_than_the_api(
    problem: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASTCALL_INPUT_BYTES_MAX", "1024")
    assert main(["export", "s"]) == 0
    whole = json.loads(capsys.readouterr().out)
    BEYOND[problem](whole["session"], whole["turns"][0]["turn"])
    Path("changed.json").write_text(json.dumps(whole))
    assert main(["import", "changed.json"]) == 78
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"lastcall: This is not an exported session: {problem}")


def test_a_backup_is_a_store_and_never_replaces_a_file(
    file: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["backup", "copy.db"]) == 0
    assert main(["backup", "copy.db"]) == 78
    assert "copy.db exists already" in capsys.readouterr().err
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:copy.db")
    assert main(["check"]) == 0
    assert main(["export", "s"]) == 0


def test_a_backup_says_how_far_it_is_beside_its_output(
    file: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_commands, "PROGRESS_INTERVAL_S", 3600)
    assert main(["backup", "short.db"]) == 0
    quick = capsys.readouterr()
    assert (quick.out, quick.err) == (f"{file} is copied to short.db\n", "")
    monkeypatch.setattr(store_commands, "PROGRESS_INTERVAL_S", 0)
    assert main(["backup", "copy.db"]) == 0
    slow = capsys.readouterr()
    assert slow.out == f"{file} is copied to copy.db\n"
    assert re.fullmatch(
        r"(lastcall: \d+ of \d+ MB are copied; kept\.db-wal has \d+ MB and grows until the copy is whole\n)+", slow.err
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_backup_that_a_signal_ends_leaves_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(it) for it in (signal.SIGTERM, signal.SIGINT)]
    before = set(file.parent.iterdir())
    monkeypatch.setattr(store_commands, "_progress_lines", lambda _: lambda _: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["backup", "copy.db"]))
    assert ended.value.code == 128 + number
    assert set(file.parent.iterdir()) == before
    assert [signal.getsignal(it) for it in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_backup_that_is_killed_leaves_no_file_of_its_name_and_the_next_one_works(file: Path) -> None:
    script = (
        "import os; from service.cli import main, store_commands; "
        "store_commands._progress_lines = lambda _: lambda _: os.kill(os.getpid(), 9); main.main(['backup', 'copy.db'])"
    )
    killed = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not Path("copy.db").exists()
    assert main(["check"]) == 0
    assert main(["backup", "copy.db"]) == 0
    assert main(["check", "--store", "sqlite:copy.db"]) == 0


def test_a_command_takes_the_store_that_its_option_names(file: Path, capsys: Output) -> None:
    """The command does so without any other setting of the server, as from cron."""
    assert main(["backup", "--store", f"sqlite:{file}", "copy.db"]) == 0
    assert main(["check", "--store", "sqlite:copy.db"]) == 0
    assert capsys.readouterr().out.endswith("/copy.db is whole\n")
    assert main(["export", "s", "--store", "memory:"]) == 78
    assert "--store sqlite:path" in capsys.readouterr().err
    assert main(["vacuum", "--store", "copy.db"]) == 78
    assert capsys.readouterr().err.startswith(
        "lastcall: --store: 'copy.db' names a store that this version does not have"
    )


def test_argument_that_is_not_utf_8_is_refused(file: Path, capsys: Output) -> None:
    assert main(["export", "\udcff"]) == 78
    said = capsys.readouterr().err
    assert said.startswith("lastcall: '\\udcff")
    assert said.endswith("' should be UTF-8\n")


def test_working_directory_that_is_not_utf_8_is_refused(
    file: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = file.parent / "\udcff"
    folder.mkdir()
    file.rename(folder / file.name)
    monkeypatch.chdir(folder)
    assert main(["check"]) == 78
    assert capsys.readouterr().err.endswith("\\udcff/kept.db' should be UTF-8\n")


def test_vacuum_and_check_print_their_results(file: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["vacuum"]) == 0
    assert capsys.readouterr().out == f"{file} gave 0 bytes back\n"
    assert main(["check"]) == 0
    assert capsys.readouterr().out == f"{file} is whole\n"
    Path("link.db").symlink_to(file)
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:link.db")
    assert main(["check"]) == 0
    assert capsys.readouterr().out == f"{file} is whole\n"
    with closing(database.connect(file)) as db:
        db.pragma("foreign_keys", False)
        db.execute("DELETE FROM sessions")
    assert main(["check"]) == 1
    assert "has lost its sessions" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["vacuum"], ["backup", "copy.db"], ["export", "s"], ["import"], ["check"]])
def test_with_a_store_in_memory_the_commands_are_refused(
    command: list[str], capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASTCALL_STORE_URL", "memory:")
    assert main(command) == 78
    assert "where nothing is kept" in capsys.readouterr().err
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:absent.db")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
    assert main(command) == 78
    assert not Path("absent.db").exists()
