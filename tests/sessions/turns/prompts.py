"""The functions of ``prompt.py`` without their steps."""

from typing import Any, TypeVar

from service.sessions.turns.prompt import Prompt, prompt_of
from service.steps import Steps

T = TypeVar("T")


def all_at_once(steps: Steps[T]) -> T:
    """Do long work in one step."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result


def build_prompt(*arguments: Any, **named: Any) -> Prompt:
    return all_at_once(prompt_of(*arguments, **named))
