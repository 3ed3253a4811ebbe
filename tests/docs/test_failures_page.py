"""The page of codes has the tables of the code. ``python -m tests.docs.test_failures_page`` writes them anew."""

import re
from typing import get_args

import pytest

from service.api.http.problems import ADVICE, REASONS_TO_RETRY, STATUS_BY_ERROR, code_of, codes, status_of
from service.errors import INTERNAL_ERROR, LimitError, StoreError
from service.failure_codes import FAILURES, FailureCode
from tests.docs.blocks import ROOT

PAGE = ROOT / "docs/failures.md"
MAY_PASS = (409, 429, 503)
"""The statuses of problems that a moment later may be gone."""


def failures_table() -> str:
    rows = ["| Code | What happened | Who can fix it |", "|---|---|---|"]
    rows += [f"| `{code}` | {meaning.cause} | {meaning.fixed_by} |" for code, meaning in FAILURES.items()]
    return "\n".join(rows) + "\n"


def problems_table() -> str:
    rows = ["| Status, code | What to do |", "|---|---|"]
    rows += [f"| {status} `{code}` | {ADVICE[code]} |" for status, code in codes()]
    return "\n".join(rows) + "\n"


def retries_table() -> str:
    rows = ["| Status, code | `Retry-After`, and why |", "|---|---|"]
    rows += [f"| {status} `{code}` | {REASONS_TO_RETRY[code]} |" for status, code in codes() if status in MAY_PASS]
    return "\n".join(rows) + "\n"


TABLES = {"failures": failures_table, "problems": problems_table, "retries": retries_table}


def place_of(table: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {table} -->\n).*?(?=<!-- /{table} -->)", re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_table_of_the_code(name: str) -> None:
    found = place_of(name).search(PAGE.read_text())
    assert found is not None
    assert found[0] == TABLES[name]()


def test_each_code_of_a_failed_turn_has_a_meaning_and_no_other_has() -> None:
    assert tuple(FAILURES) == get_args(FailureCode)
    assert {INTERNAL_ERROR, StoreError.code, *(kind.code for kind in StoreError.__subclasses__())} <= FAILURES.keys()


def test_each_code_of_a_problem_has_advice_and_no_other_has() -> None:
    assert ADVICE.keys() == {code for _, code in codes()}


def test_each_problem_that_may_pass_has_a_reason_why_it_says_when_to_retry_or_does_not() -> None:
    assert REASONS_TO_RETRY.keys() == {code for status, code in codes() if status in MAY_PASS}
    for error in STATUS_BY_ERROR:
        if status_of(error) in MAY_PASS:
            says_when = issubclass(error, LimitError | StoreError) or hasattr(error, "retry_after_s")
            assert says_when != REASONS_TO_RETRY[code_of(error)].startswith("never"), error


if __name__ == "__main__":
    page = PAGE.read_text()
    for name, table in TABLES.items():
        page = place_of(name).sub(lambda _, table=table: table(), page)  # type: ignore[misc]
    PAGE.write_text(page)
