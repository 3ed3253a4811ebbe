"""A reply of a model that wants harm: each line of it tries something on the page that shows it."""

HOSTILE = "\n".join(
    (
        "# Harmless title",
        "",
        "<script>window.hit = 'script'</script> <img src=x onerror=\"window.hit = 'img'\"> <b>not bold</b>",
        "",
        "[click](javascript:window.hit='link') [data](data:text/html,hit) [vb](vbscript:x) [rel](/admin/drain)",
        "[mixed](JaVaScRiPt:alert(1)) [blank](java\tscript:alert(1)) [entity](java&#x73;cript:alert(1))",
        '[good](https://example.org/a_(b)?c=1&d=2 "title") <https://example.org/angle> https://example.org/bare,',
        "![pic](https://evil.example/p.png) <javascript:alert(1)> [mail](mailto:a@example.org) [file](file:///etc/passwd)",
        "",
        "A bidi override: safe\u202ecod.exe\u202c, isolates \u2066hidden\u2069, an escape \x1b[31m, a bell \x07, tags.",
        "Tags: \U000e0041\U000e0042\U000e0043.",
        "",
        "| a | b |",
        "|---|---|",
        "| <i>x</i> | [l](javascript:1) |",
        "",
        "> > > > > > > > > > deep",
        "",
        *(f"{'  ' * depth}- item {depth}" for depth in range(12)),
        "",
        "```html",
        "<script>window.hit = 'code'</script>",
        "rm -rf / \u202e# harmless\x1b[2K",
        "```",
        "",
        "**bold *both*** and ~~gone~~ and `code <b>` and \\*plain\\*",
    )
)

HOSTILE_CALL = (
    'look_up:{"html":"<img src=x onerror=\\"window.hit = 1\\">","bidi":"safe\u202ecod.exe","big":12345678901234567890,'
    '"list":[1,{"a":[]}]}'
)
"""A call whose arguments want harm, or would be changed by a page that reads them as numbers."""

BOMBS = {
    "brackets": "[" * 20_000,
    "links": "[a](" * 15_000,
    "stars": "*a **b " * 8_000,
    "backticks": "".join("`" * (n % 60 + 1) + "x" for n in range(12_000)),
    "quotes": "> " * 100_000,
    "items": "\n".join(f"{'  ' * (n % 40)}- x" for n in range(6_000)),
    "one line": "a" * 1_048_576,
    "code": "```\n" + "x" * 200_000 + "\n" + "y = 1\n" * 40_000,
    "overrides": "\u202ea" * 60_000,
    "emphasis": "*a* " * 22_000,
    "table": "| a | b |\n|---|---|\n" + "| 1 | **2** |\n" * 2_000,
    "bars": "|" * 40_000 + "\n" + "|-" * 40_000 + "\n",
}
"""Texts whose parts cost a careless renderer the square of their length, by what they are made of."""
