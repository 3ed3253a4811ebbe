"""``lastcall migrate`` brings the schema of a store up, also beside processes of the version before."""

from pathlib import Path

import pytest

from service.cli.main import main
from service.storage.postgres import schema
from service.storage.sqlite.schema import SCRIPTS
from tests.postgres_server import PostgresServer
from tests.storage.sqlite.test_migrations import _restore

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def migrated(capsys: Output, *options: str) -> str:
    assert main(["migrate", *options]) == 0
    return capsys.readouterr().out


def test_the_tables_of_a_database_are_made_and_brought_up(
    postgres: PostgresServer, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = len(schema.SCRIPTS)
    with postgres.new_schema() as name:
        monkeypatch.setenv("LASTCALL_STORE_SCHEMA", name)
        monkeypatch.setenv("LASTCALL_STORE_URL", postgres.url)
        assert f"(schema {name}) has schema version {newest}, newly made\n" in migrated(capsys)
        assert migrated(capsys, "--store", postgres.url).endswith(f"has schema version {newest}, as before\n")
        monkeypatch.setattr(schema, "SCRIPTS", (*schema.SCRIPTS, "ALTER TABLE {s}.turns ADD COLUMN another int"))
        assert migrated(capsys).endswith(f"has schema version {newest + 1}, before {newest}\n")


def test_a_file_is_made_and_brought_up(capsys: Output) -> None:
    newest = f"has schema version {len(SCRIPTS)}"
    assert migrated(capsys, "--store", "sqlite:new.db").endswith(f"new.db {newest}, newly made\n")
    assert migrated(capsys, "--store", "sqlite:new.db").endswith("as before\n")
    _restore(Path("old.db"), 1)
    assert migrated(capsys, "--store", "sqlite:old.db").endswith(f"{newest}, before 1\n")
    assert Path("old.db.schema-1").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory:", "where nothing is kept"),
        ("postgresql://lastcall@/lastcall?host=/nowhere", "no server listens there"),
        ("sqlite:folder", "folder"),
    ],
)
def test_a_store_that_cannot_be_brought_up_is_refused_in_one_line(capsys: Output, url: str, words: str) -> None:
    Path("folder").mkdir()
    assert main(["migrate", "--store", url]) == 78
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
