"""The page of the API is rendered once for each prefix, and few pages are kept."""

import pytest

from service.api.reference import page
from service.api.reference.page import PAGES_MAX
from tests.api.inprocess import open_api


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs in the example commands of the pages that were rendered, in their order."""
    urls: list[str] = []
    render = page.render

    def render_and_note(document: dict[str, object], *, url: str, keyed: bool) -> str:
        urls.append(url)
        return render(document, url=url, keyed=keyed)

    monkeypatch.setattr(page, "render", render_and_note)
    monkeypatch.setattr(page, "_PAGES", f"pages of {id(urls)}")  # the tests use applications again, with their pages
    return urls


async def test_a_page_is_rendered_once_for_each_prefix(rendered: list[str]) -> None:
    async with open_api() as api:
        replies = [
            await api.call("GET", "/docs", scope={"root_path": root_path})
            for root_path in ("", "/ai", "", "/ai", "/ai/")
        ]
    assert rendered == ["http://localhost:8000", "http://localhost:8000/ai"]
    assert {reply.status for reply in replies} == {200}
    assert [b"http://localhost:8000/ai/chat" in reply.body for reply in replies] == [False, True, False, True, True]
    assert replies[1].body == replies[3].body


async def test_few_pages_are_kept_and_the_oldest_is_rendered_again(rendered: list[str]) -> None:
    async with open_api() as api:
        for number in (*range(PAGES_MAX + 1), PAGES_MAX, 0):
            reply = await api.call("GET", "/docs", scope={"root_path": f"/{number}"})
            assert f"http://localhost:8000/{number}/chat".encode() in reply.body
    assert [url.rpartition("/")[2] for url in rendered] == [*map(str, range(PAGES_MAX + 1)), "0"]
