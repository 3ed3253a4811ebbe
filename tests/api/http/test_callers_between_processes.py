"""The caller of a request that another process has to answer, and the owner of the session that it is about."""

from functools import partial
from pathlib import Path

import trio

from tests.api.http.test_callers import KEYS, key_of
from tests.api.http.test_proxy import HEAD, TURN, Owner, answer, ask, chunk, frame, open_owner, wait_for
from tests.api.inprocess import SSE, Reply
from tests.storage.rows import T0, a_session, a_turn

OF_ANN = "turn_" + 32 * "b"


async def begin_ann_s_turn(owner: Owner) -> None:
    """Ann's session has the id of the session without an owner, and the other process runs its turn, too."""
    await owner.store.create_session(a_session("ann/s", idle_timeout_s=3600), now=T0)
    await owner.store.begin_turn(a_turn(OF_ANN, "ann/s"), now=T0)


async def test_the_process_that_checked_the_key_tells_the_caller(tmp_path: Path) -> None:
    async with open_owner(tmp_path, api_keys=KEYS) as (api, owner), trio.open_nursery() as nursery:
        await begin_ann_s_turn(owner)
        replies: list[Reply] = []
        headers = {"Authorization": f"Bearer {key_of('ann')}", "Lastcall-Caller": "administer read talk;root"}
        path = f"/sessions/s/turns/{OF_ANN}/cancel"
        nursery.start_soon(partial(ask, api, replies, "POST", path, headers=headers))
        stream, request = await owner.take()
        head = request.decode().lower()
        assert head.startswith(f"post {path} http/1.1\r\n"), "the id is the public one"
        assert head.count("lastcall-caller: ") == head.count("lastcall-caller: read talk;ann\r\n") == 1
        await stream.send_all(answer("{}"))
        await wait_for(replies)
        assert replies[0].status == 200
        await stream.aclose()


async def test_another_owner_s_turns_are_not_asked_for(tmp_path: Path) -> None:
    async with open_owner(tmp_path, api_keys=KEYS) as (api, owner):
        await begin_ann_s_turn(owner)
        for turn in (TURN, OF_ANN):
            headers = {"Authorization": f"Bearer {key_of('bob')}"}
            reply = await api.call("GET", f"/sessions/s/turns/{turn}", headers=headers)
            assert reply.problem(404, "session_not_found")["detail"].startswith("There is no session 's':")
        assert owner.accepted == []


async def test_a_stream_whose_owner_process_dies_goes_on_from_the_session_of_its_caller(tmp_path: Path) -> None:
    async with open_owner(tmp_path, api_keys=KEYS) as (api, owner), trio.open_nursery() as nursery:
        await begin_ann_s_turn(owner)
        replies: list[Reply] = []
        headers = SSE | {"Authorization": f"Bearer {key_of('root')}", "Lastcall-Owner": "ann"}
        nursery.start_soon(partial(ask, api, replies, "GET", f"/sessions/s/turns/{OF_ANN}/events", headers=headers))
        stream, request = await owner.take()
        assert b"lastcall-owner: ann\r\n" in request.lower()
        assert b"lastcall-caller: administer talk;root\r\n" in request.lower()
        await stream.send_all(HEAD + chunk(frame(1)))
        await owner.die(stream)
        await wait_for(replies)
        assert [event["type"] for event in replies[0].events] == ["turn.delta", "turn.interrupted"]


async def test_an_owner_process_that_does_not_answer_is_told_by_the_public_id(tmp_path: Path) -> None:
    async with open_owner(tmp_path, api_keys=KEYS) as (api, owner):
        await begin_ann_s_turn(owner)
        owner.listener.close()  # it lives, and cannot be reached
        headers = {"Authorization": f"Bearer {key_of('ann')}"}
        reply = await api.call("GET", f"/sessions/s/turns/{OF_ANN}", headers=headers)
        assert "session 's'" in reply.problem(503, "store_unavailable")["detail"]
