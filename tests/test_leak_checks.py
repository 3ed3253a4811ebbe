"""Each leak check fails for a deliberate leak and names it, and clean tests pass."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.processes

LEAKY_TESTS = '''
import atexit, socket, subprocess, threading
import pytest, trio
from hypothesis import given, settings, strategies as st
from tests import leak_checks

leak_checks.SETTLE_S = 1
KEPT = []
NEVER = threading.Event()
LONG_S = 100  # what is left behind is there until the end of the run, however slow that is


async def numbers():
    yield 1
    yield 2


@pytest.fixture
async def stray_task():
    yield trio.lowlevel.spawn_system_task(trio.sleep_forever, name="stray")


async def test_system_task():
    trio.lowlevel.spawn_system_task(trio.sleep_forever, name="stray")


async def test_system_task_of_a_fixture(stray_task):
    pass


@settings(max_examples=2, database=None)
@given(st.integers())
async def test_system_task_in_a_property(number):
    trio.lowlevel.spawn_system_task(trio.sleep_forever, name="stray")


async def test_async_generator():
    KEPT.append(numbers())
    await anext(KEPT[-1])


async def test_dropped_async_generator():
    await anext(numbers())


def test_socket():
    KEPT.append(socket.socket())


def test_dropped_socket():
    socket.socket()


def test_thread():
    threading.Thread(target=NEVER.wait, args=(LONG_S,), name="stray", daemon=True).start()


async def test_abandoned_worker():
    with trio.move_on_after(0.05):
        await trio.to_thread.run_sync(NEVER.wait, LONG_S, abandon_on_cancel=True)


def test_child_process():
    KEPT.append(subprocess.Popen(["sleep", str(LONG_S)]))
    atexit.register(KEPT[-1].kill)


def test_zombie():
    KEPT.append(subprocess.Popen(["true"]))


def test_exception_in_a_finaliser():
    class Broken:
        def __del__(self):
            raise ValueError("broken")

    broken = Broken()
    broken.itself = broken


async def test_forgotten_await():
    trio.sleep(0)


async def test_clean():
    """As much as the leaky ones, put away in time."""
    with socket.socket():
        await trio.to_thread.run_sync(threading.Event().wait, 0)
    await trio.run_process(["true"])
    generator = numbers()
    await anext(generator)
    await generator.aclose()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 0)
'''

NAMED_BY_THE_CHECK = {
    "system_task": "system task stray",
    "system_task_of_a_fixture": "system task stray",
    "system_task_in_a_property": "system task stray",
    "async_generator": "async generator numbers",
    "dropped_async_generator": "ResourceWarning: Async generator",
    "socket": "of socket:[",
    "dropped_socket": "ResourceWarning: unclosed <socket",
    "thread": "thread stray",
    "abandoned_worker": "thread wait from <test",
    "child_process": "sleep",
    "zombie": "child process",
    "exception_in_a_finaliser": "ValueError: broken",
    "forgotten_await": "coroutine 'sleep' was never awaited",
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The message of a run for each of the leaky tests, empty for a test that passed."""
    folder = tmp_path_factory.mktemp("leaky")
    (folder / "test_leaky.py").write_text(LEAKY_TESTS)
    (folder / "pytest.ini").write_text("[pytest]\ntrio_mode = true\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.leak_checks", "--junitxml=run.xml"]
    command += ["-p", "no:anyio", "-p", "no:schemathesis", "-p", "no:llmock"]
    repository = str(Path(__file__).parent.parent)
    subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": repository}, capture_output=True, timeout=300, check=False
    )
    found: dict[str, str] = {}
    for case in ElementTree.parse(folder / "run.xml").iter("testcase"):
        faults = [f"{it.get('message')}\n{it.text}" for it in case if it.tag in ("failure", "error")]
        name = case.attrib["name"].removeprefix("test_")
        found[name] = found.get(name, "") + "\n".join(faults)
    return found


@pytest.mark.parametrize("leak", NAMED_BY_THE_CHECK)
def test_leak_fails_the_test_and_is_named(verdicts: dict[str, str], leak: str) -> None:
    assert NAMED_BY_THE_CHECK[leak] in verdicts[leak]


def test_clean_test_passes(verdicts: dict[str, str]) -> None:
    assert verdicts["clean"] == ""
    assert set(verdicts) == {*NAMED_BY_THE_CHECK, "clean"}
