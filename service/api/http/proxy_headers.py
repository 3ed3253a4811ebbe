"""Headers which show that a proxy has passed a request on. Their presence counts, not their value.

There are three kinds: names that proxies use by a standard or by custom, families that a proxy, a content network or a
platform adds, and every name for a caller's address. Headers that callers send themselves do not count: ids and traces
(``X-Request-ID``, ``traceparent``, ``X-Amzn-Trace-Id``, ``X-Cloud-Trace-Context``) come from tracing in the caller as
often as from a balancer, and ``Proxy-Connection`` comes from a client that is configured for a proxy.

Source: RFC 7239 (``Forwarded``), RFC 9110, 7.6.3 (``Via``), RFC 8586 (``CDN-Loop``); the products' documentation.
"""

import re
from collections.abc import Iterable

_NAMES = frozenset(
    b"forwarded forwarded-for via cdn-loop x-varnish x-nginx-proxy x-host x-scheme x-url-scheme x-rewrite-url "
    b"front-end-https remote-user x-remote-user".split()
)
_FAMILIES = (
    b"x-forwarded",
    b"x-original-",  # URL, host, method, Forwarded-For: ingress controllers, IIS
    b"x-real-",
    b"x-proxy",
    b"x-envoy-",  # service meshes too
    b"x-auth-request-",  # oauth2-proxy
    b"x-goog-authenticated-",
    b"x-ms-client-principal",
    b"x-appengine-",
    b"x-arr-",
    b"x-azure-",
    b"x-amz-cf-",
    b"x-vercel-",
    b"akamai-",
    b"x-akamai-",
    b"cf-",
    b"cloudfront-",
    b"fastly-",
    b"fly-",
    b"tailscale-",
)
_ADDRESS = re.compile(
    rb"(?:.*-)?(?:client|cluster|connecting|peer|proxyuser|real|remote|socket|source|user|visitor)-?"
    rb"(?:ip|ipv6|addr|address|port)"
)
"""``X-Client-IP``, ``True-Client-IP``, ``CF-Connecting-IP``, ``X-Cluster-Client-IP``, ``X-Azure-SocketIP``, …"""
_NAME_SHOWN_MAX = 64


def proxy_header(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the name of the first header that shows a proxy; None without one."""
    for name, _ in headers:
        lower = name.lower()
        if lower in _NAMES or lower.startswith(_FAMILIES) or _ADDRESS.fullmatch(lower):
            return lower[:_NAME_SHOWN_MAX].decode("latin-1").title()
    return None
