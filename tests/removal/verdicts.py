"""A pytest plugin: writes the verdict of each removal test, one line of JSON, to the file that is named.

A removal test decides in its own body: if its assertion fails there, the fault is fixed. An error anywhere else (in a
helper of the test, in a fixture, in a library that has moved the names that the test uses) decides nothing.
"""

import inspect
import json
import os
from collections.abc import Generator
from enum import StrEnum
from traceback import walk_tb
from types import CodeType

import pytest

VERDICTS_FILE = "REMOVAL_VERDICTS"
TESTS = f"{os.sep}tests{os.sep}"
CODE = pytest.StashKey[CodeType]()


class Verdict(StrEnum):
    NEEDED = "needed"
    NOT_NEEDED = "no longer needed"
    UNKNOWN = "cannot tell"
    ELSEWHERE = "not in these versions"


def verdict_of(error: BaseException | None, test: CodeType) -> Verdict:
    """The verdict of a removal test that has ended with this error.

    Args:
        test: The code of the test's function.
    """
    if error is None:
        return Verdict.NEEDED
    if isinstance(error, BaseExceptionGroup):
        said = {verdict_of(it, test) for it in error.exceptions}
        return said.pop() if len(said) == 1 else Verdict.UNKNOWN
    ours = [frame.f_code for frame, _ in walk_tb(error.__traceback__) if TESTS in frame.f_code.co_filename]
    if isinstance(error, AssertionError | pytest.fail.Exception) and ours and ours[-1] is test:
        return Verdict.NOT_NEEDED
    return Verdict.UNKNOWN


def joined(verdicts: list[Verdict]) -> Verdict:
    """The verdict of a test from the verdicts of its cases: theirs if all are the same."""
    return verdicts[0] if len(set(verdicts)) == 1 else Verdict.UNKNOWN


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function):  # later this is the function that runs the test in Trio
        item.stash[CODE] = inspect.unwrap(item.function).__code__


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if isinstance(item, pytest.Function) and (call.when == "call" or (call.when == "setup" and call.excinfo)):
        error = call.excinfo.value if call.excinfo else None
        line = {
            "test": item.nodeid.partition("[")[0],
            "verdict": verdict_of(error, item.stash[CODE]) if call.when == "call" else Verdict.UNKNOWN,
            "said": f"{type(error).__name__}: {error}".splitlines()[0] if error is not None else "",
        }
        with open(os.environ[VERDICTS_FILE], "a") as verdicts:  # noqa: PTH123
            verdicts.write(json.dumps(line) + "\n")
    return report
