"""The README has the table of settings of the code. ``python -m tests.settings.test_readme_table`` writes it anew."""

import re
from pathlib import Path

from service.setting_sources import ENV_PREFIX, SECRETS
from service.settings import Settings

README = Path(__file__).parent.parent.parent / "README.md"
TABLE = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def table() -> str:
    rows = ["| Setting | Default | What it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        assert field.description is not None, f"{name} needs a docstring"
        default = "" if name in SECRETS or field.default in (None, ()) else f"`{field.default}`"
        rows.append(f"| `{name}` | {default} | {' '.join(field.description.split())} |")
    return "\n".join(rows) + "\n"


def test_readme_has_the_table_of_the_code() -> None:
    found = TABLE.search(README.read_text())
    assert found is not None
    assert found[0] == table()


def test_prefix_in_the_readme_is_the_code_s() -> None:
    assert f"`{ENV_PREFIX}" in README.read_text()


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: table(), README.read_text()))
