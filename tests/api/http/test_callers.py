"""Callers with named keys: what each may do, whose sessions a call is about, and who acts for others."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api.http import callers
from service.api.http.callers import CALLER, caller_at_peer, caller_headers
from service.api.http.proxy import PEER
from service.api_keys import LOCAL, PLAIN, Caller
from service.ids import public_id, scoped
from tests.api.inprocess import SSE, Api, Reply, leave, open_api

SLOW = "scripted:?tokens=100&rate=1"
NAMES = ("ann", "bob", "reader", "root", "auditor", "plain")
TURN = "turn_" + "0" * 32


def key_of(name: str) -> str:
    return f"the-long-key-of-{name}"


KEYS: list[object] = [
    {"name": "ann", "key": key_of("ann")},
    {"name": "bob", "key": key_of("bob"), "may": ["talk"]},
    {"name": "reader", "key": key_of("reader"), "may": ["read"]},
    {"name": "root", "key": key_of("root"), "may": ["talk", "administer"]},
    {"name": "auditor", "key": key_of("auditor"), "may": ["read", "administer"]},
    key_of("plain"),
]


class Callers:
    """Calls with the keys of several callers."""

    def __init__(self, api: Api) -> None:
        self.api = api

    async def __call__(
        self, name: str, method: str, path: str, body: object = None, *, owner: str | None = None, **headers: str
    ) -> Reply:
        headers = {"Authorization": f"Bearer {key_of(name)}"} | {it.replace("_", "-"): of for it, of in headers.items()}
        if owner is not None:
            headers["Lastcall-Owner"] = owner
        return await self.api.call(method, path, body, headers=headers)

    async def ids(self, name: str, **kwargs: Any) -> list[tuple[str, str | None]]:
        reply = await self(name, "GET", "/sessions?count=true", **kwargs)
        assert reply.json["count"] == len(reply.json["data"])
        return sorted((it["id"], it.get("owner")) for it in reply.json["data"])


@asynccontextmanager
async def open_callers(**settings: Any) -> AsyncIterator[Callers]:
    async with open_api(**{"api_keys": KEYS, "model_url": "scripted:"} | settings) as api:
        yield Callers(api)


def test_scoped_ids_give_their_parts_back() -> None:
    assert [scoped("ann", "s"), scoped("", "s")] == ["ann/s", "s"]
    assert [public_id("ann/s"), public_id("s")] == ["s", "s"]


@pytest.mark.parametrize("caller", [PLAIN, LOCAL, Caller("a+b@c|d", frozenset(("read",))), Caller("x", frozenset())])
def test_another_process_tells_the_caller(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    scope: dict[str, object] = {"type": "http"}
    with monkeypatch.context() as patch:
        patch.setattr(callers, "request", SimpleNamespace(scope=scope))
        assert caller_headers() == (), "a probe has no caller"
        scope["lastcall.caller"] = caller
        ((name, value),) = caller_headers()
    assert (name, caller_at_peer(value.decode())) == (CALLER, caller)


async def test_a_session_belongs_to_the_name_of_the_key(autojump_clock: object) -> None:
    async with open_callers() as call:
        for name in ("ann", "bob", "plain"):
            made = await call(name, "POST", "/sessions", {"id": "s", "title": name})
            assert (made.status, made.headers["location"]) == (201, "/sessions/s")
            assert made.json["id"] == "s"
            assert made.json.get("owner") == (None if name == "plain" else name)
        for name in ("ann", "bob", "plain"):
            assert (await call(name, "GET", "/sessions/s")).json["title"] == name
            assert await call.ids(name) == [("s", None if name == "plain" else name)]
        assert (await call("ann", "DELETE", "/sessions/s")).status == 204
        assert (await call("ann", "GET", "/sessions/s")).status == 404
        assert (await call("bob", "GET", "/sessions/s")).status == 200


async def test_turns_streams_and_forks_tell_public_ids(autojump_clock: object) -> None:
    async with open_callers() as call:
        chat = await call("ann", "POST", "/chat", {"message": "Hi", "session_id": "s"}, Accept="text/event-stream")
        started = chat.events[0]
        assert started["session_id"] == "s"
        turn = started["turn_id"]
        assert chat.headers["location"] == f"/sessions/s/turns/{turn}"
        replayed = await call("ann", "GET", f"/sessions/s/turns/{turn}/events", Accept=SSE["Accept"])
        assert replayed.body == chat.body
        assert (await call("ann", "GET", f"/sessions/s/turns/{turn}")).json["session_id"] == "s"
        new = await call("ann", "POST", "/sessions/s/turns", {"input": "More", "background": True})
        assert new.json["session_id"] == "s"
        assert new.headers["location"] == f"/sessions/s/turns/{new.json['id']}"
        await call("ann", "POST", f"/sessions/s/turns/{new.json['id']}/cancel")
        fork = await call("ann", "POST", "/sessions/s/fork", {"at": turn})
        assert fork.headers["location"] == f"/sessions/{fork.json['id']}"
        assert fork.json["owner"] == "ann"
        assert await call.ids("bob") == []
        for path in ("s", fork.json["id"], f"s/turns/{turn}", f"s/turns/{turn}/events", "s/messages"):
            missing = await call("bob", "GET", f"/sessions/{path}")
            public = path.partition("/")[0]
            detail = missing.problem(404, "session_not_found")["detail"]
            assert detail == f"There is no session {public!r}: it never existed, was deleted or has expired."


@pytest.mark.parametrize(
    ("name", "may_read", "may_talk"),
    [
        ("ann", True, True),
        ("bob", True, True),
        ("reader", True, False),
        ("auditor", True, False),
        ("plain", True, True),
    ],
)
async def test_each_call_needs_a_permission(
    name: str, *, may_read: bool, may_talk: bool, autojump_clock: object
) -> None:
    reads = [
        ("GET", "/sessions"),
        ("GET", "/sessions/s"),
        ("HEAD", "/sessions/s"),
        ("GET", f"/sessions/s/turns/{TURN}"),
    ]
    talks = [
        ("POST", "/sessions", {}),
        ("POST", "/chat", {"message": "Hi"}),
        ("PATCH", "/sessions/s", {"title": "x"}),
        ("DELETE", "/sessions/s", None),
        ("POST", "/sessions/s/turns", {"input": "Hi"}),
        ("POST", f"/sessions/s/turns/{TURN}/cancel", None),
    ]
    async with open_callers() as call:
        for method, path in reads:
            assert ((await call(name, method, path)).status != 403) is may_read
        for method, path, body in talks:
            reply = await call(name, method, path, body)
            if may_talk:
                assert reply.status != 403
            else:
                assert "'talk'" in reply.problem(403, "not_permitted")["detail"]
        assert (await call(name, "POST", "/nowhere")).status == 404
        assert (await call(name, "GET", "/healthz")).status == 200


async def test_who_administers_sees_all_and_acts_for_others(autojump_clock: object) -> None:
    async with open_callers() as call:
        for name in ("ann", "plain", "root"):
            await call(name, "POST", "/sessions", {"id": "s"})
        made = await call("root", "POST", "/sessions", {"id": "for-bob", "owner": "bob"})
        assert made.json["owner"] == "bob"
        made = await call("root", "POST", "/sessions", {"id": "for-bob-2"}, owner="bob")
        assert made.json["owner"] == "bob"
        everything = [("for-bob", "bob"), ("for-bob-2", "bob"), ("s", "ann"), ("s", "root")]
        for name in ("root", "auditor"):
            reply = await call(name, "GET", "/sessions")
            found = [(it["id"], it.get("owner")) for it in reply.json["data"]]
            assert sorted(found, key=str) == sorted([*everything, ("s", None)], key=str)
            assert await call.ids(name, owner="bob") == [("for-bob", "bob"), ("for-bob-2", "bob")]
            assert await call.ids(name, owner="") == [("s", None)]
            assert await call.ids(name, owner="nobody") == []
            assert (await call(name, "GET", "/sessions/for-bob")).status == 404
            assert (await call(name, "GET", "/sessions/for-bob", owner="bob")).status == 200
        assert await call.ids("bob") == [("for-bob", "bob"), ("for-bob-2", "bob")]
        await call("root", "PATCH", "/sessions/s", {"title": "seen"}, owner="")
        assert (await call("plain", "GET", "/sessions/s")).json["title"] == "seen"
        chat = await call("root", "POST", "/chat", {"message": "Hi", "session_id": "for-bob"}, owner="bob")
        assert (await call("bob", "GET", chat.headers["location"])).json["state"] == "completed"


async def test_acting_for_others_is_refused_to_all_other_keys(autojump_clock: object) -> None:
    async with open_callers() as call:
        for name in ("ann", "plain", "bob"):
            for owner in ("ann", "bob", "", "a/b"):
                for method, path in (("GET", "/sessions"), ("GET", "/sessions/s"), ("POST", "/chat")):
                    refused = await call(name, method, path, owner=owner)
                    assert "Lastcall-Owner" in refused.problem(403, "not_permitted")["detail"]
            refused = await call(name, "POST", "/sessions", {"owner": "bob"})
            assert "`owner`" in refused.problem(403, "not_permitted")["detail"]
        assert (await call("ann", "GET", "/healthz", owner="bob")).status == 200


async def test_an_owner_who_cannot_be_is_refused(autojump_clock: object) -> None:
    async with open_callers() as call:
        for owner in ("a/b", "a b", "é", "x" * 129):
            (await call("root", "GET", "/sessions/s", owner=owner)).problem(422, "invalid_request", "Lastcall-Owner")
            (await call("root", "POST", "/sessions", {"owner": owner})).problem(422, "invalid_request", "owner")
        (await call("root", "POST", "/sessions", {"owner": ""})).problem(422, "invalid_request", "owner")
        (await call("root", "POST", "/sessions", {"owner": "ann"}, owner="bob")).problem(
            422, "invalid_request", "owner"
        )
        assert (await call("root", "POST", "/sessions", {"owner": "bob"}, owner="bob")).status == 201


async def test_ids_of_other_forms_find_nothing(autojump_clock: object) -> None:
    async with open_callers() as call:
        await call("plain", "POST", "/sessions", {"id": "s"})
        await call("ann", "POST", "/sessions", {"id": "s"})
        for path in ("/sessions/ann%2Fs", "/sessions/ann/s", "/sessions/..", "/sessions/%2e%2e"):
            for name in ("bob", "plain", "root"):
                assert (await call(name, "GET", path)).status in (404, 405)


async def test_without_keys_this_machine_may_act_for_every_owner(autojump_clock: object) -> None:
    async with open_api() as api:
        made = await api.call("POST", "/sessions", {"id": "s"})
        assert "owner" not in made.json
        await api.call("POST", "/sessions", {"id": "s", "owner": "ann"})
        assert [it.get("owner") for it in (await api.call("GET", "/sessions")).json["data"]] == ["ann", None]
        found = await api.call("GET", "/sessions/s", headers={"Lastcall-Owner": "ann"})
        assert found.json["owner"] == "ann"
        assert "owner" not in (await api.call("GET", "/sessions/s")).json


async def test_the_header_of_another_process_is_believed_only_from_another_process(autojump_clock: object) -> None:
    forged = {CALLER.decode(): "administer talk;root"}
    async with open_callers() as call:
        await call("root", "POST", "/sessions", {"id": "s"})
        headers = forged | {"Authorization": f"Bearer {key_of('ann')}"}
        assert (await call.api.call("GET", "/sessions/s", headers=headers)).status == 404
        assert (await call.api.call("GET", "/sessions", headers=headers | {"Lastcall-Owner": "root"})).status == 403
        (await call.api.call("GET", "/sessions/s", headers=forged)).problem(401, "unauthorized")
        passed_on = await call.api.call("GET", "/sessions/s", headers=forged, scope={PEER: bool})
        assert passed_on.json["owner"] == "root"
        of_an_earlier_version = await call.api.call("GET", "/sessions/s", scope={PEER: bool})
        assert of_an_earlier_version.status == 404


def _of_ann(name: str, *, at_owner: bool) -> dict[str, Any]:
    """What a call of this key for Ann has, sent to this process or to one that passes it on to this one."""
    if not at_owner:
        return {"headers": {"Authorization": f"Bearer {key_of(name)}", "Lastcall-Owner": "ann"} | SSE}
    may = "read administer" if name == "auditor" else "read talk administer"
    return {"headers": {CALLER.decode(): f"{may};{name}", "Lastcall-Owner": "ann"} | SSE, "scope": {PEER: bool}}


@pytest.mark.parametrize("at_owner", [False, True], ids=["here", "at the owner's process"])
@pytest.mark.parametrize("name", ["auditor", "root"])
async def test_a_caller_who_may_only_read_keeps_no_turn_running(
    name: str, *, at_owner: bool, autojump_clock: MockClock
) -> None:
    """Another one who may talk does: the turn has a client."""
    async with open_callers(model_url=SLOW) as call:
        await call("ann", "POST", "/sessions", {"id": "s"})
        api = call.api
        headers = {"Authorization": f"Bearer {key_of('ann')}", "Content-Type": "application/json"} | SSE
        talker = api.open("POST", "/sessions/s/turns", headers=headers)
        replies: list[Reply] = []
        async with trio.open_nursery() as nursery, talker:
            await talker.send(b'{"input": "Hi"}')
            await talker.send_complete()
            await trio.sleep(5)
            [turn] = (await call("ann", "GET", "/sessions/s/turns")).json["data"]

            async def look() -> None:
                path = f"/sessions/s/turns/{turn['id']}/events"
                replies.append(await api.call("GET", path, **_of_ann(name, at_owner=at_owner)))

            nursery.start_soon(look)
            await trio.sleep(5)
            assert not replies
            await leave(talker)
            left_at = trio.current_time()
        ran_on_s = trio.current_time() - left_at
        end = replies[0].events[-1]
        if name == "auditor":
            assert (end["type"], end["reason"]) == ("turn.cancelled", "disconnected")
            assert ran_on_s < 2
        else:
            assert end["type"] == "turn.completed"
            assert ran_on_s == pytest.approx(90, abs=5)


async def test_a_caller_who_may_only_read_gives_no_client_more_time_to_come_back(autojump_clock: MockClock) -> None:
    async with open_callers(model_url=SLOW, disconnect_grace_s=10) as call:
        headers = {"Authorization": f"Bearer {key_of('ann')}", "Content-Type": "application/json"} | SSE
        talker = call.api.open("POST", "/chat", headers=headers)
        async with talker:
            await talker.send(b'{"message": "Hi", "session_id": "s"}')
            await talker.send_complete()
            await trio.sleep(5)
            [turn] = (await call("ann", "GET", "/sessions/s/turns")).json["data"]
            await leave(talker)
        path = f"/sessions/s/turns/{turn['id']}"
        for _ in range(3):
            await trio.sleep(3)
            reader = call.api.open("GET", f"{path}/events", **_of_ann("auditor", at_owner=False))
            async with reader:
                await reader.send_complete()
                await reader.receive()
                await leave(reader)
        assert (await call("ann", "GET", path)).json["state"] == "running"
        await trio.sleep(2)
        ended = (await call("ann", "GET", path)).json
        assert (ended["state"], ended["reason"]) == ("cancelled", "disconnected")


async def test_a_deletion_that_takes_too_long_tells_the_public_id(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_callers(model_url=SLOW, store_timeout_s=10, cleanup_timeout_s=1) as call:
        await call("ann", "POST", "/sessions", {"id": "s"})

        def slow(step: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
            async def slow_step(*args: object, **kwargs: object) -> object:
                await trio.sleep(9)
                return await step(*args, **kwargs)

            return slow_step

        for name in ("begin_turn", "mark_deleted", "remove_deleted"):  # each of them within the store's time
            monkeypatch.setattr(call.api.service.store, name, slow(getattr(call.api.service.store, name)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, "ann", "POST", "/sessions/s/turns", {"input": "Hi"})
            await wait_all_tasks_blocked()  # the acceptance is before the deletion
            late = (await call("ann", "DELETE", "/sessions/s")).problem(503, "store_unavailable")
        assert late["detail"].startswith("Session 's' is being deleted")
        assert (await call("ann", "DELETE", "/sessions/s")).status == 204
