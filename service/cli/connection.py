"""The connection of a command to its server, and what its refusals mean for the user."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from lastcall_client import Bounds, Client, LastcallError

from service.cli import exit_codes
from service.client_settings import Target

ONE_ATTEMPT = Bounds(patience_s=0)
"""For the first call: where no server is, the user is told at once."""


@asynccontextmanager
async def open_client(target: Target, bounds: Bounds) -> AsyncIterator[Client]:
    """A client of this server. Leaving it closes its connections.

    The proxies of the environment are used, but not for a server on this machine.
    """
    transport = None
    if target.is_on_this_machine:
        transport = httpx.AsyncHTTPTransport(verify=httpx.create_ssl_context(), uds=target.unix_path)
    limits = httpx.Limits(max_keepalive_connections=4)
    async with (
        httpx.AsyncClient(transport=transport, trust_env=transport is None, limits=limits) as http,
        Client(target.url, api_key=target.api_key, bounds=bounds, http=http) as client,
    ):
        yield client


def is_connect_refused(error: LastcallError) -> bool:
    """Whether no connection could be made."""
    return isinstance(error.__cause__, httpx.ConnectError)


def is_of_a_proxy(error: LastcallError) -> bool:
    """Whether a proxy has answered, because no server did."""
    return error.code == "unknown" and error.status in (502, 503, 504)


def explained(error: LastcallError, target: Target) -> tuple[int, str]:
    """The exit code of a refusal, and one line that says what the user can do."""
    server = target.shown
    if error.code == "unreachable":
        why = str(error).removeprefix("The server cannot be reached: ")
        line = f"no server answers at {server} ({why}): lastcall serve starts one, --url names another"
        return exit_codes.UNREACHABLE, line
    if is_of_a_proxy(error):
        return exit_codes.UNREACHABLE, f"no server answers at {server}: the proxy before it says {error.status}"
    if error.code in ("timeout", "cut"):
        return exit_codes.UNREACHABLE, f"the server at {server} does not answer"
    if error.status == 401:
        how = "does not accept this API key" if target.api_key else "requires an API key"
        return exit_codes.NO_PERMISSION, f"{server} {how}: set LASTCALL_API_KEY, or name its file with --api-key-file"
    if error.status == 403:
        return exit_codes.NO_PERMISSION, f"{server} refuses: {error.detail}"
    if error.code in ("unknown", "malformed_answer", "redirected", "event_too_large"):
        return exit_codes.NOT_LASTCALL, f"what answers at {server} does not speak as Lastcall does: {error.detail}"
    if error.is_passing:
        return exit_codes.BUSY, f"{server} refuses for the moment: {error.detail}"
    return exit_codes.FAILED, f"refused: {error.detail} ({error.code})"
