"""The parameters of a request that a model's server may refuse, and how the words of a refusal name them. Pure.

A parameter has the name that :class:`~service.models.client.ModelRequest` and the API have for it.
"""

import re
from collections.abc import Collection, Mapping

from service.models.client import ModelRequest

_WORDS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "text_format": r"response.?format|text\.format|json.?(schema|object|mode)|structured.?outputs?|\bgrammar\b",
        "reasoning_effort": r"reasoning.?effort|\bthink(ing)?\b|\breasoning\b",
        "parallel_tool_calls": r"parallel.?tool.?calls?",
        "tool_choice": r"tool.?choice|function_call\b",
        # The schemas of functions are all that is left for a JSON schema if no form of the text was asked for.
        "tools": r"\btools\b|\btool.(use|calling)\b|\bfunction.?calling\b|\bfunctions\b|json.?schema",
        "verbosity": r"verbosity",
        "top_p": r"\btop.?p\b",
        "temperature": r"temperature",
        "presence_penalty": r"presence.?penalty",
        "frequency_penalty": r"frequency.?penalty",
        "stop": r"\bstop\b",
        "seed": r"\bseed\b",
        "max_output_tokens": r"max.?(output|completion|new)?.?tokens",
    }.items()
}
_REFUSING = re.compile(
    r"support|unknown|unrecogni[sz]ed|unexpected|\bextra\b|permit|allow|accept|invalid|available|requires?\b"
    r"|implement|enable|disable|must|should|cannot|can't|expected|deprecated",
    re.IGNORECASE,
)
_NAMED_AS: Mapping[str, tuple[str, ...]] = {
    "text_format": ("response_format", "text"),
    "reasoning_effort": ("reasoning_effort", "reasoning"),
    "tool_choice": ("tool_choice", "function_call"),
    "tools": ("tools", "functions"),
    "max_output_tokens": ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens"),
}
_ROOT = re.compile(r"^(?:body\.)?([A-Za-z_]+)")
_WITHOUT_EFFECT: Mapping[str, object] = {
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
}
"""The value of a parameter that asks for nothing which a server without this parameter would not do by itself."""


def parameters_of(request: ModelRequest) -> Mapping[str, object]:
    """The parameters that a request has, with their values."""
    tools = request.tools
    values: dict[str, object] = {
        "temperature": request.temperature,
        "max_output_tokens": request.max_output_tokens,
        **request.options.given(),
    }
    if tools.functions:
        values |= {"tools": tools.functions, "tool_choice": tools.choice, "parallel_tool_calls": tools.parallel}
    return {name: value for name, value in values.items() if value is not None}


def without_effect(parameters: Mapping[str, object]) -> frozenset[str]:
    """The parameters that can be left out for a server that refuses them, and nothing is lost."""
    return frozenset(name for name, value in parameters.items() if _WITHOUT_EFFECT.get(name) == value)


def refused_parameter(words: str, named: str, sent: Collection[str]) -> str | None:
    """The parameter that a refusal is about; None if it is about none that was sent.

    Args:
        words: What the server said.
        named: The name that the server gave in a field of its own (``param``); empty if it gave none.
        sent: The parameters of the request.
    """
    if root := _ROOT.match(named):
        return next((name for name in sent if root[1] in _NAMED_AS.get(name, (name,))), None)
    if not _REFUSING.search(words):
        return None
    return next((name for name, pattern in _WORDS.items() if name in sent and pattern.search(words)), None)
