"""``[[api_keys]]``: named keys beside plain ones, their files and hashes, and what is refused."""

from hashlib import sha256
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.setting_sources import read_sources
from service.settings import NamedKey, Settings, digests_of

ONE, TWO = "the-first-key-of-callers", "the-second-key-of-callers"
HASH = sha256(TWO.encode()).hexdigest()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(file: str, environ: dict[str, str] | None = None) -> Settings:
    Path("lastcall.toml").write_text(file)
    return read_sources(environ or {}).settings()


def problems(*tables: str) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        read("\n".join(f"[[api_keys]]\n{table}" for table in tables))
    text = str(refused.value)
    assert ONE not in text
    assert HASH not in text
    return [line.removeprefix("lastcall.toml: ") for line in text.splitlines()]


def known(settings: Settings) -> dict[bytes, str]:
    return {digest: name for entry in settings.api_keys for name, digest in digests_of(entry)}


def digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def test_a_table_names_a_key_and_what_it_may_do() -> None:
    table = f'[[api_keys]]\nname = "ann@example.org"\nkey = "{ONE}"\n'
    [key] = read(table).api_keys
    assert isinstance(key, NamedKey)
    assert (key.name, key.may) == ("ann@example.org", ("talk", "read"))
    [key] = read(table + 'may = ["administer", "read"]').api_keys
    assert isinstance(key, NamedKey)
    assert key.may == ("administer", "read")


def test_plain_and_named_keys_are_in_one_list() -> None:
    settings = read(f'api_keys = ["{ONE}", {{name = "ann", key = "{TWO}"}}]')
    assert known(settings) == {digest(ONE): "", digest(TWO): "ann"}
    assert known(read(f'api_keys = ["{ONE}", "{ONE}"]')) == {digest(ONE): ""}


def test_a_hash_stands_for_a_key_that_the_server_never_has() -> None:
    for written in (HASH, HASH.upper()):
        assert known(read(f'[[api_keys]]\nname = "ann"\nkey_sha256 = "{written}"')) == {digest(TWO): "ann"}


def test_a_name_has_several_keys_while_one_takes_another_s_place() -> None:
    Path("keys").write_text(f"{ONE}\n{TWO}\n")
    both = {digest(ONE): "ann", digest(TWO): "ann"}
    assert known(read('[[api_keys]]\nname = "ann"\nkey_file = "keys"')) == both
    assert known(read(f'[[api_keys]]\nname = "ann"\nkey = ["{ONE}", "{TWO}"]')) == both
    assert known(read(f'[[api_keys]]\nname = "ann"\nkey = "{ONE}"\nkey_sha256 = ["{HASH}"]')) == both


def test_the_environment_s_list_is_over_the_tables() -> None:
    table = f'[[api_keys]]\nname = "ann"\nkey = "{ONE}"'
    assert known(read(table, {"LASTCALL_API_KEYS": TWO})) == {digest(TWO): ""}


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ([f'key = "{ONE}"'], "api_keys[0].name: is missing"),
        (['name = "ann"'], "api_keys of 'ann' should have a key, a key_file or a key_sha256"),
        (['name = "ann"\nkey = []'], "api_keys of 'ann' should have a key, a key_file or a key_sha256"),
        (
            ['name = "ann"\nkey = "short"'],
            (
                "api_keys[0].key[0]: should be at least 16 characters; "
                "openssl rand -hex 32 makes one that cannot be guessed"
            ),
        ),
        (
            ['name = "ann"\nkey_sha256 = "short"'],
            (
                "api_keys[0].key_sha256[0]: should be the SHA-256 of a key, 64 of 0-9 a-f: "
                'printf %s "$KEY" | sha256sum makes it'
            ),
        ),
        (['name = "ann"\nkey = 1'], "api_keys[0].key: should be a string, or a list of strings"),
        (
            [f'name = "a/b"\nkey = "{ONE}"'],
            (
                "api_keys[0].name: 'a/b' should be 1 to 128 of A-Z a-z 0-9 _ . ~ @ | : + = -, "
                "as it is the owner of the key's sessions"
            ),
        ),
        (
            [f'name = "ann"\nkey = "{ONE}"\nmay = ["wirte"]'],
            "api_keys[0].may[0]: 'wirte' should be 'talk', 'read', 'administer' or 'metrics'",
        ),
        (
            [f'name = "ann"\nkey = "{ONE}"\nmay = "talk"'],
            'api_keys[0].may: \'talk\' should be a list of strings, such as ["talk", "read"]',
        ),
        (
            [f'name = "ann"\nkey = "{ONE}"\nmay = []'],
            'api_keys[0].may: should be at least one of "talk", "read", "administer" and "metrics"',
        ),
        (
            [f'name = "ann"\nkey = "{ONE}"\nmays = ["talk"]'],
            "api_keys[0].mays: is not a setting; did you mean may?",
        ),
        (
            [f'name = "ann"\nkey = "{ONE}"', f'name = "ann"\nkey = "{TWO}"'],
            (
                "api_keys should not share a name: 'ann'; a second key of one name goes into the same table: "
                'key = ["…", "…"]'
            ),
        ),
        (
            [f'name = "ann"\nkey = "{TWO}"', f'name = "bob"\nkey_sha256 = "{HASH}"'],
            "api_keys should not share a key: 'ann' and 'bob' have the same",
        ),
        (
            [f'name = "ann"\nkey = "{ONE}"\nkey_file = "keys"'],
            "api_keys[0].key_file: should not be set together with key",
        ),
        (
            ['name = "ann"\nkey_file = "missing"'],
            "api_keys[0].key_file: names a file that cannot be read: No such file or directory",
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_told_in_a_line(tables: list[str], told: str) -> None:
    assert problems(*tables) == [told]


def test_a_plain_key_and_a_named_one_are_not_the_same() -> None:
    with pytest.raises(SettingsError, match=r"^api_keys should not share a key: a plain key and 'ann' have the same$"):
        read(f'api_keys = ["{ONE}", {{name = "ann", key = "{ONE}"}}]')


def test_tables_beside_a_file_of_keys_are_refused() -> None:
    Path("keys").write_text(TWO)
    with pytest.raises(
        SettingsError, match=r"^lastcall.toml: api_keys_file: should not be set together with api_keys$"
    ):
        read(f'api_keys_file = "keys"\n[[api_keys]]\nname = "ann"\nkey = "{ONE}"')
