"""Runs a command that talks to a server, on Trio, and turns what happens into an exit code."""

import argparse
from importlib import import_module

import trio
from lastcall_client import LastcallError

from service.cli import exit_codes
from service.cli.connection import explained
from service.cli.terminal.output import Output, OutputClosedError, complain
from service.client_settings import Target


def run(arguments: argparse.Namespace, target: Target, *, encoding: str) -> int:
    """Run the command, and return the exit code."""
    command = import_module(f"service.cli.{arguments.command}")
    output = Output(encoding=encoding)

    async def run_command() -> int:
        code = exit_codes.OUTPUT_CLOSED
        try:
            code = await command.run(arguments, target, output)
        except* LastcallError as refused:
            code, line = explained(_first(refused), target)
            complain(line)
        except* OutputClosedError:
            pass
        except* KeyboardInterrupt:  # before the command takes signals itself
            code = exit_codes.INTERRUPTED
        return code

    return trio.run(run_command)


def _first(group: BaseExceptionGroup[LastcallError]) -> LastcallError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
