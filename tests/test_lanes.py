"""Serial tests run alone, others beside each other, and a test that starts a process says so."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
TESTS = '''
import os, subprocess, time
from pathlib import Path
import pytest

HERE = Path(__file__).parent.parent
WORKER = os.environ["PYTEST_XDIST_WORKER"]


@pytest.fixture(autouse=True)
def noted(request):
    with (HERE / "notes").open("a", buffering=1) as notes:
        notes.write(f"{WORKER} begins {request.node.name}\\n")
        yield
        notes.write(f"{WORKER} ends {request.node.name}\\n")


@pytest.mark.parametrize("number", range(4))
def test_timing(number):
    time.sleep(0.02)


@pytest.mark.parallel
@pytest.mark.parametrize("number", range(8))
def test_beside(number):
    """Ends once both workers are in this test, or have been."""
    (HERE / WORKER).touch()
    deadline = time.monotonic() + 120
    while len(list(HERE.glob("gw*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parallel
@pytest.mark.long
def test_long():
    pass
'''
UNMARKED = """
import os, subprocess

def test_unmarked_program():
    subprocess.run(["true"])

def test_unmarked_fork():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)

def test_without_a_process():
    pass

def test_logs_half_a_character():
    import logging
    logging.getLogger("x").warning("\\ud800")

def test_fails_with_half_a_character():
    assert "a" == "\\ud800"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the notes and results of a run of these tests with two workers."""
    folder = tmp_path_factory.mktemp("lanes")
    for name, text in (("process/test_process", TESTS), ("models/test_models", UNMARKED)):
        path = folder / f"tests/{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  processes\n  serial\n  parallel\n  long\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n2", "-p", "tests.lanes", "--junitxml=run.xml"]
    for plugin in ("anyio", "llmock", "schemathesis", "trio", "hypothesispytest"):
        command += ["-p", f"no:{plugin}"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(
        command, cwd=folder, env=environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=300, check=False
    )
    return folder


def test_serial_tests_run_alone_and_others_beside_each_other(folder: Path) -> None:
    notes = [line.split() for line in (folder / "tests/notes").read_text().splitlines()]
    assert len(notes) == 2 * (4 + 8 + 1)
    first = next(index for index, (_, _, test) in enumerate(notes) if test.startswith("test_timing"))
    serial = [note for note in notes if note[2].startswith("test_timing")]
    assert len(serial) == 8
    for begun, ended in zip(serial[::2], serial[1::2], strict=True):
        index = notes.index(begun)
        assert notes[index : index + 2] == [begun, ended]
        assert (begun[0], begun[2]) == (ended[0], ended[2])
    assert {worker for worker, *_ in notes[:first]} == {"gw0", "gw1"}


def test_a_long_test_is_among_the_first_to_begin(folder: Path) -> None:
    notes = (folder / "tests/notes").read_text().splitlines()
    begun = [line.split()[-1] for line in notes if " begins " in line]
    assert "test_long" in begun[:2]


@pytest.mark.parametrize("test", ["unmarked_program", "unmarked_fork"])
def test_a_process_without_the_marker_fails_the_test(folder: Path, test: str) -> None:
    assert "mark it with pytest.mark.processes" in faults(folder)[test]


def test_a_lone_surrogate_in_a_report_does_not_stop_the_run(folder: Path) -> None:
    assert faults(folder)["logs_half_a_character"] == ""
    assert "ud800" in faults(folder)["fails_with_half_a_character"]


def test_all_others_pass(folder: Path) -> None:
    assert {name for name, fault in faults(folder).items() if fault} == {
        "unmarked_program",
        "unmarked_fork",
        "fails_with_half_a_character",
    }
    assert len(faults(folder)) == 4 + 8 + 1 + 5


def faults(folder: Path) -> dict[str, str]:
    """The run's message for each test, empty for a test that passed."""
    return {
        case.attrib["name"].removeprefix("test_"): "".join(f"{it.get('message')}\n{it.text}" for it in case)
        for case in ElementTree.parse(folder / "run.xml").iter("testcase")
    }
