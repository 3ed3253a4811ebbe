"""The page of codes has each code that there is."""

import ast
import re
from pathlib import Path

from service.api.http.problems import codes
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs/failures.md").read_text()
TURNS, PROBLEMS = PAGE.split("## Problems")


def named(text: str) -> set[str]:
    """The codes in the first column of a page's tables."""
    rows = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    return {code for row in rows for code in re.findall(r"`([a-z_]+)`", row)}


def codes_of_turns() -> set[str]:
    """Whatever is given to ``ModelError`` or ``outcome.failed`` as a code, and the codes of what a turn fails with."""
    found: set[str] = {"store_unavailable", "internal_error"}
    for path in (*Path(ROOT, "service/models").rglob("*.py"), *Path(ROOT, "service/sessions").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in {
                "ModelError",
                "failed",
            }:
                found |= {
                    it.value for it in node.args[:1] if isinstance(it, ast.Constant) and isinstance(it.value, str)
                }
    return found


def test_each_code_of_a_problem_is_on_the_page() -> None:
    assert named(PROBLEMS) == {code for _, code in codes()}


def test_each_code_of_a_failed_turn_is_on_the_page() -> None:
    assert codes_of_turns() <= named(TURNS)
