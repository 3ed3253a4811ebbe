"""Who is served: holders of a key; without keys this machine alone."""

import pytest

from service.api.http.access import Access, Address, LoopbackOnlyError, UnauthorizedError
from service.settings import Settings

LOCAL: Address = ("127.0.0.1", 50_000)
SERVER: Address = ("127.0.0.1", 8000)


def check(
    access: Access,
    *,
    authorization: str | None = None,
    host: str | None = "localhost",
    client: Address = LOCAL,
    server: Address = SERVER,
) -> None:
    access.check(authorization=authorization, host=host, client=client, server=server)


OPEN = Access.by(Settings())
KEYED = Access.by(Settings.model_validate({"api_keys": ("first-key", "second-key")}))


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "127.0.0.1",
        "127.0.0.1:8000",
        "127.8.9.10:1",
        "[::1]",
        "[::1]:8000",
        "[::ffff:127.0.0.1]:80",
    ],
)
def test_without_keys_loopback_hosts_are_served(host: str) -> None:
    check(OPEN, host=host)


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "example.com",
        "example.com:8000",
        "localhost.example.com",
        "127.0.0.1.example.com",
        "localhost@example.com",
        "localhost:80:80",
        "localhost:evil",
        "10.0.0.1:8000",
        "0.0.0.0",
        "[::]",
        "[fe80::1]:8000",
        "[::1]evil",
        "[::1",
        "[localhost]",
        "localhost\n",
        "2130706433",
        "127.1",
        "::1",
    ],
)
def test_without_keys_other_hosts_are_refused(host: str | None) -> None:
    with pytest.raises(LoopbackOnlyError):
        check(OPEN, host=host)


@pytest.mark.parametrize("address", [("::1", 1), ("127.0.0.9", 1), ("::ffff:127.0.0.1", 1)])
def test_without_keys_loopback_addresses_are_served(address: Address) -> None:
    check(OPEN, client=address, server=address)


@pytest.mark.parametrize("address", [None, ("10.0.0.1", 1), ("fe80::1%eth0", 1), ("0.0.0.0", 1), ("<local>", None)])
def test_without_keys_other_addresses_are_refused(address: Address) -> None:
    with pytest.raises(LoopbackOnlyError):
        check(OPEN, client=address)
    with pytest.raises(LoopbackOnlyError):
        check(OPEN, server=address)


@pytest.mark.parametrize("authorization", ["Bearer first-key", "bearer  first-key ", "BEARER second-key"])
def test_each_key_opens_from_anywhere(authorization: str) -> None:
    check(KEYED, authorization=authorization, host="example.com", client=("10.0.0.1", 1))


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer first", "Bearer first-key2", "Basic first-key", "first-key"],
)
def test_with_keys_nothing_else_opens_not_even_from_this_machine(authorization: str | None) -> None:
    with pytest.raises(UnauthorizedError):
        check(KEYED, authorization=authorization)
