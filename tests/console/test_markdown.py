"""What a model writes is shown, in any pieces and of any size, and nothing of it acts on the page."""

import json

from tests.console.conftest import Tabs
from tests.console.hostile import BOMBS, HOSTILE
from tests.docs.browser import Page

SHOW = """
(async () => {
  const { Markdown } = await import(document.querySelector('script[type=module]').src.replace('app.js', 'markdown.js'));
  document.body.replaceChildren();
  document.body.style.overflow = 'auto';
  window.show = (pieces) => new Promise((done) => {
    const root = document.createElement('div');
    root.className = 'markdown';
    document.body.replaceChildren(root);
    const shown = new Markdown(root);
    for (const piece of pieces) shown.append(piece);
    shown.end();
    const look = () => (shown.isShown ? done(null) : setTimeout(look, 4));
    look();
  });
})()
"""


async def renderer(tabs: Tabs) -> Page:
    page = await tabs.open("#/chat")
    await page.get(SHOW + ".then(() => null)")
    return page


async def shown(page: Page, *pieces: str) -> str:
    html: str = await page.get(f"show({json.dumps(pieces)}).then(() => document.querySelector('.markdown').innerHTML)")
    return html


async def links(page: Page) -> dict[str, str]:
    found: dict[str, str] = await page.get(f"Object.fromEntries({each('a')}((it) => [it.textContent, it.href]))")
    return found


def each(selector: str) -> str:
    """The call of ``map`` for the elements of the text that is shown."""
    return f"[...document.querySelectorAll('.markdown {selector}')].map"


P = '<p dir="auto">{}</p>'
ITEM = f'<li dir="auto">{P}</li>'
CASES = {
    "para": ("one\ntwo\n\nthree", '<p dir="auto">one<br>two</p><p dir="auto">three</p>'),
    "marks": ("*a* **b** ***c*** ~~d~~ __e__ snake_case_name 2*3*4 * x", None),
    "code": ("a ``b ` c`` d", '<p dir="auto">a <code dir="ltr">b ` c</code> d</p>'),
    "rule": ("a\n\n---\nb", '<p dir="auto">a</p><hr><p dir="auto">b</p>'),
    "list": (
        "1. a\n2. b\n   - c\n\nd",
        f'<ol start="1">{ITEM.format("a")}<li dir="auto">{P.format("b")}<ul>{ITEM.format("c")}</ul></li></ol>'
        + P.format("d"),
    ),
    "quote": ("> a\n> b\n\nc", '<blockquote><p dir="auto">a<br>b</p></blockquote><p dir="auto">c</p>'),
    "heading": ("## H *x*\ntext", '<h4 dir="auto">H <em>x</em></h4><p dir="auto">text</p>'),
}


async def test_a_text_is_shown_the_same_in_whatever_pieces_it_arrives(tabs: Tabs) -> None:
    page = await renderer(tabs)
    for name, (text, expected) in CASES.items():
        whole = await shown(page, text)
        assert expected is None or whole == expected, name
        assert await shown(page, *text) == whole, f"{name}, a character a piece"
    whole = await shown(page, HOSTILE)
    assert await shown(page, *HOSTILE) == whole
    assert await shown(page, *(HOSTILE[at : at + 7] for at in range(0, len(HOSTILE), 7))) == whole
    marks = await shown(page, CASES["marks"][0])
    assert "<em>a</em> <strong>b</strong> <strong><em>c</em></strong> <s>d</s> <strong>e</strong>" in marks
    assert "snake_case_name 2<em>3</em>4 * x" in marks


async def test_nothing_of_a_hostile_reply_acts_on_the_page(tabs: Tabs) -> None:
    page = await renderer(tabs)
    html = await shown(page, HOSTILE)
    made: list[str] = await page.get(f"{each('*')}((it) => it.localName)")
    known = "a blockquote br button code div em figcaption figure h3 hr li p path pre s span strong svg table tbody td"
    known += " th thead tr ul"
    assert set(made) <= set(known.split()), made
    attributes: list[str] = await page.get(f"{each('*')}((it) => it.getAttributeNames()).flat()")
    assert [it for it in attributes if it.startswith("on") or it in ("src", "style", "srcdoc")] == []
    assert await links(page) == {
        "good": "https://example.org/a_(b)?c=1&d=2",
        "https://example.org/angle": "https://example.org/angle",
        "https://example.org/bare": "https://example.org/bare",
        "pic (image)": "https://evil.example/p.png",
        "mail": "mailto:a@example.org",
    }
    assert set(await page.get(f"{each('a')}((it) => it.rel)")) == {"noopener noreferrer nofollow"}
    text: str = await page.get("document.querySelector('.markdown').textContent")
    assert not set(text) & set("\x1b\x07\u202e\u202c\u2066\u2069\U000e0041")
    for name in ("U+202E", "U+202C", "U+2066", "U+001B", "U+0007", "U+E0041 +2"):
        assert f">{name}</span>" in html, name
    assert await page.get("window.hit ?? null") is None
    depth = "(it) => { let depth = 0; for (; (it = it.parentElement); depth += /^(BLOCKQUOTE|LI)$/.test(it.tagName)); "
    assert max(await page.get(f"{each('p')}({depth} return depth; }})")) <= 12


async def test_texts_made_to_be_slow_are_shown_in_bounded_steps(tabs: Tabs) -> None:
    """The time is not judged: a renderer that is not linear would need minutes for these, and the wait has a bound."""
    page = await renderer(tabs)
    for name, text in BOMBS.items():
        await page.get(f"show({json.dumps([text])})")
        nodes, length = await page.get(
            "[document.querySelectorAll('.markdown *').length, document.querySelector('.markdown').textContent.length]"
        )
        assert nodes < 30_000, (name, nodes)
        assert length > 0 or name == "bars", name


async def test_characters_that_are_not_seen_are_elements_only_up_to_a_bound_however_they_arrive(tabs: Tabs) -> None:
    page = await renderer(tabs)
    named = "\x01a" * 30
    for before, piece in (("```\n", named), ("", f"{named}\n"), ("", "\x01a\n" * 30)):
        await page.get(f"show([{json.dumps(before)}, ...Array(1000).fill({json.dumps(piece)})])")
        made = await page.get("document.querySelectorAll('.markdown *').length")
        assert 1000 < made < 23_000, (before, piece, made)
    links = "[" + "**b** " * 20 + "](https://example.org) "
    await page.get(f"show([{json.dumps(links * 1300)}])")
    assert await page.get("document.querySelectorAll('.markdown *').length") < 23_000
