"""Serving installs no test tools, and the recipes of the Justfile that need the tools install them."""

import re
import tomllib

from tests.docs.blocks import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECIPE_LINES = [line.strip() for line in (ROOT / "Justfile").read_text().splitlines() if line.startswith("    ")]
TOOLS = re.compile(r"\b(pytest|ruff|flake8-async|mypy)\b|-m tests\.")


def test_serving_installs_what_it_needs_and_just() -> None:
    default = [it for group in PROJECT["tool"]["uv"]["default-groups"] for it in PROJECT["dependency-groups"][group]]
    assert [re.split(r"[^a-z-]", it)[0] for it in default] == ["rust-just"]


def test_every_recipe_that_needs_a_tool_installs_its_group() -> None:
    with_tools = [line for line in RECIPE_LINES if TOOLS.search(line)]
    assert len(with_tools) > 8
    assert [line for line in with_tools if "{{ dev }} " not in line] == []


def test_the_container_has_neither_tools_nor_just() -> None:
    [sync] = [line for line in (ROOT / "deploy/Containerfile").read_text().splitlines() if "uv sync" in line]
    assert "--no-default-groups" in sync
