"""The caller's address: what trusted proxies have added, and nothing that a caller can write."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.http import caller_address
from service.api.http.access import Address
from service.api.http.caller_address import HOPS_MAX, LINE_MAX, TrustedProxies
from service.settings import Settings

PROXY: Address = ("10.0.0.1", 50_000)
REAL = "203.0.113.9"
ELEMENT = caller_address._ELEMENT


def trusting(*proxies: str) -> TrustedProxies:
    return TrustedProxies.by(Settings.model_validate({"trusted_proxies": proxies, "api_keys": ("k" * 16,)}))


TRUSTED = trusting("10.0.0.0/8", "fd00::/8")


def caller(*headers: tuple[str, str], peer: Address = PROXY, trusted: TrustedProxies = TRUSTED) -> str | None:
    return trusted.caller_of(peer, [(name.lower().encode(), value.encode("latin-1")) for name, value in headers])


def listed(*lines: str) -> str | None:
    return caller(*(("X-Forwarded-For", line) for line in lines))


def forwarded(*lines: str) -> str | None:
    return caller(*(("Forwarded", line) for line in lines))


@pytest.mark.parametrize(
    ("node", "address"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("203.0.113.9:4711", "203.0.113.9"),
        ("2001:DB8::0:1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("[::ffff:203.0.113.9]:1", "203.0.113.9"),
        ("unknown", None),
        ("_hidden", None),
        ("localhost", None),
        ("203.0.113", None),
        ("203.0.113.009", None),
        ("203.0.113.9.1", None),
        ("203.0.113.9:x", None),
        ("[203.0.113.9]", "203.0.113.9"),
        ("[2001:db8::1", None),
        ("2001:db8::1]", None),
        ("fe80::1%eth0", None),
        ("fe80::1%\x1b[31m", None),
        ("203.0.113.9\n", "203.0.113.9"),
        ("203.0.113.9;x", None),
        ("\xb2\xb9.1.1.1", None),
        ("1" * 5000, None),
        ("", None),
    ],
)
def test_a_node_is_an_address_or_is_ignored(node: str, address: str | None) -> None:
    assert listed(node) == address
    if ";" not in node and "\n" not in node:
        assert forwarded(f'for="{node}"') == address


def test_the_first_from_the_right_that_is_not_trusted_is_the_caller() -> None:
    assert listed("1.1.1.1, 203.0.113.9, 10.0.0.7, 10.0.0.8") == REAL
    assert listed("1.1.1.1", "203.0.113.9,10.0.0.7", "10.0.0.8") == REAL
    assert forwarded("for=1.1.1.1, for=203.0.113.9;proto=https, for=10.0.0.7;by=10.0.0.8") == REAL
    assert forwarded("for=1.1.1.1", 'For="203.0.113.9:80"', "for=10.0.0.7") == REAL


def test_where_all_are_trusted_the_first_of_them_is_the_caller() -> None:
    assert listed("10.0.0.5, 10.0.0.6") == "10.0.0.5"
    assert forwarded('for="[fd00::5]", for=10.0.0.6') == "fd00::5"


def test_an_unreadable_node_ends_the_walk_at_the_last_known_address() -> None:
    assert listed("203.0.113.9, unknown, 10.0.0.7") == "10.0.0.7"
    assert forwarded("for=203.0.113.9, by=10.0.0.7, for=10.0.0.8") == "10.0.0.8"
    assert forwarded("for=203.0.113.9, for=_secret") is None


@pytest.mark.parametrize("peer", [("203.0.113.1", 1), ("::1", 1), None, ("<local>", None), ("", 1)])
def test_only_a_trusted_peer_is_believed(peer: Address) -> None:
    assert caller(("X-Forwarded-For", REAL), ("Forwarded", f"for={REAL}"), peer=peer) is None


@pytest.mark.parametrize("peer", [("::ffff:10.0.0.1", 1), ("fd00::1%eth0", 1)])
def test_a_trusted_peer_is_recognized_in_each_form_of_its_address(peer: Address) -> None:
    assert caller(("X-Forwarded-For", REAL), peer=peer) == REAL


def test_a_proxy_on_a_unix_socket_is_trusted_if_it_is_named() -> None:
    assert caller(("X-Forwarded-For", REAL), peer=None, trusted=trusting("unix:")) == REAL
    assert caller(("X-Forwarded-For", REAL), peer=PROXY, trusted=trusting("unix:")) is None


def test_without_headers_the_peer_is_all_that_is_known() -> None:
    assert caller() is None
    assert listed("") is None
    assert listed(", ,,") is None
    assert forwarded("") is None


def test_of_two_headers_that_disagree_neither_counts() -> None:
    """It is not known which of the two headers the proxy writes; the client may have written the other one."""
    assert caller(("X-Forwarded-For", REAL), ("Forwarded", "for=1.1.1.1")) is None
    assert caller(("X-Forwarded-For", REAL), ("Forwarded", "for=unknown")) is None
    assert caller(("X-Forwarded-For", REAL), ("Forwarded", f'for="{REAL}:80"')) == REAL


def test_quotes_are_read_as_rfc_7239_has_them() -> None:
    assert forwarded('for="203.0.113.9";host="a, for=1.1.1.1"') == REAL
    assert forwarded('proto=http;for=203.0.113.9;ext="a\\"b, c"') == REAL
    assert forwarded('for="\\203.0.113.9"') == REAL
    assert forwarded("for = 203.0.113.9 ; proto=http") == REAL
    assert forwarded("for=203.0.113.9;") == REAL
    assert forwarded("for=203.0.113.9;for=1.1.1.1") is None


@pytest.mark.parametrize("written", ['for="', '"', 'for="1.1.1.1', 'for=1.1.1.1, for="\\', "for=,", "=", ";;"])
def test_a_quote_that_a_client_leaves_open_hides_nothing_that_its_proxy_adds(written: str) -> None:
    assert forwarded(f"{written}, for={REAL}") == REAL
    assert forwarded(f'{written}, for="{REAL}:80";proto=https') == REAL


@given(written=st.text(st.sampled_from('for=byFO1.:[]",;\\ _%'), max_size=60) | st.text(max_size=60))
def test_no_client_can_have_another_address_logged(written: str) -> None:
    """The client may write any header: the proxy adds the address that it has seen at the right end."""
    written = written.encode("utf-8", "replace").decode("latin-1")
    assert listed(f"{written}, {REAL}") == REAL
    assert listed(written, REAL) == REAL
    assert forwarded(f"{written}, for={REAL}") == REAL
    assert forwarded(written, f"for={REAL};proto=http") == REAL
    assert caller(("X-Forwarded-For", REAL), ("Forwarded", written)) in (REAL, None)
    assert caller(("X-Forwarded-For", written), ("Forwarded", f"for={REAL}")) in (REAL, None)


def test_the_number_of_proxies_on_the_way_is_bounded() -> None:
    assert listed(", ".join([REAL, *["10.0.0.2"] * HOPS_MAX])) == "10.0.0.2"
    assert listed(", ".join([REAL, *["10.0.0.2"] * (HOPS_MAX - 1)])) == REAL


@pytest.mark.parametrize(
    "line",
    ["10.0.0.2," * 8000, "," * 64_000, 'for="' * 12_000, "for=10.0.0.2," * 5000, 'a="\\"' * 9000, 'a="' + "," * 64_000],
)
def test_only_a_bounded_part_of_a_long_header_is_read(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    def fullmatch(element: str) -> re.Match[str] | None:
        looked_at.append(len(element))
        return ELEMENT.fullmatch(element)

    monkeypatch.setattr(caller_address, "_ELEMENT", SimpleNamespace(fullmatch=fullmatch))
    assert forwarded(line) in (None, "10.0.0.2")
    assert listed(line) in (None, "10.0.0.2")
    assert len(looked_at) <= HOPS_MAX + 1
    assert sum(looked_at) <= HOPS_MAX * LINE_MAX
