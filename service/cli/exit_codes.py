"""The exit codes of ``lastcall``, but for how a server ends. Those from 64 to 78 are of ``sysexits.h``.

Of a server: :class:`~service.hosting.process.process_exit.ExitCode`.
"""

from typing import Final

OK: Final = 0
FAILED: Final = 1
"""The turn did not complete, or the server refused the call for what it is."""
USAGE: Final = 2
"""The command line, the address or the key cannot be used."""
UNREACHABLE: Final = 69
"""No server answers (``EX_UNAVAILABLE``)."""
BUSY: Final = 75
"""The server refuses for the moment: a limit, a start, a stop (``EX_TEMPFAIL``)."""
NOT_LASTCALL: Final = 76
"""What answers is no Lastcall server (``EX_PROTOCOL``)."""
NO_PERMISSION: Final = 77
"""The server does not accept the key, or the key may not do this (``EX_NOPERM``)."""
REFUSED: Final = 78
"""A start, or a command for the store, was refused (``EX_CONFIG``)."""
INTERRUPTED: Final = 130
"""Ctrl+C. Other signals: 128 and their number."""
OUTPUT_CLOSED: Final = 141
"""The reader of standard output has gone, as SIGPIPE would say."""
