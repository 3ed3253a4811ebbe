"""Runs ``lastcall`` as a document's reader does, but the scripted model falls silent in its reply to one message.

``python -m tests.docs.held_reply MESSAGE serve``. A document cancels the turn of this message by one of its next
commands. The turn still runs then, however long the programs in between take to start.
"""

import sys

import msgspec

from service.__main__ import main
from service.models import scripted
from service.models.client import ModelRequest

TOKENS = 5
"""After so many the model is silent."""


class HeldStream(scripted.ScriptedStream):
    """A scripted reply that has no end, if it is the one to this message."""

    message = ""

    def __init__(self, script: scripted.Script, request: ModelRequest) -> None:
        if getattr(request.prompt[-1], "text", "").endswith(self.message):
            script = msgspec.structs.replace(script, silent_after=TOKENS)
        super().__init__(script, request)


if __name__ == "__main__":
    HeldStream.message = sys.argv.pop(1)
    scripted.ScriptedStream = HeldStream  # type: ignore[misc]
    sys.exit(main())
