"""The patches are those of the table, they are installed by a call, and an undo puts the originals back."""

import ast
import logging
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import hypercorn.__main__
import hypercorn.run
import hypercorn.trio.run
import hypercorn.trio.tcp_server
import pytest
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext

from service.errors import StartupError
from service.hosting import hypercorn_config
from service.hosting.hypercorn import patches
from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.patches import PATCHES, Patch
from service.hosting.listeners.closing import DeferredTermination
from service.hosting.listeners.listeners import Listeners
from service.stop_state import StopState
from tests.hosting.hypercorn.library_names import LibraryNames, Name, module_of

FORK = multiprocessing.get_context("fork")
SERVICE = Path(hypercorn_config.__file__).parent.parent


class Process:
    """Installs the patches as a process that serves or runs the master does, and names the patched objects."""

    def __init__(self) -> None:
        self.context = WorkerContext(None)
        self.stop_event = FORK.Event()
        self.main = module_of("__main__", run=hypercorn.run.run)
        self.owners: dict[str, object] = {
            patches.ACCEPT_LOG.target: logging.getLogger(patches.ACCEPT_LOGGER),
            patches.TERMINATE.target: self.context,
            patches.STOP_EVENT_IS_SET.target: self.stop_event,
            patches.COMMAND_RUN.target: self.main,
        }

    @contextmanager
    def install(self) -> Iterator[None]:
        stop = StopState()
        termination = DeferredTermination(stop, lambda: None)
        with (
            patches.install_in_command_line(self.main, run),
            patches.install_in_worker(
                open_connection=Connections(stop).open,
                serve_listeners=Listeners([]).serve_listeners,
                termination=termination,
                context=self.context,
                stop_event=self.stop_event,
            ),
        ):
            yield

    def own_names(self) -> dict[Name, object]:
        """The names of the objects; a method that only their classes have counts as absent."""
        patched = {it for it in PATCHES if it.owner is None}
        return {(id(owner), it.key): vars(owner).get(it.key) for it in patched for owner in [self.owners[it.target]]}


def run() -> None:
    """Takes the place of hypercorn's ``run``."""


def names_of(changed: dict[Name, str]) -> set[str]:
    return set(changed.values())


async def test_the_table_lists_all_replacements_and_each_is_undone() -> None:
    process = Process()
    before, own = LibraryNames(), process.own_names()
    with process.install():
        during, own_during = LibraryNames(), process.own_names()
    after, own_after = LibraryNames(), process.own_names()

    changed = during.changed_since(before)
    listed = {(id(process.owners[it.target] if it.owner is None else it.owner), it.key) for it in PATCHES}
    assert set(changed) - listed == set(), names_of(changed)
    assert {it.target for it in PATCHES if it.owner is not None and (id(it.owner), it.key) not in changed} == set()
    assert [key for key in own if own_during[key] is own[key]] == []
    assert after.changed_since(before) == {}
    assert {key for key in own if own_after[key] is not own[key]} == set()


async def test_a_second_service_in_the_same_process_is_undone_first() -> None:
    first, second = Process(), Process()
    before = LibraryNames()
    with first.install():
        during = LibraryNames()
        with second.install():
            assert LibraryNames().changed_since(during) != {}
        assert LibraryNames().changed_since(during) == {}
    assert LibraryNames().changed_since(before) == {}
    with second.install():  # one after the other
        assert names_of(LibraryNames().changed_since(before)) == names_of(during.changed_since(before))
    assert LibraryNames().changed_since(before) == {}


def test_an_undo_in_the_wrong_order_is_an_error() -> None:
    undo_first = patches.MAIN_RUN.put(run)
    undo_second = patches.MAIN_RUN.put(test_an_undo_in_the_wrong_order_is_an_error)
    with pytest.raises(RuntimeError, match=r"^hypercorn\.__main__\.run was replaced again since"):
        undo_first()
    undo_second()
    undo_first()
    with pytest.raises(RuntimeError, match="was replaced again"):
        undo_first()


@pytest.mark.parametrize("patch", [it for it in PATCHES if isinstance(it.owner, ModuleType | type)])
def test_a_name_that_is_gone_refuses_the_start_and_replaces_nothing(
    patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    if patch.key == "DEFAULT_MAX_HEADER_LIST_SIZE":
        monkeypatch.delattr("h2.connection.H2Connection.DEFAULT_MAX_HEADER_LIST_SIZE")
    else:
        monkeypatch.delattr(patch.owner, patch.key)
    before = LibraryNames()
    process = Process()
    with pytest.raises(StartupError, match=f"there is no {patch.target}"), process.install():
        pytest.fail("it is installed")
    assert LibraryNames().changed_since(before) == {}


def test_an_object_without_the_name_refuses_the_start_too() -> None:
    with pytest.raises(StartupError, match="there is no WorkerContext"):
        patches.TERMINATE.put(run, object())


def test_a_missing_reader_refuses_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(patches.CHUNKED_READER.owner, dict)
    monkeypatch.delitem(patches.CHUNKED_READER.owner, "chunked")
    with pytest.raises(StartupError, match="READERS"):
        patches.CHUNKED_READER.put(run)


def test_the_configuration_for_hypercorn_installs_when_it_is_read_and_not_at_its_import() -> None:
    before = LibraryNames()
    assert before.changed_since(before) == {}
    assert not hypercorn_config._configuration
    assert dir(hypercorn_config) == sorted(hypercorn_config.NAMES)
    with pytest.raises(AttributeError):
        hypercorn_config.workers  # noqa: B018
    assert LibraryNames().changed_since(before) == {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        config = Config.from_object("service.hosting.hypercorn_config")
        assert (config.worker_class, config.backlog) == ("trio", hypercorn_config.BACKLOG)
        assert names_of(LibraryNames().changed_since(before)) == {"hypercorn.__main__.run"}
    finally:
        hypercorn_config._installed.close()
        hypercorn_config._configuration.clear()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert LibraryNames().changed_since(before) == {}


def test_nothing_else_replaces_a_name_of_a_library() -> None:
    """The lines that set an attribute by a name, or an attribute of a module, outside of the one place."""
    found = []
    for path in sorted(SERVICE.rglob("*.py")):
        if path.name == "patches.py":
            continue
        tree = ast.parse(path.read_text())
        modules = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("setattr", "delattr"):
                    found.append(f"{path.stem}: {ast.unparse(node.args[0])}")
            elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                root = ast.unparse(node).partition(".")[0].partition("[")[0]
                if root in modules:
                    found.append(f"{path.stem}: {ast.unparse(node)}")
    # Only the handler is ours. Through a Config hypercorn itself passes values to its workers (of a shared port: its
    # socket and its address), and programs may replace the hook of sys.
    assert found == [
        *("operations: handler", "peer_tls: sys.unraisablehook", "peer_tls: sys.unraisablehook"),
        *("worker: config", "bind: config", "shared_port: config", "shared_port: config"),
    ]


SERVE_AND_LOOK = """
import os, signal, sys, threading
from pathlib import Path
import hypercorn.__main__, hypercorn.run, hypercorn.trio.run, hypercorn.trio.tcp_server
import h11, h2.connection, hpack, quart, quart_trio, trio, wsproto
from tests.hosting.hypercorn.library_names import LibraryNames

before = LibraryNames()
import service.asgi, service.hosting.hypercorn_config, service.hosting.reload
from service.hosting.hypercorn.patches import PATCHES
from service.hosting.lifespan import Hosting
from service.hosting.serve import serve
from service.settings import Settings
from service.stop_state import StopState

def say(when):
    targets = {(id(it.owner), it.key): it.target for it in PATCHES}
    changed = LibraryNames().changed_since(before)
    print(when, [targets.get(key, written) for key, written in changed.items()], flush=True)

async def announce(self, service):
    await self._listeners.open.wait()
    say("serving")
    os.kill(os.getpid(), signal.SIGTERM)

say("imported")
Hosting._announce = announce
serve(Settings(store_url="memory:", bind="127.0.0.1:0", drain_timeout_s=0))
say("left")
"""


def test_in_a_process_that_serves_nothing_but_the_table_is_replaced() -> None:
    done = subprocess.run(  # noqa: PLW1510  the output tells more than the exit code
        [sys.executable, "-c", SERVE_AND_LOOK], capture_output=True, text=True, timeout=60
    )
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert said.keys() == {"imported", "serving", "left"}, done.stderr
    assert ast.literal_eval(said["imported"]) == []
    master = {"hypercorn.run._populate", "hypercorn.run.wait", "hypercorn.run._join_exited", "hypercorn.__main__.run"}
    in_worker = {it.target for it in PATCHES if it.owner is not None} - master | {patches.ACCEPT_LOG.target}
    assert set(ast.literal_eval(said["serving"])) == in_worker
    assert ast.literal_eval(said["left"]) == []


@pytest.fixture(autouse=True)
def _nothing_stays_installed() -> Iterator[None]:
    before = LibraryNames()
    yield
    assert LibraryNames().changed_since(before) == {}
