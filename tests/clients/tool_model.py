"""A model server that calls two tools, and then tells what they returned."""

from collections.abc import Iterator, Sequence
from typing import Any

from tests.upstreams.raw_server import DONE, Connection, delta, finish, usage

TOOLS = ("get_weather", "get_time")
_ARGUMENTS = ('{"city":', '"Oslo"}')


class ToolModel:
    """Calls both tools at once, or one by one where the user asks for that.

    Attributes:
        requests: The messages of each request.
    """

    def __init__(self) -> None:
        self.requests: list[list[dict[str, Any]]] = []

    async def reply(self, connection: Connection) -> None:
        while True:
            asked: Any = (await connection.receive_request()).json
            self.requests.append(asked["messages"])
            await connection.send_head()
            for event in self._events(asked["messages"]):
                await connection.send_event(event)
            await connection.end_body()

    def _events(self, messages: Sequence[dict[str, Any]]) -> Iterator[object]:
        asked_at = max(index for index, it in enumerate(messages) if it["role"] == "user")
        outputs = [str(it["content"]) for it in messages[asked_at:] if it["role"] == "tool"]
        calls = TOOLS[len(outputs) :]
        if "one by one" in str(messages[asked_at]["content"]):
            calls = calls[:1]
        for index, name in enumerate(calls):
            opening = {"id": f"call_{len(self.requests)}_{index}", "type": "function", "index": index}
            yield _call(opening, {"name": name, "arguments": ""})
            for piece in _ARGUMENTS:
                yield _call({"index": index}, {"arguments": piece})
        if not calls:
            yield from map(delta, ("The tools ", "said ", answer_of(outputs)))
        yield finish("tool_calls" if calls else "stop")
        yield usage(len(messages), 3)
        yield DONE


def answer_of(outputs: Sequence[str]) -> str:
    return " and ".join(outputs)


def _call(opening: dict[str, object], function: dict[str, str]) -> dict[str, object]:
    return {
        "choices": [{"index": 0, "delta": {"tool_calls": [opening | {"function": function}]}, "finish_reason": None}]
    }
