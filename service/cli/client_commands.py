"""The commands that talk to a server: ``lastcall chat``, ``sessions``, ``tree`` and ``drain``.

This module is loaded for each ``--help``, so it imports nothing that takes a moment: what a command needs is imported
when it runs.
"""

import argparse
import sys
from collections.abc import Sequence

from service.cli import exit_codes
from service.client_settings import ClientSettingsError, read_target

CLIENT_COMMANDS = ("chat", "sessions", "tree", "drain")
_EXIT_CODES = """\
exit codes: 0 done; 1 the turn did not complete, or the server refused; 2 wrong arguments; 69 no server answers;
75 refused for the moment; 76 no Lastcall server; 77 no permission; 130 Ctrl+C
"""


def main(argv: Sequence[str], *, encoding: str | None = None) -> int:
    """Run one of these commands, without loading the others of ``lastcall``. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="lastcall")
    add_client_commands(parser.add_subparsers(dest="command", required=True))
    return run_client_command(parser.parse_args(argv), encoding=encoding)


def add_client_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add these commands to a command line."""
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument(
        "--url",
        metavar="URL",
        help="the server: http://host:port or unix:path; unless given LASTCALL_URL, else where the settings bind",
    )
    server.add_argument(
        "--api-key-file", metavar="FILE", help="a file that holds the API key; unless given LASTCALL_API_KEY is used"
    )

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[server], help=help_text, description=help_text, epilog=_EXIT_CODES)

    chat = add("chat", "talk with a model; without a terminal: send one message and print the reply")
    chat.add_argument("message", nargs="?", help="send this one message; without a terminal standard input is sent")
    chat.add_argument("--session", metavar="ID", help="go on with this session, or make it; a new one if left out")
    chat.add_argument("--model", metavar="NAME", help="ask this model, in place of the session's")
    chat.add_argument("--json", action="store_true", help="print the events of the turn as JSON, one a line")
    sessions = add("sessions", "list the sessions, newest first, or search them")
    sessions.add_argument("words", nargs="*", help="only sessions with all of these words in the title or in one turn")
    sessions.add_argument("--status", choices=("idle", "running"), help="only sessions with this status")
    sessions.add_argument("--limit", metavar="N", type=_limit, default=20, help="so many in one page, 1 to 100 (20)")
    sessions.add_argument("--after", metavar="CURSOR", help="the next page: what the page before said")
    sessions.add_argument("--all", action="store_true", help="all pages")
    sessions.add_argument("--json", action="store_true", help="print each session as JSON, one a line")
    tree = add("tree", "draw what the server's process does now, as a tree; live on a terminal, until q or Ctrl+C")
    tree.add_argument("--once", action="store_true", help="draw it once")
    tree.add_argument("--worker", metavar="PID", type=int, help="this worker of the server")
    tree.add_argument("--all", action="store_true", help="with cancel scopes, nurseries and idle connections")
    tree.add_argument("--json", action="store_true", help="print the server's answer as JSON")
    drain = add("drain", "stop the server as SIGTERM does: running turns may finish, new work is refused")
    drain.add_argument("--wait", action="store_true", help="wait until the server is gone")
    drain.add_argument("--json", action="store_true", help="print the server's answer as JSON")


def _limit(text: str) -> int:
    """Raises: ArgumentTypeError: This is no number from 1 to 100."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} should be a number from 1 to 100")
    return int(text)


def run_client_command(arguments: argparse.Namespace, *, encoding: str | None = None) -> int:
    """Run one of these commands. Returns the exit code.

    Args:
        encoding: What standard output speaks; as Python found it if left out.
    """
    try:
        target = read_target(arguments.url, arguments.api_key_file)
    except ClientSettingsError as error:
        sys.stderr.write(f"lastcall: {error}\n")
        return exit_codes.USAGE
    try:
        from service.cli import client_run  # noqa: PLC0415  takes a moment

        return client_run.run(arguments, target, encoding=encoding or sys.stdout.encoding)
    except KeyboardInterrupt:  # while the command is loaded
        return exit_codes.INTERRUPTED
