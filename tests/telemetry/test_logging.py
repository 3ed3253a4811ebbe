"""One form for all logs, no secrets in them, no noise of cancellations."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import hypercorn.config
import hypercorn.logging
import pytest
import structlog
import trio
from pydantic import SecretStr

from service.settings import Settings
from service.telemetry.banner import announce, banner
from service.telemetry.logging import Log, configure_logging, drain_log

logger = structlog.get_logger("lastcall.tests")

OpenLog = Callable[..., Log]


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def open_log(log_file: Path) -> Generator[OpenLog]:
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log: Log | None = None

    def open_it(**changes: Any) -> Log:
        nonlocal log
        log = configure_logging(Settings(**changes), fd=fd)
        return log

    level = logging.getLogger().level
    yield open_it
    logging.getLogger().setLevel(level)
    if log is not None:
        log.uninstall()
    os.close(fd)


def lines(log_file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_file.read_text().splitlines()]


def test_event_is_a_line_of_json_without_a_terminal(open_log: OpenLog, log_file: Path) -> None:
    open_log()
    logger.info("turn ended", turn="turn_1", state="completed")
    (line,) = lines(log_file)
    assert line.pop("timestamp").endswith("Z")
    assert line.pop("pid") == os.getpid()
    assert line == {
        "message": "turn ended",
        "level": "info",
        "logger": "lastcall.tests",
        "turn": "turn_1",
        "state": "completed",
    }


def test_last_configuration_holds_alone(open_log: OpenLog, log_file: Path) -> None:
    open_log(log_format="console")
    open_log()
    logger.warning("told")
    logging.getLogger("somebody").warning("told")
    logging.getLogger("hypercorn.error").warning("told")
    assert len(lines(log_file)) == 3


def test_console_form_is_a_readable_line(open_log: OpenLog, log_file: Path) -> None:
    open_log(log_format="console")
    logger.warning("turn ended", turn="turn_1")
    text = log_file.read_text()
    assert "\x1b" not in text, "colours are for terminals"
    assert "[warning  ] turn ended" in text
    assert "turn=turn_1" in text


def test_less_severe_levels_are_left_out(open_log: OpenLog, log_file: Path) -> None:
    open_log(log_level="warning")
    logger.info("left out")
    logging.getLogger("hypercorn.error").setLevel(logging.INFO)
    logging.getLogger("hypercorn.error").info("left out")
    logging.getLogger("somebody").info("left out")
    logger.error("told")
    assert [line["message"] for line in lines(log_file)] == ["told"]


async def test_hypercorn_s_records_have_the_same_form_whenever_it_makes_its_logger(
    open_log: OpenLog, log_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = hypercorn.logging.Logger(hypercorn.config.Config())
    open_log()
    after = hypercorn.logging.Logger(hypercorn.config.Config())
    await before.info("before %s", 1)
    await after.warning("after")
    assert [(it["message"], it["level"], it["logger"]) for it in lines(log_file)] == [
        ("before 1", "info", "hypercorn.error"),
        ("after", "warning", "hypercorn.error"),
    ]
    assert capfd.readouterr() == ("", "")


def test_python_s_warnings_are_logged(open_log: OpenLog, log_file: Path) -> None:
    open_log()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    (line,) = lines(log_file)
    assert "DeprecationWarning: old" in line["message"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_traceback_is_logged(open_log: OpenLog, log_file: Path, log_format: str) -> None:
    open_log(log_format=log_format)
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("session failed")
    assert "Traceback" in log_file.read_text()
    assert "ValueError: broken" in log_file.read_text()


@pytest.mark.parametrize("grouped", [False, True])
async def test_cancellation_has_no_traceback(open_log: OpenLog, log_file: Path, grouped: bool) -> None:
    open_log()
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            fault = BaseExceptionGroup("", [cancelled]) if grouped else cancelled
            logger.exception("request failed", exc_info=fault)
            logging.getLogger("somebody").exception("request failed", exc_info=fault)
            raise
    assert [set(line) & {"exception", "exc_info"} for line in lines(log_file)] == [set(), set()]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_secret_is_blotted_out_wherever_it_comes_from(open_log: OpenLog, log_file: Path, log_format: str) -> None:
    secrets = ['open"sesame-open"sesame', "open-sesame-two"]
    open_log(log_format=log_format, api_keys=(secrets[0],), model_api_key=SecretStr(secrets[1]))
    for secret in secrets:
        logger.info("with %s", secret, header=secret, nested={"key": secret})
        logging.getLogger("httpx").warning("request with %s", secret)
        try:
            raise ValueError(f"bad header {secret}")
        except ValueError:
            logger.exception("failed")
    assert "sesame" not in log_file.read_text()
    assert "********" in log_file.read_text()


def test_record_that_cannot_be_formatted_is_logged_without_harm(open_log: OpenLog, log_file: Path) -> None:
    open_log()
    logging.getLogger("hypercorn.error").warning("%d tokens", "many")
    (line,) = lines(log_file)
    assert line["message"] == "a log record of hypercorn.error could not be formatted: '%d tokens'"
    assert (line["level"], line["pid"]) == ("warning", os.getpid())


def test_stalled_reader_of_standard_error_does_not_hold_up_who_logs() -> None:
    reader, writer = os.pipe()
    log = configure_logging(Settings(), fd=writer)
    try:
        for _ in range(2000):
            logger.info("x" * 1000)
        drain_log(0.01)
        read = b""
        for _ in range(100):
            logger.info("still here")
            read += os.read(reader, 1 << 20)
        assert b"log_lines_lost" in read
    finally:
        log.uninstall()
        for fd in (reader, writer):
            os.close(fd)


BINDS = ["127.0.0.1:8000"]


def test_banner_of_the_stand_in_says_that_it_is_one_and_how_to_name_a_real_model() -> None:
    text = banner(Settings(), binds=BINDS, store="memory")
    assert "http://127.0.0.1:8000" in text
    assert "a stand-in" in text
    for variable in ("LASTCALL_MODEL_URL", "LASTCALL_MODEL", "LASTCALL_MODEL_API_KEY"):
        assert variable in text
    assert "memory" in text


def test_banner_of_a_real_model_names_it_and_no_key() -> None:
    settings = Settings(model_url="https://api.example.org/v1", model="large", model_api_key=SecretStr("sesame"))
    text = banner(settings, binds=BINDS, store="memory")
    assert "large at https://api.example.org/v1" in text
    assert "stand-in" not in text
    assert "sesame" not in text


def test_key_in_a_model_s_url_is_neither_in_the_banner_nor_in_the_log(open_log: OpenLog, log_file: Path) -> None:
    changes: dict[str, Any] = {"model_url": "https://api.example.org/v1?api_key=open%2Dsesame&v=1", "model": "large"}
    settings = Settings(**changes)
    assert "large at https://api.example.org/v1?api_key=********&v=********" in banner(settings, binds=BINDS, store="")
    log = open_log(**changes)
    announce(log, settings, binds=BINDS, store="memory")
    structlog.get_logger("lastcall").info("asked %s", settings.model_url, told="the key open-sesame is wrong")
    assert [line["level"] for line in lines(log_file)] == ["info", "info"]
    assert "sesame" not in log_file.read_text()


@pytest.mark.parametrize(
    ("changes", "binds", "target"),
    [
        ({}, ["127.0.0.1:8000"], "curl -N http://127.0.0.1:8000/chat -H"),
        ({}, ["0.0.0.0:80"], "curl -N http://127.0.0.1:80/chat -H"),
        ({}, ["[::]:80"], "curl -N http://[::1]:80/chat -H"),
        ({}, ["unix:run/a.sock"], "curl -N --unix-socket run/a.sock http://localhost/chat -H"),
        ({"tls_certfile": "a", "tls_keyfile": "b"}, BINDS, "curl -N https://127.0.0.1:8000/chat -H"),
        (
            {"api_keys": ("sesame-open-sesame",)},
            BINDS,
            "curl -N http://127.0.0.1:8000/chat -H 'Authorization: Bearer KEY' -H",
        ),
    ],
)
def test_banner_has_a_curl_that_reaches_the_server(changes: dict[str, Any], binds: Sequence[str], target: str) -> None:
    assert target in banner(Settings(**changes), binds=binds, store="memory")


def test_open_address_without_keys_is_cautioned() -> None:
    assert "LASTCALL_API_KEYS" in banner(Settings(), binds=["0.0.0.0:80"], store="memory")
    assert "LASTCALL_API_KEYS" not in banner(Settings(), binds=BINDS, store="memory")
    assert "LASTCALL_API_KEYS" not in banner(
        Settings(api_keys=(SecretStr("k" * 16),)), binds=["0.0.0.0:80"], store="memory"
    )


def test_machines_get_the_banner_as_an_event(open_log: OpenLog, log_file: Path) -> None:
    log = open_log()
    announce(log, Settings(), binds=["0.0.0.0:80"], store="memory")
    serving, stand_in, caution = lines(log_file)
    assert (serving["message"], serving["urls"], serving["store"]) == ("serving", ["http://0.0.0.0:80"], "memory")
    assert (serving["model"], serving["model_url"]) == ("scripted", "scripted:")
    assert serving["attempt"].startswith("curl -N http://127.0.0.1:80/chat")
    assert "LASTCALL_MODEL_URL" in stand_in["message"]
    assert (caution["level"], "LASTCALL_API_KEYS" in caution["message"]) == ("warning", True)


def test_people_get_the_banner_as_a_text(open_log: OpenLog, log_file: Path) -> None:
    log = open_log(log_format="console")
    announce(log, Settings(), binds=BINDS, store="memory")
    assert log_file.read_text() == banner(Settings(), binds=BINDS, store="memory")
