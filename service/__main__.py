"""The console script ``lastcall``, which is ``python -m service`` too.

A stop signal ends ``lastcall serve`` with code 0 from here on, and SIGHUP does not end one with workers, so this module
imports nothing else that takes a moment.
"""

import sys
from collections.abc import Sequence

from service.cli.client_commands import CLIENT_COMMANDS
from service.cli.client_commands import main as run_client_command
from service.hosting.process.early_stop import end_on_stop_signals


def main() -> int:
    """Run the command line and return the process's exit code."""
    if sys.argv[1:2] == ["serve"]:
        end_on_stop_signals(hold_hangups=_becomes_master(sys.argv[2:]))
    if sys.argv[1:2] and sys.argv[1] in CLIENT_COMMANDS:
        return run_client_command(sys.argv[1:])
    from service.cli.main import main as run  # noqa: PLC0415  takes a moment

    return run()


def _becomes_master(arguments: Sequence[str]) -> bool:
    """Whether ``lastcall serve`` with these arguments has workers, and no parent that serves anew after each change."""
    return any(it.startswith("--w") for it in arguments) and not any(it.startswith("--r") for it in arguments)


if __name__ == "__main__":
    sys.exit(main())
