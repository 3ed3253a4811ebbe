"""Every patch of a library: what is replaced, by what, for which faults, and how it is undone.

A patch replaces a name inside of a library, because the library has no extension point there. All of them are in
:data:`PATCHES`, and nothing outside of this module replaces a name of a library. ``install_*`` are context managers:
they put the originals back when they are left, the last one first. A name that is not there any more refuses the start.

These are extension points of the libraries, and no patches: Quart's ``asgi_http_class``, ``asgi_lifespan_class``,
``request_class`` and ``body_class``; what :class:`~service.hosting.hypercorn.connections.Connection` overrides of
hypercorn's ``TCPServer``, with the parser that it gives to a connection of its own; hypercorn's ``Config``; and the
filters that ``service.telemetry.logging`` adds to hypercorn's loggers.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event as MasterEvent
from types import ModuleType
from typing import Any, Protocol

import h2.connection
import hypercorn.__main__
import hypercorn.run
import hypercorn.trio.run
import hypercorn.trio.tcp_server
import trio
from h11._readers import READERS
from h11._state import SEND_BODY
from hypercorn.trio.worker_context import WorkerContext

from service.errors import StartupError
from service.hosting.hypercorn.asgi_receive import ConnectionTaskGroup
from service.hosting.hypercorn.chunked_request import JoiningChunkedReader
from service.hosting.hypercorn.connections import HEAD_BYTES_MAX, BoundedDecoder

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


# In a worker

TCP_SERVER = Patch("hypercorn.trio.run.TCPServer", hypercorn.trio.run, "TCPServer", "Connections.open")
TASK_GROUP = Patch("hypercorn.trio.tcp_server.TaskGroup", hypercorn.trio.tcp_server, "TaskGroup", "ConnectionTaskGroup")
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
SERVE_LISTENERS = Patch("hypercorn.trio.run.trio", hypercorn.trio.run, "trio", "Listeners.serve_listeners")
ACCEPT_LOG = Patch(f"the filters of the logger {ACCEPT_LOGGER}", None, "filters", "_RateLimit")
TERMINATE = Patch("WorkerContext.terminate of the worker", None, "terminate", "DeferredTermination")
STOP_EVENT_IS_SET = Patch("is_set of the master's event, in a worker", None, "is_set", "DeferredTermination.is_set")

# In the master

MAIN_RUN = Patch("hypercorn.__main__.run", hypercorn.__main__, "run", "service.hosting.master.run")
COMMAND_RUN = Patch("run of __main__, for python -m hypercorn", None, "run", "service.hosting.master.run")
POPULATE = Patch("hypercorn.run._populate", hypercorn.run, "_populate", "Workers.populate")
WAIT = Patch("hypercorn.run.wait", hypercorn.run, "wait", "Workers.wait")
JOIN_EXITED = Patch("hypercorn.run._join_exited", hypercorn.run, "_join_exited", "Workers.join_exited")
STOP_EVENT_CLEAR = Patch("clear of the master's event, in the master", None, "clear", "Workers._note_reload")
PROCESS_JOIN = Patch("join of each worker's process", None, "join", "Workers._join")

PATCHES = tuple(it for it in tuple(globals().values()) if isinstance(it, Patch))


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
        undoing.callback(TASK_GROUP.put(ConnectionTaskGroup))
        undoing.callback(CHUNKED_READER.put(JoiningChunkedReader))
        undoing.callback(HEAD_BYTES.put(HEAD_BYTES_MAX))
        undoing.callback(HEAD_DECODER.put(BoundedDecoder))
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
    """Have hypercorn see that it is to stop when this says so, whatever its own triggers say."""
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


@contextmanager
def install_in_master(*, populate: object, wait: object, join_exited: object) -> Iterator[None]:
    """Have hypercorn's master call these for its functions that start its workers, wait for them and take them."""
    with ExitStack() as undoing:
        undoing.callback(POPULATE.put(populate))
        undoing.callback(WAIT.put(wait))
        undoing.callback(JOIN_EXITED.put(join_exited))
        yield


def replace_clear(stop_event: MasterEvent, clear: Callable[[], None]) -> Undo:
    """Have the master's event call this for its ``clear``. To be undone before the event is sent to a worker."""
    return STOP_EVENT_CLEAR.put(clear, stop_event)


def replace_join(process: BaseProcess, join: Callable[..., None]) -> Undo:
    """Have a worker's process call this for its ``join``."""
    return PROCESS_JOIN.put(join, process)


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
