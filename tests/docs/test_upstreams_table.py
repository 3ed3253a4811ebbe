"""The table of model servers in docs/openai.md is of the servers, versions and questions that `just upstreams` has."""

import pytest

from tests.upstreams.kinds import KINDS
from tests.upstreams.table import BEGIN, DOCUMENT, END, LABELS, columns_in, render, with_table


def test_the_table_has_each_server_in_its_version_and_no_failed_cell() -> None:
    columns = columns_in(DOCUMENT.read_text())
    assert list(columns) == [kind.head for kind in KINDS], "run `just upstreams --write`"
    cells = [cell for column in columns.values() for cell in column]
    assert len(cells) == len(KINDS) * (len(LABELS) - 1)
    assert all(cells)
    assert "FAILED" not in cells


def test_a_table_that_is_written_is_read_again() -> None:
    columns = {kind.head: [f"{kind.name} {at}" for at in range(len(LABELS) - 1)] for kind in KINDS}
    document = with_table(f"before\n{BEGIN}old\n{END}after\n", columns)
    assert document == f"before\n{BEGIN}{render(columns)}{END}after\n"
    assert columns_in(document) == columns
    assert columns_in(f"{BEGIN}{END}") == {}


def test_a_table_of_other_questions_or_none_is_refused() -> None:
    document = with_table(f"{BEGIN}{END}", {KINDS[0].head: ["yes"] * (len(LABELS) - 1)})
    with pytest.raises(ValueError, match="the rows are"):
        columns_in(document.replace("| usage |", "| cost |"))
    with pytest.raises(ValueError, match="there is no table"):
        columns_in("nothing")
