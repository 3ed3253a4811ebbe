"""The client of a chat completions server: OpenAI, DeepSeek, vLLM, Ollama, llama.cpp, LiteLLM and others.

The only module that knows httpx. Decisions, and why:

- **The bound on the output is called** ``max_tokens``: every server knows that name. OpenAI's newer
  models refuse it, saying ``max_completion_tokens`` instead; that other name is then used from there on.
- **Proxies in the environment are not used** (``trust_env=False``): the settings alone say where prompts
  go. Certificates are trusted as the machine does (``SSL_CERT_FILE`` included) and as certifi does.
- **Redirects are not followed**: they would carry a prompt and a key to an address nobody configured.
- **Connections have no bound**, so no turn ever queues for one with its deadlines running: ``live_turns_max``
  is the bound on streams.
"""

import math
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx  # noqa: ASYNC127  the project's choice; only this module knows it

from service.clock import Clock, wall_clock
from service.errors import ModelError, SettingsError
from service.models.chat_completions import ReplyDecoder, encode_request
from service.models.client import ModelEvent, ModelRequest
from service.models.upstream_errors import ErrorReply, error_from_reply, error_from_status, parse_retry_after

_HOST = re.compile(rb"[0-9a-fA-F:.]+(%[\w.-]+)?|([\w-]{1,63}\.)*[\w-]{1,63}\.?")
_POOL_REQUESTS_MAX = 32
_IDLE_EXPIRY_S = 4.0  # uvicorn, under many model servers, closes after 5
_ERROR_BODY_BYTES_MAX = 64 * 1024
_ERROR_BODY_TIMEOUT_S = 2.0
_USAGE_TIMEOUT_S = 2.0
"""How long a reply that is whole waits for usage and ``[DONE]``."""
_REUSE_TIMEOUT_S = 0.05
"""How long leaving a whole reply waits for the end of the response, without which it costs the connection."""
_CLOSE_TIMEOUT_S = 1.0


@asynccontextmanager
async def open_openai_compatible(
    url: str,
    *,
    api_key: str | None = None,
    name: str | None = None,
    connect_timeout_s: float = 5.0,
    ssl_context: ssl.SSLContext | None = None,
    clock: Clock = wall_clock,
) -> AsyncIterator["OpenAICompatibleClient"]:
    """Open a client with one connection pool; leaving closes every connection, within a second.

    Args:
        url: The server's base URL, with or without ``/v1`` (a URL without a path gets it), or the
            whole address ending in ``/chat/completions``. A query is kept, userinfo becomes basic
            authentication.
        api_key: Sent as a bearer token; never shown, and taken out of whatever the upstream says.
        name: Which of several upstreams it is; the URL's host and port stand for it by default.
        connect_timeout_s: Bound on the connection's set-up and, again, on the TLS handshake. All
            other waiting is the caller's to bound.
        ssl_context: Replaces the trust described above.
        clock: What a ``Retry-After`` with a date is compared with.

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
    )
    try:
        yield client
    finally:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + _CLOSE_TIMEOUT_S):
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
    ) -> None:
        url_setting, key_setting = (
            (f"upstreams.{name}.url", f"upstreams.{name}.api_key") if name else ("model_url", "model_api_key")
        )
        self._url, auth = _endpoint(url, setting=url_setting)
        if api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", api_key):
            raise SettingsError(f"{key_setting}: it has characters that cannot be in a key (or is empty).")
        if api_key is not None and auth is not None:
            raise SettingsError(f"{url_setting}: it has a user and password beside {key_setting}; use one of them.")
        self._name = name or self._url.netloc.decode("ascii")
        self._secrets = [secret for secret in (api_key, auth and auth[1]) if secret]
        self._clock = clock
        self._limit_field = "max_tokens"
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        headers["User-Agent"] = "lastcall"
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        if ssl_context is None and self._url.scheme == "https":
            ssl_context = _trust()
        self._pools = _Pools(
            headers=headers,
            auth=auth,
            verify=ssl_context if ssl_context is not None else False,  # an http: URL needs no trust
            timeout=httpx.Timeout(None, connect=connect_timeout_s),
        )

    @property
    def name(self) -> str:
        return self._name

    async def aclose(self) -> None:
        await self._pools.aclose()

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncIterator["OpenAICompatibleStream"]:
        """See :class:`~service.models.client.ModelClient`."""
        limit_field = self._limit_field
        async with self._respond(encode_request(request, limit_field=limit_field)) as response:
            if not response.is_event_stream:
                limited_by = None if request.max_output_tokens is None else limit_field
                raise await self._failure(response, limited_by=limited_by)
            decoder = ReplyDecoder(redact=self._redact)
            yield OpenAICompatibleStream(response, decoder)
            response.reusable = decoder.finished

    @asynccontextmanager
    async def _respond(self, body: bytes) -> AsyncIterator["_Response"]:
        """Send the request, wait for the response's head, and leave nothing of either behind."""
        connection = _NewConnection()
        opened: _Response | None = None
        pool = self._pools.enter()
        try:
            opened = await self._send(pool.http, body, connection)
            yield opened
        finally:
            surplus = self._pools.leave(pool)
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + _CLOSE_TIMEOUT_S):
                await (connection if opened is None else opened).aclose()
                if surplus is not None:
                    await surplus.http.aclose()

    async def _send(self, http: httpx.AsyncClient, body: bytes, connection: "_NewConnection") -> "_Response":
        request = http.build_request("POST", self._url, content=body, extensions={"trace": connection.trace})
        request.stream = _Body(body)
        try:
            return _Response(await http.send(request, stream=True))
        except httpx.HTTPError as error:
            raise _transport_error(error, during=connection.phase) from error

    async def _failure(self, response: "_Response", *, limited_by: str | None) -> ModelError:
        """What went wrong, from a response that is not an event stream.

        Args:
            limited_by: The name under which the request had a bound on the output.
        """
        body = await response.read_error_body()
        reply = ErrorReply.from_body(body)
        if response.status != 200:
            if limited_by == "max_tokens" and response.status == 400 and "max_completion_tokens" in reply.words:
                self._limit_field = "max_completion_tokens"
                return ModelError("upstream_rejected", "The model server wants max_completion_tokens.", retryable=True)
            retry_after_s = parse_retry_after(response.headers.get("retry-after"), now=self._clock())
            return error_from_status(response.status, reply, retry_after_s=retry_after_s, redact=self._redact)
        if reply.is_error_member:
            return error_from_reply(reply, redact=self._redact)
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        described = media_type if re.fullmatch(r"[a-z]+/[a-z0-9.+-]{1,40}", media_type) else "something else"
        if response.headers.get("content-encoding"):
            described = "a compressed body"
        return ModelError(
            "upstream_protocol",
            f"The model server answered with {described} instead of an event stream: check the model URL.",
        )

    def _redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class OpenAICompatibleStream:
    """One reply on its way; see :class:`~service.models.client.ModelStream`."""

    def __init__(self, response: "_Response", decoder: ReplyDecoder) -> None:
        self._chunks = response.chunks
        self._decoder = decoder
        self._end_deadline = math.inf

    async def receive(self) -> Sequence[ModelEvent]:
        decoder = self._decoder
        while True:
            if decoder.failure is not None:
                raise decoder.failure
            chunk = await self._next_chunk()
            events = decoder.feed(chunk) if chunk is not None else [decoder.end()]
            if events:
                return events

    async def _next_chunk(self) -> bytes | None:
        """The next bytes of the body, None where nothing that matters will come."""
        try:
            if not self._decoder.has_finish_reason:
                return await anext(self._chunks, None)
            # The reply is whole: what is still to come is not worth failing, or waiting, for.
            self._end_deadline = min(self._end_deadline, anyio.current_time() + _USAGE_TIMEOUT_S)
            with anyio.CancelScope(deadline=self._end_deadline):
                return await anext(self._chunks, None)
            return None
        except httpx.HTTPError as error:
            if self._decoder.has_finish_reason:
                return None
            message = "The connection to the model server broke in the middle of the reply."
            raise ModelError("upstream_truncated", message, retryable=True) from error


class _Response:
    """A response whose head has arrived, and the one iterator over its body."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.chunks = response.aiter_raw()
        self.reusable = False
        """Whether the body is about to end by itself, which keeps the connection for another request."""

    @property
    def is_event_stream(self) -> bool:
        """Whether it can be read as one. A missing content type is not held against it."""
        media_type = self.headers.get("content-type", "text/event-stream").partition(";")[0]
        return (
            self.status == 200
            and media_type.strip().lower() == "text/event-stream"
            and self.headers.get("content-encoding", "identity").strip().lower() == "identity"
        )

    async def read_error_body(self) -> bytes:
        """What can be had of the body within its bounds in size and time."""
        body = b""
        with anyio.move_on_after(_ERROR_BODY_TIMEOUT_S):
            try:
                async for chunk in self.chunks:
                    body += chunk
                    if len(body) > _ERROR_BODY_BYTES_MAX:
                        break
            except httpx.HTTPError:
                pass  # the status says enough
        return body

    async def aclose(self) -> None:
        """Give the connection back where the body has ended, close it otherwise. To be shielded by the caller.

        Only an exception from the innermost of httpx's nested generators ends them all and closes the
        connection; closing the outermost leaves the others to the garbage collector. So the rest of
        the body is read, in a scope that cancels the first wait.
        """
        with anyio.CancelScope(deadline=anyio.current_time() + _REUSE_TIMEOUT_S) as scope:
            if not self.reusable:
                scope.cancel()
            try:
                async for _ in self.chunks:
                    pass
            except httpx.HTTPError:
                pass  # it is being left


class _Pools:
    """Pools of connections, each with a bounded number of requests at work.

    httpcore 1.0 looks at all connections of a pool whenever one of its requests begins or ends: in a single pool the
    ends of a thousand turns would cost a million looks. ``test_pools.py`` tells when it no longer does.

    Args:
        options: Of each pool's httpx client.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._pools: list[_Pool] = []

    def enter(self) -> "_Pool":
        """A pool with room for a request; it is to be left."""
        pool = next((pool for pool in self._pools if pool.requests < _POOL_REQUESTS_MAX), None)
        if pool is None:
            limits = httpx.Limits(
                max_connections=None, max_keepalive_connections=_POOL_REQUESTS_MAX, keepalive_expiry=_IDLE_EXPIRY_S
            )
            http = httpx.AsyncClient(limits=limits, follow_redirects=False, trust_env=False, **self._options)
            pool = _Pool(http)
            self._pools.append(pool)
        pool.requests += 1
        return pool

    def leave(self, pool: "_Pool") -> "_Pool | None":
        """A request is over. A pool without any is kept for the next; returns one too many, to be closed."""
        pool.requests -= 1
        unused = [pool for pool in self._pools if not pool.requests]
        if len(unused) < 2:
            return None
        self._pools.remove(unused[-1])
        return unused[-1]

    async def aclose(self) -> None:
        while self._pools:
            await self._pools.pop().http.aclose()


class _Pool:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.requests = 0


class _Body(httpx.AsyncByteStream):
    """A request's body in one piece. httpx's own is an async generator, which a cancelled send leaves open."""

    def __init__(self, body: bytes) -> None:
        self._pieces = iter((body,))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return next(self._pieces)
        except StopIteration:
            raise StopAsyncIteration from None


class _NewConnection:
    """Watches a connection being made: how far it is, and the socket until it has another owner.

    httpcore 1.0 forgets a TCP connection whose TLS handshake is cancelled; ``test_upstream_closing.py``
    has the test that tells when it no longer does.
    """

    def __init__(self) -> None:
        self.phase = ""
        self._stream: Any = None

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        """httpcore's trace extension: called at the start and the end of each phase."""
        step, _, moment = event.rpartition(".")
        if moment == "started":
            self.phase = step
        elif event == "connection.connect_tcp.complete":
            self._stream = info["return_value"]

    async def aclose(self) -> None:
        """Close the socket, if there is one. Idempotent."""
        if self._stream is not None:
            await self._stream.aclose()


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


def _transport_error(error: httpx.HTTPError, *, during: str) -> ModelError:
    """The error for a request that got no response."""
    if isinstance(error, httpx.ConnectTimeout):
        return ModelError("connect_timeout", "The model server did not take the connection in time.", retryable=True)
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return ModelError(
                "upstream_dns",
                "The model server's name could not be resolved: check the model URL.",
                retryable=cause.errno == socket.EAI_AGAIN,
            )
    if during == "connection.start_tls":
        reasons = [cause.verify_message for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)]
        if reasons:
            return ModelError("upstream_tls", f"The model server's certificate is not trusted: {reasons[0]}.")
        return ModelError(
            "upstream_tls", "The TLS handshake with the model server failed: does it speak TLS at this address?"
        )
    if isinstance(error, httpx.ConnectError):
        return ModelError("upstream_unreachable", "The model server could not be reached.", retryable=True)
    if isinstance(error, httpx.RemoteProtocolError) and "disconnected" not in str(error):
        return ModelError("upstream_protocol", "The model server did not answer with HTTP: check the model URL.")
    return ModelError("upstream_unreachable", "The model server closed the connection unanswered.", retryable=True)


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
