"""Parameters that are refused by their names, because their callers would miss the effect."""

from collections.abc import Mapping

from service.api.openai.errors import ParameterError

Refused = Mapping[str, tuple[tuple[object, ...], str]]
"""By the name of a parameter: the values that are taken beside null, and why no others are."""


def refuse_values(told: Mapping[str, object], refused: Refused) -> None:
    """Refuse the values of parameters that are not taken. Raises: ParameterError."""
    for name, (taken, why) in refused.items():
        value = told.get(name)
        if value is not None and not any(value == it and type(value) is type(it) for it in taken):
            raise unsupported(f"`{name}` is not supported with this value: {why}.", name)


def unsupported(message: str, param: str) -> ParameterError:
    """The error of a parameter that has no effect here."""
    return ParameterError(message, param=param, code="unsupported_parameter")
