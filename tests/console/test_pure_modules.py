"""The modules of the console that need no page are tested in Node.js."""

import subprocess
from pathlib import Path

import pytest

from tests.node import NODE

pytestmark = pytest.mark.processes

CASES = Path(__file__).with_name("pure_modules.mjs")


def test_what_the_console_computes_without_a_page_is_right() -> None:
    done = subprocess.run([NODE, "--test", str(CASES)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = CASES.read_text().count("\ntest(")
    assert f"pass {cases}\n" in done.stdout, done.stdout
