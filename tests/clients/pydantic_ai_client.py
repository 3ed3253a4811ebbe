"""Pydantic AI with two tools, through chat completions or responses. See :mod:`tests.clients.framework`."""

from typing import Any

from openai import AsyncOpenAI
from pydantic_ai import (  # type: ignore[import-not-found]  # of the script's own environment
    Agent,
    AgentRunResultEvent,
    ModelAPIError,
    ModelHTTPError,
    PartDeltaEvent,
    PartStartEvent,
)
from pydantic_ai.models.openai import (  # type: ignore[import-not-found]
    OpenAIChatModel,
    OpenAIResponsesModel,
)
from pydantic_ai.providers.openai import OpenAIProvider  # type: ignore[import-not-found]

from tests.clients import framework

MODELS = {"responses": OpenAIResponsesModel, "chat": OpenAIChatModel}


def make_agent(face: str, model: str) -> Any:
    client = AsyncOpenAI(base_url=framework.URL, api_key="none", max_retries=0, timeout=30)
    made = MODELS[face](model, provider=OpenAIProvider(openai_client=client))
    return Agent(made, instructions="Use the tools.", tools=[framework.get_weather, framework.get_time])


async def streamed(agent: Any, prompt: str, **options: Any) -> Any:
    """The result of a run whose requests are streamed; each piece of a text or of a call is noted."""
    result = None
    async with agent.run_stream_events(prompt, **options) as events:
        async for event in events:
            if isinstance(event, PartStartEvent):
                framework.note(getattr(event.part, "content", None) or getattr(event.part, "args", None))
            elif isinstance(event, PartDeltaEvent):
                framework.note(getattr(event.delta, "content_delta", None) or getattr(event.delta, "args_delta", None))
            elif isinstance(event, AgentRunResultEvent):
                result = event.result
    assert result is not None
    return result


async def turns(face: str) -> list[object]:
    """Three turns: whole, streamed, and whole, each from the history of those before."""
    agent = make_agent(face, "tools")
    first = await agent.run(framework.TURNS[0])
    second = await streamed(agent, framework.TURNS[1], message_history=first.all_messages())
    third = await agent.run(framework.TURNS[2], message_history=second.all_messages())
    return [first.output, second.output, third.output]


async def run(face: str, model: str) -> object:
    output: object = (await make_agent(face, model).run("Hi")).output
    return output


async def stream(face: str, model: str) -> object:
    output: object = (await streamed(make_agent(face, model), "Hi")).output
    return output


framework.main("pydantic-ai-slim", turns=turns, run=run, stream=stream, errors=(ModelHTTPError, ModelAPIError))
