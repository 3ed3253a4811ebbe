"""The client of a chat completions server: OpenAI, DeepSeek, vLLM, Ollama, llama.cpp, LiteLLM and others.

Only this module and :mod:`service.models.http`, which carries its requests, know httpx. Decisions, and why:

- **A field that a server refuses** is left out, or renamed as the server asks. Once the server has answered the request
  that was changed so, later requests for that model are made in the same way: :mod:`service.models.dialects`.
- **A kept connection may be closed** by the server or on the way when a request reaches it: the request is sent again
  at once, over a new one.
- **Proxies in the environment are not used**: the settings alone say where prompts
  go. Certificates are trusted as the machine does (``SSL_CERT_FILE`` included) and as certifi does.
- **Requests ask for bodies without compression**, because compression only delays a stream of tokens. If a server on
  the way compresses a body nevertheless, the client decompresses the body within bounds.
- **Redirects are not followed**: they would carry a prompt and a key to an address that is not configured.
- **No cookies are kept**: one of a load balancer would send all turns to the same model server.
- **Connections have no bound**, so no turn ever queues for one with its deadlines running: ``live_turns_max``
  is the bound on streams.
"""

import base64
import math
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import httpx  # noqa: ASYNC127  the project's choice
import structlog
import trio

from service.clock import Clock, wall_clock
from service.errors import NOTHING_LEFT, ModelError, SettingsError, is_exhaustion
from service.freezes import extended_when_late, move_on_after
from service.ids import is_request_id
from service.models.chat_completions import ReplyDecoder, request_encoded
from service.models.client import NO_OPTIONS, ListedModel, ModelEvent, ModelRequest, Options, TakeEvents, Usage
from service.models.continuation import ContinuedStream, Form, is_long_enough
from service.models.dialects import KnownDialects
from service.models.http.connect import TlsError
from service.models.http.read_poller import ReadPoller
from service.models.http.transport import BODY, ResponseBody, Transport
from service.models.http.tree_notes import note_connections
from service.models.inflate import ENCODINGS, InflateError, Inflater, inflate
from service.models.listed_models import LIST_BYTES_MAX, read_models
from service.models.parameters import parameters_of
from service.models.upstream_errors import ErrorReply, RetryHints, error_from_reply, error_from_status
from service.steps import Steps, in_steps
from service.telemetry.log_context import add_to_log_context
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics
from service.telemetry.tree_nodes import Notes

_HOST = re.compile(rb"[0-9a-fA-F:.]+(%[\w.-]+)?|([\w-]{1,63}\.)*[\w-]{1,63}\.?")
_IDLE_MAX = 256
"""How many connections are kept between turns."""
_IDLE_EXPIRY_S = 4.0  # uvicorn, under many model servers, closes after 5
_ERROR_BODY_BYTES_MAX = 64 * 1024
_ERROR_BODY_TIMEOUT_S = 2.0
_PIECE_BYTES_MAX = 8 * 1024
"""How much of a body is decoded at once: at the most 10 ms of work. Chunks of servers that stream are smaller."""
_SECRET_LENGTH_MIN = 8
"""Values of the model URL's query are redacted as possible keys, except for values shorter than this."""
_USAGE_TIMEOUT_S = 2.0
"""How long a whole reply waits for usage and ``[DONE]``, counted from its last text."""
_TEXT_TIMEOUT_S = 30.0
"""How long a reply that says "stop" before any text waits for a text: Open WebUI says "stop" first."""
_REUSE_TIMEOUT_S = 0.05
"""How long leaving a whole reply waits for the end of the response. Without this end the connection is closed."""
_CLOSE_TIMEOUT_S = 1.0
_NO_HEADERS = httpx.Headers()
_PROVIDERS = {
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "api.cohere.com": "cohere",
    "api.deepseek.com": "deepseek",
    "api.groq.com": "groq",
    "api.mistral.ai": "mistral_ai",
    "api.perplexity.ai": "perplexity",
    "api.x.ai": "x_ai",
    "generativelanguage.googleapis.com": "gcp.gemini",
}
"""What OpenTelemetry's conventions call the providers, by host. Any other one is called as its upstream is."""

logger = structlog.get_logger("lastcall.models")


@asynccontextmanager
async def open_openai_compatible(
    url: str,
    *,
    api_key: str | None = None,
    name: str | None = None,
    connect_timeout_s: float = 5.0,
    ssl_context: ssl.SSLContext | None = None,
    clock: Clock = wall_clock,
    poller: ReadPoller | None = None,
    continuation: Form = "none",
    logs_words: bool = False,
    metrics: Metrics | None = None,
) -> AsyncIterator["OpenAICompatibleClient"]:
    """Open a client with one connection pool; leaving closes every connection, within a second.

    Args:
        url: The server's base URL, with or without ``/v1`` (a URL without a path gets it), or the
            whole address ending in ``/chat/completions``. A query is kept, userinfo becomes basic
            authentication.
        api_key: Sent as a bearer token; never shown, and removed from every text of the upstream.
        name: The name of the upstream, if there are several; by default the URL's host and port.
        connect_timeout_s: Bound on the connection's set-up and, again, on the TLS handshake. The caller bounds
            all other waits.
        ssl_context: Replaces the default trust in certificates (see the module).
        clock: The clock with which a ``Retry-After`` with a date is compared.
        poller: Waits for the replies of all turns, where they are relayed; None if each task waits by itself.
        continuation: How the server is asked to go on with a reply that was cut off.
        logs_words: Whether the log may quote what the server sent: it may be a part of a conversation.
        metrics: Counts the connections.

    Raises:
        SettingsError: The URL or the key cannot be used; the message shows neither password nor key.
    """
    client = OpenAICompatibleClient(
        url,
        api_key=api_key,
        name=name,
        connect_timeout_s=connect_timeout_s,
        ssl_context=ssl_context,
        clock=clock,
        poller=poller,
        continuation=continuation,
        logs_words=logs_words,
        metrics=metrics,
    )
    try:
        yield client
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_TIMEOUT_S):
            await client.aclose()


class OpenAICompatibleClient:
    """See :func:`open_openai_compatible`, which makes and closes it."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        name: str | None,
        connect_timeout_s: float,
        ssl_context: ssl.SSLContext | None,
        clock: Clock,
        poller: ReadPoller | None = None,
        continuation: Form = "none",
        logs_words: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        url_setting, key_setting = (
            (f"upstreams.{name}.url", f"upstreams.{name}.api_key") if name else ("model_url", "model_api_key")
        )
        self._url, auth = _endpoint(url, setting=url_setting)
        self._models_url = self._url.copy_with(path=self._url.path.removesuffix("/chat/completions") + "/models")
        if api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", api_key):
            raise SettingsError(f"{key_setting}: it has characters that cannot be in a key (or is empty).")
        if api_key is not None and auth is not None:
            raise SettingsError(f"{url_setting}: it has a user and password beside {key_setting}; use one of them.")
        self._name = name or self._url.netloc.decode("ascii")
        keys_in_query = [value for value in self._url.params.values() if len(value) >= _SECRET_LENGTH_MIN]
        self._secrets = [secret for secret in (api_key, auth and auth[1], *keys_in_query) if secret]
        self._clock = clock
        self._continuation = continuation
        self._logs_words = logs_words
        self._dialects = KnownDialects()
        self._headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
            "Connection": "keep-alive",
            "User-Agent": "lastcall",
            "Content-Type": "application/json",
        }
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        elif auth is not None:
            self._headers["Authorization"] = f"Basic {base64.b64encode(':'.join(auth).encode()).decode()}"
        if ssl_context is None and self._url.scheme == "https":
            ssl_context = _trust()
        self._transport = Transport(
            self._url,
            ssl_context=ssl_context,
            connect_timeout_s=connect_timeout_s,
            idle_max=_IDLE_MAX,
            idle_expiry_s=_IDLE_EXPIRY_S,
            poller=poller,
            when_connected=partial((metrics or Metrics()).add, families.UPSTREAM_OPENED, self._name),
        )

    @property
    def name(self) -> str:
        return self._name

    def count_connections(self) -> tuple[int, int]:
        """See :class:`~service.models.client.CountsConnections`."""
        return self._transport.count_connections()

    async def aclose(self) -> None:
        await self._transport.aclose()

    def describe(self, notes: Notes) -> Steps[None]:
        """Tell the live tree of the connections to this server."""
        yield from note_connections(self._transport, notes, upstream=self._name)

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncIterator["OpenAICompatibleStream | ContinuedStream"]:
        """See :class:`~service.models.client.ModelClient`."""
        dialect = known = self._dialects.of(request.model)
        headers = self._headers
        if request.notes is not None and request.notes.fields:
            host, port = self._url.host, self._url.port or (443 if self._url.scheme == "https" else 80)
            request.notes.note_server(host, port, provider=_PROVIDERS.get(host))
            headers = {**headers, **request.notes.fields}
        while True:
            body = await in_steps(request_encoded(request, dialect, self._continuation))
            response = await self._respond(body, headers)
            del body
            try:
                if response.is_readable:
                    if dialect != known:
                        self._dialects.note_understood(request.model, dialect)
                    warn = partial(self._warn, request.model)
                    sent = tuple(parameters_of(request))
                    decoder = ReplyDecoder(redact=self._redact, described=response.described, sent=sent, warn=warn)
                    response.drop_head()
                    stream = OpenAICompatibleStream(response.body, decoder)
                    so_far = request.prefix
                    del request  # a prompt may be large, and a reply long
                    yield ContinuedStream(stream, so_far) if so_far else stream
                    response.reusable = decoder.finished
                    return
                reply = ErrorReply.from_body(await response.read_error_body())
            finally:
                await response.aclose()  # noqa: ASYNC102  shielded inside
            refused, dialect = dialect, dialect.learn(request, response.status, reply)
            if dialect == refused:
                raise self._failure(response, reply, request)

    def can_continue(self, text: str, options: Options = NO_OPTIONS) -> bool:
        """See :class:`~service.models.client.ModelClient`. An echo of a short text could be a repetition."""
        return self._continuation != "none" and options.text_format is None and is_long_enough(text)

    async def list_models(self) -> Sequence[ListedModel]:
        """See :class:`~service.models.client.ListsModels`."""
        headers = {name: value for name, value in self._headers.items() if name != "Content-Type"}
        headers["Accept"] = "application/json"
        response = await self._send(httpx.Request("GET", self._models_url, headers=headers))
        try:
            if not response.is_readable:
                raise ModelError(
                    "upstream_rejected", f"The model server has no list of models (HTTP {response.status})."
                )
            body = await response.read_body(bytes_max=LIST_BYTES_MAX)
            response.reusable = True
        finally:
            await response.aclose()  # noqa: ASYNC102  shielded inside
        try:
            return read_models(body)
        except ValueError as error:
            raise ModelError("upstream_protocol", "The model server's list of models cannot be read.") from error

    async def _respond(self, body: bytes, headers: Mapping[str, str]) -> "_Response":
        """Send the request and wait for the response's head. The caller closes the response."""
        add_to_log_context(upstream_request_id=None)
        response = await self._send(httpx.Request("POST", self._url, headers=headers, content=body))
        add_to_log_context(upstream_request_id=response.request_id)
        return response

    async def _send(self, request: httpx.Request) -> "_Response":
        try:
            return _Response(await self._transport.handle_async_request(request))
        except httpx.HTTPError as error:
            raise _transport_error(error) from error

    def _failure(self, response: "_Response", reply: ErrorReply, request: ModelRequest) -> ModelError:
        """The error for a response whose body cannot be read as a reply."""
        sent = parameters_of(request)
        if not response.is_success:
            hints = RetryHints.from_headers(response.headers, now=self._clock())
            return error_from_status(response.status, reply, hints=hints, redact=self._redact, sent=sent)
        if reply.is_error_member:
            return error_from_reply(reply, redact=self._redact, sent=sent)
        return ModelError(
            "upstream_protocol",
            "The model server answered with a compressed body that was not requested: check the model URL. "
            "Of encodings only gzip and deflate can be read, and one at a time.",
        )

    def _warn(self, model: str, sentence: str, start: str) -> None:
        quoted = {"begins": start} if self._logs_words else {}
        logger.warning(sentence, upstream=self._name, model=model, **quoted)

    def _redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class _Body(Protocol):
    """The bytes of a reply."""

    async def receive(self) -> bytes:
        """Wait for the next bytes; empty at the end."""
        ...


class OpenAICompatibleStream:
    """One reply on its way; see :class:`~service.models.client.ModelStream`."""

    def __init__(self, body: _Body, decoder: ReplyDecoder) -> None:
        self._body = body
        self._decoder = decoder
        self._end_deadline = math.inf
        self._piece = b""  # the rest of a large chunk

    @property
    def usage(self) -> Usage | None:
        return self._decoder.usage

    async def receive(self) -> Sequence[ModelEvent]:
        decoder = self._decoder
        while True:
            if decoder.failure is not None:
                raise decoder.failure
            if self._piece:
                await trio.lowlevel.checkpoint()
                chunk = self._piece
            elif decoder.has_finish_reason:
                chunk = await self._receive_rest()
            else:
                try:
                    chunk = await self._body.receive()
                except (httpx.HTTPError, InflateError) as error:
                    raise _body_error(error) from error
            if not chunk:
                events = decoder.end()
            elif len(chunk) <= _PIECE_BYTES_MAX:
                self._piece = b""
                events = decoder.feed(chunk)
            else:
                self._piece = chunk[_PIECE_BYTES_MAX:]
                events = decoder.feed(chunk[:_PIECE_BYTES_MAX])
            if events:
                self._end_deadline = math.inf
                return events

    async def relay(self, take: TakeEvents) -> None:
        """See :class:`~service.models.client.ModelStream`."""
        decoder = self._decoder
        goes_on = True

        def take_piece(piece: bytes) -> bool:
            nonlocal goes_on
            if len(piece) > _PIECE_BYTES_MAX:
                self._piece = piece
                return False
            if events := decoder.feed(piece):
                self._end_deadline = math.inf
                goes_on = take(events)
            return goes_on and decoder.failure is None and not decoder.has_finish_reason

        while goes_on:
            is_simple = decoder.failure is None and not decoder.has_finish_reason and not self._piece
            if is_simple and isinstance(self._body, ResponseBody):
                await self._body.relay(take_piece)
            if goes_on:
                goes_on = take(await self.receive())

    async def _receive_rest(self) -> bytes:
        """The next bytes of a body whose reply may be whole: the rest is not worth a failure or a long wait."""
        wait_s = _USAGE_TIMEOUT_S if self._decoder.is_whole else _TEXT_TIMEOUT_S
        self._end_deadline = min(self._end_deadline, trio.current_time() + wait_s)
        try:
            with trio.CancelScope(deadline=self._end_deadline) as scope, extended_when_late(scope, timeout_s=wait_s):
                chunk = await self._body.receive()
                self._end_deadline = scope.deadline  # ``extended_when_late`` may have moved the deadline
                return chunk
        except (httpx.HTTPError, InflateError):
            pass
        return b""


class _Response:
    """A response whose head has arrived."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self._raw: ResponseBody = response.extensions[BODY]
        self.body = self._raw if self._encoding not in ENCODINGS else _Inflated(self._raw, Inflater(self._encoding))
        self.reusable = False
        """Whether the body is about to end by itself, so that the connection can serve another request."""

    def drop_head(self) -> None:
        """Hold the headers no longer. From now on only the body may be asked for."""
        self.headers = _NO_HEADERS

    @property
    def request_id(self) -> str | None:
        """The server's own id of the request, as in its log, if it sends one."""
        named = self.headers.get("x-request-id", "")
        return named if is_request_id(named) else None

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def is_readable(self) -> bool:
        """Whether the body may be a reply. Its beginning decides later, not its type, which many servers get wrong."""
        return self.is_success and self._encoding in ("", *ENCODINGS)

    @property
    def described(self) -> str | None:
        """The content type of the response, for a reader, if it is no event stream."""
        media_type = self.headers.get("content-type", "text/event-stream").lower()
        if "text/event-stream" in media_type:
            return None
        media_type = media_type.partition(";")[0].strip()
        return media_type if re.fullmatch(r"[a-z]+/[a-z0-9.+-]{1,40}", media_type) else "something else"

    @property
    def _encoding(self) -> str:
        """The compression of the body; empty if it is not compressed."""
        said = [name.strip() for name in self.headers.get("content-encoding", "").lower().split(",")]
        return ", ".join(name for name in said if name not in ("", "identity", "none", "utf-8"))

    async def read_body(self, *, bytes_max: int) -> bytes:
        """The whole body.

        Raises:
            ModelError: It broke off, cannot be decompressed or is larger than ``bytes_max``.
        """
        body = bytearray()
        try:
            while piece := await self.body.receive():
                body += piece
                if len(body) > bytes_max:
                    raise ModelError("upstream_protocol", f"The model server's answer has more than {bytes_max} bytes.")
        except (httpx.HTTPError, InflateError) as error:
            raise _body_error(error) from error
        return bytes(body)

    async def read_error_body(self) -> bytes:
        """The part of the body that arrives within bounds of size and time."""
        body = b""
        with move_on_after(_ERROR_BODY_TIMEOUT_S):
            try:
                while len(body) <= _ERROR_BODY_BYTES_MAX and (piece := await self._raw.receive()):
                    body += piece
            except httpx.HTTPError:
                pass  # the status says enough
        if self._encoding in ENCODINGS:
            return inflate(body, self._encoding, bytes_max=_ERROR_BODY_BYTES_MAX)
        return body

    async def aclose(self) -> None:
        """Give the connection back if the body ends in a moment; otherwise close the connection."""
        try:
            if self.reusable:
                with trio.CancelScope(deadline=trio.current_time() + _REUSE_TIMEOUT_S, shield=True):
                    while await self._raw.receive():
                        pass
        except httpx.HTTPError:
            pass  # the caller leaves the response, so the error does not matter
        finally:
            self._raw.close()


class _Inflated:
    """The chunks of a compressed body, decompressed."""

    def __init__(self, raw: ResponseBody, inflater: Inflater) -> None:
        self._raw = raw
        self._inflater = inflater

    async def receive(self) -> bytes:
        while True:
            if self._inflater.has_more:
                await trio.lowlevel.checkpoint()  # a small chunk may hold much text
                if piece := self._inflater.take():
                    return piece
            elif chunk := await self._raw.receive():
                self._inflater.feed(chunk)
            else:
                return b""


def _endpoint(url: str, *, setting: str) -> tuple[httpx.URL, tuple[str, str] | None]:
    """The address of chat completions for a configured URL, and the basic authentication in it."""
    try:
        base = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        base = httpx.URL("")
    port = 443 if base.port is None else base.port
    if base.scheme not in ("http", "https") or not _HOST.fullmatch(base.raw_host) or not 0 < port < 65536:
        raise SettingsError(f"{setting}: not a usable address; allowed are scripted: and http(s)://host[:port][/path].")
    auth = (base.username, base.password) if base.userinfo else None
    path = base.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    return base.copy_with(username=None, password=None, path=path, fragment=None), auth


def _trust() -> ssl.SSLContext:
    """The certificates that certifi, the system and ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` name."""
    context = httpx.create_ssl_context(trust_env=False)
    context.set_default_verify_paths()
    return context


def _transport_error(error: httpx.HTTPError) -> ModelError:
    """The error for a request that got no response."""
    causes = list(_causes(error))
    if _is_exhausted(causes):
        return ModelError(
            "resources_exhausted",
            f"This server cannot connect to the model server: it has {NOTHING_LEFT}.",
            retryable=True,
        )
    if isinstance(error, httpx.ConnectTimeout):
        return ModelError("connect_timeout", "The model server did not take the connection in time.", retryable=True)
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return ModelError(
                "upstream_dns",
                "The model server's name could not be resolved: check the model URL.",
                retryable=cause.errno == socket.EAI_AGAIN,
            )
    if isinstance(error, TlsError):
        reasons = [cause.verify_message for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)]
        if reasons:
            message, reason = "The model server's certificate is not trusted.", f"The reason: {reasons[0]}."
            return ModelError("upstream_tls", message, upstream_words=reason)
        return ModelError(
            "upstream_tls", "The TLS handshake with the model server failed: does it speak TLS at this address?"
        )
    if isinstance(error, httpx.ConnectError):
        return ModelError("upstream_unreachable", "The model server could not be reached.", retryable=True)
    if isinstance(error, httpx.RemoteProtocolError):
        return ModelError("upstream_protocol", "The model server did not answer with HTTP: check the model URL.")
    return ModelError("upstream_unreachable", "The model server closed the connection unanswered.", retryable=True)


def _body_error(error: httpx.HTTPError | InflateError) -> ModelError:
    """The error for a body that broke before its reply was whole."""
    if isinstance(error, InflateError):
        message = f"The model server answered with a compressed body that cannot be read: {error}."
        return ModelError("upstream_protocol", message)
    message = "The connection to the model server broke in the middle of the reply."
    return ModelError("upstream_truncated", message, retryable=True)


def _is_exhausted(causes: Iterable[BaseException]) -> bool:
    """Whether this process may open no more files. The resolver hides this, so after its errors a file is opened."""
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            try:
                os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as refusal:
                return is_exhaustion(refusal.errno)
        elif isinstance(cause, OSError) and is_exhaustion(cause.errno):
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that led to it, httpcore's hidden contexts and exception groups included."""
    pending = [error]
    while pending:
        error = pending.pop(0)
        if error is None:
            continue
        yield error
        pending.append(error.__cause__ or error.__context__)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
