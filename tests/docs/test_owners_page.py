"""The page of owners has the table of the code. ``python -m tests.docs.test_owners_page`` writes it anew."""

import re
import tomllib
from pathlib import Path

from service.api.app import create_app
from service.api.http.callers import needed_for
from service.api.reference.openapi import build_document
from service.settings import Settings
from tests.docs.blocks import ROOT

PAGE = ROOT / "docs/owners.md"
TABLE = re.compile(r"(?<=<!-- permissions -->\n).*?(?=<!-- /permissions -->)", re.DOTALL)


def table() -> str:
    rows = ["| Call | Needs |", "|---|---|"]
    for path, methods in build_document(create_app())["paths"].items():
        for method, operation in methods.items():
            if operation.get("security") != []:
                needed = operation.get("x-permissions") or [needed_for(method.upper())]
                rows.append(f"| `{method.upper()} {path}` | {' or '.join(f'`{it}`' for it in needed)} |")
    return "\n".join([*rows[:2], *sorted(rows[2:], key=lambda row: row.split()[2])]) + "\n"


def test_the_page_has_the_table_of_the_code() -> None:
    found = TABLE.search(PAGE.read_text())
    assert found is not None
    assert found[0] == table()


def test_the_settings_on_the_page_are_accepted(tmp_path: Path) -> None:
    found = re.search(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    settings = tomllib.loads(found[1])
    [shop, back_end] = settings["api_keys"]
    assert shop.pop("key_file")
    assert Settings(**settings | {"api_keys": [shop | {"key": "k" * 16}, back_end]}).api_keys


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
