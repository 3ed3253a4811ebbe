"""Rules for every request: access, problem documents, bounds on bodies, shutdown, other origins."""

import gzip
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from service.api.app import Application, create_app
from service.api.http.proxy import PEER
from service.errors import StoreError
from tests.api.inprocess import CAP_S, LOOPBACK, Api, open_api

KEY = "the-key-of-a-caller"
JSON = {"Content-Type": "application/json"}


async def test_without_a_service_everything_is_503() -> None:
    api = Api(create_app(), None)  # type: ignore[arg-type]
    for path in ("/sessions", "/healthz", "/nowhere"):
        reply = await api.call("GET", path)
        assert reply.problem(503, "not_ready")["retry_after_s"] == 1
        assert reply.headers["retry-after"] == "1"


async def test_errors_of_the_router_are_problem_documents_too() -> None:
    async with open_api() as api:
        for path in ("/nowhere", "/sessions/", "/sessions//turns", "/sessions/a/b", "/static/x", "/SESSIONS"):
            (await api.call("GET", path)).problem(404, "not_found")
        for method, path, allowed in (
            ("PUT", "/sessions", {"GET", "HEAD", "OPTIONS", "POST"}),
            ("GET", "/chat", {"OPTIONS", "POST"}),
            ("BREW", "/docs", {"GET", "HEAD", "OPTIONS"}),
        ):
            reply = await api.call(method, path)
            reply.problem(405, "method_not_allowed")
            assert set(reply.headers["allow"].split(", ")) == allowed


async def test_options_names_the_allowed_methods_and_head_is_get_without_a_body() -> None:
    async with open_api() as api:
        options = await api.call("OPTIONS", "/sessions")
        assert (options.status, options.body) == (204, b"")
        assert "content-type" not in options.headers
        assert set(options.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}
        head = await api.call("HEAD", "/sessions")
        assert head.status == 200
        assert head.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/jsonx"}, {"Content-Type": ""}]
)
async def test_a_body_that_is_not_said_to_be_json_is_refused(headers: dict[str, str]) -> None:
    async with open_api() as api:
        reply = await api.call("POST", "/sessions", raw=b"{}", headers=headers)
        reply.problem(415, "unsupported_media_type")
        utf8 = {"Content-Type": "application/json; charset=utf-8"}
        assert (await api.call("POST", "/sessions", raw=b"{}", headers=utf8)).status == 201


async def test_a_body_that_is_said_to_be_compressed_is_refused() -> None:
    async with open_api() as api:
        for encoding in ("gzip", "br", "identity, gzip", "x"):
            for raw in (b"{}", gzip.compress(b"{}")):
                headers = JSON | {"Content-Encoding": encoding}
                reply = await api.call("POST", "/sessions", raw=raw, headers=headers)
                reply.problem(415, "unsupported_media_type", "Content-Encoding")
                assert reply.headers["accept-encoding"] == "identity"
        for encoding in ("identity", "Identity", ""):
            headers = JSON | {"Content-Encoding": encoding}
            assert (await api.call("POST", "/sessions", raw=b"{}", headers=headers)).status == 201


async def test_malformed_and_wrong_bodies_get_different_codes() -> None:
    upstream = {"name": "only", "url": "scripted:", "models": ("scripted",)}
    async with open_api(upstreams=(upstream,)) as api:
        (await api.call("POST", "/sessions", raw=b"", headers=JSON)).problem(400, "malformed_body")
        twice = await api.call("POST", "/sessions", raw=b'{"id": "a", "id": "b"}', headers=JSON)
        twice.problem(400, "malformed_body", "id")
        (await api.call("POST", "/sessions", {"di": "a"})).problem(422, "invalid_request", "di")
        (await api.call("POST", "/sessions", {"model": "nope", "id": "a"})).problem(422, "invalid_request", "model")


async def test_a_text_over_its_bound_is_refused_and_one_at_it_taken(autojump_clock: MockClock) -> None:
    async with open_api(input_bytes_max=1024) as api:
        session_id = await api.new_session(system_message="x" * 1024)
        path = f"/sessions/{session_id}/turns"
        assert (await api.call("POST", path, {"input": "x" * 1024})).status == 200
        (await api.call("POST", path, {"input": "x" * 1025})).problem(413, "input_too_large", "input")
        (await api.call("PATCH", f"/sessions/{session_id}", {"system_message": "x" * 1025})).problem(
            413, "input_too_large", "system_message"
        )


async def test_a_body_over_its_bound_is_refused_before_it_is_read() -> None:
    async with open_api(input_bytes_max=1024) as api:
        announced = {"Content-Length": "10000000"} | JSON
        connection = api.open("POST", "/sessions", headers=announced)
        async with connection:
            with trio.fail_after(CAP_S):
                await connection.receive()
        assert connection.status_code == 413


async def test_a_body_without_a_length_is_refused_at_the_bound() -> None:
    async with open_api(input_bytes_max=1024) as api:
        connection = api.open("POST", "/sessions", headers=JSON)
        async with connection:
            with trio.fail_after(CAP_S):
                for _ in range(10):
                    await connection.send(b" " * 32 * 1024)
                await connection.receive()
        assert connection.status_code == 413


async def test_a_body_that_takes_too_long_is_refused(autojump_clock: MockClock) -> None:
    async with open_api(body_timeout_s=30) as api:
        connection = api.open("POST", "/sessions", headers=JSON)
        async with connection:
            with trio.fail_after(CAP_S):
                await connection.send(b"{")
                reply = await connection.receive()
        assert connection.status_code == 408
        assert b'"body_timeout"' in reply
        assert trio.current_time() == 30


async def test_a_key_gives_access_to_every_call_and_probes_need_none() -> None:
    async with open_api(api_keys=(KEY,)) as api:
        for path in ("/sessions", "/chat", "/nowhere", "/sessions/a", "/docs/a"):
            reply = await api.call("GET", path)
            reply.problem(401, "unauthorized")
            assert reply.headers["www-authenticate"] == "Bearer"
        far: dict[str, Any] = {"client": ("10.0.0.9", 1), "server": ("10.0.0.1", 80)}
        assert (await api.call("GET", "/healthz", scope=far)).json == {"status": "ok"}
        assert (await api.call("GET", "/readyz", scope=far)).json == {"status": "ready"}
        key = {"Authorization": f"Bearer {KEY}", "Host": "chat.example.com"}
        assert (await api.call("GET", "/sessions", headers=key, scope=far)).status == 200


async def test_without_keys_only_this_machine_is_served() -> None:
    async with open_api() as api:
        for headers, scope in (
            ({"Host": "evil.example.com"}, LOOPBACK),
            ({}, {"client": ("10.0.0.9", 1)}),
            ({}, {"server": ("10.0.0.1", 80)}),
            ({}, {"client": None}),
        ):
            for path in ("/sessions", "/healthz", "/nowhere"):
                (await api.call("GET", path, headers=headers, scope=scope)).problem(403, "loopback_only")


async def test_a_probe_from_this_machine_needs_to_name_no_host() -> None:
    """HAProxy's probe speaks HTTP/1.0, which needs no host."""
    far: dict[str, Any] = {"client": ("10.0.0.9", 1), "server": ("10.0.0.1", 80)}
    async with open_api() as api:
        for headers in ({"Host": ""}, None):
            scope: dict[str, Any] = {"headers": [], "http_version": "1.0"} if headers is None else {}
            for method, path in (("GET", "/healthz"), ("GET", "/readyz"), ("HEAD", "/healthz"), ("OPTIONS", "/readyz")):
                assert (await api.call(method, path, headers=headers, scope=scope)).status in (200, 204)
                reply = await api.call(method, path, headers=headers, scope=scope | far)
                assert reply.status == 403
            (await api.call("GET", "/sessions", headers=headers, scope=scope)).problem(403, "loopback_only")
        (await api.call("GET", "/healthz", headers={"Host": "evil.example"})).problem(403, "loopback_only")


@pytest.mark.parametrize("header", ["Forwarded", "Via", "X-Forwarded-For", "X-Real-IP", "CF-Connecting-IP"])
async def test_without_keys_requests_that_a_proxy_passes_on_are_refused_except_probes(header: str) -> None:
    async with open_api() as api:
        for path in ("/sessions", "/docs", "/nowhere"):
            for value in ("127.0.0.1", ""):
                reply = await api.call("GET", path, headers={header: value})
                problem = reply.problem(403, "proxied_without_keys")
                assert header.title() in problem["detail"]
                assert "LASTCALL_API_KEYS" in problem["detail"]
        (await api.call("POST", "/chat", {"message": "Hello"}, headers={header: "x"})).problem(
            403, "proxied_without_keys"
        )
        for path in ("/healthz", "/readyz"):
            assert (await api.call("GET", path, headers={header: "x"})).status == 200


async def test_a_request_that_another_worker_has_admitted_is_not_checked_again() -> None:
    async with open_api() as api:
        passed_on: dict[str, Any] = {PEER: bool, "client": None, "server": None}
        headers = {"X-Forwarded-For": "203.0.113.9", "Host": "chat.example.com"}
        assert (await api.call("GET", "/sessions", headers=headers, scope=passed_on)).status == 200


async def test_the_caller_s_address_is_that_which_a_trusted_proxy_names(monkeypatch: pytest.MonkeyPatch) -> None:
    callers: list[Any] = []

    async def listening(app: Application, scope: Any, receive: Any, send: Any) -> None:
        await answer(app, scope, receive, send)
        callers.append(scope["client"])

    answer = Application.asgi_app
    monkeypatch.setattr(Application, "asgi_app", listening)
    async with open_api(api_keys=(KEY,), trusted_proxies=("127.0.0.1", "unix:")) as api:
        named = {"X-Forwarded-For": "1.1.1.1, 203.0.113.9"}
        on_unix: dict[str, Any] = {"client": None, "server": None}
        for scope in ({}, {"client": ("10.0.0.9", 1)}, on_unix, on_unix | {PEER: bool}):
            await api.call("GET", "/healthz", headers=named, scope=scope)
        # The header gives no access: a caller that it names as this machine still needs a key.
        (await api.call("GET", "/sessions", headers={"X-Forwarded-For": "127.0.0.1"})).problem(401, "unauthorized")
    assert callers == [("203.0.113.9", 0), ("10.0.0.9", 1), ("203.0.113.9", 0), None, ("127.0.0.1", 0)]


async def test_no_origin_is_allowed_unless_it_is_configured() -> None:
    page = {"Origin": "https://app.example.com"}
    async with open_api() as api:
        reply = await api.call("GET", "/sessions", headers=page)
        assert not [name for name in reply.headers if name.startswith("access-control")]
        asked = await api.call("OPTIONS", "/sessions", headers=page | {"Access-Control-Request-Method": "POST"})
        assert not [name for name in asked.headers if name.startswith("access-control")]


async def test_configured_origins_may_ask_without_a_key_and_read() -> None:
    page = {"Origin": "https://app.example.com"}
    asking = {"Access-Control-Request-Method": "POST"}
    async with open_api(cors_origins=("https://app.example.com",), api_keys=(KEY,)) as api:
        asked = await api.call("OPTIONS", "/sessions", headers=page | asking)
        assert asked.status == 204
        assert "content-type" not in asked.headers
        assert asked.headers["access-control-allow-origin"] == "https://app.example.com"
        assert "PATCH" in asked.headers["access-control-allow-methods"]
        assert "Last-Event-ID" in asked.headers["access-control-allow-headers"]
        stranger = await api.call("OPTIONS", "/sessions", headers=asking | {"Origin": "https://evil.example.com"})
        stranger.problem(401, "unauthorized")
        assert "access-control-allow-origin" not in stranger.headers
        reply = await api.call("GET", "/sessions", headers=page | {"Authorization": f"Bearer {KEY}"})
        assert reply.headers["access-control-allow-origin"] == "https://app.example.com"
        assert reply.headers["vary"] == "Origin"
        refused = await api.call("GET", "/sessions", headers=page)
        assert refused.headers["access-control-allow-origin"] == "https://app.example.com"


async def test_a_notice_that_is_on_its_way_is_enough_to_be_not_ready(autojump_clock: MockClock) -> None:
    async with open_api(drain_timeout_s=20) as api:
        await trio.to_thread.run_sync(api.service.shutdown.expect_notice, lambda: None)
        (await api.call("GET", "/readyz")).problem(503, "shutting_down")
        session_id = await api.new_session()
        assert (await api.call("POST", f"/sessions/{session_id}/turns", {"input": "Hi"})).status == 200


async def test_after_the_notice_the_service_is_not_ready_and_later_takes_no_new_work(autojump_clock: MockClock) -> None:
    async with open_api(lame_duck_timeout_s=10, drain_timeout_s=20) as api:
        session_id = await api.new_session()
        api.service.shutdown.notice("test")
        (await api.call("GET", "/readyz")).problem(503, "shutting_down")
        assert (await api.call("GET", "/healthz")).status == 200
        assert (await api.call("POST", f"/sessions/{session_id}/turns", {"input": "Hi"})).status == 200
        await trio.sleep(11)
        for path, body in (
            (f"/sessions/{session_id}/turns", {"input": "Hi"}),
            ("/sessions", {}),
            ("/chat", {"message": "Hi"}),
        ):
            reply = await api.call("POST", path, body)
            reply.problem(503, "shutting_down")
            assert reply.headers["connection"] == "close"
            assert int(reply.headers["retry-after"]) >= 1
        assert (await api.call("GET", f"/sessions/{session_id}")).status == 200


async def test_the_answer_to_a_crash_in_a_handler_has_no_details(monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(**_: object) -> None:
        raise RuntimeError("the secret is 42")

    async with open_api() as api:
        monkeypatch.setattr(api.service.sessions, "list_sessions", crash)
        reply = await api.call("GET", "/sessions")
        reply.problem(500, "internal_error")
        assert b"42" not in reply.body
        assert b"Runtime" not in reply.body


async def test_an_error_out_of_a_nursery_is_answered_as_the_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise ExceptionGroup("of a nursery", [ExceptionGroup("of another", [StoreError("The disk is full.")])])

    async with open_api() as api:
        monkeypatch.setattr(api.service.sessions, "list_sessions", refuse)
        (await api.call("GET", "/sessions")).problem(503, "store_unavailable")


@pytest.mark.parametrize("refusals", [1, 2])
async def test_a_session_whose_owner_is_gone_is_answered_here_or_with_503(
    refusals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.errors import OwnedElsewhereError

    async with open_api() as api:
        await api.new_session(id="a")
        get_session = api.service.store.get_session
        gone = [OwnedElsewhereError("a", fence=1, address="@lastcall-nobody")] * refusals

        async def refuse_first(*args: Any, **kwargs: Any) -> Any:
            if gone:
                raise gone.pop()
            return await get_session(*args, **kwargs)

        monkeypatch.setattr(api.service.store, "get_session", refuse_first)
        reply = await api.call("GET", "/sessions/a")
        if refusals == 1:
            assert (reply.status, reply.json["id"]) == (200, "a")
        else:
            reply.problem(503, "owned_elsewhere")
            assert reply.headers["retry-after"] == "1"


async def test_a_store_that_refuses_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.errors import StoreError

    async def refuse(*_: object, **__: object) -> None:
        raise StoreError("The store is away.")

    async with open_api() as api:
        monkeypatch.setattr(api.service.store, "get_session", refuse)
        reply = await api.call("GET", "/sessions/a")
        reply.problem(503, "store_unavailable")
        assert reply.headers["retry-after"] == "1"
