"""Calls every operation with a client that openapi-python-client generates: ``generated_client.py URL KEY``.

Prints its results as JSON. A warning of the generator is a failure: each operation or type that it leaves out is one.
"""

import json
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

PACKAGE = "lastcall_client"
CALLED: set[str] = set()


def generate(url: str, folder: str) -> None:
    command = ["openapi-python-client", "generate", "--url", f"{url}/openapi.json", "--meta", "none"]
    output = str(Path(folder, PACKAGE))
    done = subprocess.run(
        [*command, "--output-path", output, "--fail-on-warning"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0 or "WARNING" in done.stdout:
        sys.exit(done.stdout)


def call(name: str, status: int, **arguments: Any) -> Any:
    """Call an operation, ``tag.operation``; return the answer as the client parsed it."""
    CALLED.add(name)
    answer = import_module(f"{PACKAGE}.api.{name}").sync_detailed(**arguments)
    if answer.status_code != status:
        sys.exit(f"{name} was answered with {answer.status_code}: {answer.content.decode()}")
    return answer.parsed


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "turn.delta")


def stream(client: Any, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a call as they come, over the generated client's own connections."""
    kwargs["headers"] = kwargs.get("headers", {}) | {"Accept": "text/event-stream"}
    with client.get_httpx_client().stream(**kwargs) as response:
        return events_of("\n".join(response.iter_lines()))


def main(url: str, key: str) -> None:
    models, module = import_module(f"{PACKAGE}.models"), import_module(PACKAGE)
    with module.AuthenticatedClient(base_url=url, token=key, timeout=60) as client:
        session = call("sessions.create_session", 201, client=client, body=models.CreateSession())
        known = {"client": client, "session_id": session.id}
        call("sessions.update_session", 200, **known, body=models.UpdateSession(title="A title"))
        turn = call("turns.start_turn", 200, **known, body=models.StartTurn(input_="Hi"))
        start = import_module(f"{PACKAGE}.api.turns.start_turn")._get_kwargs
        streamed = stream(
            client,
            start(session.id, body=models.StartTurn(input_="Hi again", on_conflict=models.StartTurnOnConflict.QUEUE)),
        )
        replayed = events_of(call("turns.stream_events", 200, **known, turn_id=turn.id))
        chatted = events_of(call("chat.chat", 200, client=client, body=models.Chat(message="Hi")))
        call("turns.cancel_turn", 200, **known, turn_id=turn.id)
        retried = call("turns.retry_turn", 200, **known, turn_id=turn.id, body=models.RetryTurn(temperature=1.0))
        assert (retried.siblings.place, retried.siblings.count, retried.is_head) == (2, 2, True)
        tree = call("turns.get_tree", 200, **known).data
        assert [node.parent for node in tree] == [None, turn.id, None]
        call("sessions.update_session", 200, **known, body=models.UpdateSession(head=tree[1].id))
        seen: dict[str, Any] = {
            "title": call("sessions.get_session", 200, **known).title,
            "sessions": call("sessions.list_sessions", 200, client=client, count=True).count,
            "turns": [it.state for it in call("turns.list_turns", 200, **known).data],
            "messages": len(call("sessions.list_messages", 200, **known).data),
            "text": call("turns.get_turn", 200, **known, turn_id=turn.id).text,
            "texts": [text_of(events) for events in (streamed, replayed, chatted)],
            "last": [events[-1]["type"] for events in (streamed, replayed, chatted)],
        }
        call("sessions.fork_session", 201, **known, body=models.ForkSession())
        items = [models.AddedMessage(type_="message", role=models.AddedMessageRole.USER, text="Hm")]
        added = call("sessions.add_messages", 201, **known, body=models.AddMessages(items=items))
        call("sessions.delete_message", 204, **known, item_id=added.messages[0].id)
        call("turns.delete_turn", 204, **known, turn_id=added.turns[0])
        call("sessions.delete_session", 204, **known)
        seen["code"] = call("sessions.get_session", 404, **known).code
        for name, status in (
            *(("health.healthz", 200), ("health.readyz", 200)),
            *(("docs.openapi", 200), ("docs.docs", 200), ("docs.root", 302)),
        ):
            call(name, status, client=client)
    api = import_module(f"{PACKAGE}.api")
    every = {
        it.name.removeprefix(f"{PACKAGE}.api.") for it in walk_packages(api.__path__, f"{PACKAGE}.api.") if not it.ispkg
    }
    every = {name for name in every if not name.startswith("admin.")}  # they need a key that administers
    sys.stdout.write(json.dumps(seen | {"called": sorted(CALLED), "not_called": sorted(every - CALLED)}))


with tempfile.TemporaryDirectory() as folder:
    generate(sys.argv[1], folder)
    sys.path.insert(0, folder)
    main(*sys.argv[1:])
