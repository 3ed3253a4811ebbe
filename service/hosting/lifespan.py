"""The lifespan: holds the service in one ``async with`` while hypercorn serves, and speaks ASGI's protocol for it.

hypercorn serves on without the service when the lifespan returns early or raises. So this lifespan does neither: it
ends when hypercorn has closed all connections, and otherwise it ends the process. Quart's ``while_serving`` cannot be
used: it cannot hold a nursery. Proven by ``tests/hosting/test_lifespan.py``.
"""

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from typing import Any

import msgspec
import structlog
import trio
from hypercorn.config import Sockets
from hypercorn.typing import ConnectionState
from quart import Quart

from service.api.app import attach, detach
from service.api.http.app_state import refusals_of
from service.api.http.proxy import SUCCESSORS
from service.api.operator.stop_wire import bounds_of
from service.api.operator.workers import ASK_STOP, WORKERS
from service.cluster.peer_transport import PeerTransport
from service.errors import StartupError
from service.freezes import watch_for_freezes
from service.hosting.hypercorn.asgi_request import open_requests
from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.http1_connection import Stream
from service.hosting.hypercorn.patches import install_in_worker
from service.hosting.hypercorn.unread_answers import watch_unread_answers
from service.hosting.hypercorn.worker import Worker, find_worker
from service.hosting.listeners.bind import given_sockets
from service.hosting.listeners.closing import DeferredTermination, ListenerShutdown
from service.hosting.listeners.listeners import ACCEPTED_MAX, SHARED_ACCEPTED_MAX, Listeners
from service.hosting.listeners.peer_port import PeerDoor
from service.hosting.metrics_listener import open_metrics_listener
from service.hosting.peer_listener import check_sharing, open_peer_listener
from service.hosting.process.process_exit import ExitCode, leave, leave_at_exit, refuse_to_start
from service.hosting.process.watchdog import Watchdog, count_tasks
from service.hosting.stop_signals import Notice, has_terminal
from service.setting_sources import ignored_variables, standard_variables
from service.settings import Settings, check_stand_in
from service.shutdown import PHASE_MARGIN_S, Host, Shutdown
from service.steps import Steps
from service.stop_state import Phase
from service.supervisor import Service, models_of, open_service
from service.telemetry.banner import announce
from service.telemetry.logging import Log, configure_logging
from service.telemetry.metrics.memory import Memory
from service.telemetry.metrics.metrics import Metrics
from service.telemetry.shutdown_history import ShutdownHistory
from service.telemetry.trace_variables import PREFIX as OTEL_PREFIX
from service.telemetry.trace_variables import OpenTracing, find_tracing
from service.telemetry.tree_nodes import Node, Notes

logger = structlog.get_logger("lastcall")

LOAD_SETTINGS = "lastcall.load_settings"
"""Key of the function that loads an application's settings: the lifespan's begin calls it, not an import."""

READ_SOURCES = "lastcall.read_sources"
"""Key of the function that reads them again."""

GARBAGE_AFTER = 10_000
"""New objects after which the garbage collector runs. With Python's default of 700 a worker with 500 streams spends a
fifth of its time on it, in pieces of 50 ms every half second."""

IDLE_GRACE_MAX_S = 0.5
"""How long a worker that others have replaced keeps idle connections: a request on them is answered and is the last."""
VARIABLES_SHOWN_MAX = 20


class ServiceLifespan:
    """Quart's ``asgi_lifespan_class``: holds the service while the server serves."""

    def __init__(self, app: Quart, _scope: object) -> None:
        self._app = app

    async def __call__(self, receive: Any, send: Any) -> None:
        if not trio.lowlevel.in_trio_run():
            refuse_to_start("Lastcall runs on Trio: start hypercorn with --worker-class trio.")
        with ExitStack() as installed:
            try:
                worker = find_worker()
                if worker is not None:
                    worker.config.startup_timeout = inf  # a recovery may be long; hypercorn reads this after receive()
                await receive()
                settings, hosting = self._prepare(worker)
                if hosting is not None:
                    installed.enter_context(hosting.install())
            except Exception as error:  # noqa: BLE001  after any error hypercorn would serve without the service
                refuse_to_start(error)
            if hosting is None:
                await serve_embedded(self._app, settings, receive, send)
            else:
                await hosting.run(receive, send)

    def _prepare(self, worker: Worker | None) -> "tuple[Settings, Hosting | None]":
        """Return the settings, and the hosting for them; None where other code runs hypercorn."""
        load_settings: Callable[[], Settings] = self._app.extensions[LOAD_SETTINGS]
        settings = load_settings()
        if worker is None:
            return settings, None
        log = configure_logging(settings)
        check_sharing(settings, workers=worker.config.workers)
        check_stand_in(settings, binds=worker.addresses)
        if variables := ignored_variables():
            logger.debug("variables that service links made are ignored", variables=variables[:VARIABLES_SHOWN_MAX])
        return settings, Hosting(self._app, worker, settings, log)


async def serve_embedded(app: Quart, settings: Settings, receive: Any, send: Any) -> None:
    """Hold the service where other code owns the process, as in a test: no signals, no exit codes, no patches."""
    shutdown = Shutdown(settings)
    open_requests(app, shutdown)
    async with open_service(settings, shutdown=shutdown, open_tracing=_find_tracing()) as service:
        attach(app, service)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        shutdown.notice("the server stops")
        await shutdown.reached(Phase.RELEASING)
        detach(app)
    refusals_of(app).flush()
    shutdown.report(tasks_left=0).log()
    await send({"type": "lifespan.shutdown.complete"})


class Hosting(Host):
    """One service in one worker process, from its start to the end of the process."""

    def __init__(self, app: Quart, worker: Worker, settings: Settings, log: Log) -> None:
        self._app = app
        self._worker = worker
        self._settings = settings
        self._log = log
        self._shutdown = Shutdown(settings, self)
        self._requests = open_requests(app, self._shutdown)
        self._watchdog = Watchdog(settings.shutdown_total_s)
        self._notice = Notice(
            self._shutdown,
            self._watchdog,
            is_replaced=lambda: worker.master is not None and worker.master.leaves,
            explain_hangup=worker.master is None and not has_terminal(),
        )
        self._connections = Connections(self._shutdown)
        self._unread_answers = watch_unread_answers(app, timeout_s=settings.unread_timeout_s)
        self._listeners = Listeners(
            given_sockets(worker.config),
            accepted_max=SHARED_ACCEPTED_MAX if worker.config.workers > 1 else ACCEPTED_MAX,
        )
        self._peer_door = PeerDoor()
        self._listener_shutdown = ListenerShutdown(worker, self._listeners, self._peer_door)
        app.extensions[WORKERS] = self._listener_shutdown.workers
        app.extensions[ASK_STOP] = self._ask_stop
        app.extensions[SUCCESSORS] = lambda: worker.master.successors if worker.master is not None else ()
        master = worker.master
        self._metrics = Metrics(
            Memory(master.open_metrics_file() if master is not None else None), models=models_of(settings)
        )
        self._history: ShutdownHistory | None = None
        self._peer_address: str | None = None
        self._opened = False
        self._closed = trio.Event()  # hypercorn has closed every connection and asks the lifespan to end
        worker.config.shutdown_timeout = settings.shutdown_total_s
        worker.config.graceful_timeout = settings.cleanup_timeout_s + PHASE_MARGIN_S + settings.release_timeout_s

    @contextmanager
    def install(self) -> Iterator[None]:
        """Install the patches until the context is left. Then hypercorn may stop, after success and failure alike."""
        master = self._worker.master
        with install_in_worker(
            open_connection=self._connections.open,
            serve_listeners=self._listeners.serve_listeners,
            termination=DeferredTermination(self._shutdown, self._wish_to_end),
            context=self._worker.context,
            stop_event=master.stop_event if master is not None else None,
        ):
            try:
                yield
            finally:
                self._shutdown.enter(Phase.RELEASED)

    async def run(self, receive: Any, send: Any) -> None:
        """Hold the service until it is to stop, then stop it. Returns only once the server has stopped too.

        Call it only inside of :meth:`install`.
        """
        crash: Exception | None = None
        with self._notice.from_signals():
            async with trio.open_nursery() as nursery:
                try:
                    if self._worker.master is not None:
                        self._worker.master.tell_begun(self._settings.shutdown_total_s)
                        self._notice.watch(self._worker.master)
                    with watch_for_freezes(counts_frozen_time=lambda: self._shutdown.phase >= Phase.LAME_DUCK):
                        await self._hold_service(nursery, receive, send)
                    sockets = self._worker.sockets
                    if not self._opened and sockets is not None:
                        await self._refuse_waiting_clients(sockets, nursery)
                except Exception as error:  # noqa: BLE001  the edge of the service: each error here ends the process
                    crash = error
                    await self._end_crashed(error)
                nursery.cancel_scope.cancel()
            self._end(crash)
            await send({"type": "lifespan.shutdown.complete"})

    async def _hold_service(self, nursery: trio.Nursery, receive: Any, send: Any) -> None:
        with trio.CancelScope() as opening:
            nursery.start_soon(self._cancel_unopened, opening)
            async with (
                open_peer_listener(
                    self._worker,
                    self._connections,
                    serving=self._listeners.open,
                    settings=self._settings,
                    door=self._peer_door,
                ) as peers,
                open_service(
                    self._settings,
                    shutdown=self._shutdown,
                    peer_address=peers.address if peers else None,
                    peers=PeerTransport(peers.certificates) if peers else None,
                    read_sources=self._app.extensions.get(READ_SOURCES),
                    metrics=self._metrics,
                    open_tracing=_find_tracing(),
                ) as service,
                open_metrics_listener(
                    self._worker, self._connections, serving=self._listeners.open, settings=self._settings
                ),
            ):
                if peers is not None:
                    self._peer_address = peers.address
                    peers.take_peers(service.store.peer_secret, fence=service.store.fence)
                self._opened = True
                service.tree.add_source(self._describe)
                service.tree.add_source(self._connections.describe)
                service.tree.add_source(self._requests.describe)
                gc.freeze()  # modules, routes and schemas live on: the collector need not look through them
                gc.set_threshold(GARBAGE_AFTER)
                attach(self._app, service)
                try:
                    await send({"type": "lifespan.startup.complete"})
                    nursery.start_soon(self._receive_shutdown, receive)
                    nursery.start_soon(self._notice.watch_hypercorn, self._worker.context)
                    await self._run_beside(service)
                finally:
                    detach(self._app)
                    self._watchdog.start()

    async def _run_beside(self, service: Service) -> None:
        """Run what goes on beside the service, until the server has stopped. An error of these tasks is a crash."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, service)
            if (reports := service.shutdown_reports) is not None:
                # Beside the start: a disk that hangs holds nothing up.
                self._history = reports.history
                nursery.start_soon(reports.note_started)
                nursery.start_soon(reports.measure_last, self._metrics)
            nursery.start_soon(self._unread_answers.run)
            nursery.start_soon(self._leave_clients_to_others)
            await self._shutdown.reached(Phase.RELEASING)
            await self._stop_serving()
            nursery.cancel_scope.cancel()

    def _describe(self, notes: Notes) -> Steps[None]:
        """Tell the live tree of hypercorn's nursery."""
        with suppress(StartupError):  # hypercorn does not serve yet
            notes.name(self._worker.server_nursery, Node(parent=None, kind="nursery", name="client connections"))
        yield

    async def _refuse_waiting_clients(self, sockets: Sockets, nursery: trio.Nursery) -> None:
        """After a start was given up, answer the clients that wait with 503, unless another worker will serve them."""

        async def serve(stream: Stream) -> None:
            worker = self._worker
            await self._connections.open(worker.app, worker.config, worker.context, ConnectionState({}), stream).run()

        with self._shutdown.noting_faults("refusing waiting clients"):
            self._listener_shutdown.give_up_start()
            if not self._listeners.adopt(sockets, self._worker.config, serve, nursery):
                return
            await self._shutdown.close_listeners()
            with trio.move_on_after(self._settings.release_timeout_s):
                await self._listeners.wait_served()

    async def _announce(self, service: Service) -> None:
        await self._listeners.open.wait()
        self._listener_shutdown.show_serving()
        if self._worker.master is not None:
            self._worker.master.tell_serving(self._peer_address)
        addresses, secure = self._listeners.addresses, self._listeners.secure_addresses
        announce(self._log, self._settings, binds=addresses, secure=secure, store=service.store.name)

    def _ask_stop(self, reason: str) -> None:
        """Begin the stop of the whole server, as a signal to it would. A master, if there is one, gives the notice."""
        if self._worker.master is not None:
            self._worker.master.ask_stop(reason)
        else:
            self._notice.tell(reason)

    def _wish_to_end(self) -> None:
        """Stop because of ``--max-requests``: once another worker serves in this place, if the master sees to that."""
        master = self._worker.master
        if master is None or not master.ask_for_successor():
            self._notice.tell("max requests")

    async def _leave_clients_to_others(self) -> None:
        await self._shutdown.reached(Phase.DRAINING)
        if self._shutdown.phase is Phase.DRAINING:  # a drain without a turn, and a second Ctrl+C, end it at once
            with self._shutdown.until(Phase.CLOSING):
                await self._listener_shutdown.leave_clients_to_others()

    async def close_listeners(self) -> None:
        """For :class:`~service.shutdown.Host`. Idle connections close afterwards; those with a request go on."""
        _expect_ends_only()
        self._keep_idle_connections()
        await self._listener_shutdown.close_listeners()

    def close_listeners_at_once(self) -> bool:
        """For :class:`~service.shutdown.Host`."""
        _expect_ends_only()
        self._keep_idle_connections()
        return self._listener_shutdown.close_listeners_at_once()

    async def wait_clients_gone(self) -> None:
        """For :class:`~service.shutdown.Host`. Requests that are not complete get half of the release phase's time."""
        patience_s = self._settings.release_timeout_s / 2
        self._connections.close_idle(grace_s=self._idle_grace_s)
        with self._shutdown.while_replaced():
            await trio.sleep(self._idle_grace_s)  # clients that were accepted together with the notice begin in it
            while self._connections.any_open:
                with trio.move_on_after(patience_s) as patience:
                    await self._connections.wait_none_open()
                if patience.cancelled_caught:
                    self._shutdown.note_connections_aborted(self._refuse_unbegun(older_than_s=patience_s))
                    if self._connections.all_stalled:
                        return
        if not self._shutdown.is_replaced:
            self._connections.keep_idle()

    def _keep_idle_connections(self) -> None:
        if self._shutdown.is_replaced:
            self._connections.idle_grace_s = self._idle_grace_s

    @property
    def _idle_grace_s(self) -> float:
        return min(IDLE_GRACE_MAX_S, self._settings.release_timeout_s / 4)

    async def _cancel_unopened(self, opening: trio.CancelScope) -> None:
        """End the start when a notice arrives during it; once opened, the service ends by its own phases."""
        await self._shutdown.reached(Phase.LAME_DUCK)
        if not self._opened:
            opening.cancel()

    async def _receive_shutdown(self, receive: Any) -> None:
        await receive()
        self._closed.set()
        self._notice.tell("the server stops")

    async def _stop_serving(self) -> None:
        """Let the streams send their last chunk and hypercorn close, for no longer than the release phase."""
        aborted = 0
        if not self._shutdown.is_replaced:
            aborted += self._refuse_unbegun()
        with trio.move_on_after(self._settings.release_timeout_s):
            with trio.move_on_after(self._settings.release_timeout_s / 2):
                await self._closed.wait()
            if self._shutdown.is_replaced:
                aborted += self._refuse_unbegun()
            with self._shutdown.noting_faults("closing stalled connections"):
                aborted += self._connections.abort_stalled()
            await self._closed.wait()
        if not self._closed.is_set():
            with self._shutdown.noting_faults("closing connections"):
                aborted += self._connections.abort_all()
            with trio.move_on_after(PHASE_MARGIN_S):
                await self._closed.wait()
        self._shutdown.note_connections_aborted(aborted)

    def _refuse_unbegun(self, *, older_than_s: float = 0) -> int:
        """Refuse uploads and handshakes that are not complete. Returns the number of connections that are aborted."""
        with self._shutdown.noting_faults("refusing requests that have not begun"):
            self._requests.refuse_uploads(older_than_s=older_than_s)
            return self._connections.abort_handshakes(older_than_s=older_than_s)
        return 0

    async def _end_crashed(self, error: Exception) -> None:
        """End the streams after a crash: the tree has unwound, so they have their terminal events by now."""
        cause = first_cause(error)
        if not self._opened:
            refuse_to_start(cause)
        frame = traceback.extract_tb(cause.__traceback__)[-1]
        logger.critical("service crashed", error=repr(cause), where=f"{frame.filename}:{frame.lineno} in {frame.name}")
        self._shutdown.notice("crash")
        await self._shutdown.close_listeners()
        self._shutdown.enter(Phase.RELEASING)
        await self._stop_serving()

    def _end(self, crash: Exception | None) -> None:
        """Log the report and set the exit code; exit at once if hypercorn would not return to its caller."""
        left = count_tasks(self._worker.task, beside=trio.lowlevel.current_task())
        report = self._shutdown.report(tasks_left=left)
        refusals_of(self._app).flush()
        report.log()
        report.count(self._metrics)
        code = ExitCode.CRASHED if crash else ExitCode.CLEAN if report.clean else ExitCode.FAULTS
        if self._history is not None:
            bounds_ms = {name: round(bound * 1000, 1) for name, bound in bounds_of(self._settings).items()}
            self._history.note_stopped(msgspec.structs.asdict(report), exit_code=code, bounds_ms=bounds_ms)
        if not self._closed.is_set():
            leave(code)
        leave_at_exit(code)


def _find_tracing() -> OpenTracing | None:
    """What opens traces, if the environment asks for them and they can be had. If they cannot, the log says why."""
    open_tracing, warning = find_tracing(standard_variables(OTEL_PREFIX))
    if warning is not None:
        logger.warning("there are no traces", reason=warning)
    return open_tracing


def _expect_ends_only() -> None:
    # The process ends within seconds from here: to look for garbage among objects that end anyway would take a fifth of
    # the time.
    gc.disable()


def first_cause(error: Exception) -> Exception:
    """Return the first error inside of ``error``, without the exception groups around it."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
