"""``lastcall sessions``: list the sessions, or search them, page by page.

In a pipe a session is one line of fields with tabs between: id, status, last use, messages, title, and what was found.
"""

import argparse
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from lastcall_client import Client, Session

from service.cli import exit_codes
from service.cli.connection import ONE_ATTEMPT, open_client
from service.cli.reply_views import json_line
from service.cli.terminal.cells import cells, cut, padded
from service.cli.terminal.output import Output, harmless_line
from service.client_settings import Target

_ID_WIDTH_MAX = 40
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


async def run(arguments: argparse.Namespace, target: Target, output: Output) -> int:
    """Run the command, and return the exit code."""
    async with open_client(target, ONE_ATTEMPT) as client:
        await _print_pages(arguments, output, client)
    return exit_codes.OK


async def _print_pages(arguments: argparse.Namespace, output: Output, client: Client) -> None:
    after, is_first = arguments.after, True
    words = " ".join(arguments.words) or None
    while True:
        page = await client.list_sessions(limit=arguments.limit, after=after, status=arguments.status, q=words)
        await _print_page(arguments, output, page["data"], is_first=is_first)
        after, is_first = page["next"], False
        if not (arguments.all and after):
            break
    if output.is_terminal and not arguments.json:
        if after:
            await output.write(output.styled(harmless_line(f"more: {_next_command(arguments, after)}"), "dim") + "\n")
        elif page.get("partial"):
            await output.write(output.styled("the search ended early: more specific words find more", "dim") + "\n")


async def _print_page(
    arguments: argparse.Namespace, output: Output, sessions: Sequence[Session], *, is_first: bool
) -> None:
    if arguments.json:
        lines = [json_line(session) for session in sessions]
    elif not output.is_terminal:
        lines = ["\t".join(_fields(session)) + "\n" for session in sessions]
    elif sessions:
        lines = _table(output, sessions, with_head=is_first)
    else:
        lines = [output.styled("no sessions" if is_first else "no more sessions", "dim") + "\n"]
    await output.write("".join(lines))


def _fields(session: Session) -> list[str]:
    fields = [session["id"], session["status"], session["last_accessed_at"], str(session["message_count"])]
    fields += [session["title"] or "", *([session["match"]["snippet"]] if session.get("match") else [])]
    return [harmless_line(it) for it in fields]


def _table(output: Output, sessions: Sequence[Session], *, with_head: bool) -> list[str]:
    columns, _ = output.size()
    width = min(max(cells(it["id"]) for it in sessions), _ID_WIDTH_MAX)
    rest = max(10, columns - width - 24)
    lines = []
    if with_head:
        lines.append(output.styled(f"{padded('session', width)}  {'used':>9}  {'messages':>8}  title", "dim") + "\n")
    for session in sessions:
        title = harmless_line(session["title"] or "")
        is_running = session["status"] == "running"
        name = padded(harmless_line(session["id"]), width)
        name = output.styled(name, "bold", "green") if is_running else output.styled(name, "bold")
        used = "running" if is_running else _ago(session["last_accessed_at"])
        lines.append(f"{name}  {used:>9}  {session['message_count']:>8}  {cut(title, rest)}".rstrip() + "\n")
        if found := session.get("match"):
            lines.append(output.styled(f"  {cut(harmless_line(found['snippet']), max(10, columns - 3))}", "dim") + "\n")
    return lines


def _ago(moment: str) -> str:
    past_s = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())
    unit, unit_s = next((it for it in _UNITS if past_s >= it[1]), _UNITS[-1])
    return f"{int(past_s // unit_s)} {unit}"


def _next_command(arguments: argparse.Namespace, after: str) -> str:
    said = ["lastcall", "sessions"]
    said += ["--url", arguments.url] if arguments.url else []
    said += ["--api-key-file", arguments.api_key_file] if arguments.api_key_file else []
    said += ["--status", arguments.status] if arguments.status else []
    said += ["--limit", str(arguments.limit)] if arguments.limit != 20 else []
    return shlex.join([*said, "--after", after, *arguments.words])
