"""The log of several processes: each line in one form, with its process, and a request's lines found by its id."""

import json
import os
import signal
from pathlib import Path

import pytest
import trio

from tests.process.clients import new_session, open_client, owner_of
from tests.process.lastcall import CAP_S, CONFIGURED_2, open_lastcall, wait_gone
from tests.process.test_workers import SLOW, on_file, reaching_others

pytestmark = pytest.mark.parallel


async def test_a_request_is_followed_through_workers_and_every_line_names_its_process(tmp_path: Path) -> None:
    settings = on_file(tmp_path, model_url=SLOW, access_log="on")
    async with open_lastcall(CONFIGURED_2, tmp_path, **settings) as server, open_client(server) as [client]:
        session = await new_session(client, "s")
        body = {"input": "go", "background": True}
        started = await client.post(f"{session}/turns", json=body, headers={"X-Request-ID": "starts-it"})
        turn = started.headers["location"]
        assert started.headers["x-request-id"] == "starts-it"
        refused = []

        async def ask_again(request_id: str) -> None:
            refused.append(await client.post(f"{session}/turns", json=body, headers={"X-Request-ID": request_id}))

        async with (
            trio.open_nursery() as nursery,
            reaching_others(server, tmp_path, session, method="POST", requests=2),
        ):
            nursery.start_soon(ask_again, "asks")
            nursery.start_soon(ask_again, "asks-again")
        assert [it.status_code for it in refused] == [409, 409]
        assert sorted(it.headers["x-request-id"] for it in refused) == ["asks", "asks-again"]
        [other] = {*server.workers()} - {owner_of(tmp_path / "lastcall.db", "s")}
        await client.post(f"{turn}/cancel")
        os.kill(other, signal.SIGKILL)
        with trio.fail_after(CAP_S):
            await server.wait_logged("another one takes its place")
            await server.wait_logged('"serving"', times=3)
        server.signal_main(signal.SIGTERM)
        await wait_gone(server)
    lines = [json.loads(line) for line in server.log().splitlines()]
    main = [line["pid"] for line in lines if line["logger"] == "lastcall.process"]
    assert main == [server.pid]
    assert len({line["pid"] for line in lines}) == 4, "the master, two workers and the one in the place of the first"
    [ended] = [line for line in lines if line["message"] == "turn ended"]
    assert (ended["request_id"], ended["outcome"], ended["code"]) == ("starts-it", "cancelled", "requested")
    for request_id in ("asks", "asks-again"):
        of_one = [line for line in lines if line.get("request_id") == request_id]
        assert of_one[0]["message"] == "asking the owner"
        access = [line for line in of_one if line["logger"] == "lastcall.access"]
        assert len({line["pid"] for line in access}) == len(access) == 2, "of the worker that it reached, and the owner"
    counts = [line["count"] for line in lines if line["message"] == "requests refused"]
    assert sum(counts) == 2, "each is counted once, by the owner"
