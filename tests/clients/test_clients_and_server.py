"""Both clients in ``clients/`` do all that they can do with a real server, and outlive its restarts."""

import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.clients.client_driver import Job, Results
from tests.clients.drivers import DRIVERS, Drive, drive_all
from tests.clients.scenarios import BOUNDS, Step
from tests.clients.surroundings import open_cutting_proxy
from tests.docs.test_examples import open_model, serving, stopped, turns
from tests.process.lastcall import CAP_S, SERVE, open_lastcall

pytestmark = pytest.mark.processes

KEY = "sesame-of-the-clients"
DONE = {"end": "turn.completed", "waits": []}
ENDLESS, LEAVES = {"model": "endless"}, {"on_disconnect": "cancel"}
MODELS = """
model = "quick"
upstreams = [
  { name = "quick", url = "scripted:?rate=200&first_token_s=0", models = ["quick"] },
  { name = "endless", url = "scripted:?silent_after=3&first_token_s=0", models = ["endless"] },
]
"""
QUESTION = "What is a nursery?"


def names(value: Any) -> list[Any]:
    return [it["id"] for it in value]


def each_call(me: str) -> list[Step]:
    """Steps that make each call, in the session ``me`` and with a copy of it."""
    copy = f"{me}-copy"
    return [
        {"do": "create_session", "options": {"id": me, "title": "First", "metadata": {"team": me}}},
        {"do": "create_session", "options": {"id": me}},
        {"do": "rename_session", "args": [me, "Sécond"]},
        {"do": "list_sessions", "options": {"limit": 100, "count": True}},
        {"do": "stream", "args": [me, QUESTION], "as": "first"},
        {"do": "retry", "args": [me, "$first.id"], "options": {"temperature": 1}, "as": "second"},
        {"do": "get_turn", "args": [me, "$second.id"], "as": "retried"},
        {"do": "edit", "args": ["$retried", "What is a scope?"], "as": "third"},
        {"do": "siblings", "args": ["$retried"]},
        {"do": "path", "args": [me]},
        {"do": "switch_to", "args": [me, "$first.id"], "options": {"seen_head": "$third.id"}},
        {"do": "switch_to", "args": [me, "$first.id"], "options": {"seen_head": "$third.id"}},
        {"do": "stream", "args": [me, "And then?"], "as": "fourth"},
        {"do": "path", "args": [me]},
        {"do": "messages", "args": [me], "as": "messages"},
        {"do": "fork_session", "args": [me], "options": {"at": "$first.id", "id": copy}},
        {"do": "search", "args": ["nursery"], "options": {"metadata": {"team": me}}},
        {"do": "start_turn", "args": [me, "In the background"], "as": "background"},
        {"do": "wait_turn", "args": [me, "$background.id"]},
        {"do": "tree", "args": [me]},
        {"do": "chat", "args": ["Hi"], "as": "chat"},
        {"do": "events", "args": ["$chat.session_id", "$chat.id"], "options": {"after": 1}},
        {"do": "add_messages", "args": [copy, [{"type": "message", "role": "user", "text": "Imported"}]]},
        {"do": "stream", "args": [me, "Stop"], "options": ENDLESS, "cancel_after": 2},
        {"do": "stream", "args": [me, "Once"], "options": {"idempotency_key": "once"}, "as": "once"},
        {"do": "stream", "args": [me, "Once"], "options": {"idempotency_key": "once"}, "as": "again"},
        {"do": "stream", "args": [me, "Left"], "leave_after": 2, "as": "left"},
        {"do": "wait_turn", "args": [me, "$left.id"]},
        {"do": "stream", "args": [me, "Gone"], "options": ENDLESS | LEAVES, "abort_after": 2, "as": "gone"},
        {"do": "wait_turn", "args": [me, "$gone.id"]},
        {"do": "delete_message", "args": [me, "$messages.0.id"]},
        {"do": "delete_turn", "args": [me, "$fourth.id"]},
        {"do": "delete_session", "args": [me]},
        {"do": "stream", "args": [me, "Too late"]},
    ]


async def test_each_client_makes_each_call_and_is_not_cut_short_by_a_proxy(tmp_path: Path) -> None:
    async def run(name: str, drive: Drive) -> None:
        [results] = await drive([Job(url, each_call(name), BOUNDS, {"api_key": KEY})])
        check_each_call(iter(results), name)
        [[refused]] = await drive([Job(url, [{"do": "sessions"}], BOUNDS, {"api_key": "wrong"})])
        assert (refused["error"]["status"], refused["error"]["code"]) == (401, "unauthorized")
        assert refused["error"]["request_id"]
        async with open_cutting_proxy(server.port, cut_after_seq=5) as proxy:
            steps = [{"do": "chat", "args": ["Count"]}]
            [[cut]] = await drive([Job(f"http://127.0.0.1:{proxy.port}", steps, BOUNDS, {"api_key": KEY})])
        seqs = [seq for seq, _, _ in cut["events"]]
        assert seqs == list(range(1, len(seqs) + 1))
        assert (cut["events"][-1][1], len(cut["waits"]) >= 1) == ("turn.completed", True)

    config = tmp_path / "lastcall.toml"
    config.write_text(MODELS)
    settings: dict[str, Any] = {"LASTCALL_CONFIG_FILE": config, "model": "quick", "api_keys": KEY}
    async with open_lastcall(SERVE, tmp_path, **settings) as server:
        url = f"http://127.0.0.1:{server.port}"
        with trio.fail_after(2 * CAP_S):
            await drive_all(run)


def check_each_call(results: Any, me: str) -> None:
    assert next(results)["value"]["metadata"] == {"team": me}
    assert next(results)["error"]["code"] == "session_exists"
    assert next(results)["value"]["title"] == "Sécond"
    page = next(results)["value"]
    assert me in names(page["data"])
    assert page["count"] >= 1
    first, second, retried, third = (next(results) for _ in range(4))
    for stream in (first, second, third):
        assert stream | DONE == stream
        assert stream["text"].startswith("You said: “What is a ")
        assert "".join(text for _, kind, text in stream["events"] if kind == "turn.delta") == stream["text"]
    assert retried["value"]["text"] == second["text"]
    siblings = names(next(results)["value"])
    assert siblings == [first["turn_id"], second["turn_id"], third["turn_id"]]
    assert names(next(results)["value"]) == [third["turn_id"]]
    assert next(results)["value"]["head"] == first["turn_id"]
    moved = next(results)["error"]
    assert (moved["code"], moved["turn_id"]) == ("head_moved", first["turn_id"])
    fourth = next(results)
    assert names(next(results)["value"]) == [first["turn_id"], fourth["turn_id"]]
    assert [it["text"] for it in next(results)["value"]] == [QUESTION, first["text"], "And then?", fourth["text"]]
    assert next(results)["value"]["message_count"] == 2
    found = next(results)["value"]
    assert sorted(names(found)) == [me, f"{me}-copy"]
    assert all("nursery" in it["match"]["snippet"] for it in found)
    background, waited = next(results)["value"], next(results)["value"]
    assert (waited["id"], waited["state"]) == (background["id"], "completed")
    tree = names(next(results)["value"])
    assert tree == [*siblings, fourth["turn_id"], background["id"]]
    chat, replayed = next(results), next(results)
    assert chat["session_id"].startswith("sess_")
    assert replayed["events"] == chat["events"][1:]
    assert [it["text"] for it in next(results)["value"]] == ["Imported"]
    assert next(results)["end"] == "turn.cancelled"
    once, again = next(results), next(results)
    assert (once["turn_id"], once["events"]) == (again["turn_id"], again["events"])
    next(results)
    assert next(results)["value"]["state"] == "completed"
    assert next(results)["aborted"]
    gone = next(results)["value"]
    assert (gone["state"], gone["reason"]) == ("cancelled", "disconnected")
    assert [next(results)["value"] for _ in range(3)] == [None] * 3
    assert next(results)["error"]["code"] == "session_not_found"
    assert list(results) == []


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "shutdown"), (signal.SIGKILL, "crash")])
async def test_a_stream_of_each_client_outlives_the_restart_of_its_server(
    tmp_path: Path, number: int, reason: str, port: int
) -> None:
    results: dict[str, Results] = {}
    done = trio.Event()

    async def run(me: str, drive: Drive) -> None:
        steps: list[Step] = [
            {"do": "create_session", "options": {"id": me}},
            {"do": "stream", "args": [me, "Count"], "as": "first"},
            {"do": "retry", "args": [me, "$first.id"]},
        ]
        [results[me]] = await drive([Job(f"http://127.0.0.1:{server.port}", steps, BOUNDS)])

    async def run_all() -> None:
        await drive_all(run)
        done.set()

    async def answer_all(*tokens: str, to_the_end: bool) -> None:
        for _ in DRIVERS:
            reply = await model.asked("Count")
            await reply.say(*tokens)
            if to_the_end:
                await reply.end()

    async with open_model() as model, trio.open_nursery() as nursery:
        async with serving(tmp_path, model.url, port=port) as server:
            nursery.start_soon(run_all)
            await answer_all("1 ", "2 ", to_the_end=False)
            await stopped(server, number)
        async with serving(tmp_path, model.url, port=port):
            await answer_all("1 2 3", to_the_end=True)
            with trio.fail_after(2 * CAP_S):
                await done.wait()
            had = {me: await turns(server.port, me) for me in DRIVERS}
    for me, [first, second] in had.items():
        [_, cut, again] = results[me]
        assert (cut["end"], first["state"], first["reason"]) == ("turn.interrupted", "interrupted", reason)
        assert (cut["turn_id"], cut["text"]) == (first["id"], first["text"])
        assert (again["turn_id"], again["text"], again["end"]) == (second["id"], "1 2 3", "turn.completed")
