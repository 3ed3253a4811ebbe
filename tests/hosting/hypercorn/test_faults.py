"""Each workaround has a removal test and a description, and ``just removal`` gives a verdict for each test."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

from service.hosting.hypercorn.patches import FAULTS, PATCHES
from tests.removal.__main__ import exit_code, table, verdict_on
from tests.removal.verdicts import VERDICTS_FILE, Verdict, joined, verdict_of

ROOT = Path(__file__).parents[3]
VERSIONS = {"hypercorn": "0.18.0", "quart": "0.22.0"}


def removal_tests() -> list[str]:
    """The ids of the tests that have the marker ``removal``."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "mark.removal" in text:
            found += [
                f"{path.relative_to(ROOT)}::{node.name}"
                for node in ast.parse(text).body
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and any(ast.unparse(it) == "pytest.mark.removal" for it in node.decorator_list)
            ]
    return found


def test_every_fault_has_a_removal_test_and_every_removal_test_a_fault() -> None:
    assert sorted(fault.removal_test for fault in FAULTS) == sorted(removal_tests())


def test_every_patch_is_there_for_a_fault() -> None:
    assert {it.target for it in PATCHES} == {it.target for fault in FAULTS for it in fault.patches}


def test_every_fault_is_described_as_it_could_be_filed() -> None:
    text = (ROOT / "docs" / "upstream-faults.md").read_text()
    sections = {part.partition("\n")[0]: part.partition("\n")[2] for part in text.split("\n## ")[1:]}
    assert list(sections) == [fault.title for fault in FAULTS]
    for fault in FAULTS:
        assert len(sections[fault.title].split()) > 25, fault.title
        assert fault.issue is None or f"<{fault.issue}>" in sections[fault.title]


def says_so(fixed: bool) -> None:
    assert not fixed


def raises_nothing() -> None:
    with pytest.raises(ValueError, match="x"):
        pass


def looks_for_a_name_that_moved() -> None:
    raise AttributeError("hypercorn has no _join_exited")


def fails_in_a_helper() -> None:
    says_so(fixed=True)


def fails_below_a_nursery() -> None:
    try:
        assert not "fixed"
    except AssertionError as error:
        raise ExceptionGroup("nursery", [error]) from None


def is_of_two_minds() -> None:
    try:
        assert not "fixed"
    except AssertionError as error:
        raise ExceptionGroup("nursery", [error, OSError("the port is taken")]) from None


@pytest.mark.parametrize(
    ("test", "verdict"),
    [
        (lambda: None, Verdict.NEEDED),
        (raises_nothing, Verdict.NOT_NEEDED),
        (fails_below_a_nursery, Verdict.NOT_NEEDED),
        (looks_for_a_name_that_moved, Verdict.UNKNOWN),
        (fails_in_a_helper, Verdict.UNKNOWN),
        (is_of_two_minds, Verdict.UNKNOWN),
    ],
)
def test_only_the_assertion_of_the_test_itself_says_that_a_fault_is_fixed(test: object, verdict: Verdict) -> None:
    assert isinstance(test, FunctionType)
    error: BaseException | None = None
    try:
        test()
    except BaseException as raised:  # noqa: ASYNC103, BLE001  pytest's own failures are no subclasses of Exception
        error = raised
    assert verdict_of(error, test.__code__) is verdict


TESTS_OF_FAULTS = """
import pytest, trio

def helper():
    assert not "what the test needs"

async def test_fixed():
    async with trio.open_nursery():
        assert not "fixed"

async def test_there(): pass

@pytest.mark.parametrize("case", [1, 2])
async def test_broken(case):
    helper()

@pytest.fixture
def missing():
    raise OSError("no port")

async def test_without_its_fixture(missing): pass
"""


def test_the_plugin_knows_the_test_below_what_runs_it_in_trio(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS_OF_FAULTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.removal.verdicts", "--rootdir", str(tmp_path)]
    subprocess.run(  # noqa: PLW1510  the run is meant to fail
        [sys.executable, "-m", "pytest", *options, "-c", str(tmp_path / "pytest.ini"), str(tmp_path / "tests")],
        cwd=ROOT,
        env=os.environ | {VERDICTS_FILE: str(tmp_path / "verdicts")},
        capture_output=True,
        timeout=100,
    )
    said = [json.loads(line) for line in (tmp_path / "verdicts").read_text().splitlines()]
    assert [(it["test"].partition("::")[2], it["verdict"]) for it in said] == [
        ("test_fixed", Verdict.NOT_NEEDED),
        ("test_there", Verdict.NEEDED),
        ("test_broken", Verdict.UNKNOWN),
        ("test_broken", Verdict.UNKNOWN),
        ("test_without_its_fixture", Verdict.UNKNOWN),
    ]


def test_the_verdict_on_a_fault_is_that_of_all_cases_of_its_test() -> None:
    first, *_, last = FAULTS
    said = {
        first.removal_test: ([Verdict.NEEDED, Verdict.NEEDED], ""),
        last.removal_test: ([Verdict.NOT_NEEDED], "AssertionError: assert not True"),
    }
    assert verdict_on(first, said, VERSIONS) == (Verdict.NEEDED, "")
    assert verdict_on(FAULTS[1], said, VERSIONS) == (Verdict.UNKNOWN, "the test did not run")
    assert verdict_on(last, said, VERSIONS)[0] is Verdict.ELSEWHERE  # Quart's fault appeared in 0.23
    assert verdict_on(last, said, VERSIONS | {"quart": "0.23.1"})[0] is Verdict.NOT_NEEDED
    assert joined([Verdict.NEEDED, Verdict.NOT_NEEDED]) is Verdict.UNKNOWN


def test_the_table_names_what_can_go_and_the_code_says_whether_there_is_something_to_do() -> None:
    fault = FAULTS[0]
    lines = table([(fault, Verdict.NOT_NEEDED, "AssertionError: it ended")], VERSIONS)
    assert lines.startswith("hypercorn 0.18.0, quart 0.22.0\n")
    for part in ("no longer needed", fault.title, fault.goes, fault.removal_test, "AssertionError: it ended"):
        assert part in lines
    assert exit_code([Verdict.NEEDED, Verdict.ELSEWHERE]) == 0
    assert exit_code([Verdict.NEEDED, Verdict.NOT_NEEDED]) == 1
    assert exit_code([Verdict.UNKNOWN]) == 1
