"""The tools of a request: what goes to the model, what is left out, and what is refused by its name."""

from typing import Any

import pytest

from service.api.openai.errors import ParameterError
from service.api.openai.tools import TakenTools, take_tools
from service.models.client import NamedFunction, Tools

READ = {"type": "function", "name": "read", "description": "Reads.", "parameters": {"type": "object"}, "strict": True}
WRITE = {"type": "function", "name": "write"}
FILES = {"type": "namespace", "name": "files", "description": "Files.", "tools": [READ, WRITE]}
SEARCH = {"type": "web_search", "search_context_size": "low"}
PATCH = {"type": "custom", "name": "apply_patch", "format": {"type": "text"}}
GITHUB = {"type": "mcp", "server_label": "github", "server_url": "https://example.org"}


def take(*tools: dict[str, Any], choice: object = None, parallel: bool | None = None, hosted: Any = "leave_out") -> Any:
    return take_tools(tools, choice, parallel=parallel, hosted=hosted)


def sent(taken: TakenTools) -> Tools:
    assert isinstance(taken.tools, Tools)
    return taken.tools


def refusal(*tools: dict[str, Any], **options: Any) -> tuple[str | None, str]:
    with pytest.raises(ParameterError) as refused:
        take(*tools, **options)
    return refused.value.field, refused.value.openai_code


def test_functions_go_to_the_model_as_they_are() -> None:
    tools = sent(take(READ, WRITE, parallel=False))
    assert [(it.name, it.description, it.parameters, it.strict) for it in tools.functions] == [
        ("read", "Reads.", {"type": "object"}, True),
        ("write", None, None, None),
    ]
    assert (tools.choice, tools.parallel) == (None, False)


def test_no_tools_are_nothing_and_their_defaults_say_nothing() -> None:
    for choice in (None, "auto", "none"):
        assert take(choice=choice) == TakenTools()
    assert sent(take(READ, choice="auto")).choice is None
    assert sent(take(READ, choice="none")).choice == "none"


def test_functions_of_a_namespace_are_flattened_and_their_names_kept() -> None:
    taken = take(READ, FILES)
    assert [it.name for it in sent(taken).functions] == ["read", "files__read", "files__write"]
    assert taken.namespaces == {"files__read": ("files", "read"), "files__write": ("files", "write")}
    chosen = take(FILES, choice={"type": "function", "namespace": "files", "name": "write"})
    assert sent(chosen).choice == NamedFunction("files__write")


def test_what_is_no_function_is_left_out_and_named() -> None:
    within = FILES | {"tools": [PATCH, READ]}
    taken = take(SEARCH, READ, GITHUB, PATCH, SEARCH, within, choice="auto")
    assert [it.name for it in sent(taken).functions] == ["read", "files__read"]
    assert taken.left_out == ("web_search", "mcp:github", "custom:apply_patch")
    assert take(SEARCH) == TakenTools(left_out=("web_search",))


@pytest.mark.parametrize("tool", [SEARCH, GITHUB, PATCH])
def test_what_is_no_function_can_be_refused(tool: dict[str, Any]) -> None:
    assert refusal(READ, tool, hosted="refuse") == ("tools[1].type", "unsupported_value")
    assert refusal(FILES | {"tools": [tool]}, hosted="refuse") == ("tools[0].tools[0].type", "unsupported_value")


def test_a_choice_that_needs_a_tool_which_is_left_out_is_refused() -> None:
    for kind in ("web_search", "mcp", "custom", "image_generation"):
        assert refusal(SEARCH, READ, choice={"type": kind}) == ("tool_choice", "unsupported_value")
    assert refusal(SEARCH, choice="required") == ("tool_choice", "invalid_value")
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]}
    assert refusal(SEARCH, READ, choice=allowed) == ("tool_choice", "invalid_value")


def test_a_choice_names_a_function_or_some() -> None:
    assert sent(take(READ, choice={"type": "function", "name": "read"})).choice == NamedFunction("read")
    assert sent(take(READ, choice="required")).choice == "required"
    for mode, choice in (("auto", None), ("required", "required")):
        allowed = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "write"}]}
        tools = sent(take(READ, WRITE, choice=allowed))
        assert [it.name for it in tools.functions] == ["write"]
        assert tools.choice == choice


@pytest.mark.parametrize(
    ("tools", "options", "param", "code"),
    [
        ((READ, READ), {}, "tools[1].name", "invalid_value"),
        (({"type": "function", "name": "files__read"}, FILES), {}, "tools[1].tools[0].name", "invalid_value"),
        (({"type": "function"},), {}, "tools[0].name", "invalid_value"),
        ((READ | {"name": "a b"},), {}, "tools[0].name", "invalid_value"),
        ((READ | {"name": "x" * 65},), {}, "tools[0].name", "invalid_value"),
        ((READ | {"strict": "yes"},), {}, "tools[0].strict", "invalid_type"),
        ((READ | {"parameters": []},), {}, "tools[0].parameters", "invalid_type"),
        ((READ | {"function": {}},), {}, "tools[0].function", "unknown_parameter"),
        ((READ | {"async": True},), {}, "tools[0].async", "unsupported_value"),
        ((READ | {"allowed_callers": ["programmatic"]},), {}, "tools[0].allowed_callers", "unsupported_value"),
        ((READ | {"allowed_callers": 3},), {}, "tools[0].allowed_callers", "invalid_type"),
        (({"name": "read"},), {}, "tools[0].type", "invalid_value"),
        (({"type": 3},), {}, "tools[0].type", "invalid_value"),
        ((FILES | {"tools": {}},), {}, "tools[0].tools", "invalid_type"),
        ((FILES | {"tools": [3]},), {}, "tools[0].tools[0]", "invalid_type"),
        ((FILES | {"extra": 1},), {}, "tools[0].extra", "unknown_parameter"),
        ((READ,), {"choice": "any"}, "tool_choice", "invalid_value"),
        ((READ,), {"choice": {}}, "tool_choice.type", "invalid_value"),
        ((READ,), {"choice": {"type": "function", "name": "other"}}, "tool_choice.name", "invalid_value"),
        ((READ,), {"choice": {"type": "function", "name": ["read"]}}, "tool_choice.name", "invalid_value"),
        ((READ,), {"choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools", "invalid_type"),
        ((READ,), {"choice": {"type": "allowed_tools", "mode": "x", "tools": []}}, "tool_choice.mode", "invalid_value"),
        (
            (READ,),
            {"choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "read"}]}},
            "tool_choice.tools[0]",
            "invalid_value",
        ),
    ],
)
def test_a_tool_or_a_choice_that_is_wrong_is_refused_by_its_name(
    tools: tuple[dict[str, Any], ...], options: dict[str, Any], param: str, code: str
) -> None:
    assert refusal(*tools, **options) == (param, code)


def test_what_loses_nothing_is_accepted() -> None:
    extra = {"defer_loading": True, "allowed_callers": ["direct"], "async": False, "output_schema": {"type": "string"}}
    assert sent(take(READ | extra)) == sent(take(READ))
    assert sent(take(READ | {"description": None, "parameters": None, "strict": None})).functions[0].name == "read"
