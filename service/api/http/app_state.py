"""The service behind the application: attached and detached by the code that holds the service open."""

import msgspec
from quart import Quart, current_app
from quart_trio.wrappers import TrioResponse

from service.api.http.access import Access
from service.api.http.caller_address import TrustedProxies
from service.api.http.held_bytes import HeldBytes, hold_answer
from service.api.http.locations import located
from service.api.http.problems import NotReadyError
from service.api.http.request_record import RequestRecords
from service.supervisor import Service
from service.telemetry.refusal_log import RefusalLog

HISTORY_BYTES_MAX = "LASTCALL_HISTORY_BYTES_MAX"
"""Key in the application's configuration of the bound on bodies that may bring a whole conversation."""
METRICS_ONLY = "lastcall.metrics_only"
"""Key in the ASGI scope of a request that came to the listener of ``metrics_bind``: nothing else is answered there."""
LOOPBACK_HOST_ONLY = "lastcall.loopback_host_only"
"""Key in the same scope if that listener is on a loopback address: then the ``Host`` has to name this machine."""
_SERVICE = "lastcall"
_ACCESS = "lastcall.access"
_TRUSTED_PROXIES = "lastcall.trusted_proxies"
_REFUSALS = "lastcall.refusals"
_HELD_BYTES = "lastcall.held_bytes"
_RECORDS = "lastcall.records"
_NO_RECORDS = RequestRecords(access_log=False)


def attach(app: Quart, service: Service) -> None:
    """Let the application answer from this service. The service's settings hold for all requests from now on."""
    app.config["MAX_CONTENT_LENGTH"] = service.settings.body_bytes_max
    app.config[HISTORY_BYTES_MAX] = service.settings.history_bytes
    app.extensions[_ACCESS] = Access(service.keys)
    app.extensions[_TRUSTED_PROXIES] = TrustedProxies.by(service.settings)
    app.extensions[_REFUSALS] = service.refusals
    app.extensions[_HELD_BYTES] = HeldBytes(bytes_max=service.settings.held_bytes_max)
    app.extensions[_RECORDS] = RequestRecords(access_log=service.settings.access_log == "on", tracing=service.tracing)
    app.extensions[_SERVICE] = service


def detach(app: Quart) -> None:
    """Let the application answer 503. Idempotent."""
    app.extensions.pop(_SERVICE, None)


def current_service() -> Service:
    """The service of the current request. Raises: NotReadyError."""
    service: Service | None = current_app.extensions.get(_SERVICE)
    if service is None:
        raise NotReadyError
    return service


def current_access() -> Access:
    access: Access = current_app.extensions[_ACCESS]
    return access


def refusals_of(app: Quart) -> RefusalLog:
    """Where refused requests are counted: the service's, also once it is detached."""
    if _REFUSALS not in app.extensions:  # none was attached yet
        app.extensions[_REFUSALS] = RefusalLog()
    refusals: RefusalLog = app.extensions[_REFUSALS]
    return refusals


def held_bytes_of(app: Quart) -> HeldBytes:
    """The bytes that the requests of an application hold; without a bound before a service is attached."""
    held: HeldBytes = app.extensions.get(_HELD_BYTES, HeldBytes())
    return held


def records_of(app: Quart) -> RequestRecords:
    """What records the requests of an application; nothing before a service is attached."""
    records: RequestRecords = app.extensions.get(_RECORDS, _NO_RECORDS)
    return records


def service_of(app: Quart) -> Service | None:
    """The service that is attached."""
    return app.extensions.get(_SERVICE)


def trusted_proxies_of(app: Quart) -> TrustedProxies:
    """Return the trusted proxies of an application; before a service is attached no proxy is trusted."""
    proxies: TrustedProxies = app.extensions.get(_TRUSTED_PROXIES, TrustedProxies())
    return proxies


def json_response(
    body: msgspec.Struct, status: int = 200, *, location: str | None = None, etag: str | None = None
) -> TrioResponse:
    """Return a wire type as a response. ``location`` is a path of this service, without the prefix.

    A wire type with texts of models goes through :func:`~service.api.http.long_json.encode_json` first.

    Raises:
        HeldBytesLimitError: The request can be repeated, and there is no room for the answer.
    """
    return encoded_response(msgspec.json.encode(body), status, location=location, etag=etag)


def encoded_response(
    encoded: bytes, status: int = 200, *, location: str | None = None, etag: str | None = None
) -> TrioResponse:
    """Return JSON as a response, as :func:`json_response` does."""
    headers = {"Cache-Control": "no-store"}
    if location is not None:
        headers["Location"] = located(location)
    if etag is not None:
        headers["ETag"] = etag
    hold_answer(len(encoded))
    return TrioResponse(encoded, status, headers, content_type="application/json")


def no_content(status: int = 204, headers: dict[str, str] | None = None) -> TrioResponse:
    """Return a response without a body: 204, or 304 with the headers of what the client has already."""
    response = TrioResponse(b"", status, headers)
    for name in ("Content-Type", "Content-Length"):  # Quart sets them also without a body
        response.headers.pop(name, None)
    return response
