"""What the scripts of agent frameworks have in common: the tools, and the talk with the checks over pipes.

A script runs in an environment of its own, without the packages of this project, and prints what it saw at its end, as
JSON. Before that it prints a line whenever the check has something to do:

* ``SCRIPT turns URL FACE``: ``restart`` in the midst of each turn, between a call and its output. The script goes on
  with a line of its input.
* ``SCRIPT cut URL MODEL…``: ``begun`` for each stream whose reply has begun as far as it ever will.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Any

MODE, URL, *REST = sys.argv[1:]
TURNS = ("The weather and the time?", "Both of them again, one by one.", "And once more?")
FACES = ("responses", "chat")
_LAST_PIECES = ("is not ", '{"city":')
"""The last pieces of replies that are cut, in mid-text and in mid-call: see tests/process/cut_replies.py."""

Run = Callable[[str, str], Awaitable[object]]
"""Asks a model through a face, and returns the answer."""
ran: list[str] = []
"""The calls that the framework has made, in the order of their ends."""


async def get_weather(city: str) -> str:
    """The weather in a city."""
    say("restart")
    await asyncio.to_thread(sys.stdin.readline)
    ran.append(f"get_weather {city}")
    return "4 degrees"


async def get_time(city: str) -> str:
    """The time in a city."""
    ran.append(f"get_time {city}")
    return "noon"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def note(piece: object) -> None:
    """Note a piece of a streamed reply, if it is one that will be cut."""
    if MODE == "cut" and isinstance(piece, str) and piece.endswith(_LAST_PIECES):
        say("begun")


async def seen(answer: Awaitable[object], errors: Sequence[type[Exception]]) -> str:
    """What a run of the framework gave: its answer, or its error and what this error tells of HTTP.

    An error has the name of the first one of ``errors`` that it is, else its own.
    """
    try:
        return f"taken for a success: {await answer!r}"
    except Exception as error:  # noqa: BLE001  each one is a result
        kind = next((it for it in errors if isinstance(error, it)), type(error))
        status = getattr(error, "status_code", None)
        return f"{kind.__name__}{'' if status is None else f' {status}'}: {error}"


async def cut(run: Run, stream: Run, errors: Sequence[type[Exception]]) -> dict[str, str]:
    """Ask for all replies that are cut at once, without and with a stream, and return what became of each."""
    asks = {
        f"{face} {way.__name__} {model}": way(face, model) for face in FACES for way in (run, stream) for model in REST
    }
    return dict(zip(asks, await asyncio.gather(*[seen(it, errors) for it in asks.values()]), strict=True))


def main(
    package: str,
    *,
    turns: Callable[[str], Awaitable[list[object]]],
    run: Run,
    stream: Run,
    errors: Sequence[type[Exception]] = (),
) -> None:
    work = turns(REST[0]) if MODE == "turns" else cut(run, stream, errors)

    async def result() -> Any:
        return await work

    say(json.dumps({"version": version(package), "ran": ran, "seen": asyncio.run(result())}))
