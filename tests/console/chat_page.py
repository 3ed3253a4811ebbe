"""The view of conversations, as a person sees and uses it."""

import json

from tests.docs.browser import Page

LAST = "document.querySelector('.turn:last-child')"
REPLY = f"({LAST}?.querySelector('.answer > .parts > .markdown')?.textContent ?? '')"


def _usable(words: str) -> str:
    """The expression for the last button with these words that can be pressed."""
    named = f"(it.textContent === {json.dumps(words)} || it.getAttribute('aria-label') === {json.dumps(words)})"
    usable = f"(it) => {named} && it.checkVisibility() && !it.disabled"
    return f"[...document.querySelectorAll('button')].findLast({usable})"


class ChatPage:
    """A tab with the view of conversations."""

    def __init__(self, page: Page) -> None:
        self.page = page

    async def send(self, text: str) -> None:
        await self.page.type_in(".box", text)
        await self.page.press("Enter")

    async def press(self, words: str) -> None:
        """Press the last button with these words, once it is there and can be pressed."""
        await self.page.click_on(_usable(words))

    async def press_by_key(self, words: str) -> None:
        """As :meth:`press`, with the keyboard: for a button that moves while a reply is written."""
        found = _usable(words)
        await self.page.wait_for(f"{found} !== undefined")
        await self.page.get(f"{found}.focus({{ preventScroll: true }})")
        await self.page.press("Enter")

    async def has(self, words: str, where: str = "body") -> None:
        """Return once the page shows these words."""
        await self.page.wait_for(
            f"document.querySelector({json.dumps(where)})?.innerText.includes({json.dumps(words)})"
        )

    async def is_in(self, state: str) -> None:
        """Return once the last turn is in this state."""
        await self.page.wait_for(f"{LAST}?.dataset.state === {json.dumps(state)}")

    async def replies(self, start: str) -> None:
        """Return once the last reply has this text in it."""
        await self.page.wait_for(f"{REPLY}.includes({json.dumps(start)})")

    async def replies_whole(self, text: str) -> None:
        """Return once the last reply is drawn to the last word of this text: its state is shown before."""
        await self.replies(f" {text.rsplit(maxsplit=1)[-1]} ")

    async def reply(self) -> str:
        text: str = await self.page.get(REPLY)
        return text

    async def copied(self, button: str) -> str:
        """What this button of the last turn puts on the clipboard."""
        text: str = await self.page.get(
            "navigator.clipboard.writeText = (text) => ((window.copied = text), Promise.resolve()),"
            f"{LAST}.querySelector({json.dumps(button)}).click(), window.copied"
        )
        return text

    async def turns(self) -> list[list[str]]:
        """The state, the question and the reply of each turn on the page."""
        found: list[list[str]] = await self.page.get(
            "[...document.querySelectorAll('.turn')].map((it) => [it.dataset.state, "
            "it.querySelector('.asked').textContent, it.querySelector('.answer > .parts > .markdown').textContent])"
        )
        return found

    async def session(self) -> str:
        """The id of the conversation in the address, once there is one."""
        await self.page.wait_for("location.hash.startsWith('#/chat/sess_')")
        found: str = await self.page.get("location.hash.split('/')[2]")
        return found
