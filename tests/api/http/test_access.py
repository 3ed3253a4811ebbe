"""Access: callers with a key; without keys only this machine."""

import pytest

from service.api.http.access import Access, Address, LoopbackOnlyError, ProxiedRequestError, UnauthorizedError
from service.api.http.proxy_headers import proxy_header
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
    proxy_header: str | None = None,
) -> None:
    access.check(authorization=authorization, host=host, client=client, server=server, proxy_header=proxy_header)


OPEN = Access.by(Settings())
KEYED = Access.by(Settings.model_validate({"api_keys": ("the-first-key-of-two", "the-second-key-of-two")}))


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


@pytest.mark.parametrize(
    "authorization", ["Bearer the-first-key-of-two", "bearer  the-first-key-of-two ", "BEARER the-second-key-of-two"]
)
def test_each_key_gives_access_from_any_address(authorization: str) -> None:
    check(KEYED, authorization=authorization, host="example.com", client=("10.0.0.1", 1))


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer first",
        "Bearer the-first-key-of-two2",
        "Basic the-first-key-of-two",
        "the-first-key-of-two",
    ],
)
def test_with_keys_a_request_without_one_is_refused_even_from_this_machine(authorization: str | None) -> None:
    with pytest.raises(UnauthorizedError):
        check(KEYED, authorization=authorization)


def test_without_keys_a_request_that_a_proxy_passed_on_is_refused_with_the_reason() -> None:
    with pytest.raises(ProxiedRequestError, match=r"header X-Forwarded-For\..*set api_keys \(LASTCALL_API_KEYS\)"):
        check(OPEN, proxy_header="X-Forwarded-For")


def test_with_keys_a_request_through_a_proxy_is_served() -> None:
    check(KEYED, authorization="Bearer the-first-key-of-two", proxy_header="X-Forwarded-For")
    with pytest.raises(UnauthorizedError):
        check(KEYED, proxy_header="X-Forwarded-For")


# fmt: off
PROXIES = [
    "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded", "X-Forwarded-Host", "X-Forwarded-Proto",
    "X-Forwarded-Port", "X-Forwarded-Prefix", "X-Forwarded-Client-Cert", "X-Real-IP", "X-Real-Port", "X-Client-IP",
    "X-Cluster-Client-IP", "True-Client-IP", "CF-Connecting-IP", "CF-Connecting-IPv6", "CF-Ray", "CDN-Loop",
    "Fly-Client-IP", "Fastly-Client-IP", "Incap-Client-IP", "Ali-CDN-Real-IP", "X-Envoy-External-Address",
    "X-Envoy-Attempt-Count", "X-Original-Forwarded-For", "X-Original-URI", "X-Original-Host", "X-ProxyUser-Ip",
    "Forwarded-For", "Client-IP", "WL-Proxy-Client-IP", "Proxy-Client-IP", "X-Remote-Addr", "X-Azure-ClientIP",
    "X-Azure-SocketIP", "X-ARR-SSL", "X-AppEngine-User-IP", "X-Varnish", "X-Amz-Cf-Id", "CloudFront-Viewer-Address",
    "Tailscale-User-Login", "Remote-User", "X-Auth-Request-Email", "X-Scheme", "Front-End-Https",
]
# fmt: on


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("value", [b"203.0.113.9", b"", b"127.0.0.1", b"\xff"])
def test_a_proxy_s_header_is_known_by_its_name_with_any_value(name: str, value: bytes) -> None:
    for spelt in (name, name.lower(), name.upper()):
        assert proxy_header([(b"host", b"localhost"), (spelt.encode(), value)]) == name.title()


# fmt: off
OF_CALLERS = [
    "Host", "User-Agent", "Accept", "Accept-Encoding", "Accept-Language", "Authorization", "Content-Type",
    "Content-Length", "Cookie", "Origin", "Referer", "Connection", "Cache-Control", "Pragma", "Idempotency-Key",
    "Last-Event-ID", "Sec-Fetch-Site", "Sec-CH-UA", "Sec-GPC", "DNT", "TE", "Upgrade", "Expect",
    "Upgrade-Insecure-Requests", "Priority", "X-Requested-With", "X-Stainless-Lang", "X-Stainless-Raw-Response",
    "X-API-Key", "Anthropic-Version", "OpenAI-Organization", "X-Request-ID", "X-Correlation-ID", "Traceparent",
    "Tracestate", "Baggage", "B3", "X-B3-TraceId", "X-Amzn-Trace-Id", "X-Cloud-Trace-Context", "Proxy-Connection",
    "X-Client-Name", "X-Client-Version", "X-Source", "X-User-ID", "X-Forward", "X-IP", "Description",
]
# fmt: on


def test_no_header_of_a_caller_counts_as_one_of_a_proxy() -> None:
    """These are headers of browsers, curl, the SDKs of OpenAI and Anthropic, and of tracing in the caller."""
    assert proxy_header((name.lower().encode(), b"1") for name in OF_CALLERS) is None


def test_the_refusal_shortens_the_name_of_a_long_header() -> None:
    assert proxy_header([(b"x-forwarded-" + b"a" * 5000, b"1")]) == "X-Forwarded-" + "A" + "a" * 51
