"""The official SDK follows a response in the background over a stop and a crash, by the program of docs/openai.md."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import trio
from openai import OpenAI

from bench.server_process import ServerProcess
from tests.process.lastcall import CAP_S, SERVE, open_lastcall, wait_gone

pytestmark = [
    pytest.mark.parallel,
    # The SDK, and the HTTP client below it, leave a stream to the garbage collector that ends with an error.
    pytest.mark.filterwarnings(r"ignore:Async generator '(openai|httpx2?|httpcore2?)\.:ResourceWarning"),
]

DOCUMENT = (Path(__file__).parents[2] / "docs/openai.md").read_text()
(PROGRAM,) = re.findall(r"(?ms)^```python\n(seen, text = .*?)^```$", DOCUMENT)
TOKENS = 60
MODEL = f"scripted:?tokens={TOKENS}&rate=12&first_token_s=0"
WHOLE = "".join(f"{number} " for number in range(TOKENS))


class Watched:
    """The client of the program, which tells what its streams say."""

    def __init__(self, client: OpenAI) -> None:
        self.responses = self
        self.refused: list[Any] = []
        self.texts = 0
        self.more = trio.Event()
        self._client = client

    def retrieve(self, name: str, **asked: Any) -> Iterator[Any]:
        try:
            for event in self._client.responses.retrieve(name, **asked):
                yield event
                if event.type == "response.output_text.delta":
                    trio.from_thread.run_sync(self._note_text)
        except openai.APIStatusError as error:
            self.refused.append(error.code)
            raise

    async def wait_texts(self, count: int) -> None:
        """Wait for so many more pieces of text."""
        self.texts, self.more = -count, trio.Event()
        with trio.fail_after(3 * CAP_S):
            await self.more.wait()

    def _note_text(self) -> None:
        self.texts += 1
        if self.texts == 0:
            self.more.set()


@pytest.mark.parametrize("continues", [True, False], ids=["continue", "retry"])
async def test_the_sdk_has_the_whole_text_after_a_stop_and_a_crash(tmp_path: Path, continues: bool) -> None:
    settings: dict[str, Any] = {
        "LASTCALL_STORE_URL": f"sqlite:{tmp_path}/lastcall.db",
        "model_url": f"{MODEL}&continues={str(continues).lower()}",
        "on_interrupt": "continue",
        "drain_timeout_s": 0,
        "checkpoint_interval_s": 0.2,
    }
    async with open_lastcall(SERVE, tmp_path, **settings) as server:
        settings["LASTCALL_BIND"] = f"127.0.0.1:{server.port}"
        url = f"http://127.0.0.1:{server.port}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
            watched = Watched(client)
            said: dict[str, Any] = {"client": watched, "openai": openai, "time": time}
            said["response"] = await trio.to_thread.run_sync(
                lambda: client.responses.create(model="scripted", input="Count", background=True)
            )
            over = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, said, over)
                await watched.wait_texts(4)
                await ended(server, signal.SIGTERM)
                (tmp_path / "second").mkdir()
                async with open_lastcall(SERVE, tmp_path / "second", **settings) as second:
                    await watched.wait_texts(8)
                    await ended(second, signal.SIGKILL)
                    (tmp_path / "third").mkdir()
                    async with open_lastcall(SERVE, tmp_path / "third", **settings):
                        with trio.fail_after(4 * CAP_S):
                            await over.wait()
            assert said["text"] == WHOLE
    assert set(watched.refused) <= {"stream_cut", "response_restarted"}
    assert continues or "response_restarted" in watched.refused


async def run(said: dict[str, Any], over: trio.Event) -> None:
    """Run the program of the document."""
    await trio.to_thread.run_sync(lambda: exec(PROGRAM, said))
    over.set()


async def ended(server: ServerProcess, number: int) -> None:
    server.signal_main(number)
    await wait_gone(server)
