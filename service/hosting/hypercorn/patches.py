"""Every patch of a library: what is replaced, by what, for which faults, and how it is undone.

Each fault in :data:`FAULTS` has a description, a removal test and what goes when that test fails; ``just removal`` runs
these tests against the newest libraries. A patch replaces a name inside of a library, because the library has no
extension point there. All of them are in :data:`PATCHES`, and nothing outside of this module replaces a name of a
library. ``install_*`` are context managers: they put the originals back when they are left, the last one first. A name
that is not there any more refuses the start.

These are extension points of the libraries, and no patches: Quart's ``asgi_http_class``, ``asgi_lifespan_class``,
``request_class`` and ``body_class``; what :class:`~service.hosting.hypercorn.connections.Connection` overrides of
hypercorn's ``TCPServer``, which serves HTTP/1.1 by a connection of ours; hypercorn's ``Config``; and the filters that
``service.telemetry.logging`` adds to hypercorn's loggers.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from multiprocessing.synchronize import Event as MasterEvent
from types import ModuleType
from typing import Any, Protocol

import h2.connection
import hypercorn.__main__
import hypercorn.protocol
import hypercorn.protocol.h2
import hypercorn.run
import hypercorn.trio.run
import trio
from h11._readers import READERS
from h11._state import SEND_BODY
from hypercorn.trio.worker_context import WorkerContext

from service.errors import StartupError
from service.hosting.hypercorn.chunked_request import JoiningChunkedReader
from service.hosting.hypercorn.connections import HEAD_BYTES_MAX, BoundedDecoder
from service.hosting.hypercorn.open_streams import Http2Protocol
from service.hosting.hypercorn.stream_buffer import BoundedStreamBuffer

Undo = Callable[[], None]
_ABSENT = object()
LOG_INTERVAL_S = 1.0
ACCEPT_LOGGER = "trio.serve_listeners"


@dataclass(frozen=True)
class Patch:
    """A name of a library that is replaced.

    Attributes:
        target: Where the name is, as a person writes it.
        owner: The module, class or dictionary that holds the name; None where each object of a kind holds it.
        key: The name itself.
        replacement: What stands in its place.
    """

    target: str
    owner: object
    key: str
    replacement: str

    @property
    def current(self) -> Any:
        """What stands at the name now.

        Raises:
            StartupError: The library has no such name.
        """
        if not hasattr(self.owner, self.key):
            raise self._unknown()
        return getattr(self.owner, self.key)

    def put(self, replacement: object, owner: object = None) -> Undo:
        """Replace the name; returns what puts the original back.

        Args:
            owner: The object whose name is replaced, where the patch itself has none.

        Raises:
            StartupError: The library has no such name.
        """
        holder = owner if self.owner is None else self.owner
        if isinstance(holder, MutableMapping):
            return self._put_item(holder, replacement)
        if not hasattr(holder, self.key):
            raise self._unknown()
        before = vars(holder).get(self.key, _ABSENT)
        setattr(holder, self.key, replacement)

        def undo() -> None:
            self._check_last(vars(holder).get(self.key), replacement)
            if before is _ABSENT:
                delattr(holder, self.key)
            else:
                setattr(holder, self.key, before)

        return undo

    def _put_item(self, holder: MutableMapping[Any, object], replacement: object) -> Undo:
        if self.key not in holder:
            raise self._unknown()
        before = holder[self.key]
        holder[self.key] = replacement

        def undo() -> None:
            self._check_last(holder.get(self.key), replacement)
            holder[self.key] = before

        return undo

    def _check_last(self, found: object, replacement: object) -> None:
        if found is not replacement:
            raise RuntimeError(f"{self.target} was replaced again since: undo the later patch first.")

    def _unknown(self) -> StartupError:
        return StartupError(f"The installed libraries are not those that Lastcall knows: there is no {self.target}.")


@dataclass(frozen=True)
class Fault:
    """What a library gets wrong, or does at too high a price.

    Attributes:
        title: Its section in ``docs/upstream-faults.md``, which describes it so that it could be filed as it is.
        removal_test: Shows that the fault is there. It fails once the library has fixed the fault.
        goes: What is not needed any more then.
        patches: What is replaced because of it; nothing where an extension point is enough.
        issue: The library's own issue, where there is one.
        since: A package and its first version that has the fault, where older versions are supported too.
    """

    title: str
    removal_test: str
    goes: str
    patches: tuple[Patch, ...] = ()
    issue: str | None = None
    since: tuple[str, str] | None = None


# In a worker

TCP_SERVER = Patch("hypercorn.trio.run.TCPServer", hypercorn.trio.run, "TCPServer", "Connections.open")
CHUNKED_READER = Patch(
    "h11._readers.READERS[SEND_BODY]['chunked']",
    READERS[SEND_BODY],
    "chunked",
    "JoiningChunkedReader",
)
HEAD_BYTES = Patch(
    "h2.connection.H2Connection.DEFAULT_MAX_HEADER_LIST_SIZE",
    h2.connection.H2Connection,
    "DEFAULT_MAX_HEADER_LIST_SIZE",
    "HEAD_BYTES_MAX",
)
HEAD_DECODER = Patch("h2.connection.Decoder", h2.connection, "Decoder", "BoundedDecoder")
STREAM_BUFFER = Patch(
    "hypercorn.protocol.h2.StreamBuffer", hypercorn.protocol.h2, "StreamBuffer", "BoundedStreamBuffer"
)
HTTP2_PROTOCOL = Patch("hypercorn.protocol.H2Protocol", hypercorn.protocol, "H2Protocol", "Http2Protocol")
SERVE_LISTENERS = Patch("hypercorn.trio.run.trio", hypercorn.trio.run, "trio", "Listeners.serve_listeners")
ACCEPT_LOG = Patch(f"the filters of the logger {ACCEPT_LOGGER}", None, "filters", "_RateLimit")
TERMINATE = Patch("WorkerContext.terminate of the worker", None, "terminate", "DeferredTermination")
STOP_EVENT_IS_SET = Patch("is_set of the master's event, in a worker", None, "is_set", "DeferredTermination.is_set")

# In the master

MAIN_RUN = Patch("hypercorn.__main__.run", hypercorn.__main__, "run", "service.hosting.master.run")
COMMAND_RUN = Patch("run of __main__, for python -m hypercorn", None, "run", "service.hosting.master.run")

PATCHES = tuple(it for it in tuple(globals().values()) if isinstance(it, Patch))

_CONNECTIONS = "tests/hosting/hypercorn/test_connections.py"

FAULTS = (
    Fault(
        "hypercorn: a client that does not read holds the shutdown for ever",
        f"{_CONNECTIONS}::test_a_client_that_does_not_read_is_still_able_to_hold_hypercorn",
        "Connections.abort_stalled and UnreadAnswers",
        (TCP_SERVER,),
    ),
    Fault(
        "hypercorn: a connection that its client has closed is kept until the keep-alive timeout",
        f"{_CONNECTIONS}::test_hypercorn_still_keeps_connections_that_their_clients_closed",
        "the last step of Connection._read_data",
        (TCP_SERVER,),
    ),
    Fault(
        "hypercorn: a connection stays open after an error response of hypercorn itself",
        f"{_CONNECTIONS}::test_hypercorn_still_keeps_a_connection_after_an_answer_of_its_own",
        "Connection._has_refused",
        (TCP_SERVER,),
    ),
    Fault(
        "hypercorn: an HTTP/2 client that sends a preface and nothing else is never idle",
        f"{_CONNECTIONS}::test_hypercorn_still_waits_for_an_http2_client_that_asks_nothing",
        "the second half of Connection._tidy_up",
        (TCP_SERVER,),
    ),
    Fault(
        "hypercorn: an HTTP/2 client that has reset its only stream is never idle",
        f"{_CONNECTIONS}::test_hypercorn_still_waits_for_a_client_of_http2_that_has_reset_its_stream",
        "the first half of Connection._tidy_up",
        (TCP_SERVER,),
    ),
    Fault(
        "hypercorn: a request of an HTTP/2 client that has left never ends",
        "tests/hosting/hypercorn/test_unread_answers.py::test_hypercorn_still_waits_for_a_client_of_http2_that_has_left",
        "the close of the buffers in Connection._read_data",
        (TCP_SERVER,),
    ),
    Fault(
        "hypercorn: a response on HTTP/2 is held in memory as a whole while its client grants no window",
        "tests/hosting/hypercorn/test_stream_buffer.py::"
        "test_hypercorn_still_takes_all_pieces_of_a_stream_without_a_window",
        "BoundedStreamBuffer",
        (STREAM_BUFFER,),
    ),
    Fault(
        "hypercorn: a body that arrives after its HTTP/2 request was answered ends the connection",
        "tests/hosting/hypercorn/test_open_streams.py::"
        "test_hypercorn_still_ends_a_connection_for_a_body_that_arrives_after_the_answer",
        "Http2Protocol, with OpenStreams",
        (HTTP2_PROTOCOL,),
    ),
    Fault(
        "hypercorn: a request that arrives while the server stops is reset",
        f"{_CONNECTIONS}::test_hypercorn_still_closes_on_a_request_that_is_on_its_way",
        "Connection._wait_for_request_on_its_way",
        (TCP_SERVER,),
    ),
    Fault(
        "hypercorn: HTTP/2 streams are truncated when the server stops",
        f"{_CONNECTIONS}::test_hypercorn_still_truncates_http2_streams",
        "ConnectionContext",
        (TCP_SERVER,),
    ),
    Fault(
        "hypercorn: bytes that its parsers do not expect end the whole server",
        f"{_CONNECTIONS}::test_bytes_that_hypercorn_cannot_parse_still_end_all_of_it",
        "the except* of Connection.run",
        (TCP_SERVER,),
    ),
    Fault(
        "hypercorn: a request takes a task and a round of the event loop for each message",
        "tests/hosting/hypercorn/test_asgi_receive.py::test_the_receive_queue_is_still_needed",
        "ReceiveQueue on HTTP/2",
    ),
    Fault(
        "hypercorn: a cancelled task group raises its own cancellation",
        "tests/hosting/hypercorn/test_asgi_receive.py::test_hypercorns_task_group_still_lets_its_own_cancellation_out",
        "ConnectionTaskGroup.__aexit__",
    ),
    Fault(
        "h11: each chunk of a body is an event",
        "tests/hosting/hypercorn/test_chunked_request.py::test_the_joining_reader_is_still_needed",
        "JoiningChunkedReader",
        (CHUNKED_READER,),
    ),
    Fault(
        "h2: the bound on a head cannot be set before the first head",
        "tests/hosting/hypercorn/test_event_loop.py::test_hypercorns_setting_still_does_not_bound_the_heads_of_http_2",
        "HEAD_BYTES of the patches",
        (HEAD_BYTES,),
    ),
    Fault(
        "hpack: a head may have any number of table size updates",
        "tests/hosting/hypercorn/test_event_loop.py::test_the_bounded_decoder_is_still_needed",
        "BoundedDecoder",
        (HEAD_DECODER,),
    ),
    Fault(
        "hypercorn: a client that connects while a worker stops hangs and is reset",
        "tests/hosting/listeners/test_closing.py::test_hypercorn_lets_clients_that_connect_after_its_stop_hang_and_resets_them",
        "Listeners, DeferredTermination",
        (
            SERVE_LISTENERS,
            TERMINATE,
            STOP_EVENT_IS_SET,
        ),
    ),
    Fault(
        "trio: a listener without descriptors logs a traceback ten times a second",
        "tests/hosting/listeners/test_listeners.py::test_trio_still_reports_it_more_than_once",
        "_RateLimit of the patches",
        (ACCEPT_LOG,),
    ),
    Fault(
        "quart-trio, hypercorn: a kept-alive connection never times out",
        "tests/hosting/hypercorn/test_asgi_request.py::test_the_shield_of_the_last_send_is_still_needed",
        "the shield of AsgiRequest._send_shielding_the_last",
    ),
    Fault(
        "h11: an empty line before a request is refused",
        "tests/hosting/hypercorn/test_request_parser.py::test_h11_still_refuses_an_empty_line_before_a_request",
        "RequestParser",
    ),
    Fault(
        "h11: a field of blanks takes a time that grows with its length squared",
        "tests/hosting/hypercorn/test_request_parser.py::test_h11_still_takes_long_for_blanks_before_a_byte_that_it_refuses",
        "has_refused_bytes",
    ),
    Fault(
        "hypercorn: the server goes on serving when its lifespan has ended",
        "tests/hosting/test_lifespan.py::test_hypercorn_still_serves_on_without_its_lifespan",
        "that Hosting ends the process by itself",
    ),
    Fault(
        "hypercorn: a single process dies of SIGTERM",
        "tests/hosting/test_lifespan.py::test_hypercorn_alone_dies_of_sigterm",
        "Notice.from_signals with --workers 0",
    ),
    Fault(
        "CPython: the interpreter takes 80 ms to shut down",
        "tests/hosting/process/test_process_exit.py::test_an_interpreter_still_takes_long_to_shut_down",
        "leave_at_exit",
    ),
    Fault(
        "hypercorn: the master returns 0 also if its workers fail",
        "tests/hosting/test_master.py::test_hypercorns_own_join_still_forgets_the_code_by_its_second_call",
        "Workers._note_code",
        (MAIN_RUN, COMMAND_RUN),
        issue="https://github.com/pgjones/hypercorn/issues/269",
    ),
    Fault(
        "hypercorn: the end of one worker ends all of them",
        "tests/hosting/test_exit_codes.py::test_a_killed_worker_of_bare_hypercorn_ends_the_service_with_0",
        "Workers._may_replace",
        (MAIN_RUN, COMMAND_RUN),
    ),
    Fault(
        "hypercorn: one refused start ends all workers",
        "tests/hosting/test_exit_codes.py::test_a_refused_start_ends_the_service_of_bare_hypercorn_with_0",
        "StartPause",
        (MAIN_RUN, COMMAND_RUN),
    ),
    Fault(
        "hypercorn: a reload ends the old workers before it starts new ones, without a bound",
        "tests/hosting/test_master.py::test_a_reload_of_hypercorn_still_ends_the_old_workers_first",
        "Workers._let_stale_leave",
        (MAIN_RUN, COMMAND_RUN),
    ),
    Fault(
        "hypercorn: two servers with several workers share a port",
        "tests/hosting/listeners/test_bind.py::test_hypercorn_still_shares_a_port_between_servers_with_several_workers",
        "that bind_addresses sets the number of workers",
    ),
    Fault(
        "hypercorn: the Unix socket of a running server is taken over",
        "tests/hosting/listeners/test_bind.py::test_hypercorn_still_takes_the_unix_socket_of_another_server",
        "_is_answered of listeners/bind.py",
    ),
    Fault(
        "quart: a body without a length is kept without a bound",
        "tests/api/http/test_request_body.py::test_quarts_own_body_still_keeps_more_than_it_takes",
        "BoundedBody's own bound",
        since=("quart", "0.23"),
    ),
)


class Termination(Protocol):
    """What stands in for ``context.terminate``, and decides when hypercorn sees that it is to stop."""

    async def set(self) -> None: ...

    async def clear(self) -> None: ...

    async def wait(self) -> None: ...

    def is_set(self) -> bool: ...


@contextmanager
def install_in_worker(
    *,
    open_connection: object,
    serve_listeners: object,
    termination: Termination,
    context: WorkerContext,
    stop_event: MasterEvent | None,
) -> Iterator[None]:
    """Install what a worker needs, before hypercorn serves: it looks the names up once the lifespan has begun.

    Raises:
        StartupError: A library has no such name. Nothing is replaced then.
    """
    with (
        install_connections(open_connection),
        install_listeners(serve_listeners),
        install_termination(termination, context, stop_event),
    ):
        yield


@contextmanager
def install_connections(open_connection: object) -> Iterator[None]:
    """Have hypercorn's trio worker open its connections with this, in place of its ``TCPServer``."""
    with ExitStack() as undoing:
        undoing.callback(TCP_SERVER.put(open_connection))
        undoing.callback(CHUNKED_READER.put(JoiningChunkedReader))
        undoing.callback(HEAD_BYTES.put(HEAD_BYTES_MAX))
        undoing.callback(HEAD_DECODER.put(BoundedDecoder))
        undoing.callback(STREAM_BUFFER.put(BoundedStreamBuffer))
        undoing.callback(HTTP2_PROTOCOL.put(Http2Protocol))
        yield


@contextmanager
def install_listeners(serve_listeners: object) -> Iterator[None]:
    """Have hypercorn's trio worker serve its listeners with this, in place of ``trio.serve_listeners``."""
    accept_log = logging.getLogger(ACCEPT_LOGGER)
    with ExitStack() as undoing:
        undoing.callback(SERVE_LISTENERS.put(_TrioWith(serve_listeners=serve_listeners)))
        undoing.callback(ACCEPT_LOG.put([*accept_log.filters, _RateLimit()], accept_log))
        yield


@contextmanager
def install_termination(
    termination: Termination, context: WorkerContext, stop_event: MasterEvent | None
) -> Iterator[None]:
    """Have ``termination`` decide, in place of hypercorn's own triggers, when hypercorn sees that it is to stop."""
    with ExitStack() as undoing:
        undoing.callback(TERMINATE.put(termination, context))
        if stop_event is not None:
            undoing.callback(STOP_EVENT_IS_SET.put(termination.is_set, stop_event))
        yield


@contextmanager
def install_in_command_line(main: ModuleType, run: object) -> Iterator[None]:
    """Have hypercorn's command line call this for its ``run``.

    Args:
        main: The module that was started: hypercorn's own, where it was started by ``python -m hypercorn``.
    """
    with ExitStack() as undoing:
        if getattr(main, "run", None) is hypercorn.run.run and main is not hypercorn.__main__:
            undoing.callback(COMMAND_RUN.put(run, main))
        undoing.callback(MAIN_RUN.put(run))
        yield


class _TrioWith(ModuleType):
    """Trio as one module sees it, with something else in the place of a name."""

    def __init__(self, **others: Callable[..., Awaitable[object]] | object) -> None:
        super().__init__("trio")
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


class _RateLimit(logging.Filter):
    """Lets a line through once in a while, without its traceback.

    Where no descriptors are left Trio logs a traceback ten times a second for each listener: a line will do.
    """

    _quiet_until = -inf

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = None
        if record.created < self._quiet_until:
            return False
        self._quiet_until = record.created + LOG_INTERVAL_S
        return True
