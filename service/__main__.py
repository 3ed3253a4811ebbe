"""The console script ``lastcall``, which is ``python -m service`` too.

A stop signal ends ``lastcall serve`` with code 0 from here on, so this module imports nothing else that takes a moment.
"""

import sys

from service.hosting.process.early_stop import end_on_stop_signals


def main() -> int:
    """Run the command line and return the process's exit code."""
    if sys.argv[1:2] == ["serve"]:
        end_on_stop_signals()
    from service.cli.main import main as run  # noqa: PLC0415  takes a moment

    return run()


if __name__ == "__main__":
    sys.exit(main())
