"""The application: its routes, and the checks and headers of every request."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

from quart import Quart, Request, current_app, has_request_context, request, websocket
from quart.routing import QuartRule
from quart.sessions import NullSession, SessionInterface
from quart.wrappers.base import BaseRequestWebsocket
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import NotFound
from werkzeug.routing import MapAdapter

from service.api.http.access import LoopbackOnlyError, is_loopback_host
from service.api.http.admin_access import PATHS as ADMIN_PATHS
from service.api.http.admin_access import check_no_other_page, protect
from service.api.http.app_state import (
    HISTORY_BYTES_MAX,
    LOOPBACK_HOST_ONLY,
    METRICS_ONLY,
    attach,
    current_access,
    current_service,
    detach,
    held_bytes_of,
    no_content,
    records_of,
    refusals_of,
    service_of,
    trusted_proxies_of,
)
from service.api.http.callers import CALLER, admit, caller_at_peer
from service.api.http.cors import allow_origin, preflight_response
from service.api.http.held_bytes import SMALL_BYTES, bytes_of, counting_bytes, hold_answer
from service.api.http.locations import root_path_of, take_prefix
from service.api.http.operations import operation_of
from service.api.http.pacing import Pace, is_paced
from service.api.http.problems import NotReadyError, Refusal, answer_error, problem_response
from service.api.http.proxy import PEER, forward, hand_over, is_from_peer
from service.api.http.proxy_headers import proxy_header
from service.api.http.query_params import check_query_length
from service.api.http.request_body import BODY_BYTES_MAX, BoundedRequest
from service.api.http.request_id import HEADER, name_request, request_id_of
from service.api.http.request_record import record_of
from service.api.http.request_resources import request_resources
from service.api.http.request_target import fault_of, refuse_target
from service.api.native import chat, sessions, turns
from service.api.openai import chat_completions, conversations, models, responses
from service.api.openai.errors import is_path_of_openai, openai_error_response
from service.api.operator import admin, console, drain, health, metrics, shutdowns, tree
from service.api.reference import page
from service.errors import InvalidRequestError, OwnedElsewhereError, ShuttingDownError, StoreError
from service.setting_types import Permission
from service.telemetry.log_context import log_context
from service.telemetry.refusal_log import causes_of

__all__ = ["Application", "attach", "create_app", "detach"]


_HISTORY_PATHS = ("/v1/responses", "/v1/chat/completions")
"""The ends of the paths of requests that may bring a whole conversation."""
_WITHOUT_DATA = frozenset({page.blueprint.name, console.blueprint.name})
"""The blueprints of pages. They hold no secret and need no key, because a browser sends none for a page."""


_OF_METRICS = (
    "metrics_bind (LASTCALL_METRICS_BIND) is a loopback address, so only requests to a loopback host name are "
    "served; set metrics_bind to an address of the network to serve others."
)


class _NoCookies(SessionInterface):
    """No request has a session of Quart's, which is a cookie: all share one that nothing can be put into."""

    def __init__(self) -> None:
        self._none = NullSession()

    async def open_session(self, app: Quart, request: BaseRequestWebsocket) -> NullSession:  # noqa: ARG002  Quart's
        return self._none

    def is_null_session(self, session: object) -> bool:
        return session is self._none


class Application(QuartTrio):
    """A Quart application whose requests are bounded and always give back their resources."""

    request_class = BoundedRequest
    session_interface = _NoCookies()  # type: ignore[assignment]  # any interface will do

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._pace = Pace()

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await super().asgi_app(scope, receive, send)
            return
        with (
            log_context(request_id=name_request(scope)),
            records_of(self).of(scope),
            request_resources(scope),
            counting_bytes(scope, held_bytes_of(self)),
        ):
            if (fault := fault_of(scope)) is not None:
                path: str = scope["path"].removeprefix(root_path_of(scope))
                respond = openai_error_response if is_path_of_openai(path) else problem_response
                await refuse_target(scope, send, fault, respond=respond, note=partial(_note_bad_target, self, scope))
                return
            take_prefix(scope)
            self._name_caller(scope)
            if scope["path"].endswith(_HISTORY_PATHS) and HISTORY_BYTES_MAX in self.config:
                scope[BODY_BYTES_MAX] = self.config[HISTORY_BYTES_MAX]
            if is_paced(scope):
                await self._pace.wait()
            await super().asgi_app(scope, receive, send)

    def _name_caller(self, scope: Any) -> None:
        """Replace the proxy's address in the ASGI scope by the caller's, for hypercorn's access log and others.

        The access rule cannot be misled: settings allow trusted proxies only with API keys, and then only keys count.
        """
        proxies = trusted_proxies_of(self)
        if proxies and PEER not in scope:
            caller = proxies.caller_of(scope.get("client"), scope["headers"])
            if caller is not None:
                scope["client"] = (caller, 0)  # the port is not known

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        """Return the routes for a request. No route depends on the host, so the host's name is not looked at."""
        if request is None:
            return None
        return MapAdapter(
            self.url_map,
            server_name="",
            script_name=request.root_path,
            subdomain=None,
            url_scheme=request.scheme,
            path_info=request.path,
            default_method=request.method,
        )

    async def full_dispatch_request(self, request_context: Any = None) -> TrioResponse:
        """Answer the request of a context.

        Quart's method does so, too. Besides, it sends signals, keeps sessions, calls functions of blueprints and
        converts results, which this application does not use.
        """
        answered: Request = request_context.request
        try:
            response = await _admit(answered) or await self._call_handler(answered, request_context.url_adapter)
        except Exception as error:  # noqa: BLE001  the edge of a request
            response = await _answer_any(error)
        _complete(response, answered)
        return response

    async def _call_handler(self, answered: Request, routes: MapAdapter) -> TrioResponse:
        if answered.routing_exception is not None:
            raise answered.routing_exception
        rule = cast("QuartRule", answered.url_rule)
        if answered.method == "OPTIONS" and rule.provide_automatic_options:
            response = no_content()
            response.headers["Allow"] = ", ".join(routes.allowed_methods())
            return response
        handler: Any = self.view_functions[rule.endpoint]
        return cast("TrioResponse", await handler(**(answered.view_args or {})))


def create_app() -> Application:
    """Make an application without a service: it answers 503 until :func:`attach` gives it one. Opens nothing."""
    app = Application("lastcall", static_folder=None)
    app.config["RESPONSE_TIMEOUT"] = None  # Quart would cut an answer off after 60 s, also one that is being read
    app.url_map.merge_slashes = False  # otherwise Quart redirects ``//``, which would drop a POST's body
    for module in (sessions, turns, chat, responses, conversations, chat_completions, models):
        app.register_blueprint(module.blueprint)
    assert drain.blueprint is shutdowns.blueprint is tree.blueprint is admin.blueprint  # each module adds calls to it
    for module in (health, metrics, admin, page, console):
        app.register_blueprint(module.blueprint)
    app.register_error_handler(Exception, _answer_error)  # for web sockets
    return app


async def _admit(request: Request) -> TrioResponse | None:
    """Let a request pass to its handler, or answer it here."""
    if METRICS_ONLY in request.scope:
        if request.blueprint not in (metrics.blueprint.name, None):
            raise NotFound
        if LOOPBACK_HOST_ONLY in request.scope and not is_loopback_host(request.headers.get("Host") or "localhost"):
            raise LoopbackOnlyError(_OF_METRICS)
        return None  # without a blueprint it is no call at all
    settings = current_service().settings
    is_admin = request.path.startswith(ADMIN_PATHS)
    if is_admin and not is_from_peer():
        check_no_other_page(request)
    preflight = None if is_admin else preflight_response(settings.cors_origins)
    if preflight is not None:
        return preflight
    is_probe = request.blueprint == health.blueprint.name
    needs_no_key = is_probe or request.blueprint in _WITHOUT_DATA
    access = current_access()
    of_operators: tuple[Permission, ...] = ("administer",) if is_admin else ()
    needs = _needed(request) or of_operators
    if is_from_peer():
        if not needs_no_key:
            caller = caller_at_peer(request.headers.get(CALLER.decode()))
            admit(request, caller, needs=needs)
    elif not (needs_no_key and access.needs_key):
        caller = access.check(
            authorization=request.headers.get("Authorization"),
            # HAProxy's probe speaks HTTP/1.0 and sends no host. A browser, for which the host is checked, sends one.
            host=request.headers.get("Host") or ("localhost" if is_probe else None),
            client=request.scope.get("client"),
            server=request.scope.get("server"),
            proxy_header=None if is_probe or access.needs_key else proxy_header(request.scope["headers"]),
        )
        if not needs_no_key:
            admit(request, caller, needs=needs)
    if not needs_no_key and (record := record_of(request.scope)) is not None:
        record.begin_span(cast("dict[str, Any]", request.scope))
    if request.query_string and not is_probe and request.endpoint is not None:
        _refuse_query(current_app.view_functions[request.endpoint])
    return None


def _needed(request: Request) -> Collection[Permission]:
    """The permissions that a call names itself."""
    if request.endpoint is None:
        return ()
    return operation_of(current_app.view_functions[request.endpoint]).needs


async def _answer_any(error: Exception) -> TrioResponse:
    """Answer a request that failed, or let the process answer it that can."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    try:
        if isinstance(error, OwnedElsewhereError):
            return await forward(error)
        if isinstance(error, ShuttingDownError):
            return await hand_over(error)
    except Exception as failure:  # noqa: BLE001  the edge of a request
        error = failure
    return await _answer_error(error)


async def _answer_error(error: Exception) -> TrioResponse:
    is_http = has_request_context()
    path = (request if is_http else websocket).path
    shape = openai_error_response if is_path_of_openai(path) else problem_response
    route = f"{request.method} {request.url_rule.rule}" if is_http and request.url_rule is not None else None

    def respond(refusal: Refusal) -> TrioResponse:
        response = shape(refusal)
        size = response.content_length or 0
        if is_http and size > SMALL_BYTES:  # it has the text of a turn
            hold_answer(size)
        elif is_http:
            bytes_of(request.scope).add(size)
        _note_refusal(current_app, refusal, route=route)
        return response

    return await answer_error(error, respond=respond)


def _note_refusal(app: Quart, refusal: Refusal, *, route: str | None = None) -> None:
    """Count a refusal for the log, which says of the store why it refuses. What callers sent is not in it."""
    status = refusal.problem.status
    refusals_of(app).count(refusal.problem.code)
    if status == 500:
        return  # has a line of its own, with a traceback
    fields: dict[str, object] = {"status": status}
    if route is not None:
        fields["route"] = route
    if isinstance(refusal.error, StoreError):
        service = service_of(app)
        fields["error"] = str(refusal.error)
        fields["cause"] = causes_of(refusal.error)
        fields["store"] = None if service is None else service.store.name
    is_expected = status < 500 or isinstance(refusal.error, ShuttingDownError | NotReadyError)  # in a stop
    refusals_of(app).note(refusal.problem.code, level="info" if is_expected else "warning", **fields)


def _note_bad_target(app: Quart, scope: Any, refusal: Refusal) -> None:
    if (record := record_of(scope)) is not None:
        record.status, record.is_whole = refusal.problem.status, True
    _note_refusal(app, refusal)


def _refuse_query(handler: Callable[..., Any]) -> None:
    """Refuse query parameters for a call that takes none, instead of ignoring them."""
    if operation_of(handler).query is None:
        check_query_length(request)
        raise InvalidRequestError("This call takes no parameters.", field=next(iter(request.args), None))


def _complete(response: TrioResponse, answered: Request) -> None:
    """Add the headers that each response has."""
    response.headers[HEADER] = request_id_of(cast("dict[str, Any]", answered.scope))
    if (record := record_of(answered.scope)) is not None:
        record.status = response.status_code
        record.route = None if answered.url_rule is None else answered.url_rule.rule
    if is_from_peer():
        return  # the process that sent the request on adds the CORS headers
    if answered.path.startswith(ADMIN_PATHS):
        protect(response.headers)
        return
    try:
        allow_origin(response.headers, current_service().settings.cors_origins)
    except NotReadyError:
        pass
