"""API keys that change while the service runs: a file is read again, and a broken one changes nothing."""

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import trio
from structlog.testing import capture_logs
from structlog.typing import EventDict

from service.api.app import attach, create_app, detach
from service.api_keys import ApiKeys, Caller
from service.errors import SettingsError
from service.setting_sources import read_sources
from service.setting_types import MASK
from service.supervisor import open_service
from service.telemetry.logging import configure_logging, current_layout
from service.watched_files import LOOK_INTERVAL_S
from tests.api.inprocess import Api

OLD, NEW = "the-old-key-of-ann", "the-new-key-of-ann"
ANN = Caller("ann")
Files = dict[str, Path]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.chdir(tmp_path)
    config, keys = tmp_path / "lastcall.toml", tmp_path / "keys"
    config.write_text('model_url = "scripted:"\n[[api_keys]]\nname = "ann"\nkey_file = "keys"\n')
    keys.write_text(OLD)
    return {"config": config, "keys": keys}


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    with capture_logs() as events:
        yield events


def open_keys(environ: dict[str, str] | None = None) -> ApiKeys:
    read = partial(read_sources, environ or {})
    return ApiKeys(read().settings(), read_sources=read)


async def look(keys: ApiKeys, *, times: int = 4) -> list[Caller | None]:
    """Look often enough that a change is in force; returns who has the old key and the new one."""
    for _ in range(times):
        await keys.look()
    return [keys.find(OLD), keys.find(NEW)]


async def test_a_key_in_a_file_is_rotated(files: Files, logged: list[EventDict]) -> None:
    keys = open_keys()
    assert await look(keys) == [ANN, None]
    files["keys"].write_text(f"{NEW}\n{OLD}\n")
    assert await look(keys) == [ANN, ANN]
    files["keys"].write_text(NEW)
    assert await look(keys) == [None, ANN]
    assert await look(keys) == [None, ANN]
    assert [(it["event"], it["keys"], it["added"], it["removed"]) for it in logged] == [
        ("API keys have changed", 2, 1, 0),
        ("API keys have changed", 1, 0, 1),
    ]


async def test_names_and_permissions_in_the_settings_file_change(files: Files) -> None:
    keys = open_keys()
    await look(keys)
    files["config"].write_text(files["config"].read_text().replace('"ann"', '"bob"') + 'may = ["read"]\n')
    assert await look(keys) == [Caller("bob", frozenset(("read",))), None]


async def test_a_file_in_place_of_another_is_seen_also_with_its_times(files: Files) -> None:
    keys = open_keys()
    await look(keys)
    before = files["keys"].stat()
    other = files["keys"].with_name("other")
    other.write_text(NEW)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(files["keys"])
    assert await look(keys) == [None, ANN]


async def test_a_file_that_changes_between_two_looks_is_not_read_yet(files: Files) -> None:
    keys = open_keys()
    await look(keys)
    files["keys"].write_text(NEW[:17])
    assert await look(keys, times=1) == [ANN, None]
    files["keys"].write_text(NEW)
    assert await look(keys, times=1) == [ANN, None]
    assert await look(keys, times=1) == [None, ANN]


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("keys", "short", "at least 16 characters"),
        ("keys", "", "names a file without a key in it"),
        ("keys", None, "names a file that cannot be read"),
        ("config", "streams_max = 0", "streams_max"),
        ("config", "[[", "is not TOML"),
        ("config", 'model_url = "scripted:"', "no api_keys are set any more"),
        ("config", None, "no api_keys are set any more"),
    ],
)
async def test_a_broken_file_leaves_the_keys_as_they_were_and_is_told_once(
    files: Files, logged: list[EventDict], file: str, text: str | None, told: str
) -> None:
    keys = open_keys()
    await look(keys)
    whole = files["config"].read_text(), files["keys"].read_text()
    if text is None:
        files[file].unlink()
    else:
        files[file].write_text(text)
    assert await look(keys, times=8) == [ANN, None]
    [warning] = logged
    assert warning["log_level"] == "warning"
    assert told in warning["error"]
    assert "\n" not in warning["error"]
    files["config"].write_text(whole[0])
    files["keys"].write_text(NEW)
    assert await look(keys, times=8) == [None, ANN]


async def test_a_changed_file_that_could_not_be_opened_is_read_again(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = open_keys()
    await look(keys)
    files["keys"].write_text(NEW)
    with monkeypatch.context() as patched:
        patched.setattr(keys, "_read_sources", Mock(side_effect=SettingsError("Too many open files")))
        assert await look(keys) == [ANN, None]
    assert await look(keys, times=1) == [None, ANN]


async def test_keys_of_the_environment_never_change(files: Files, autojump_clock: object) -> None:
    keys = open_keys({"LASTCALL_API_KEYS": OLD, "LASTCALL_MODEL_URL": "scripted:"})
    await keys.run()  # ends at once
    assert keys.find(OLD) == Caller()


async def test_a_new_key_is_masked_in_the_log(files: Files) -> None:
    keys = open_keys()
    log = configure_logging(read_sources({}).settings())
    try:
        files["keys"].write_text(NEW)
        await look(keys)
        layout = current_layout()
        assert layout is not None
        line = layout.line(f"{OLD} and {NEW}", level="info", logger_name="lastcall")
        assert f"{MASK} and {MASK}" in line
    finally:
        log.uninstall()


async def test_a_removed_key_is_refused_while_its_open_stream_goes_on(files: Files, autojump_clock: object) -> None:
    files["config"].write_text(files["config"].read_text().replace("scripted:", "scripted:?tokens=20&rate=1"))
    read = partial(read_sources, {"LASTCALL_STORE_URL": "memory:"})
    app = create_app()

    def headers(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    async with open_service(read().settings(), read_sources=read) as service:
        attach(app, service)
        api = Api(app, service)
        async with api.open("POST", "/chat", headers=headers(OLD)) as stream:
            await stream.send(b'{"message": "Hi"}')
            await stream.send_complete()
            received = await stream.receive()
            files["keys"].write_text(NEW)
            await trio.sleep(3 * LOOK_INTERVAL_S)
            assert (await api.call("GET", "/sessions", headers=headers(OLD))).status == 401
            assert (await api.call("GET", "/sessions", headers=headers(NEW))).json["data"][0]["owner"] == "ann"
            assert b"turn.completed" not in received
            with suppress(trio.EndOfChannel):
                while True:
                    received += await stream.receive()
        assert b"turn.completed" in received
        detach(app)
