"""openai-agents with two tools, through responses or chat completions. See :mod:`tests.clients.framework`."""

from typing import Any

from agents import (  # type: ignore[import-not-found]  # of the script's own environment
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

from tests.clients import framework

set_tracing_disabled(True)
MODELS = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}
TOOLS = [function_tool(framework.get_weather), function_tool(framework.get_time)]


def make_agent(face: str, model: str) -> Any:
    client = AsyncOpenAI(base_url=framework.URL, api_key="none", max_retries=0, timeout=30)
    made = MODELS[face](model=model, openai_client=client)
    return Agent(name="one", instructions="Use the tools.", model=made, tools=TOOLS)


async def turns(face: str) -> list[object]:
    """Three turns: whole, streamed, and whole from a history. The second response follows the first by its id."""
    agent = make_agent(face, "tools")
    first = await Runner.run(agent, framework.TURNS[0])
    question = {"role": "user", "content": framework.TURNS[1]}
    if face == "responses":
        streamed = Runner.run_streamed(agent, [question], previous_response_id=first.last_response_id)
    else:
        streamed = Runner.run_streamed(agent, [*first.to_input_list(), question])
    pieces = [event.data.delta async for event in streamed.stream_events() if is_text(event)]
    assert "".join(pieces) == streamed.final_output, (pieces, streamed.final_output)
    history = [*first.to_input_list(), *streamed.to_input_list()] if face == "responses" else streamed.to_input_list()
    third = await Runner.run(agent, [*history, {"role": "user", "content": framework.TURNS[2]}])
    return [first.final_output, streamed.final_output, third.final_output]


def is_text(event: Any) -> bool:
    return bool(event.type == "raw_response_event" and event.data.type == "response.output_text.delta")


async def run(face: str, model: str) -> object:
    return (await Runner.run(make_agent(face, model), "Hi")).final_output


async def stream(face: str, model: str) -> object:
    streamed = Runner.run_streamed(make_agent(face, model), "Hi")
    async for event in streamed.stream_events():
        if event.type == "raw_response_event":
            framework.note(getattr(event.data, "delta", None))
    return streamed.final_output


framework.main("openai-agents", turns=turns, run=run, stream=stream)
