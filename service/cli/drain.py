"""``lastcall drain``: begin the shutdown of a server as a signal would, and with ``--wait`` see it through."""

import argparse
from typing import Any

import trio
from lastcall_client import Client, LastcallError

from service.cli import exit_codes
from service.cli.connection import ONE_ATTEMPT, is_connect_refused, is_of_a_proxy, open_client
from service.cli.reply_views import json_line
from service.cli.terminal.output import Output, complain
from service.client_settings import Target

_LOOK_S = 0.2
_UNANSWERED_MAX = 10
"""A server that has not answered so many looks in a row is gone: a tunnel or a balancer takes the connections."""
_MARGIN_S = 10
"""How much longer than its own bounds a server may take until ``--wait`` gives up."""


async def run(arguments: argparse.Namespace, target: Target, output: Output) -> int:
    """Run the command, and return the exit code."""
    async with open_client(target, ONE_ATTEMPT) as client:
        before = await _workers(client) if arguments.wait else frozenset()
        answer = await client.request("POST", "/admin/drain", body={})
        bounds = answer["bounds_s"]
        if arguments.json:
            await output.write(json_line(answer))
        else:
            await output.write(_told(answer, target) + "\n")
        if not arguments.wait:
            return exit_codes.OK
        began_at = trio.current_time()
        with trio.move_on_after(bounds["total"] + _MARGIN_S):
            is_replaced = await _wait_gone(client, before)
            if not arguments.json:
                again = "; another one serves in its place" if is_replaced else ""
                await output.write(f"gone after {trio.current_time() - began_at:.1f} s{again}\n")
            return exit_codes.OK
    complain(f"the server at {target.shown} is still there {bounds['total'] + _MARGIN_S:g} s after the drain began")
    return exit_codes.FAILED


def _told(answer: dict[str, Any], target: Target) -> str:
    bounds = answer["bounds_s"]
    workers = f"{answer['workers']} processes stop" if answer.get("workers", 1) > 1 else "it stops"
    lame_duck = f"everything still works for {bounds['lame_duck']:g} s, then " if bounds.get("lame_duck") else ""
    return (
        f"The server at {target.shown} drains; {workers} as at SIGTERM: {lame_duck}new work is refused, running "
        f"turns may finish for {bounds['draining']:g} s, and what still runs then is interrupted and kept. "
        f"Gone in {bounds['total']:g} s at most."
    )


async def _workers(client: Client) -> frozenset[tuple[int, str]]:
    tree = await client.request("GET", "/admin/tree", params={"nodes": "10"})
    return frozenset((it["pid"], it["started_at"]) for it in tree["workers"])


async def _wait_gone(client: Client, before: frozenset[tuple[int, str]]) -> bool:
    """Return once none of these processes accepts connections: whether others answer in their place."""
    unanswered = 0
    while True:
        try:
            if not await _workers(client) & before:
                return True
            unanswered = 0
        except LastcallError as error:
            # One connection that is cut is no sign of it: one of several workers has ended, say.
            unanswered = unanswered + 1 if error.status is None or is_of_a_proxy(error) else 0
            if is_connect_refused(error) or unanswered == _UNANSWERED_MAX:
                return False
        await trio.sleep(_LOOK_S)
