"""The supervision tree: which part of the service owns which. One ``async with`` opens the service and closes it.

::

    open_service()
    ├─ tracing               only where traces are on; owns the thread that sends them
    ├─ store                 opened first, closed last; an acknowledged write is never lost
    ├─ model clients         one per upstream; closed after the last turn
    ├─ sessions              one task per session with work
    │  └─ session <id>       a failure ends the turns of this session only
    │     └─ turn <id>       has the whole-turn deadline; a failure becomes the terminal event. A turn runs in the
    │        │               session's task, or in a task of its own if it was queued
    │        └─ model stream has the first-token and next-token deadlines; leaving closes the connection
    └─ loops                 children of one nursery, inside of all the above
       ├─ expiry loop        removes expired sessions
       ├─ heartbeat loop     wakes the streams that have been silent for a while
       ├─ recovery loop      retries writes that the store refused, and ends the turns of processes that died
       ├─ checkpoint loop    only with a store that outlives the process
       ├─ standing watcher   ends the service once another process has taken over its turns
       ├─ refusal loop       tells how many requests were refused, once a second
       ├─ metrics loop       measures what is not counted where it happens, once a second
       ├─ shutdown watcher   waits for the notice, then runs the phases
       ├─ key loop           reads API keys again when their files change
       └─ tree keeper        forgets what the live tree has mirrored, once nobody looks any more

The parts start in this order. On the way down the loops are cancelled first, all at once; then the sessions, the
model clients in reverse order, the store and the traces close, one after the other. The indentation of
:func:`open_service` shows the same order. An error in the expiry, recovery or checkpoint loop is logged, and the loop
goes on. Any other failure of a child ends the service: the tree unwinds, and the failure leaves :func:`open_service`.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from service.api_keys import ApiKeys
from service.clock import Clock, SteadyClock
from service.cluster.peer_transport import PeerTransport
from service.errors import StartupError, StoreError, StoreLostError
from service.gauges import Gauges
from service.models.client import ModelClient
from service.models.http.read_poller import open_read_poller
from service.models.model_catalog import ModelCatalog
from service.models.openai_compatible import OpenAICompatibleClient, open_openai_compatible
from service.models.retrying import RetryingClient
from service.models.scripted import Script, open_scripted
from service.models.upstreams import Upstreams
from service.sessions.sessions import Sessions, open_sessions
from service.sessions.turns.turn_metrics import count_recovered
from service.sessions.upkeep.checkpoints import run_checkpoints
from service.sessions.upkeep.expiry import run_expiry
from service.sessions.upkeep.heartbeats import run_heartbeats
from service.sessions.upkeep.recovery import run_recovery
from service.setting_sources import Sources
from service.setting_types import missing_driver, shown_url
from service.settings import Settings, Upstream
from service.shutdown import Shutdown
from service.steps import Steps
from service.storage.memory import open_memory_store
from service.storage.store import Store
from service.storage.store_deadline import answered_within
from service.telemetry.live_tree import LiveTree
from service.telemetry.metrics.metrics import Metrics
from service.telemetry.refusal_log import RefusalLog
from service.telemetry.shutdown_reports import ShutdownReports, open_shutdown_reports
from service.telemetry.trace_variables import OpenTracing
from service.telemetry.tree_nodes import Node, Notes

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

logger = structlog.get_logger("lastcall.supervisor")

TRACES_TIMEOUT_S = 0.5
"""How long a stop waits for a collector that takes no spans: less than it waits for anything that clients need."""


@dataclass(frozen=True)
class Service:
    """The parts of the open service that its callers use. Valid inside :func:`open_service`."""

    settings: Settings
    clock: Clock
    store: Store
    sessions: Sessions
    models: ModelCatalog
    shutdown: Shutdown
    refusals: RefusalLog
    keys: ApiKeys
    tree: LiveTree
    gauges: Gauges
    tracing: "Tracing | None"
    shutdown_reports: ShutdownReports | None


@asynccontextmanager
async def open_service(
    settings: Settings,
    *,
    shutdown: Shutdown | None = None,
    clock: Clock | None = None,
    peer_address: str | None = None,
    peers: PeerTransport | None = None,
    read_sources: Callable[[], Sources] | None = None,
    metrics: Metrics | None = None,
    open_tracing: OpenTracing | None = None,
) -> AsyncIterator[Service]:
    """Open the whole service. Leaving the context stops and closes each part within a bound of its own.

    Args:
        shutdown: Receives the notice. The caller makes it where a notice may come before the tree is open.
        clock: Wall time; a :class:`~service.clock.SteadyClock` unless given.
        peer_address: The address at which this process answers other processes that share the store.
        peers: How it reaches them; only through Unix sockets unless given.
        read_sources: Reads the settings again, for API keys that change; None if they never do.
        metrics: Counts what happens, also after the service is closed; of this service alone unless given.
        open_tracing: Opens traces; there are none unless given.

    Raises:
        StartupError: A part cannot be opened; one sentence names the part and the reason.
    """
    shutdown = shutdown or Shutdown(settings)
    clock = clock or SteadyClock()
    metrics = metrics or Metrics(models=models_of(settings))
    refusals = RefusalLog(metrics)
    keys = ApiKeys(settings, read_sources=read_sources)
    tree = LiveTree()
    shutdown_reports = await open_shutdown_reports(settings)
    async with (
        _open_tracing(open_tracing, shutdown) as tracing,
        shutdown.closing(_open_store(settings, peer_address, metrics), "the store") as store,
        _open_upstreams(settings, shutdown, clock, tree, metrics) as upstreams,
        open_sessions(
            store=store,
            client_for=upstreams.client_for,
            clock=clock,
            settings=settings,
            stop=shutdown,
            transport=peers,
            metrics=metrics,
            tracing=tracing,
        ) as sessions,
        trio.open_nursery() as nursery,
    ):
        tree.add_source(sessions.describe)
        tree.add_source(partial(_describe_nursery, nursery))
        await _recover(store, clock, settings, metrics)
        expiry = partial(
            run_expiry,
            store,
            clock=clock,
            interval_s=settings.expiry_interval_s,
            store_timeout_s=settings.store_timeout_s,
            metrics=metrics,
        )
        await nursery.start(expiry, name="expiry loop")
        await nursery.start(run_heartbeats, sessions.streams, name="heartbeat loop")
        recovery = partial(
            run_recovery, sessions, shared=store.capabilities.shared, woken=store.standing.taken_over.wait
        )
        await nursery.start(recovery, name="recovery loop")
        if store.capabilities.durable:
            checkpoints = partial(
                run_checkpoints,
                store,
                open_turns=sessions.open_turns,
                interval_s=settings.checkpoint_interval_s,
                store_timeout_s=settings.store_timeout_s,
            )
            await nursery.start(checkpoints, name="checkpoint loop")
        await nursery.start(_run_until_lost, store, sessions, name="standing watcher")
        await nursery.start(refusals.run, name="refusal loop")
        gauges = Gauges(metrics, store=store, sessions=sessions, clients=upstreams.clients, clock=clock)
        await nursery.start(gauges.run, name="metrics loop")
        await nursery.start(shutdown.run, sessions, name="shutdown watcher")
        await nursery.start(keys.run, name="key loop")
        await nursery.start(tree.run, name="tree keeper")
        models = ModelCatalog(upstreams, default_model=settings.default_model)
        yield Service(
            settings,
            clock,
            store,
            sessions,
            models,
            shutdown,
            refusals,
            keys,
            tree,
            gauges,
            tracing,
            shutdown_reports,
        )
        nursery.cancel_scope.cancel()


def _describe_nursery(nursery: trio.Nursery, notes: Notes) -> Steps[None]:
    notes.name(nursery, Node(parent=None, kind="nursery", name="loops of the service"))
    yield


def _open_tracing(
    open_tracing: OpenTracing | None, shutdown: Shutdown
) -> AbstractAsyncContextManager["Tracing | None"]:
    """Open traces first, and close them last: then all spans have ended. What a collector does not take is no fault."""

    def flush_deadline() -> float:
        return min(shutdown.closing_deadline(), trio.current_time() + TRACES_TIMEOUT_S)

    return nullcontext() if open_tracing is None else open_tracing(flush_deadline=flush_deadline)


def check_script(url: str, *, setting: str) -> None:
    """Check a ``scripted:`` URL before any part of the service is opened.

    Raises:
        SettingsError: A parameter is unknown or wrong; the message begins with ``setting``.
    """
    Script.from_url(url, setting=setting)


def models_of(settings: Settings) -> set[str]:
    """The models that the settings name: of those that callers name, only these are told in the metrics."""
    named = {model for upstream in settings.all_upstreams for model in upstream.models}
    return named if settings.title_model is None else named | {settings.title_model}


def _open_store(settings: Settings, peer_address: str | None, metrics: Metrics) -> AbstractAsyncContextManager[Store]:
    """Open the store that ``store_url`` names."""
    match settings.store_scheme:
        case "memory":
            return open_memory_store(sessions_max=settings.memory_sessions_max)
        case "sqlite":
            from service.storage.sqlite import open_sqlite_store  # noqa: PLC0415  a memory store needs no SQLite

            path = settings.store_url.removeprefix("sqlite:")
            return open_sqlite_store(
                path, address=peer_address, close_timeout_s=settings.release_timeout_s, metrics=metrics
            )
        case "postgresql":
            try:
                from service.storage.postgres import open_postgres_store  # noqa: PLC0415  only this store needs psycopg
            except ModuleNotFoundError as error:
                raise missing_driver(settings.store_url) from error
            return open_postgres_store(
                settings.store_url,
                schema_name=settings.store_schema,
                address=peer_address,
                close_timeout_s=settings.release_timeout_s,
                metrics=metrics,
            )
        case scheme:
            raise AssertionError(scheme)


@asynccontextmanager
async def _open_upstreams(
    settings: Settings, shutdown: Shutdown, clock: Clock, tree: LiveTree, metrics: Metrics
) -> AsyncIterator[Upstreams]:
    """Open one model client per upstream, each with its own connection pool.

    The clients close in reverse order, each within a bound.
    """

    async def open_client(upstream: Upstream, name: str | None) -> ModelClient:
        # The exit stack runs in reverse: the client closes first, then the note says that this client is closed.
        clients.callback(shutdown.note_client_closed)
        url, api_key = upstream.url, upstream.api_key
        if url.startswith("scripted:"):
            opened: AbstractAsyncContextManager[ModelClient] = open_scripted(url, name=name)
        else:
            opened = open_openai_compatible(
                url,
                api_key=api_key.get_secret_value() if api_key is not None else None,
                name=name,
                connect_timeout_s=settings.connect_timeout_s,
                clock=clock,
                poller=poller,
                continuation=upstream.continuation,
                logs_words=settings.upstream_words != "caller",
                metrics=metrics,
            )
        client = await clients.enter_async_context(
            shutdown.closing(opened, f"the model client {name or shown_url(url)}")
        )
        if isinstance(client, OpenAICompatibleClient):
            tree.add_source(client.describe)
        return RetryingClient(client, retries_max=settings.model_retries_max, metrics=metrics)

    async with open_read_poller() as poller, AsyncExitStack() as clients:
        if settings.upstreams:
            by_model: dict[str, ModelClient] = {}
            for upstream in settings.upstreams:
                client = await open_client(upstream, upstream.name)
                by_model |= dict.fromkeys(upstream.models, client)
            yield Upstreams(by_model=by_model)
        else:
            yield Upstreams(await open_client(settings.default_upstream, None))


async def _run_until_lost(
    store: Store, sessions: Sessions, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """End the service once another process has taken this one for dead: with a new start it is an owner again.

    Raises:
        StoreLostError
    """
    task_status.started()
    await store.standing.lost.wait()
    sessions.lose_turns()
    raise StoreLostError("Another process has taken this one for dead, and goes on with its turns.", retry_after_s=None)


async def _recover(store: Store, clock: Clock, settings: Settings, metrics: Metrics) -> None:
    try:
        with answered_within(settings.store_timeout_s) as deadline:
            recovered = await store.recover(now=clock(), after_step=deadline.restart)
    except StoreError as error:
        raise StartupError(f"The store {store.name} cannot be used: {error}") from error
    count_recovered(metrics, recovered)
    if recovered:
        logger.info("turns of a crashed process ended as interrupted", turns=recovered)
