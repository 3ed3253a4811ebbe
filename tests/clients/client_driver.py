"""Does steps with the client in ``clients/python``: what ``client_driver.mjs`` does with the one in ``clients/js``.

A step is ``{"do": "stream", "args": ["me", "Hi"], "options": {…}, "as": "first"}``: a call of the client. A text
``$first.id`` in ``args`` stands for that field of an earlier result. ``leave_after`` leaves a stream after so many
events, and with ``go_on`` reads on in another loop; ``abort_after`` cancels the reader (``abort_on_wait``
in a pause), ``cancel_after`` the turn.
``split`` and ``block_ms`` are for JavaScript.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio
import httpx
from lastcall_client import Bounds, Client, Event, LastcallError, Pages, TurnStream, Waiting

Results = Sequence[Mapping[str, Any]]
"""The result of each step."""


@dataclass(frozen=True)
class Job:
    """Steps that are done one after the other, by a client with these bounds and options."""

    url: str
    steps: Sequence[Mapping[str, Any]]
    bounds: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The job for the driver in JavaScript."""
        return asdict(self)


async def do_jobs(jobs: Sequence[Job]) -> Sequence[Results]:
    """Do jobs at the same time, and return the results of each."""
    results: dict[int, Results] = {}

    async def run(number: int, job: Job) -> None:
        try:
            results[number] = await _do_steps(job)
        except Exception as error:
            error.add_note(f"the job: {job}")
            raise

    async with anyio.create_task_group() as group:
        for number, job in enumerate(jobs):
            group.start_soon(run, number, job)
    return [results[number] for number in range(len(jobs))]


async def _do_steps(job: Job) -> Results:
    waits: list[Waiting] = []
    results: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    # Without certificates, which take most of the time that a client takes to be made.
    async with (
        httpx.AsyncClient(verify=False, limits=httpx.Limits(max_connections=None)) as http,
        Client(job.url, bounds=Bounds(**job.bounds), on_wait=waits.append, http=http, **job.options) as client,
    ):
        for step in job.steps:
            waits.clear()
            result = await _do(client, step, kept)
            result["waits"] = [[it.delay_s, it.error.code] for it in waits]
            results.append(result)
    return results


async def _do(client: Client, step: Mapping[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    args = [_filled(it, kept) for it in step.get("args", ())]
    options = {name: _filled(it, kept) for name, it in step.get("options", {}).items()}
    scope = anyio.CancelScope()
    if "abort_on_wait" in step:
        options["on_wait"] = lambda _: scope.cancel()
    try:
        made = getattr(client, step["do"])(*args, **options)
        if isinstance(made, TurnStream):
            await _read(made, step, result, scope)
            kept[step.get("as", "")] = {"id": made.turn_id, "session_id": made.session_id}
        else:
            result["value"] = await (made.collect() if isinstance(made, Pages) else made)
            kept[step.get("as", "")] = result["value"]
    except LastcallError as error:
        names = ("status", "code", "title", "detail", "request_id", "retry_after_s", "turn_id")
        result["error"] = {name: getattr(error, name) for name in names}
    except ValueError:
        result["refused"] = True
    return result


async def _read(stream: TurnStream, step: Mapping[str, Any], result: dict[str, Any], scope: anyio.CancelScope) -> None:
    events: list[Event] = []
    try:
        with scope:
            async with stream:
                async for event in stream:
                    events.append(event)
                    if len(events) == step.get("leave_after"):
                        break
                    if len(events) == step.get("abort_after"):
                        scope.cancel()
                    if len(events) == step.get("cancel_after"):
                        await stream.cancel()
            if "go_on" in step:
                events += [event async for event in stream]
    finally:
        result |= {
            "events": [[it.seq, it.type, it.text] for it in events],
            "text": stream.text,
            "end": stream.end.type if stream.end else None,
            "session_id": stream.session_id,
            "turn_id": stream.turn_id,
            "aborted": scope.cancelled_caught,
        }


def _filled(value: Any, kept: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    name, *path = value[1:].split(".")
    found = kept[name]
    for key in path:
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found
