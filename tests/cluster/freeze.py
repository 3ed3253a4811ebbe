"""Writes down what processes of this version send each other, before a release: ``just freeze`` writes ``fixtures/``.

``forwards_N.json`` has the bytes of each request that one process passes on and of its answer, in the order in which
they were sent, with ``{turn}``, ``{instance}`` and ``{fence}`` in place of what differs from run to run. Later versions
are held to it (:mod:`tests.hosting.test_earlier_forwards`). The file of a version that was released never changes: a
change of what is sent is a new file.
"""

import json
import re
import sqlite3
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import trio

from service.cluster.peer_address import PeerAddress
from tests.api.http.test_proxy import TURN, open_owner
from tests.hosting.hosts import KEYED, SERVE, open_host

FIXTURES = Path(__file__).parent / "fixtures"
SSE = {"accept": "text/event-stream"}
CALLS: Mapping[str, tuple[str, str, object, Mapping[str, str]]] = {
    "stream": ("POST", "/sessions/s/turns", {"input": "é", "on_conflict": "queue"}, SSE),
    "background": (
        *("POST", "/sessions/s/turns", {"input": "x", "on_conflict": "queue", "background": True}),
        {"idempotency-key": "k"},
    ),
    "wait": ("GET", f"/sessions/s/turns/{TURN}?wait=5", None, {}),
    "events": ("GET", f"/sessions/s/turns/{TURN}/events", None, SSE | {"last-event-id": "1"}),
    "cancel": ("POST", f"/sessions/s/turns/{TURN}/cancel", None, {}),
    "delete": ("DELETE", "/sessions/s", None, {}),
}
_RANDOM = re.compile(r"req_[0-9a-f]{32}")


def newest() -> int:
    """The number of the newest file."""
    return max(int(path.stem.rpartition("_")[2]) for path in FIXTURES.glob("forwards_*.json"))


async def requests_now(folder: Path) -> dict[str, str]:
    """The bytes of each request as this version passes it on."""
    answers = json.loads((FIXTURES / f"forwards_{newest()}.json").read_text())
    sent: dict[str, str] = {}
    for name, (method, path, body, headers) in CALLS.items():
        (folder / name).mkdir()
        async with open_owner(folder / name) as (api, owner), trio.open_nursery() as nursery:

            async def call(*call: Any, headers: Mapping[str, str] = headers) -> None:
                await api.call(*call, headers=dict(headers))

            nursery.start_soon(call, method, path, body)
            stream, request = await owner.take()
            await stream.send_all(answers[name]["answer"].replace("{turn}", TURN).encode("latin-1"))
            await stream.aclose()
            instance = PeerAddress.parse(owner.address).instance
            text = request.decode("latin-1").replace(TURN, "{turn}").replace(instance, "{instance}")
            sent[name] = re.sub(r"(?m)^lastcall-fence: \d+", "lastcall-fence: {fence}", text)
    return sent


def shape(request: str) -> str:
    """A request without what differs from run to run."""
    return _RANDOM.sub("{request}", request)


async def answers_now(folder: Path, requests: Mapping[str, str]) -> dict[str, str]:
    """The bytes of the answer of a server to each of these requests, in this order."""
    from tests.hosting.test_earlier_forwards import NEW_SESSION, TURN_ID, ask

    path = folder / "lastcall.db"
    settings = KEYED | {"model_url": "scripted:?tokens=2&rate=20&first_token_s=0"}
    answers: dict[str, str] = {}
    async with open_host(folder, SERVE, store_url=f"sqlite:{path}", **settings):
        with closing(sqlite3.connect(path)) as db:
            fence, address = db.execute("SELECT fence, address FROM owners").fetchone()
        secret = path.with_name("lastcall.db-owners").read_bytes()  # noqa: ASYNC240
        instance = PeerAddress.parse(address).instance
        await ask(address, secret, NEW_SESSION)
        turn = ""
        for name, request in requests.items():
            text = request.replace("{turn}", turn).replace("{instance}", instance).replace("{fence}", str(fence))
            answer = (await ask(address, secret, text.encode("latin-1"))).decode("latin-1")
            turn = turn or TURN_ID.findall(answer)[0]
            answers[name] = answer.replace(turn, "{turn}").replace(instance, "{instance}")
    return answers


async def main(number: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        requests = await requests_now(Path(name))
        answers = await answers_now(Path(name), requests)
    written = {name: {"request": requests[name], "answer": answers[name]} for name in CALLS}
    path = FIXTURES / f"forwards_{number}.json"
    path.write_text(json.dumps(written, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else newest() + 1)
