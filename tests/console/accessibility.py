"""What axe (https://github.com/dequelabs/axe-core) finds in a page, by rules of WCAG that a program can check."""

from importlib.resources import files
from typing import Any

from tests.docs.browser import Page

AXE = files("axe_core_python").joinpath("axe.min.js").read_text()
GRAVE = ("serious", "critical")


async def violations(page: Page) -> list[Any]:
    """What axe finds that is serious or critical: the rule, and the first elements that break it."""
    await page.get(f"{AXE}; null")
    found: list[Any] = await page.get(
        "axe.run(document, { resultTypes: ['violations'] }).then(({ violations }) => violations"
        f".filter((it) => {list(GRAVE)}.includes(it.impact))"
        ".map((it) => [it.id, it.nodes.slice(0, 3).map((node) => node.html.slice(0, 160))]))"
    )
    return found
