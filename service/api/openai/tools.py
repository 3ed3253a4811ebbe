"""The tools of a request: functions go to the model, and what this server cannot run is left out, or refused.

Functions in a ``namespace`` get flat names for the model's server, which knows no namespaces:
:func:`~service.api.openai.ids.flat_name`. A call of such a function is shown with its namespace again: the turn keeps
the names (:attr:`TakenTools.namespaces`).

A tool that OpenAI's servers run (``web_search``…), and one that is no function (``custom``), is left out while the
model may choose freely: the answer names it. If the choice needs such a tool, or with ``hosted_tools = "refuse"``, the
request is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import msgspec

from service.api.http.strict_json import shown
from service.api.openai.errors import ParameterError
from service.api.openai.ids import FUNCTION_NAME_LENGTH_MAX, flat_name
from service.models.client import FunctionTool, NamedFunction, ToolChoice, Tools

HostedTools = Literal["leave_out", "refuse"]
TOOLS_MAX = 1024
"""The most tools of a request, and the most functions, those in namespaces included."""
_WORDS = frozenset({"auto", "none", "required"})
_NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_FUNCTION_FIELDS = frozenset(
    {"type", "name", "description", "parameters", "strict"}
    | {"allowed_callers", "async", "defer_loading", "output_schema"}
)
_NAMESPACE_FIELDS = frozenset({"type", "name", "description", "tools"})


class TakenTools(msgspec.Struct, frozen=True, kw_only=True):
    """The tools of a request, as they are used.

    Attributes:
        tools: What the model may call, and whether it must.
        left_out: The types of the tools that are left out, or their names if they have one; each once, in order.
        namespaces: The namespace and the name of each function that has a flat name.
    """

    tools: Tools | msgspec.UnsetType = msgspec.UNSET
    left_out: tuple[str, ...] = ()
    namespaces: dict[str, tuple[str, str]] = {}


def take_tools(
    tools: Sequence[Mapping[str, Any]], choice: object, *, parallel: bool | None, hosted: HostedTools
) -> TakenTools:
    """Read the tools of a request and its ``tool_choice``.

    Args:
        hosted: What is done with tools that are left out or refused.

    Raises:
        ParameterError
    """
    functions: dict[str, FunctionTool] = {}
    namespaces: dict[str, tuple[str, str]] = {}
    left_out: dict[str, None] = {}
    for param, tool, namespace in _functions_in(tools, left_out, hosted):
        if len(functions) == TOOLS_MAX:
            raise ParameterError(
                f"At most {TOOLS_MAX} functions are taken, those in namespaces included.", param="tools"
            )
        function = _function(tool, param)
        name = function.name
        if namespace is not None:
            name = flat_name(namespace, function.name)
            namespaces[name] = (namespace, function.name)
        if name in functions:
            raise ParameterError(f"There are two functions named {name!r}.", param=f"{param}.name")
        functions[name] = msgspec.structs.replace(function, name=name)
    taken, allowed = _choice(choice, functions)
    if allowed is not None:
        functions = {name: functions[name] for name in functions if name in allowed}
    if taken == "required" and not functions:
        raise ParameterError(
            "A call is required, and `tools` has no function that could be called.", param="tool_choice"
        )
    if not functions:
        return TakenTools(left_out=tuple(left_out))
    # "auto" is what servers do without a choice, and some know no other word.
    sent = Tools(functions=tuple(functions.values()), choice=None if taken == "auto" else taken, parallel=parallel)
    return TakenTools(tools=sent, left_out=tuple(left_out), namespaces=namespaces)


def _functions_in(
    tools: Sequence[Mapping[str, Any]], left_out: dict[str, None], hosted: HostedTools
) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Each function with its place in the request and its namespace. Notes the other tools in ``left_out``."""
    for index, tool in enumerate(tools):
        param = f"tools[{index}]"
        kind = tool.get("type")
        if kind == "namespace":
            yield from _of_namespace(tool, param, left_out, hosted)
        elif kind == "function":
            yield param, tool, None
        else:
            _leave_out(tool, param, left_out, hosted)


def _of_namespace(
    tool: Mapping[str, Any], param: str, left_out: dict[str, None], hosted: HostedTools
) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    _check_fields(tool, _NAMESPACE_FIELDS, param)
    namespace = _name(tool, param)
    if not isinstance(tool.get("description"), str | None):
        raise ParameterError("Expected a string.", param=f"{param}.description", code="invalid_type")
    within = tool.get("tools")
    if not isinstance(within, list):
        raise ParameterError("Expected an array of the namespace's tools.", param=f"{param}.tools", code="invalid_type")
    for index, inner in enumerate(within):
        place = f"{param}.tools[{index}]"
        if not isinstance(inner, dict):
            raise ParameterError("Expected an object.", param=place, code="invalid_type")
        if inner.get("type") == "function":
            yield place, inner, namespace
        else:
            _leave_out(inner, place, left_out, hosted)


def _leave_out(tool: Mapping[str, Any], param: str, left_out: dict[str, None], hosted: HostedTools) -> None:
    kind = tool.get("type")
    if not isinstance(kind, str) or not kind or len(kind) > FUNCTION_NAME_LENGTH_MAX:
        raise ParameterError("Expected the type of a tool, such as `function`.", param=f"{param}.type")
    if hosted == "refuse":
        raise ParameterError(
            f"This server has no tool {shown(kind)!r}: it passes functions to the model, and its caller runs them.",
            param=f"{param}.type",
            code="unsupported_value",
        )
    left_out[_shown_tool(tool)] = None


def _shown_tool(tool: Mapping[str, Any]) -> str:
    name = tool.get("name") or tool.get("server_label")
    return (
        f"{tool['type']}:{shown(name)[:FUNCTION_NAME_LENGTH_MAX]}"
        if isinstance(name, str) and name
        else str(tool["type"])
    )


def _check_fields(tool: Mapping[str, Any], known: frozenset[str], param: str) -> None:
    unknown = next((name for name in tool if name not in known), None)
    if unknown is not None:
        raise ParameterError(
            f"Unknown parameter: {shown(unknown)!r}.", param=f"{param}.{shown(unknown)}", code="unknown_parameter"
        )


def _name(tool: Mapping[str, Any], param: str) -> str:
    name = tool.get("name")
    if (
        not isinstance(name, str)
        or not 1 <= len(name) <= FUNCTION_NAME_LENGTH_MAX
        or not _NAME_CHARACTERS.issuperset(name)
    ):
        raise ParameterError("Expected a name: 1-64 of `A-Z a-z 0-9 _ -`.", param=f"{param}.name")
    return name


def _function(tool: Mapping[str, Any], param: str) -> FunctionTool:
    """Read a function.

    ``defer_loading`` has no effect, because all functions go to the model; ``output_schema`` has none, because model
    servers do not take it.
    """
    _check_fields(tool, _FUNCTION_FIELDS, param)
    for field, kind, words in (
        ("description", str, "a string"),
        ("parameters", dict, "an object"),
        ("strict", bool, "true or false"),
    ):
        if not isinstance(tool.get(field), kind | None):
            raise ParameterError(f"Expected {words}.", param=f"{param}.{field}", code="invalid_type")
    if tool.get("async"):
        raise _unsupported("Functions that the model does not wait for are not supported.", f"{param}.async")
    callers = tool.get("allowed_callers") or ["direct"]
    if not isinstance(callers, list):
        raise ParameterError("Expected an array.", param=f"{param}.allowed_callers", code="invalid_type")
    if "direct" not in callers:
        raise _unsupported("Only the model itself calls functions here.", f"{param}.allowed_callers")
    return FunctionTool(
        name=_name(tool, param),
        description=tool.get("description"),
        parameters=tool.get("parameters"),
        strict=tool.get("strict"),
    )


def _choice(choice: object, functions: Mapping[str, FunctionTool]) -> tuple[ToolChoice | None, set[str] | None]:
    """Read the choice: whether the model must call, and the functions to which it is bound, if it is bound."""
    if choice is None or (isinstance(choice, str) and choice in _WORDS):
        return cast("ToolChoice | None", choice), None
    if not isinstance(choice, dict):
        raise ParameterError("Expected `auto`, `none`, `required` or an object.", param="tool_choice")
    kind = choice.get("type")
    if kind == "function":
        _check_fields(choice, frozenset({"type", "name", "namespace"}), "tool_choice")
        return NamedFunction(_chosen(choice, functions, "tool_choice")), None
    if kind == "allowed_tools":
        return _allowed(choice, functions)
    if not isinstance(kind, str):
        raise ParameterError("Expected the type of a choice.", param="tool_choice.type")
    raise _unsupported(
        f"The model cannot be made to use a tool {shown(kind)!r}: this server has no such tool.", "tool_choice"
    )


def _allowed(choice: Mapping[str, Any], functions: Mapping[str, FunctionTool]) -> tuple[ToolChoice | None, set[str]]:
    """The mode of a choice among some tools, and the functions among them."""
    _check_fields(choice, frozenset({"type", "mode", "tools"}), "tool_choice")
    mode = choice.get("mode")
    if mode not in ("auto", "required"):
        raise ParameterError("Expected `auto` or `required`.", param="tool_choice.mode")
    tools = choice.get("tools")
    if not isinstance(tools, list):
        raise ParameterError("Expected an array of tools.", param="tool_choice.tools", code="invalid_type")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        param = f"tool_choice.tools[{index}]"
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            raise ParameterError("Expected a tool with its type.", param=param)
        if tool["type"] == "function":
            names.add(_chosen(tool, functions, param))
    return mode, names


def _chosen(tool: Mapping[str, Any], functions: Mapping[str, FunctionTool], param: str) -> str:
    """The name, as it is sent, of the function that a choice names."""
    name, namespace = _name(tool, param), tool.get("namespace")
    if namespace is not None:
        name = flat_name(_name({"name": namespace}, f"{param}.namespace"), name)
    if name not in functions:
        raise ParameterError("This is none of the functions in `tools`.", param=f"{param}.name")
    return name


def _unsupported(message: str, param: str) -> ParameterError:
    return ParameterError(message, param=param, code="unsupported_value")
