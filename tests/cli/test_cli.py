"""The console script: what it prints, what it refuses, and with which exit code."""

import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from service import __version__
from service.cli.main import main
from service.setting_sources import read_sources
from tests.kept_log import said_in

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environ,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lastcall {__version__}\n"


@pytest.mark.parametrize("module", ["service/__init__.py", "service.py"])
def test_config_warns_of_a_folder_in_which_hypercorn_would_find_another_package(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("service").mkdir()  # an empty folder hides no package
    assert main(["config"]) == 0
    assert not capsys.readouterr().out.startswith("# caution")
    Path(module).touch()
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"# caution: hypercorn would find {module} of this folder in Lastcall's place; ")
    assert tomllib.loads(printed)["bind"] == "127.0.0.1:8000"


def test_config_in_our_own_checkout_gives_no_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["config"]) == 0
    assert "caution" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "config"])
def test_unnamed_stand_in_is_refused_if_other_callers_would_get_its_answers(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASTCALL_API_KEYS", "a-key-of-the-callers")
    assert main([command]) == 78
    assert capsys.readouterr().err.startswith(
        "lastcall: model_url should be set (LASTCALL_MODEL_URL): api_keys are set"
    )


def test_config_prints_the_settings_in_force_and_where_they_come_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lastcall.toml").write_text("streams_max = 5")
    monkeypatch.setenv("LASTCALL_DRAIN_TIMEOUT_S", "20")
    assert main(["config"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "streams_max = 5  # lastcall.toml" in printed
    assert "drain_timeout_s = 20  # LASTCALL_DRAIN_TIMEOUT_S" in printed
    assert 'bind = "127.0.0.1:8000"' in printed


UPSTREAMS = """
log_level = "debug"
cors_origins = ["https://a.example", "https://b.example"]
api_keys = ["open-sesame-open-sesame"]

[[upstreams]]
name = "near \\"and\\" dear"
url = "http://127.0.0.1:1/v1"
api_key = "open-sesame"
models = ["small", "org/large:7b"]
prompt_bytes_max = { "org/large:7b" = 1_000_000, small = 600_000 }

[[upstreams]]
name = "far"
url = "scripted:?tokens=3"
models = ["huge"]
"""


NAMED_KEYS = """
model_url = "scripted:"
[[api_keys]]
name = "ann"
key = "open-sesame-open-sesame"
[[api_keys]]
name = "bob"
key = ["sesame-sesame-sesame", "sesame-sesame-sesame-2"]
may = ["administer", "talk"]
"""


def test_printed_config_names_the_callers(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lastcall.toml").write_text(NAMED_KEYS)
    assert main(["config"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "key" in line and "model" not in line] == [
        "# tls_keyfile is not set",
        "# peer_keyfile is not set",
        "# a key of 'ann', which may talk and read:",
        "# a key of 'bob', which may administer and talk:",
        "# api_keys is set, and hidden  # lastcall.toml",
    ]


@pytest.mark.parametrize("file", ["", "shutdown_timeout_s = 2.5", UPSTREAMS, NAMED_KEYS])
def test_printed_config_gives_the_same_settings_less_the_secrets(capsys: pytest.CaptureFixture[str], file: str) -> None:
    Path("lastcall.toml").write_text(file)
    settings = read_sources({}).settings()
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    assert "sesame" not in printed
    assert ("is set, and hidden" in printed) is ("sesame" in file)
    Path("lastcall.toml").write_text(printed)
    again = read_sources({}).settings()
    assert again.default_model == settings.default_model
    secrets = {"api_keys": (), "model": settings.default_model}
    without = [it.model_copy(update={"api_key": None}) for it in settings.upstreams]
    expected = settings.model_copy(update=secrets | {"upstreams": tuple(without)})
    assert again.model_dump() == expected.model_dump()
    assert set(tomllib.loads(printed)) >= {"bind", "streams_max"}


@pytest.mark.parametrize(
    "file",
    [
        'model = "m"\nmodel_url = "https://a.example/v1?api_key=open-sesame"',
        '[[upstreams]]\nname = "a"\nurl = "https://a.example/v1?api_key=open-sesame"\nmodels = ["m"]',
    ],
)
def test_printed_config_has_no_key_out_of_a_url(capsys: pytest.CaptureFixture[str], file: str) -> None:
    Path("lastcall.toml").write_text(file)
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    assert 'url = "https://a.example/v1?api_key=********"' in printed
    assert "sesame" not in printed


@pytest.mark.parametrize("command", ["serve", "config"])
def test_every_wrong_setting_is_a_line_and_the_exit_code_is_78(command: str) -> None:
    refused = run(command, LASTCALL_STREAMS_MAX="0", LASTCALL_BNID="x")
    assert refused.returncode == 78
    assert refused.stdout == ""
    assert refused.stderr.splitlines() == [
        "lastcall: LASTCALL_STREAMS_MAX: '0' should be a whole number of at least 1, at most 10000000",
        "lastcall: LASTCALL_BNID: is not a setting; did you mean LASTCALL_BIND?",
    ]


def test_printed_config_is_utf_8_on_any_output() -> None:
    printed = run("config", LASTCALL_MODEL="ü \x7f \N{CLINKING BEER MUGS}", PYTHONIOENCODING="ascii")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert tomllib.loads(printed.stdout)["model"] == "ü \x7f \N{CLINKING BEER MUGS}"


@pytest.mark.parametrize("command", ["serve", "config"])
def test_script_with_a_wrong_parameter_is_refused_with_its_setting(command: str) -> None:
    refused = run(command, LASTCALL_MODEL_URL="scripted:?foo=1")
    assert (refused.returncode, refused.stdout) == (78, "")
    assert refused.stderr.startswith("lastcall: LASTCALL_MODEL_URL: 'foo' is not a parameter of scripted:; those are ")
    Path("lastcall.toml").write_text('[[upstreams]]\nname = "a"\nurl = "scripted:?rate=x"\nmodels = ["m"]')
    refused = run(command)
    assert refused.returncode == 78
    assert refused.stderr.startswith("lastcall: lastcall.toml: upstreams[0].url: rate='x' is not allowed")


def test_taken_port_is_one_line_and_the_exit_code_is_78() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = run("serve", "--bind", bind)
    assert (refused.returncode, refused.stdout) == (78, "")
    assert said_in(refused.stderr) == [f"Cannot listen on {bind}: Address already in use"]
    assert len(refused.stderr.splitlines()) == 1


def test_wrong_command_is_refused_with_the_commands_that_exist() -> None:
    refused = run("sreve")
    assert refused.returncode == 2
    of_the_store = "backup,check,export,import,copy,migrate,vacuum"
    assert f"{{serve,config,{of_the_store},certificates,chat,sessions,tree,drain}}" in refused.stderr
    assert "Traceback" not in refused.stderr
