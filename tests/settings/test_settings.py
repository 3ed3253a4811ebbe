"""The settings: their sources, the values that are refused, and the errors for them."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from service.errors import SettingsError
from service.setting_sources import load_settings, read_sources
from service.setting_types import reaches_beyond_loopback, shown_store_url, shown_url
from service.settings import Settings, check_stand_in, secrets_of
from service.store_capabilities import MEMORY, POSTGRESQL, SQLITE, StoreCapabilities

ONE, TWO = "the-first-key-of-callers", "the-second-key-of-callers"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(environ: dict[str, str] | None = None, /, *, file: str = "", **overrides: str) -> Settings:
    if file:
        Path("lastcall.toml").write_text(file)
    return read_sources(environ or {}, **overrides).settings()


def problems(environ: dict[str, str] | None = None, /, *, file: str = "", **overrides: str) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        read(environ, file=file, **overrides)
    return str(refused.value).splitlines()


def test_defaults_hold_without_any_source() -> None:
    assert read() == Settings()


def test_command_line_is_over_environment_over_file_over_defaults() -> None:
    file = 'bind = "127.0.0.1:1"\ndrain_timeout_s = 3\nstreams_max = 7'
    settings = read({"LASTCALL_BIND": "127.0.0.1:2", "LASTCALL_DRAIN_TIMEOUT_S": "4"}, file=file, bind="127.0.0.1:3")
    assert (settings.bind, settings.drain_timeout_s, settings.streams_max) == ("127.0.0.1:3", 4, 7)
    assert settings.cleanup_timeout_s == 1


def test_load_settings_reads_the_environment_and_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LASTCALL_STREAMS_MAX", "5")
    Path("lastcall.toml").write_text("queued_turns_max = 3")
    settings = load_settings(bind="127.0.0.1:0")
    assert (settings.streams_max, settings.queued_turns_max, settings.bind) == (5, 3, "127.0.0.1:0")


def test_settings_made_directly_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LASTCALL_STREAMS_MAX", "5")
    Path("lastcall.toml").write_text("streams_max = 6")
    assert Settings().streams_max == 10000


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read().bind = "127.0.0.1:1"


def test_empty_variable_counts_as_not_set() -> None:
    assert read({"LASTCALL_MODEL_API_KEY": "", "LASTCALL_API_KEYS": ""}) == Settings()


def test_keys_and_origins_are_separated_by_commas_in_the_environment() -> None:
    settings = read(
        {"LASTCALL_API_KEYS": f"{ONE}, {TWO}", "LASTCALL_CORS_ORIGINS": "https://a.example,http://localhost:3"}
    )
    assert shown_keys(settings) == [ONE, TWO]
    assert settings.cors_origins == ("https://a.example", "http://localhost:3")


@pytest.mark.parametrize("space", [" ", "\n", "\r\n"])
def test_space_around_a_variable_is_no_part_of_it(space: str) -> None:
    given = {"MODEL_API_KEY": "key", "API_KEYS": f"{ONE},{TWO}", "MODEL_URL": "http://host/v1", "MODEL": "m"}
    without = read({f"LASTCALL_{name}": value for name, value in given.items()})
    assert read({f"LASTCALL_{name}": f"{value}{space}" for name, value in given.items()}) == without


def test_key_that_is_empty_is_refused() -> None:
    empty = "should not be empty; is there a comma too many?"
    assert problems({"LASTCALL_API_KEYS": f"{ONE},"}) == [f"LASTCALL_API_KEYS[1]: {empty}"]
    assert problems({"LASTCALL_API_KEYS": "\n"}) == [f"LASTCALL_API_KEYS[0]: {empty}"]


@pytest.mark.parametrize(
    "origin",
    ["*", "https://app.example.org", "http://localhost:3000", "http://[::1]:3000", "https://xn--bcher-kva.example"],
)
def test_origin_is_taken(origin: str) -> None:
    assert read({"LASTCALL_CORS_ORIGINS": origin}).cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    ["https://*.example.org", "HTTPS://a.example", "https://A.example", "https://a.example/", "https://bücher.example"],
)
def test_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    [said] = problems({"LASTCALL_CORS_ORIGINS": origin})
    assert said.startswith(
        f"LASTCALL_CORS_ORIGINS[0]: {origin!r} should be * or an origin as browsers send it, such as "
    )
    assert said.endswith(": in lower case, without a path, and no pattern")


@pytest.mark.parametrize("proxy", ["10.1.2.3", "10.0.0.0/8", "::1", "fd00::/8", "unix:"])
def test_proxy_is_taken(proxy: str) -> None:
    assert read({"LASTCALL_TRUSTED_PROXIES": f"127.0.0.1, {proxy}", "LASTCALL_API_KEYS": ONE}).trusted_proxies == (
        "127.0.0.1",
        proxy,
    )


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("proxy.example.org", "should be an address or a network of proxies, such as 10.1.2.3, "),
        ("10.0.0.0/33", "should be an address or a network of proxies, such as 10.1.2.3, "),
        ("10.0.0.1:80", "should be an address or a network of proxies, such as 10.1.2.3, "),
        ("*", "should be an address or a network of proxies, such as 10.1.2.3, "),
        ("10.0.0.1/8", "should be a network, such as 10.0.0.0/8, or an address"),
        ("0.0.0.0/0", "should not cover all addresses: each caller could choose the address that is logged"),
        ("::/0", "should not cover all addresses: each caller could choose the address that is logged"),
        ("::ffff:10.0.0.0/104", "should be written as IPv4"),
    ],
)
def test_proxy_is_refused(proxy: str, said: str) -> None:
    [refusal] = problems({"LASTCALL_TRUSTED_PROXIES": proxy, "LASTCALL_API_KEYS": ONE})
    assert refusal.startswith(f"LASTCALL_TRUSTED_PROXIES[0]: {proxy!r} {said}")


def test_trusted_proxies_do_not_replace_keys() -> None:
    assert problems({"LASTCALL_TRUSTED_PROXIES": "127.0.0.1"}) == [
        "api_keys should be set with trusted_proxies: without keys no proxy's request is served"
    ]


@pytest.mark.parametrize("name", ["heartbeat_interval_s", "checkpoint_interval_s", "expiry_interval_s"])
def test_interval_has_a_floor(name: str) -> None:
    assert problems(file=f"{name} = 0.09") == [
        f"lastcall.toml: {name}: 0.09 should be a number of at least 0.1, at most 31536000"
    ]
    assert getattr(read(file=f"{name} = 0.1"), name) == 0.1


def test_prompt_that_could_pass_its_bound_is_refused() -> None:
    """A system message and an input are always sent, and each may have ``input_bytes_max``."""
    assert problems({"LASTCALL_PROMPT_BYTES_MAX": "4095", "LASTCALL_INPUT_BYTES_MAX": "2048"}) == [
        "prompt_bytes_max should be at least twice input_bytes_max: 4095 is less than 2 * 2048"
    ]
    assert read({"LASTCALL_PROMPT_BYTES_MAX": "4096", "LASTCALL_INPUT_BYTES_MAX": "2048"}).prompt_bytes_max == 4096


def test_a_model_may_have_a_bound_on_prompts_of_its_own() -> None:
    bounds = 'models = ["small", "org/large:7b"]\nprompt_bytes_max = {"org/large:7b" = 1048576}'
    settings = read(file=TWO_UPSTREAMS.replace('models = ["small", "large"]', bounds))
    assert [settings.prompt_bytes_max_of(model) for model in ("small", "org/large:7b", "huge", "no model")] == [
        *(524288, 1048576, 524288, 524288),
    ]


def test_a_bound_on_the_prompts_of_a_model_is_checked_as_that_of_all_models() -> None:
    def told(bounds: str) -> list[str]:
        given = f'models = ["small", "large"]\nprompt_bytes_max = {bounds}'
        return problems(file=TWO_UPSTREAMS.replace('models = ["small", "large"]', given))

    (line,) = told("{small = 524287}")
    assert line.startswith("upstreams[0].prompt_bytes_max['small'] should be at least twice input_bytes_max: 524287 ")
    assert told("{smal = 524288}") == ["upstreams[0].prompt_bytes_max should only name models of this upstream: 'smal'"]
    allowed = "should be a whole number of at least 1024, at most 1073741824"
    for wrong in ("1", "true", '"many"'):
        (line,) = told(f"{{small = {wrong}}}")
        assert line.startswith("lastcall.toml: upstreams[0].prompt_bytes_max.small: ")
        assert line.endswith(allowed)
    assert told("5") == [
        "lastcall.toml: upstreams[0].prompt_bytes_max: 5 should be a table of models, such as { small = 1048576 }"
    ]


def test_a_bound_on_held_bytes_that_a_request_or_an_answer_could_not_meet_is_refused() -> None:
    told = problems({"LASTCALL_HELD_BYTES_MAX": "1048576"})
    assert told == [
        "held_bytes_max should be at least 8 times input_bytes_max: 1048576 is less than 8 * 262144",
        "held_bytes_max should be at least 8 times reply_bytes_max: 1048576 is less than 8 * 1048576",
    ]
    assert read({"LASTCALL_HELD_BYTES_MAX": "8388608"}).held_bytes_max == 8 * 1024 * 1024


def test_another_file_can_be_named() -> None:
    Path("other.toml").write_text("streams_max = 5")
    assert read({"LASTCALL_CONFIG_FILE": "other.toml"}, file="streams_max = 6").streams_max == 5


@pytest.mark.parametrize("file", ["missing.toml", "lastcall.toml"])
def test_a_file_that_is_named_has_to_be_there(file: str) -> None:
    assert problems({"LASTCALL_CONFIG_FILE": file}) == [f"LASTCALL_CONFIG_FILE names {file}, which is not there"]


def test_unreadable_file_is_refused() -> None:
    assert problems(file="bind = ")[0].startswith("lastcall.toml is not TOML: Invalid value (at ")
    Path("lastcall.toml").write_bytes(b"bind = '\xff'")
    assert problems()[0].startswith("lastcall.toml is not TOML: 'utf-8' codec can't decode")
    Path("lastcall.toml").unlink()
    Path("lastcall.toml").mkdir()
    assert problems() == ["lastcall.toml cannot be read: it is not a regular file"]
    Path("lastcall.toml").rmdir()
    os.mkfifo("lastcall.toml")
    assert problems() == ["lastcall.toml cannot be read: it is not a regular file"]


def test_file_with_a_bom_is_read() -> None:
    Path("lastcall.toml").write_bytes(b"\xef\xbb\xbfstreams_max = 5\r\nqueued_turns_max = 3\r\n")
    settings = read()
    assert (settings.streams_max, settings.queued_turns_max) == (5, 3)


def test_bom_is_only_taken_at_the_beginning() -> None:
    assert problems(file="streams_max = 5\n\ufeffqueued_turns_max = 3")[0].startswith("lastcall.toml is not TOML: ")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_file_in_another_unicode_is_refused_with_a_word_about_its_bom(encoding: str) -> None:
    bom = "\ufeff" if encoding.endswith("be") else ""
    Path("lastcall.toml").write_bytes((bom + "streams_max = 5").encode(encoding))
    assert problems() == ["lastcall.toml is not UTF-8: it begins with the BOM of UTF-16; save it as UTF-8"]


def test_file_that_is_nested_too_deeply_is_refused() -> None:
    assert problems(file="x = " + 5000 * "[") == ["lastcall.toml cannot be read: it is nested too deeply"]


def test_every_problem_is_reported_at_once_with_name_value_and_what_is_allowed() -> None:
    said = problems(
        {"LASTCALL_STORE_TIMEOUT_S": "0", "LASTCALL_SHUTDOWN_TIMEOUT_S": "5s", "LASTCALL_DRIAN_TIMEOUT_S": "1"},
        file='live_turns_max = 1.5\nlog_level = "loud"\nbnd = "x"\ndrain_timeout_s = true',
        bind=":8000",
    )
    assert sorted(said) == [
        "--bind: ':8000' should be host:port ([address]:port for IPv6) or unix:path; port 0 takes a free one",
        "LASTCALL_DRIAN_TIMEOUT_S: is not a setting; did you mean LASTCALL_DRAIN_TIMEOUT_S?",
        "LASTCALL_SHUTDOWN_TIMEOUT_S: '5s' should be a number above 0, at most 31536000",
        "LASTCALL_STORE_TIMEOUT_S: '0' should be a number above 0, at most 31536000",
        "lastcall.toml: bnd: is not a setting; did you mean bind?",
        "lastcall.toml: drain_timeout_s: true should be a number of at least 0, at most 31536000",
        "lastcall.toml: live_turns_max: 1.5 should be a whole number of at least 1, at most 10000000",
        "lastcall.toml: log_level: 'loud' should be 'debug', 'info', 'warning' or 'error'",
    ]


def test_unknown_name_is_refused_without_its_value() -> None:
    assert problems({"LASTCALL_MODEL_API_KYE": "sesame"}) == [
        "LASTCALL_MODEL_API_KYE: is not a setting; did you mean LASTCALL_MODEL_API_KEY?"
    ]
    assert problems({"LASTCALL_bind": "sesame"}) == ["LASTCALL_bind: is not a setting; did you mean LASTCALL_BIND?"]
    assert problems({"LASTCALL_XYZZY": "sesame"}) == ["LASTCALL_XYZZY: is not a setting"]
    assert problems({"LASTCALL_F\udcff": "sesame"}) == ["LASTCALL_F\\udcff: is not a setting"]


@pytest.mark.parametrize(
    "name", ["bind", "store_url", "model_url", "model", "tls_certfile", "cors_origins", "api_keys"]
)
def test_a_value_that_is_not_utf_8_is_refused_and_shown_escaped(name: str) -> None:
    [said] = problems({f"LASTCALL_{name.upper()}": "sqlite:/\udcff:80"})
    assert said.endswith("should be UTF-8 without a NUL")
    assert said.startswith(f"LASTCALL_{name.upper()}: ")
    assert said.isascii()


def test_nul_in_a_text_is_refused() -> None:
    needed = "should be UTF-8 without a NUL"
    upstream = '[[upstreams]]\nname = "\\u0000"\nurl = "scripted:"\nmodels = ["m"]'
    file = 'bind = "a\\u0000:80"\ntls_certfile = "\\u0000"\n' + upstream
    assert problems(file=file) == [
        f"lastcall.toml: bind: 'a\\x00:80' {needed}",
        f"lastcall.toml: tls_certfile: '\\x00' {needed}",
        f"lastcall.toml: upstreams[0].name: '\\x00' {needed}",
    ]


@pytest.mark.parametrize("number", ["9" * 5000, "x" * 5000, "0x" + "f" * 5000])
def test_value_that_is_too_long_is_shown_shortened(number: str) -> None:
    for said in (*problems({"LASTCALL_STREAMS_MAX": number}), *problems(file=f"streams_max = {number.strip('x')}")):
        assert len(said) < 300


@pytest.mark.parametrize(
    ("environ", "file"),
    [
        ({"LASTCALL_MODEL_API_KEY": "open sesame"}, ""),
        ({"LASTCALL_MODEL_API_KEY": "open\nsesame"}, ""),
        ({"LASTCALL_API_KEYS": "fine-for-a-caller-key,open sesame, sesame"}, ""),
        ({"LASTCALL_MODEL_URL": "https://user:opensesame@host/v1"}, ""),
        ({"LASTCALL_MODEL_URL": "https://host:port/v1?key=opensesame", "LASTCALL_MODEL": "m"}, ""),
        ({"LASTCALL_MODEL_URL": "https://host/v1?key=opensesame"}, ""),
        ({"LASTCALL_API_KEYS_FILE": "sesame"}, ""),
        ({"LASTCALL_MODEL_API_KEY_FILE": "sesame"}, ""),
        ({}, 'api_keys_file = ["sesame"]'),
        ({}, 'api_keys = "open sesame"'),
        ({}, "api_keys = { key = 'open sesame' }"),
        ({}, '[[upstreams]]\nname = "a"\nurl = "scripted:"\napi_key = "open sesame"'),
        ({}, '[upstreams]\napi_key = "open sesame"'),
    ],
)
def test_secret_is_not_in_its_complaint(environ: dict[str, str], file: str) -> None:
    for line in problems(environ, file=file):
        assert "sesame" not in line


@pytest.mark.parametrize("bind", ["127.0.0.1:8000", "localhost:0", "[::1]:8000", "0.0.0.0:65535", "unix:run/a.sock"])
def test_address_is_taken(bind: str) -> None:
    assert read({"LASTCALL_API_KEYS": ONE}, bind=bind).bind == bind


def test_unix_socket_that_would_refuse_everything_is_refused() -> None:
    needed = "api_keys should be set for a bind of unix:path, or every request would be refused"
    assert problems(bind="unix:run/a.sock") == [needed]


@pytest.mark.parametrize(
    "bind",
    [
        "8000",
        ":8000",
        "host",
        "host:",
        "host:port",
        "host:65536",
        "::1:8000",
        "[::1]",
        "unix:",
        "a b:1",
        "/s:1",
        "a:\N{FULLWIDTH DIGIT EIGHT}",
    ],
)
def test_address_is_refused(bind: str) -> None:
    assert problems(bind=bind)[0].startswith(f"--bind: {bind!r} should be ")


@pytest.mark.parametrize(
    ("bind", "reaches"),
    [
        ("127.0.0.1:1", False),
        ("127.8.0.1:1", False),
        ("[::1]:1", False),
        ("localhost:1", False),
        ("unix:a", False),
        ("0.0.0.0:1", True),
        ("[::]:1", True),
        ("192.0.2.1:1", True),
        ("example.org:1", True),
    ],
)
def test_address_beyond_loopback_is_recognised(bind: str, reaches: bool) -> None:
    assert reaches_beyond_loopback(bind) is reaches


@pytest.mark.parametrize(
    "url",
    ["scripted:", "scripted:?tokens=3", "http://127.0.0.1:11434/v1", "https://api.example.org", "http://[::1]:1/"],
)
def test_model_url_is_taken(url: str) -> None:
    assert read({"LASTCALL_MODEL_URL": url, "LASTCALL_MODEL": "m"}).model_url == url


@pytest.mark.parametrize(
    "url", ["example.org", "ftp://example.org", "http://", "http://a:b/", "http://a b/", "script:", "http://[::1/v1"]
)
def test_model_url_is_refused(url: str) -> None:
    said = problems({"LASTCALL_MODEL_URL": url, "LASTCALL_MODEL": "m"})
    assert said[0].startswith(f"LASTCALL_MODEL_URL: {url!r} should be http://host/v1, ")


@pytest.mark.parametrize("url", ["redis://localhost", "", "memory:x", "sqlite:", "lastcall.db"])
def test_store_that_is_not_there_is_refused(url: str) -> None:
    known = "it should be memory:, sqlite:path or postgresql://host/database"
    assert problems(file=f'store_url = "{url}"') == [
        f"lastcall.toml: store_url: {url!r} names a store that this version does not have; {known}"
    ]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:open@sesame@h/d",
        "postgresql://u:open/sesame@h/d",
        "postgresql://u:open?sesame@h/d",
        "postgresql://u:open#sesame@h/d",
        "postgresql://u:open%sesame@h/d",
        "postgresql://u:open sesame@h/d",
        "postgresql://u:open:sesame@h/d",
        "postgresql:open-sesame",
        "postgresql://h:sesame/d?password=open",
    ],
)
def test_a_store_url_that_is_not_read_as_it_is_meant_is_refused_and_not_shown(url: str) -> None:
    [said] = problems({"LASTCALL_STORE_URL": url})
    assert said.startswith("LASTCALL_STORE_URL: should be postgresql://user:password@host:port/database; ")
    assert "sesame" not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory:", "memory:"),
        ("sqlite:a@b", "sqlite:a@b"),
        ("postgresql:///d", "postgresql:///d"),
        ("postgres://u@h1:1,h2:2/d", "postgresql://u@h1:1,h2:2/d"),
        ("postgresql://u:open%40sesame@[::1]:5432/d", "postgresql://u:********@[::1]:5432/d"),
        (
            "postgresql://%2Frun%2Fpg/d?user=u&password=sesame&sslpassword=open&host=/x",
            "postgresql://%2Frun%2Fpg/d?user=u&password=********&sslpassword=********&host=/x",
        ),
    ],
)
def test_a_store_url_is_shown_without_its_password(url: str, shown: str) -> None:
    settings = Settings(store_url=url)
    assert shown_store_url(settings.store_url) == shown
    assert "sesame" not in repr(settings)


@pytest.mark.parametrize("name", ["1a", "A", "a-b", 'a"b', "pg_a", "a" * 64, "ä"])
def test_a_schema_name_that_would_need_quotes_is_refused(name: str) -> None:
    [said] = problems({"LASTCALL_STORE_SCHEMA": name})
    assert "should be 1 to 63 of the letters a to z" in said


def test_store_in_memory_that_would_be_a_file_is_refused() -> None:
    assert problems({"LASTCALL_STORE_URL": "sqlite::memory:"}) == [
        "LASTCALL_STORE_URL: 'sqlite::memory:' would be a file of the name :memory:; a store in memory is memory:"
    ]


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "", "1e9"])
def test_number_out_of_bounds_is_refused(number: str) -> None:
    assert problems(file=f'drain_timeout_s = "{number}"')[0].endswith(
        "should be a number of at least 0, at most 31536000"
    )


def test_log_that_could_hold_no_events_is_refused() -> None:
    assert problems({"LASTCALL_LOG_BYTES_MAX": "65535"}) == [
        "LASTCALL_LOG_BYTES_MAX: '65535' should be a whole number of at least 65536, at most 1073741824"
    ]
    assert read({"LASTCALL_LOG_BYTES_MAX": "65536"}).log_bytes_max == 65536


def test_error_for_a_string_in_place_of_a_list_shows_a_list() -> None:
    such = "should be a list of strings, such as"
    file = 'api_keys = "sesame"\ncors_origins = "*"\n[[upstreams]]\nname = "a"\nurl = "scripted:"\nmodels = "m"'
    assert problems(file=file) == [
        f'lastcall.toml: api_keys: {such} ["first-key-0123456789", "second-key-0123456789"]',
        f"lastcall.toml: cors_origins: '*' {such} [\"https://app.example.org\"]",
        f'lastcall.toml: upstreams[0].models: \'m\' {such} ["small", "large"]',
    ]


def test_certificate_and_key_go_together() -> None:
    assert problems({"LASTCALL_TLS_CERTFILE": "a.pem"}) == ["tls_certfile and tls_keyfile should be set together"]
    assert read({"LASTCALL_TLS_CERTFILE": "a.pem", "LASTCALL_TLS_KEYFILE": "b.pem"}).tls_keyfile == "b.pem"


PEERS = {f"LASTCALL_PEER_{name}": f"{name}.pem" for name in ("CERTFILE", "KEYFILE", "CAFILE")}


def test_the_settings_for_other_replicas_belong_together() -> None:
    assert read(PEERS | {"LASTCALL_PEER_BIND": "10.0.0.7:7443"}).peer_url is None
    assert problems(PEERS) == ["peer_bind should be set, too: the settings peer_* belong together"]
    assert problems(PEERS | {"LASTCALL_PEER_CERTFILE": "", "LASTCALL_PEER_URL": "tls://h:1"}) == [
        "peer_bind and peer_certfile should be set, too: the settings peer_* belong together"
    ]
    for everything in ("0.0.0.0:7443", "[::]:7443"):
        everywhere = PEERS | {"LASTCALL_PEER_BIND": everything}
        assert problems(everywhere) == [
            f"peer_url should be set (tls://host:port): no other replica reaches this one at {everything}"
        ]
        assert read(everywhere | {"LASTCALL_PEER_URL": "tls://pod-0.lastcall:7443"}).peer_bind == everything


@pytest.mark.parametrize("wrong", ["7443", "h", "h:x", "h:70000", "unix:/x", "[::1]"])
def test_peer_bind_is_a_host_and_a_port(wrong: str) -> None:
    (problem,) = problems(PEERS | {"LASTCALL_PEER_BIND": wrong})
    assert "should be host:port, or [address]:port for IPv6" in problem


@pytest.mark.parametrize(
    "wrong",
    ["h:7443", "https://h:7443", "tls://h", "tls://h:0", "tls://0.0.0.0:7443", "tls://h:7443/x", "tls://[::]:1"],
)
def test_peer_url_is_where_others_reach_the_replica(wrong: str) -> None:
    (problem,) = problems(PEERS | {"LASTCALL_PEER_BIND": "127.0.0.1:0", "LASTCALL_PEER_URL": wrong})
    assert "should be tls://host:port, where other replicas reach this one" in problem


@pytest.mark.parametrize("host", ["a..b", "-a", 64 * "a", "bücher.example", ".a", ".".join(64 * ["long"])])
def test_a_host_that_can_be_no_name_is_refused_at_the_start(host: str) -> None:
    """Looked up it would be a UnicodeError, or never be found, and the other replicas would go on asking."""
    (problem,) = problems(PEERS | {"LASTCALL_PEER_BIND": "127.0.0.1:0", "LASTCALL_PEER_URL": f"tls://{host}:7443"})
    assert f"the host {host}, which can be neither an address nor a name" in problem
    (problem,) = problems(PEERS | {"LASTCALL_PEER_BIND": f"{host}:7443"})
    assert "The host is an address or a name of letters" in problem


@pytest.mark.parametrize(
    "host", ["lastcall_1", "10.0.0.7", "[fd00::7]", "[fe80::1%eth0]", "pod-0.lastcall.svc.", "a.b.c"]
)
def test_a_name_or_an_address_is_the_host_of_a_replica(host: str) -> None:
    named = {"LASTCALL_PEER_BIND": f"{host}:7443", "LASTCALL_PEER_URL": f"tls://{host}:7443"}
    assert read(PEERS | named).peer_url == f"tls://{host}:7443"


def test_real_model_server_needs_a_model() -> None:
    assert problems({"LASTCALL_MODEL_URL": "http://host/v1"}) == [
        "model should be set: a model that http://host/v1 serves"
    ]


TWO_UPSTREAMS = """
[[upstreams]]
name = "near"
url = "http://127.0.0.1:11434/v1"
models = ["small", "large"]

[[upstreams]]
name = "far"
url = "https://api.example.org/v1"
api_key = "sesame"
models = ["huge"]
"""


def test_one_upstream_is_given_by_three_settings() -> None:
    settings = read({"LASTCALL_MODEL_URL": "http://host/v1", "LASTCALL_MODEL": "m", "LASTCALL_MODEL_API_KEY": "k"})
    (upstream,) = settings.all_upstreams
    assert (upstream.url, upstream.models, settings.default_model) == ("http://host/v1", ("m",), "m")
    assert upstream.api_key == settings.model_api_key is not None
    assert settings.default_upstream == upstream


def test_an_upstream_says_how_it_goes_on_with_a_reply() -> None:
    assert read().default_upstream.continuation == "none"
    one = read({"LASTCALL_MODEL_URL": "http://host/v1", "LASTCALL_MODEL": "m", "LASTCALL_MODEL_CONTINUATION": "Prefix"})
    assert one.default_upstream.continuation == one.model_continuation == "prefix"
    itself = "should be left out for a scripted: URL, which says it itself: scripted:?continues=false"
    assert problems({"LASTCALL_MODEL_CONTINUATION": "prefix"}) == [f"model_continuation {itself}"]
    file = TWO_UPSTREAMS.replace('["huge"]', '["huge"]\ncontinuation = "final_message"')
    assert [it.continuation for it in read(file=file).upstreams] == ["none", "final_message"]
    (line,) = problems({"LASTCALL_MODEL_CONTINUATION": "echo"}, file="")
    assert line == "LASTCALL_MODEL_CONTINUATION: 'echo' should be 'none', 'trailing', 'prefix' or 'final_message'"
    assert problems({"LASTCALL_MODEL_CONTINUATION": "prefix"}, file=TWO_UPSTREAMS) == [
        "model_continuation should not be set together with upstreams"
    ]
    assert problems(file='[[upstreams]]\nname = "a"\nurl = "scripted:"\nmodels = ["m"]\ncontinuation = "prefix"') == [
        f"upstreams[0].continuation {itself}"
    ]


def test_first_model_of_several_upstreams_is_the_default() -> None:
    assert read(file=TWO_UPSTREAMS).default_model == "small"
    settings = read({"LASTCALL_MODEL": "huge"}, file=TWO_UPSTREAMS)
    assert (settings.default_model, settings.default_upstream.name) == ("huge", "far")


def test_upstreams_that_contradict_each_other_are_refused() -> None:
    assert problems({"LASTCALL_MODEL": "other"}, file=TWO_UPSTREAMS) == [
        "model 'other' should be one that an upstream serves"
    ]
    assert problems({"LASTCALL_TITLE_MODEL": "other"}, file=TWO_UPSTREAMS) == [
        "title_model 'other' should be one that an upstream serves"
    ]
    assert problems({"LASTCALL_MODEL_URL": "scripted:"}, file=TWO_UPSTREAMS) == [
        "model_url should not be set together with upstreams"
    ]
    assert problems(file=TWO_UPSTREAMS.replace("far", "near").replace("huge", "small")) == [
        "upstreams should not share a name: 'near'",
        "upstreams should not share a model: 'small'",
    ]


def test_upstreams_wrong_parts_are_named() -> None:
    an_openai_compatible_server = "(an OpenAI-compatible server) or scripted:"
    assert problems(file='[[upstreams]]\nnam = "a"\nurl = "x"\nmodels = []') == [
        "lastcall.toml: upstreams[0].name: is missing",
        f"lastcall.toml: upstreams[0].url: 'x' should be http://host/v1, https://host/v1 {an_openai_compatible_server}",
        'lastcall.toml: upstreams[0].models: should be at least one, such as ["small", "large"]',
        "lastcall.toml: upstreams[0].nam: is not a setting; did you mean name?",
    ]
    assert problems({"LASTCALL_UPSTREAMS": "x"}) == [
        "LASTCALL_UPSTREAMS: should be at least one [[upstreams]] table of the file"
    ]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host/v1", "http://host/v1"),
        ("http://host/v1?", "http://host/v1?"),
        ("http://host/v1?api_key=sesame", "http://host/v1?api_key=********"),
        ("http://host/v1?a=se=same&b=&sesame#sesame", "http://host/v1?a=********&b=********&********"),
        ("http://host/v1#a?sesame=", "http://host/v1"),
        ("scripted:?tokens=3", "scripted:?tokens=3"),
    ],
)
def test_upstream_s_query_is_shown_without_its_values(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_shutdown_total_is_the_sum_of_the_phases_and_one_second_unless_set() -> None:
    assert (
        Settings(lame_duck_timeout_s=5, drain_timeout_s=4, cleanup_timeout_s=3, release_timeout_s=2).shutdown_total_s
        == 15
    )
    assert Settings(shutdown_timeout_s=7).shutdown_total_s == 7


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    settings = read({"LASTCALL_API_KEYS": "sesame-open-sesame", "LASTCALL_MODEL_API_KEY": "sesame"})
    assert "sesame" not in f"{settings} {settings!r} {settings.model_dump()}"


def test_example_in_the_readme_is_taken() -> None:
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    example = readme.partition("```toml\n")[2].partition("```")[0]
    assert tomllib.loads(example)
    read(file=example)


@pytest.mark.parametrize(
    ("given", "expected_s"),
    [
        ({"store_url": "memory:"}, 1800),
        ({"store_url": "sqlite:lastcall.db"}, 30 * 24 * 3600),
        ({"store_url": "sqlite:lastcall.db", "idle_timeout_s": 60}, 60),
    ],
)
def test_sessions_are_kept_longer_where_they_outlive_the_process(given: dict[str, Any], expected_s: float) -> None:
    assert Settings(**given).default_idle_timeout_s == expected_s


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("memory:", MEMORY),
        ("sqlite:a.db", SQLITE),
        ("sqlite::x", SQLITE),
        ("postgresql:///a", POSTGRESQL),
        ("postgres://a/b", POSTGRESQL),
    ],
)
def test_what_a_store_can_do_is_known_from_its_url(url: str, expected: StoreCapabilities) -> None:
    assert Settings(store_url=url).store_capabilities == expected


@pytest.mark.parametrize("value", ["1", "1.5", "true", "[]", "[1]", "{}", '"x"', "nan", "1979-05-27", "[[true]]"])
def test_no_complaint_about_the_file_names_a_type_of_python(value: str) -> None:
    pythons = re.compile(r"\b(str|int|float|bool|dict|dictionary|tuple|instance|None|True|False)\b|valid string")
    for name in Settings.model_fields:
        try:
            read(file=f"{name} = {value}\n")
        except SettingsError as error:
            text = str(error)
        else:
            continue
        assert not pythons.search(text), text


@pytest.mark.parametrize("length", [0, 1, 15])
def test_key_of_callers_that_could_be_guessed_is_refused_in_each_source(length: int) -> None:
    Path("keys").write_text(f"{ONE}\n{'k' * (length or 15)}\n")
    short = (
        "should be at least 16 characters; openssl rand -hex 32 makes one that cannot be guessed"
        if length
        else "should not be empty; is there a comma too many?"
    )
    key = "k" * length
    assert problems({"LASTCALL_API_KEYS": f"{ONE},{key}"}) == [f"LASTCALL_API_KEYS[1]: {short}"]
    assert problems(file=f'api_keys = ["{ONE}", "{key}"]') == [f"lastcall.toml: api_keys[1]: {short}"]
    if length:
        assert problems({"LASTCALL_API_KEYS_FILE": "keys"}) == [f"LASTCALL_API_KEYS_FILE[1]: {short}"]
        Path("lastcall.toml").write_text('api_keys_file = "keys"')
        assert problems() == [f"lastcall.toml: api_keys_file[1]: {short}"]
    assert read({"LASTCALL_API_KEYS": "k" * 16}, file=" ").api_keys


def test_key_of_a_model_server_may_be_short() -> None:
    """The model server decides about its key: many local servers take any text as a key."""
    assert read({"LASTCALL_MODEL_API_KEY": "EMPTY"}).model_api_key is not None


def shown_keys(settings: Settings) -> list[str]:
    return [key.get_secret_value() for entry in settings.api_keys for key in secrets_of(entry)]


@pytest.mark.parametrize(
    "text", [f"{ONE},{TWO}", f"{ONE}\n{TWO}\n", f"\ufeff {ONE}\r\n\r\n  {TWO} \r\n", f"{ONE}, {TWO},\n"]
)
def test_keys_are_read_from_a_file_one_a_line_or_between_commas(text: str) -> None:
    Path("keys").write_text(text)
    assert shown_keys(read({"LASTCALL_API_KEYS_FILE": "keys"})) == [ONE, TWO]
    assert shown_keys(read(file='api_keys_file = "keys"')) == [ONE, TWO]


def test_key_of_a_model_server_is_read_from_a_file() -> None:
    """A link to a file, as a mounted secret is; in tables of upstreams too, which no variable reaches."""
    Path("held").write_text("sk-1,2\n")
    Path("key").symlink_to("held")
    [settings, other] = [read({"LASTCALL_MODEL_API_KEY_FILE": "key"}), read(file='model_api_key_file = "key"')]
    table = '[[upstreams]]\nname = "a"\nurl = "http://host/v1"\nmodels = ["m"]\napi_key_file = "key"'
    for key in (settings.model_api_key, other.model_api_key, read(file=table).upstreams[0].api_key):
        assert key is not None
        assert key.get_secret_value() == "sk-1,2"


def test_file_of_a_secret_has_the_rank_of_its_source() -> None:
    Path("keys").write_text(TWO)
    assert shown_keys(read({"LASTCALL_API_KEYS": ONE}, file='api_keys_file = "keys"')) == [ONE]
    assert shown_keys(read({"LASTCALL_API_KEYS": ONE}, file='api_keys_file = "missing"')) == [ONE]
    assert shown_keys(read({"LASTCALL_API_KEYS_FILE": "keys"}, file=f'api_keys = ["{ONE}"]')) == [TWO]


def test_secret_and_its_file_in_one_source_are_refused() -> None:
    Path("keys").write_text(TWO)
    both = "should not be set together with"
    assert problems({"LASTCALL_API_KEYS": ONE, "LASTCALL_API_KEYS_FILE": "keys"}) == [
        f"LASTCALL_API_KEYS_FILE: {both} api_keys"
    ]
    table = '\n[[upstreams]]\nname = "a"\nurl = "http://host/v1"\nmodels = ["m"]\napi_key = "k"\napi_key_file = "keys"'
    assert problems(file=f'api_keys = ["{ONE}"]\napi_keys_file = "keys"{table}') == [
        f"lastcall.toml: api_keys_file: {both} api_keys",
        f"lastcall.toml: upstreams[0].api_key_file: {both} api_key",
    ]


def test_unusable_file_of_a_secret_is_reported_together_with_all_other_problems() -> None:
    """Such a file never leaves a server without keys, which would serve every caller of a proxy on loopback."""
    os.mkfifo("fifo")
    Path("empty").write_text(" \n,\n")
    Path("utf-16").write_bytes(ONE.encode("utf-16"))
    Path("large").write_text("k" * (64 * 1024 + 1))
    for path, what in {
        "missing": "names a file that cannot be read: No such file or directory",
        "fifo": "names something other than a regular file",
        "empty": "names a file without a key in it",
        "utf-16": "names a file that is not UTF-8",
        "large": "names a file of more than 65536 bytes",
    }.items():
        said = problems({"LASTCALL_API_KEYS_FILE": path, "LASTCALL_STREAMS_MAX": "0", "LASTCALL_BIND": "unix:a"})
        assert said == [
            f"LASTCALL_API_KEYS_FILE: {what}",
            "LASTCALL_STREAMS_MAX: '0' should be a whole number of at least 1, at most 10000000",
        ]
        # No line says that the keys are missing: they are in a file that has to be corrected.
        assert problems({"LASTCALL_API_KEYS_FILE": path, "LASTCALL_BIND": "unix:a"}) == [
            f"LASTCALL_API_KEYS_FILE: {what}"
        ]
    assert problems(file="api_keys_file = 1\nmodel_api_key_file = 'a\\u0000'".replace("'", '"')) == [
        "lastcall.toml: api_keys_file: should be the path of a file",
        "lastcall.toml: model_api_key_file: should be the path of a file",
    ]


def test_level_of_the_log_may_be_called_warn() -> None:
    assert read({"LASTCALL_LOG_LEVEL": "WARN"}).log_level == "warning"


@pytest.mark.parametrize("keys", ["", ONE])
@pytest.mark.parametrize("bind", ["127.0.0.1:0", "0.0.0.0:8000", "[::]:8000", "host.example:1"])
def test_stand_in_that_would_answer_other_machines_has_to_be_named(keys: str, bind: str) -> None:
    settings = read({"LASTCALL_API_KEYS": keys}, bind=bind)
    if not keys and bind.startswith("127"):
        check_stand_in(settings, binds=[bind])
    else:
        with pytest.raises(SettingsError, match=r"^model_url should be set \(LASTCALL_MODEL_URL\): ") as refused:
            check_stand_in(settings, binds=[bind])
        assert ("api_keys are set" if keys else f"other machines reach {bind}") in str(refused.value)
    for named in ({"LASTCALL_MODEL_URL": "scripted:"}, {"LASTCALL_MODEL_URL": "http://host/v1", "LASTCALL_MODEL": "m"}):
        check_stand_in(read({"LASTCALL_API_KEYS": keys, **named}, bind=bind), binds=[bind])
    table = '[[upstreams]]\nname = "a"\nurl = "scripted:"\nmodels = ["m"]'
    check_stand_in(read({"LASTCALL_API_KEYS": keys}, bind=bind, file=table), binds=[bind])
