"""The real client and servers that misbehave: each fault is one typed error that a user understands."""

import gzip
import json
import ssl
import zlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest
import structlog
import trio
import trustme

from service.models import chat_completions, openai_compatible
from service.models.client import TextDelta
from service.models.openai_compatible import open_openai_compatible
from service.telemetry.log_context import current_ids, log_context
from tests.descriptors import no_descriptor_left
from tests.models.replies import Reply, ask, asking, take
from tests.models.upstream import API_KEY, WAIT_S, failure_of, open_upstream
from tests.upstreams.independent import script_llmock
from tests.upstreams.raw_server import (
    DONE,
    Behaviour,
    Connection,
    delta,
    finish,
    open_raw_server,
    refusing,
    replying,
    unanswering_port,
    unused_port,
)

# No connection


async def test_a_refused_connection_is_unreachable() -> None:
    async with open_openai_compatible(f"http://127.0.0.1:{unused_port()}") as client:
        error = await failure_of(client)
    assert (error.code, error.retryable) == ("upstream_unreachable", True)


async def test_a_connection_that_is_not_taken_is_a_connect_timeout() -> None:
    with unanswering_port() as port:
        async with open_openai_compatible(f"http://127.0.0.1:{port}", connect_timeout_s=0.05) as client:
            error = await failure_of(client)
    assert (error.code, error.retryable) == ("connect_timeout", True)


async def test_a_name_that_does_not_exist_is_a_dns_error() -> None:
    async with open_openai_compatible("http://lastcall.invalid", api_key=API_KEY) as client:
        error = await failure_of(client)
    assert error.code == "upstream_dns"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "lastcall.invalid"])
async def test_a_process_that_may_open_nothing_more_does_not_blame_the_upstream(host: str) -> None:
    """A resolver that cannot open its files reports an unknown name."""
    async with open_openai_compatible(f"http://{host}:{unused_port()}") as client:
        await failure_of(client)  # the first call starts the resolver's thread
        with no_descriptor_left():
            error = await failure_of(client)
        assert (error.code, error.retryable) == ("resources_exhausted", True)
        assert "no file descriptor left" in str(error)
        assert (await failure_of(client)).code in ("upstream_unreachable", "upstream_dns"), "descriptors are free again"


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_a_trusted_certificate_is_no_fault(authority: trustme.CA) -> None:
    with trio.fail_after(WAIT_S):
        behave = replying(delta("safe"), finish(), DONE)
        async with (
            open_raw_server(behave, ssl_context=server_context(authority)) as server,
            open_openai_compatible(server.url, ssl_context=client_context(authority)) as client,
        ):
            for _ in range(2):
                assert (await ask(client)).text == "safe"
            assert server.connections_made == 1


async def test_a_certificate_is_trusted_where_the_operator_names_its_authority(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(WAIT_S), authority.cert_pem.tempfile() as path:
        monkeypatch.setenv("SSL_CERT_FILE", path)
        behave = replying(delta("safe"), finish(), DONE)
        async with (
            open_raw_server(behave, ssl_context=server_context(authority)) as server,
            open_openai_compatible(server.url) as client,
        ):
            assert (await ask(client)).text == "safe"


async def test_an_untrusted_certificate_is_a_tls_error(authority: trustme.CA) -> None:
    error = await tls_failure(server_context(authority), ssl.create_default_context())
    assert error == ("upstream_tls", False, True)


async def test_a_certificate_for_another_name_is_a_tls_error(authority: trustme.CA) -> None:
    error = await tls_failure(server_context(authority, "example.org"), client_context(authority))
    assert error == ("upstream_tls", False, True)


async def tls_failure(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str, bool, bool]:
    """The error's code, whether it is retryable, and whether its message is about trust."""
    with trio.fail_after(WAIT_S):
        async with (
            open_raw_server(replying(), ssl_context=server) as upstream,
            open_openai_compatible(upstream.url, ssl_context=client) as model,
        ):
            error = await failure_of(model)
            await upstream.wait_idle()
            assert upstream.established == 0
            is_about_trust = "certificate is not trusted" in error.message
            assert is_about_trust == error.upstream_words.startswith("The reason: ")
    return error.code, error.retryable, is_about_trust


async def answer_in_plain_text(connection: Connection) -> None:
    await connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await connection.wait_closed()


async def close_at_once(connection: Connection) -> None:
    pass


@pytest.mark.parametrize("behave", [answer_in_plain_text, close_at_once])
async def test_tls_to_a_port_without_tls_is_a_tls_error(behave: Behaviour) -> None:
    with trio.fail_after(WAIT_S):
        async with open_raw_server(behave) as server:
            async with open_openai_compatible(server.url.replace("http:", "https:")) as client:
                error = await failure_of(client)
            await server.wait_idle()
    assert (error.code, error.retryable) == ("upstream_tls", False)


async def test_a_tls_handshake_that_hangs_is_a_connect_timeout() -> None:
    async def hang(connection: Connection) -> None:
        await connection.wait_closed()

    with trio.fail_after(WAIT_S):
        async with open_raw_server(hang) as server:
            url = server.url.replace("http:", "https:")
            async with open_openai_compatible(url, connect_timeout_s=0.05) as client:
                error = await failure_of(client)
            assert server.established == 0
            await server.wait_idle()
    assert (error.code, error.retryable) == ("connect_timeout", True)


async def test_plain_text_to_a_port_with_tls_is_a_protocol_error_or_unreachable(authority: trustme.CA) -> None:
    with trio.fail_after(WAIT_S):
        async with open_raw_server(replying(), ssl_context=server_context(authority)) as server:
            async with open_openai_compatible(server.url.replace("https:", "http:")) as client:
                error = await failure_of(client)
            await server.wait_idle()
    assert error.code in ("upstream_protocol", "upstream_unreachable")


# No response


async def close_unanswered(connection: Connection) -> None:
    await connection.receive_request()


async def close_in_the_head(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-ty")


@pytest.mark.parametrize("behave", [close_at_once, close_unanswered, close_in_the_head])
async def test_a_connection_closed_before_a_response_is_unreachable(behave: Behaviour) -> None:
    async with open_upstream(behave) as upstream:
        error = await failure_of(upstream.client)
    assert (error.code, error.retryable) == ("upstream_unreachable", True)


async def answer_like_redis(connection: Connection) -> None:
    await connection.send(b"-ERR unknown command 'POST'\r\n\r\n")
    await connection.wait_closed()


async def send_an_endless_head(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await connection.send(b"x-more: " + b"x" * 4096 + b"\r\n")


@pytest.mark.parametrize("behave", [answer_like_redis, send_an_endless_head])
async def test_an_answer_that_is_not_http_is_a_protocol_error(behave: Behaviour) -> None:
    async with open_upstream(behave) as upstream:
        error = await failure_of(upstream.client)
    assert (error.code, error.retryable) == ("upstream_protocol", False)


# A response that is no reply


@pytest.mark.parametrize(
    ("status", "headers", "body", "words"),
    [
        (200, {"content-type": "text/html"}, b"<html>Sign in</html>", "text/html"),
        (200, {"content-type": "application/json"}, {"choices": []}, "application/json"),
        (200, {"content-type": "application/json"}, {"message": {"role": "assistant", "content": "hi"}}, "json"),
        (200, {"content-type": "no media type at all"}, b"", "something else"),
        (200, {"content-type": "text/event-stream", "content-encoding": "br"}, b"data", "compressed"),
        (200, {"content-type": "text/event-stream", "content-encoding": "gzip, gzip"}, b"data", "one at a time"),
    ],
)
async def test_a_response_that_is_no_event_stream_is_a_protocol_error(
    status: int, headers: dict[str, str], body: object, words: str
) -> None:
    async with open_upstream(refusing(status, body, headers)) as upstream:
        error = await failure_of(upstream.client)
    assert (error.code, error.retryable) == ("upstream_protocol", False)
    assert words in str(error)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/json"},
        {"content-type": "application/json, text/event-stream; charset=utf-8"},
        {"content-type": "Text/Event-Stream", "content-encoding": "none"},
        {"content-type": "", "content-encoding": ""},
    ],
)
@pytest.mark.parametrize("status", [200, 201])
async def test_an_event_stream_is_read_under_any_head(status: int, headers: dict[str, str]) -> None:
    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head(status, headers)
        for payload in (delta("hi"), finish(), DONE):
            await connection.send_event(payload)
        await connection.end_body()

    async with open_upstream(reply) as upstream:
        assert (await ask(upstream.client)).text == "hi"


async def test_a_whole_completion_in_place_of_a_stream_is_the_reply() -> None:
    body = {"choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}
    async with open_upstream(refusing(200, body)) as upstream:
        assert (await ask(upstream.client)).text == "hi"
        assert (await ask(upstream.client)).text == "hi"
        assert upstream.server.connections_made == 1, "the reply is whole, and its connection is kept"


@pytest.mark.parametrize(("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_compressed_error_is_read_within_its_bound(encoding: str, encode: Callable[[bytes], bytes]) -> None:
    headers = {"content-encoding": encoding}
    async with open_upstream(refusing(400, encode(b'{"message": "too hot"}'), headers)) as upstream:
        assert "too hot" in str(await failure_of(upstream.client))
    for body in (encode(b" " * 100_000_000), b"not that", encode(b'{"message": "x"}')[:-9]):
        async with open_upstream(refusing(400, body, headers)) as upstream:
            assert (await failure_of(upstream.client)).code == "upstream_rejected"


def flushed(compressor: "zlib._Compress", payload: object) -> bytes:
    """An event as sent by a gateway that compresses the stream and flushes after each event."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return compressor.compress(b"data: %b\n\n" % data) + compressor.flush(zlib.Z_SYNC_FLUSH)


@pytest.mark.parametrize(
    ("encoding", "wbits"), [("gzip", 31), ("X-Gzip", 31), ("deflate", 15), ("deflate, identity", -15)]
)
async def test_a_compressed_stream_is_read_as_it_comes(encoding: str, wbits: int) -> None:
    taken = trio.Event()

    async def reply(connection: Connection) -> None:
        for _ in range(2):
            await connection.receive_request()
            await connection.send_head(headers={"content-encoding": encoding})
            compressor = zlib.compressobj(wbits=wbits)
            await connection.send_body(flushed(compressor, delta("so ")))
            await taken.wait()  # the client has the first text before the rest is sent
            for payload in (delta("far"), finish(), DONE):
                await connection.send_body(flushed(compressor, payload))
            await connection.send_body(compressor.flush())
            await connection.end_body()

    async with open_upstream(reply) as upstream:
        async with upstream.client.stream(asking()) as stream:
            assert await stream.receive() == [TextDelta("so ")]
            taken.set()
            assert (await take(stream)).text == "far"
        assert (await ask(upstream.client)).text == "so far"
        assert upstream.server.connections_made == 1, "the body is read to its end, and its connection is kept"


async def test_a_compressed_completion_and_one_that_is_only_called_so_are_replies() -> None:
    body = json.dumps({"choices": [{"message": {"content": "hi"}}]}).encode()
    for sent in (gzip.compress(body), body):
        async with open_upstream(refusing(200, sent, {"content-encoding": "gzip"})) as upstream:
            assert (await ask(upstream.client)).text == "hi"


@pytest.mark.parametrize(
    ("make_body", "code", "words"),
    [
        (lambda: gzip.compress(b"data: " + bytes(70_000_000)), "upstream_protocol", "too large"),
        (lambda: gzip.compress(b'data: {"error": "it burns"}\n\n'), "upstream_error", "it burns"),
        (lambda: gzip.compress(b"data: x\n\n")[:-9], "upstream_protocol", "not a chat completion"),
        (lambda: b"\x1f\x8bnot gzip", "upstream_protocol", "damaged"),
        (lambda: b"", "upstream_truncated", "before it was whole"),
    ],
)
async def test_a_compressed_body_that_is_no_reply_is_an_error(
    make_body: Callable[[], bytes], code: str, words: str
) -> None:
    headers = {"content-encoding": "gzip", "content-type": "text/event-stream"}
    async with open_upstream(refusing(200, make_body(), headers)) as upstream:
        error = await failure_of(upstream.client)
    assert error.code == code
    assert words in str(error)


@pytest.mark.parametrize("body", ["base_resp", "Response"])
async def test_other_clouds_reasons_with_status_200_are_reported(body: str) -> None:
    said = {
        "base_resp": {"base_resp": {"status_code": 1004, "status_msg": "login fail"}, "choices": None},
        "Response": {"Response": {"Error": {"Code": "AuthFailure", "Message": "login fail"}}},
    }[body]
    async with open_upstream(refusing(200, said)) as upstream:
        error = await failure_of(upstream.client)
    assert error.code == "upstream_auth"
    assert "login fail" in str(error)


async def test_headers_about_asking_again_are_read() -> None:
    headers = {"retry-after": "9", "retry-after-ms": "250", "x-should-retry": "true"}
    async with open_upstream(refusing(409, b"", headers)) as upstream:
        error = await failure_of(upstream.client)
    assert (error.retryable, error.retry_after_s) == (True, 0.25)


async def test_skipped_data_is_in_the_log_once() -> None:
    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        for payload in (b": keepalive", delta("hi"), b": keepalive", f"{API_KEY}".encode(), finish(), DONE):
            await connection.send_event(payload)
        await connection.end_body()

    with structlog.testing.capture_logs() as logs:
        async with open_upstream(reply) as upstream:
            assert (await ask(upstream.client)).text == "hi"
            name = upstream.client.name
    assert logs == [
        {
            "event": "The model server sent data that is no chunk of a reply; the data is skipped.",
            "log_level": "warning",
            "upstream": name,
            "model": "test",
        }
    ]


async def test_an_error_object_with_status_200_is_that_error() -> None:
    body = {"error": {"message": "Overloaded", "type": "server_error", "code": 503}}
    async with open_upstream(refusing(200, body)) as upstream:
        error = await failure_of(upstream.client)
    assert (error.code, error.retryable) == ("upstream_error", True)
    assert "Overloaded" in str(error)


async def test_a_redirect_is_not_followed() -> None:
    async with open_upstream(replying(finish(), DONE)) as elsewhere:
        location = f"{elsewhere.server.url}/v1/chat/completions?secret"
        async with open_upstream(refusing(307, b"", {"location": location})) as upstream:
            error = await failure_of(upstream.client)
        assert elsewhere.server.connections_made == 0
    assert (error.code, error.retryable) == ("upstream_rejected", False)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    ("status", "body", "code", "retryable"),
    [
        (400, {"error": {"message": "bad"}}, "upstream_rejected", False),
        (400, {"error": {"message": "too long", "code": "context_length_exceeded"}}, "context_too_long", False),
        (401, {"error": {"message": "no key"}}, "upstream_auth", False),
        (403, b"", "upstream_auth", False),
        (404, {"error": {"message": "The model `x` does not exist", "code": "model_not_found"}}, "model_not_found", 0),
        (404, {"detail": "Not Found"}, "upstream_rejected", False),
        (408, b"", "upstream_error", True),
        (429, b"", "rate_limited", True),
        (500, b"<html>", "upstream_error", True),
        (503, {"error": "loading model"}, "upstream_error", True),
    ],
)
async def test_a_status_is_an_error_of_its_own(status: int, body: object, code: str, retryable: bool) -> None:
    async with open_upstream(refusing(status, body)) as upstream:
        error = await failure_of(upstream.client)
    assert (error.code, error.retryable) == (code, retryable)
    assert str(status) in str(error)


NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [("7", 7.0), ("Sun, 01 Mar 2026 12:01:30 GMT", 90.0), ("Sun, 01 Mar 2026 11:00:00 GMT", 0.0), ("soon", None)],
)
async def test_retry_after_is_read_as_seconds_and_as_a_date(retry_after: str, seconds: float | None) -> None:
    async with open_upstream(refusing(429, b"", {"retry-after": retry_after}), clock=lambda: NOW) as upstream:
        error = await failure_of(upstream.client)
    assert error.retry_after_s == seconds


async def hang_in_the_body(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_head(500)
    await connection.send_body(b'{"error": ')
    await connection.wait_closed()


async def break_in_the_body(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_head(500)
    await connection.send_body(b'{"error": ')


async def never_end_the_body(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_head(500)
    while True:
        await connection.send_body(b"x" * 4096)


@pytest.mark.parametrize(
    ("behave", "timeout_s"), [(hang_in_the_body, 0.05), (break_in_the_body, WAIT_S), (never_end_the_body, WAIT_S)]
)
async def test_an_error_does_not_wait_for_its_body(
    behave: Behaviour, timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_compatible, "_ERROR_BODY_TIMEOUT_S", timeout_s)
    async with open_upstream(behave) as upstream:
        error = await failure_of(upstream.client)
        assert upstream.server.established == 0
    assert error.code == "upstream_error"


@pytest.mark.parametrize("status", [302, 308])
@pytest.mark.parametrize(
    "location", ["https://other.test/v1", "http://xn--/", "http://[", "//:x", "http://h:99999/", "\x80", "", "x" * 9999]
)
async def test_a_redirect_is_a_refusal_wherever_it_leads(status: int, location: str) -> None:
    async def redirect(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_response(status, b"", {"location": location})
        await connection.wait_closed()

    async with open_upstream(redirect) as upstream:
        error = await failure_of(upstream.client)
        assert upstream.server.connections_made == 1
    assert error.code == "upstream_rejected"


# A reply that breaks off


async def end_the_body(connection: Connection) -> None:
    await connection.end_body()


async def close_in_a_chunk(connection: Connection) -> None:
    await connection.send(b'40\r\ndata: {"choices"')


async def close_between_chunks(connection: Connection) -> None:
    pass


async def send_an_error(connection: Connection) -> None:
    await connection.send_event({"error": {"message": "CUDA out of memory", "code": 500}})
    await connection.wait_closed()


async def send_an_error_of_few_words(connection: Connection) -> None:
    await connection.send_event({"error": "boom"})
    await connection.wait_closed()


async def run_into_a_rate_limit(connection: Connection) -> None:
    await connection.send_event({"error": {"message": "Rate limit reached", "type": "tokens", "code": None}})
    await connection.wait_closed()


async def send_an_endless_line(connection: Connection) -> None:
    await connection.send_body(b"data: ")
    while True:
        await connection.send_body(b"x" * 65536)


async def give_up(connection: Connection) -> None:
    await connection.send_event(finish("insufficient_system_resource"))
    await connection.wait_closed()


BREAKS: Sequence[tuple[Behaviour, str]] = [
    (end_the_body, "upstream_truncated"),
    (close_in_a_chunk, "upstream_truncated"),
    (close_between_chunks, "upstream_truncated"),
    (send_an_error, "upstream_error"),
    (send_an_error_of_few_words, "upstream_error"),
    (give_up, "upstream_error"),
    (run_into_a_rate_limit, "rate_limited"),
    (send_an_endless_line, "upstream_protocol"),
]


@pytest.mark.parametrize(("breaking", "code"), BREAKS)
async def test_the_text_before_a_break_is_kept(breaking: Behaviour, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_completions, "SKIPPED_BYTES_MAX", 4_000_000)

    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        await connection.send_event(delta("so "))
        await connection.send_event(delta("far"))
        await breaking(connection)

    came = Reply()
    async with open_upstream(reply) as upstream:
        error = await failure_of(upstream.client, came)
        if breaking is not end_the_body:  # a connection with a regular end may be kept
            assert upstream.server.established == 0
    assert error.code == code
    assert came.text == "so far"


async def test_the_text_before_an_error_in_the_same_chunk_is_kept() -> None:
    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        await connection.send_body(
            b'data: {"choices": [{"delta": {"content": "kept"}}]}\n\ndata: {"error": "boom"}\n\n'
        )
        await connection.wait_closed()

    came = Reply()
    async with open_upstream(reply) as upstream:
        await failure_of(upstream.client, came)
    assert came.events == [TextDelta("kept")]


async def test_a_reset_after_the_finish_reason_fails_no_reply() -> None:
    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        await connection.send_event(delta("whole"))
        await connection.send_event(finish())
        await taken.wait()
        connection.reset_when_closed()

    taken = trio.Event()
    came = Reply()
    async with open_upstream(reply) as upstream:
        async with upstream.client.stream(asking()) as stream:
            came.batches.append(await stream.receive())
            taken.set()
            await take(stream, came)
        assert upstream.server.established == 0
    assert (came.text, came.finished.finish_reason) == ("whole", "stop")


# Secrets


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
async def test_no_secret_is_shown_even_if_the_upstream_repeats_it(status: int) -> None:
    """The upstream echoes the key, in full and at the place where the message is cut."""
    message = f"\x1b[31mkey {API_KEY}\r\nis secret-in-query {'x' * 240} {API_KEY} " + "long " * 5000
    async with open_upstream(
        refusing(status, {"error": {"message": message}}), path="?token=secret-in-query"
    ) as upstream:
        error = await failure_of(upstream.client)
    assert "key *** is *** xxx" in str(error)
    assert not any(API_KEY[:length] in str(error) for length in range(4, len(API_KEY)))
    assert "secret" not in str(error)


async def test_the_password_in_the_url_is_not_shown() -> None:
    with trio.fail_after(WAIT_S):
        async with open_raw_server(refusing(500, {"error": "do you mean p4ssw0rd?"})) as server:
            url = server.url.replace("http://", "http://user:p4ssw0rd@")
            async with open_openai_compatible(url) as client:
                error = await failure_of(client)
    assert "do you mean ***?" in str(error)


# Faults of independent servers


@pytest.mark.processes
@pytest.mark.parametrize(
    ("behavior", "code"),
    [
        ({"type": "fail", "status": 401}, "upstream_auth"),
        ({"type": "fail", "status": 429, "retry_after": 3}, "rate_limited"),
        ({"type": "fail", "status": 503, "retry_after": 2}, "upstream_error"),
        ({"type": "fail", "status": 400, "code": "context_length_exceeded"}, "context_too_long"),
        ({"type": "stream_fault", "kind": "disconnect", "after_chunks": 3}, "upstream_truncated"),
        ({"type": "stream_fault", "kind": "truncate", "after_chunks": 3}, "upstream_truncated"),
    ],
)
async def test_llmocks_faults_have_different_codes(llmock_url: str, behavior: dict[str, object], code: str) -> None:
    script_llmock(llmock_url, behavior)
    came = Reply()
    async with open_openai_compatible(llmock_url) as client:
        error = await failure_of(client, came)
        assert error.code == code
        assert error.retry_after_s == behavior.get("retry_after")
        assert bool(came.text) == (behavior["type"] == "stream_fault")
        assert (await ask(client)).text


async def test_llmocks_malformed_event_fails_no_reply(llmock_url: str) -> None:
    script_llmock(llmock_url, {"type": "stream_fault", "kind": "malformed", "after_chunks": 3})
    with trio.fail_after(WAIT_S):
        async with open_openai_compatible(llmock_url) as client:
            assert (await ask(client)).text


@pytest.mark.parametrize(("named", "shown"), [("req-1/a", "req-1/a"), ("a b", None), ("x" * 129, None), ('"', None)])
async def test_the_log_names_an_upstreams_own_request_id_if_it_is_valid(named: str, shown: str | None) -> None:
    async with open_upstream(refusing(401, b"", {"x-request-id": named})) as upstream:
        with log_context(turn_id="t"):
            await failure_of(upstream.client)
            assert current_ids().get("upstream_request_id") == shown


async def test_a_call_without_an_answer_has_no_request_id_of_the_call_before_it() -> None:
    async def answer_once(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_response(401, b"", {"x-request-id": "a"})
        await connection.receive_request()
        unanswered.cancel()
        await connection.wait_closed()

    unanswered = trio.CancelScope()
    async with open_upstream(answer_once) as upstream:
        with log_context(turn_id="t"):
            await failure_of(upstream.client)
            assert current_ids()["upstream_request_id"] == "a"
            with unanswered:
                await failure_of(upstream.client)
            assert unanswered.cancelled_caught
            assert "upstream_request_id" not in current_ids()
