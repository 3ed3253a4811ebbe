"""Who may use the calls for operators: callers who may ``administer``, and no web page of another origin.

The access rule of all calls holds here too (:mod:`service.api.http.access`): a key, or without keys a caller on this
machine who came through no proxy. And the key has to ``administer`` (:func:`~service.api.http.callers.admit`). And a
browser must not be the way in: it runs the pages of strangers, and reaches addresses that only this machine reaches.

* ``Sec-Fetch-Site``, which no page can set, has to say that the page is the server's own, or that there is none.
* An ``Origin`` has to be the server's own. Browsers without the header before send this one with each POST.
* A POST has to be JSON by its type. A page of another origin can send this type only after a preflight, and there is
  none that allows an admin call: ``cors_origins`` does not hold here.
* No page of another origin may read an answer, nor embed it.
"""

from urllib.parse import urlsplit

from quart import Request
from werkzeug.datastructures import Headers

from service.errors import RefusedError

_OWN_SITES = ("same-origin", "none")
PATHS = "/admin/"
"""How the paths of these calls begin."""


class CrossSiteError(RefusedError):
    """A page of another origin sends the request."""

    code = "cross_site"

    def __init__(self) -> None:
        super().__init__(
            "A web page of another origin sends this request: calls under /admin are for pages of this server, and for "
            "programs, only."
        )


def check_no_other_page(asked: Request) -> None:
    """Refuse a request that a page of another origin sends.

    Raises:
        CrossSiteError
    """
    site = asked.headers.get("Sec-Fetch-Site")
    if site is not None and site not in _OWN_SITES:
        raise CrossSiteError
    origins = asked.headers.getlist("Origin")
    if site != "same-origin" and any(not _is_own(origin, asked.headers.get("Host", "")) for origin in origins):
        raise CrossSiteError


def protect(headers: Headers) -> None:
    """Keep pages of other origins from reading or embedding an answer."""
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers["X-Content-Type-Options"] = "nosniff"


def _is_own(origin: str, host: str) -> bool:
    """Whether an origin is that of this server: a proxy may speak TLS in front, so the schemes may differ."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return bool(parts.netloc) and parts.netloc.lower() == host.lower()
