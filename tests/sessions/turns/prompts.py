"""The functions of ``prompt.py`` without their steps."""

from typing import Any

from service.sessions.turns.prompt import Prompt, prompt_of
from service.steps import at_once


def build_prompt(*arguments: Any, **named: Any) -> Prompt:
    return at_once(prompt_of(*arguments, **named))
