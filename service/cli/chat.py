"""``lastcall chat``: a conversation in the terminal, or one message and its reply in a pipe.

A turn runs on the server, whatever happens to this process: a reply whose connection was lost goes on where it was, and
``--session`` shows it in another terminal. Ctrl+C cancels the turn. A second Ctrl+C, or one while a message is typed,
leaves.
"""

import argparse
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio
from lastcall_client import Bounds, Client, LastcallError, OnWait, Session, TurnStream, Waiting

from service.cli import exit_codes
from service.cli.connection import ONE_ATTEMPT, explained, open_client
from service.cli.reply_views import JsonView, PlainView, ReplyView, TerminalView
from service.cli.terminal.line_editor import Outcome
from service.cli.terminal.output import Output, OutputClosedError, complain, harmless, harmless_line
from service.cli.terminal.prompt import Prompt
from service.client_settings import Target

INPUT_BYTES_MAX = 8 * 1024 * 1024
"""Bound of a message from standard input; the server's own bound (``input_bytes_max``) is usually lower."""
_LEAVE_S = 5
"""How long the cancellation of a turn may take once the command is to end."""
_MARK = "> "
_PATIENT = Bounds(patience_s=None, pause_max_s=3)
"""A person sees that the server is away, and can leave; once it is back, the reply goes on soon."""
_HINT = "Enter sends · Ctrl+J begins a new line · Ctrl+C stops a reply · Ctrl+D leaves"
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


async def run(arguments: argparse.Namespace, target: Target, output: Output) -> int:
    """Run the command, and return the exit code."""
    is_conversation = arguments.message is None and os.isatty(0) and output.is_terminal and not arguments.json
    async with open_client(target, ONE_ATTEMPT) as client:
        if is_conversation:
            return await _Conversation(arguments, target, output, client).run()
        return await _send_one(arguments, output, client)


# One message


async def _send_one(arguments: argparse.Namespace, output: Output, client: Client) -> int:
    relay = _Relay(arguments, output, client)
    with trio.open_signal_receiver(*_STOPS) as signals:
        async with _until_signal(signals) as stopped:
            code = await relay.run()
        if stopped:
            code = 128 + stopped[0]
            await relay.give_up()
        elif code == exit_codes.OUTPUT_CLOSED:
            await relay.give_up()
    return code


@asynccontextmanager
async def _until_signal(signals: AsyncIterator[int]) -> AsyncIterator[list[int]]:
    """Cancel the block at the first signal. The list has the signal then."""
    stopped: list[int] = []

    async def stop(scope: trio.CancelScope) -> None:
        stopped.append(await anext(signals))
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop, nursery.cancel_scope)
        yield stopped
        nursery.cancel_scope.cancel()


class _Relay:
    """One message and its reply."""

    def __init__(self, arguments: argparse.Namespace, output: Output, client: Client) -> None:
        self._arguments, self._client = arguments, client
        kind = JsonView if arguments.json else TerminalView if output.is_terminal else PlainView
        self._view: ReplyView = kind(output)
        self._stream: TurnStream | None = None
        self._is_stopping = False

    async def run(self) -> int:
        """Send the message, and show the reply. Returns the exit code."""
        message = self._arguments.message
        if message is None:
            message = await _read_message()
        if message is None:
            return exit_codes.USAGE
        if not message.strip():
            complain("there is no message: name it, or send it to standard input")
            return exit_codes.USAGE
        await self._client.list_sessions(limit=1)  # where no server is, or no permission, the user is told at once
        self._client.bounds = Bounds(pause_max_s=3)
        session_id, model = self._arguments.session, self._arguments.model
        on_wait = _waiting(self._view, lambda: self._is_stopping)
        self._stream = await _sent(self._client, message, session_id=session_id, model=model, on_wait=on_wait)
        failed: LastcallError | None = None
        try:
            await _show_all(self._stream, self._view)
        except OutputClosedError:
            return exit_codes.OUTPUT_CLOSED
        except LastcallError as error:
            failed = error
        if failed is not None:
            await self._view.cut_off()
            raise failed
        end = self._stream.end
        is_whole = end is not None and end.type == "turn.completed"
        return exit_codes.OK if is_whole and self._view.is_exact else exit_codes.FAILED

    async def give_up(self) -> None:
        """Cancel the turn, if it runs: its reply has no reader any more."""
        stream = self._stream
        if stream is None or stream.end is not None:
            return
        self._is_stopping = True
        with trio.move_on_after(_LEAVE_S):
            with suppress(OutputClosedError):
                await self._view.cut_off()
            with suppress(LastcallError):
                await _cancel(stream)


async def _read_message() -> str | None:
    """The whole of standard input; None, and a complaint, if it is no message."""
    if os.isatty(0):
        sys.stderr.write("Type the message; Ctrl+D ends it.\n")
    read = b""
    # In a thread, because standard input may be a file. One that still reads at the exit is no hindrance.
    while data := await trio.to_thread.run_sync(os.read, 0, 65536, abandon_on_cancel=True):
        read += data
        if len(read) > INPUT_BYTES_MAX:
            complain(f"the message on standard input is longer than {INPUT_BYTES_MAX} bytes")
            return None
    try:
        return read.decode()
    except UnicodeDecodeError:
        complain("the message on standard input should be UTF-8")
        return None


async def _sent(
    client: Client, message: str, *, session_id: str | None, model: str | None, on_wait: OnWait
) -> TurnStream:
    """A stream that sends this message, to this session or a new one."""
    if model is None:
        return client.chat(message, session_id=session_id, on_interrupt="continue", on_wait=on_wait)
    if session_id is None:
        session_id = (await client.create_session())["id"]
    else:
        try:
            await client.create_session(id=session_id)
        except LastcallError as error:
            if error.code != "session_exists":
                raise
    return client.stream(session_id, message, model=model, on_interrupt="continue", on_wait=on_wait)


def _waiting(view: ReplyView, is_stopping: Callable[[], bool]) -> OnWait:
    """What a stream does before a pause: it says so, and once the user stops, it gives up instead of the pause."""

    def wait(waiting: Waiting) -> None:
        if is_stopping():
            raise waiting.error
        view.wait(waiting)

    return wait


async def _show_all(stream: TurnStream, view: ReplyView) -> None:
    async with stream:
        async for event in stream:
            counts = event.type == "turn.resumed" or event.is_end
            await view.show(event, stream.text if counts else "")


async def _cancel(stream: TurnStream) -> None:
    """End the turn of a stream that nobody reads, also one that no answer has named yet: it may have begun.

    The message is then sent once more, with the same key, so that the answer names the turn that has begun.

    Raises:
        LastcallError: The turn may run.
    """
    async with stream:
        if stream.turn_id is None:
            await anext(stream, None)
        if stream.turn_id is not None:
            await stream.cancel()


# A conversation


class _Conversation:
    """A conversation on a terminal: messages are typed, and replies come, one after the other."""

    def __init__(self, arguments: argparse.Namespace, target: Target, output: Output, client: Client) -> None:
        self.session_id: str | None = arguments.session
        self.exit_code = exit_codes.OK
        self._model: str | None = arguments.model
        self._target, self._output, self._client = target, output, client
        self._prompt = Prompt(output, first=_MARK, first_styled=output.styled(_MARK, "bold", "green"))
        self._stream: TurnStream | None = None
        self._reply_scope: trio.CancelScope | None = None
        self._is_stopping = False
        self._was_cut = False

    async def run(self) -> int:
        """Talk until the user leaves. Returns the exit code."""
        session = await self._opened_session()
        self._client.bounds = _PATIENT
        numbers = (*_STOPS, signal.SIGWINCH, signal.SIGCONT)
        with self._prompt.opened(), trio.open_signal_receiver(*numbers) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._take_signals, signals, nursery)
                await self._talk(session)
                nursery.cancel_scope.cancel()
        if self._was_cut:
            await self._output.write("\n")
        if self.session_id is not None and self.exit_code in (exit_codes.OK, exit_codes.INTERRUPTED):
            line = f"lastcall chat --session {harmless_line(self.session_id)} goes on with this conversation"
            await self._output.write(self._output.styled(line, "dim") + "\n")
        return self.exit_code

    async def _opened_session(self) -> Session | None:
        """The session that is to go on, if it is there. Raises: LastcallError, if no server answers, or it refuses."""
        if self.session_id is None:
            await self._client.list_sessions(limit=1)
            return None
        try:
            return await self._client.get_session(self.session_id)
        except LastcallError as error:
            if error.code != "session_not_found":
                raise
            return None

    async def _talk(self, session: Session | None) -> None:
        await self._greet(session)
        while True:
            asked = await self._prompt.ask()
            if asked is Outcome.INTERRUPTED:
                self.exit_code = exit_codes.INTERRUPTED
            if isinstance(asked, Outcome):
                return
            self._prompt.editor.remember(asked)
            view = TerminalView(self._output)
            on_wait = _waiting(view, lambda: self._is_stopping)
            send = partial(_sent, self._client, asked, session_id=self.session_id, model=self._model, on_wait=on_wait)
            if not await self._shown(send, view):
                return

    async def _greet(self, session: Session | None) -> None:
        """Say where the user is; of a session that goes on show the last turn, and follow it if it runs."""
        named = "a new session" if self.session_id is None else f"session {harmless_line(self.session_id)}"
        if session is not None and session["title"]:
            named += f", {harmless_line(session['title'])}"
        await self._output.write(f"{self._output.styled('Lastcall', 'bold')} at {self._target.shown}, {named}\n")
        await self._output.write(self._output.styled(_HINT, "dim") + "\n")
        if session is None or session["head"] is None:
            return
        try:
            turn = await self._client.get_turn(session["id"], session["head"])
        except LastcallError:
            return  # it was deleted meanwhile
        earlier = session["message_count"] - 2
        if earlier > 0:
            await self._output.write(self._output.styled(f"… {earlier} earlier messages", "dim") + "\n")
        await self._output.write(f"{self._output.styled(_MARK, 'bold', 'green')}{harmless(turn['input'])}\n")
        self._prompt.editor.remember(turn["input"])
        view = TerminalView(self._output)

        async def follow() -> TurnStream:
            return self._client.events(turn["session_id"], turn["id"], on_wait=view.wait)

        if turn["ended_at"] is None:
            await self._shown(follow, view)
        elif turn["text"]:
            await self._output.write(harmless(turn["text"]).rstrip("\n") + "\n")

    async def _shown(self, open_stream: Callable[[], Awaitable[TurnStream]], view: TerminalView) -> bool:
        """Show a reply to its end. Returns whether the conversation can go on."""
        try:
            with trio.CancelScope() as self._reply_scope:
                self._stream = await open_stream()
                await _show_all(self._stream, view)
            if self._reply_scope.cancelled_caught:
                await self._say(await self._stop_unanswered())
        except LastcallError as error:
            code, line = explained(error, self._target)
            await self._say(line)
            if code == exit_codes.NO_PERMISSION:
                self.exit_code = code
                return False
        finally:
            if self._stream is not None and self._stream.session_id is not None:
                self.session_id = self._stream.session_id
            self._stream = self._reply_scope = None
            self._is_stopping = False
        return True

    async def _stop_unanswered(self) -> str:
        """Cancel the turn of a message that the server has not answered. Returns what has become of it."""
        with trio.move_on_after(_LEAVE_S), suppress(LastcallError):
            if self._stream is not None:
                await _cancel(self._stream)
            return "stopped before the server had answered"
        return "given up before the server has answered; if it has taken the message, the turn runs"

    async def _say(self, line: str) -> None:
        await self._output.write("\r\x1b[K" + self._output.styled(harmless_line(line), "red") + "\n")

    # Signals

    async def _take_signals(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            if number == signal.SIGWINCH:
                self._prompt.redraw()
            elif number == signal.SIGCONT:
                self._prompt.continued()
            elif number == signal.SIGINT and self._reply_scope is not None and not self._is_stopping:
                self._is_stopping = True
                nursery.start_soon(self._stop_reply)
            else:
                self.exit_code = 128 + number
                self._was_cut = self._reply_scope is not None
                nursery.cancel_scope.cancel()

    async def _stop_reply(self) -> None:
        """Cancel the turn on the server: its stream then tells the end. A message without an answer is given up."""
        stream, scope = self._stream, self._reply_scope
        if stream is None or stream.turn_id is None:
            if scope is not None:
                scope.cancel()
            return
        try:
            await stream.cancel()
        except LastcallError as error:
            _, line = explained(error, self._target)
            await self._say(f"the turn was not stopped: {line}")
