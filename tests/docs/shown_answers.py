"""Answers as a page shows them, compared with the real ones.

A page shows an answer in part: ``...`` as the last member of an object stands for all other members, ``...`` as an
element of a list or on a line of its own for any elements or lines, and a text that ends with ``…`` for each text that
begins so. Ids and times count as equal. All else is compared exactly.
"""

import json
import re
from typing import Any

from tests.docs.blocks import mask

LEFT_OUT = "..."
_CUT = "…"
_LINE_MAX = 120
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\.\.\.|[{}\[\]]')
_DATA = "data: "
_OTHER_FIELDS = re.compile(r"(id|retry):|:")


def shown_values(text: str) -> list[Any]:
    """The values of an answer on a page: JSON, or lines as :func:`printed_values` reads them."""
    return _json_values(text) if text.startswith(("{", "[")) else printed_values(text)


def printed_values(text: str) -> list[Any]:
    """The values that a program has printed: a line of JSON or of text for each, or the frames of an event stream."""
    lines = [line for line in text.splitlines() if line and not _OTHER_FIELDS.match(line)]
    return [_value(line.removeprefix(_DATA)) for line in lines]


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _json_values(text: str) -> list[Any]:
    opened: list[str] = []

    def quote(found: re.Match[str]) -> str:
        token = found[0]
        if token in ("{", "["):
            opened.append(token)
        elif token in ("}", "]"):
            opened.pop()
        elif token == LEFT_OUT:
            return f'"{LEFT_OUT}": null' if opened[-1:] == ["{"] else f'"{LEFT_OUT}"'
        return token

    rest = _TOKEN.sub(quote, text).strip()
    values = []
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        values.append(value)
        rest = rest[end:].lstrip()
    return values


def agrees(shown: Any, real: Any) -> bool:
    """Whether the real answer is the one that is shown."""
    match shown, real:
        case dict(), dict():
            named = shown.keys() - {LEFT_OUT}
            has_all = named == real.keys() or (LEFT_OUT in shown and named <= real.keys())
            return has_all and all(agrees(shown[name], real[name]) for name in named)
        case list(), list():
            before, after = _parts(shown)
            if LEFT_OUT not in shown and len(shown) != len(real):
                return False
            has_room = len(before) + len(after) <= len(real)
            return has_room and all(map(agrees, before + after, real[: len(before)] + _last(real, len(after))))
        case str(), str():
            if shown.endswith(_CUT):
                return mask(real).startswith(mask(shown.removesuffix(_CUT)))
            return mask(shown) == mask(real)
    return type(shown) is type(real) and bool(shown == real)


def refreshed(shown: Any, real: Any) -> Any:
    """The shown answer as it would be of the real one: the same parts are left out. Unchanged if the two agree."""
    if agrees(shown, real):
        return shown
    match shown, real:
        case dict(), dict():
            left_out = {LEFT_OUT: None} if LEFT_OUT in shown else {}
            kept = {name: value for name, value in real.items() if name in shown or not left_out}
            return {name: refreshed(shown.get(name), value) for name, value in kept.items()} | left_out
        case list(), list():
            before, after = _parts(shown)
            if LEFT_OUT not in shown:
                before = (before + [None] * len(real))[: len(real)]
            middle = [LEFT_OUT] if LEFT_OUT in shown else []
            return [*map(refreshed, before, real), *middle, *map(refreshed, after, _last(real, len(after)))]
        case str(), str() if shown.endswith(_CUT):
            return real[: len(shown) - 1] + _CUT
    return real


def _parts(shown: list[Any]) -> tuple[list[Any], list[Any]]:
    """The elements before and after the ones that are left out."""
    at = shown.index(LEFT_OUT) if LEFT_OUT in shown else len(shown)
    return shown[:at], shown[at + 1 :]


def _last(values: list[Any], count: int) -> list[Any]:
    return values[len(values) - count :] if count else []


def rendered(value: Any, *, column: int = 0, indent: int = 0) -> str:
    """A value as a page shows it: on one line, or with a line for each part where this line would be too long."""
    line = _on_one_line(value)
    if not isinstance(value, dict | list) or column + len(line) <= _LINE_MAX:
        return line
    inner = indent + 2
    if isinstance(value, dict):
        parts = [_member(name, part, indent=inner) for name, part in value.items()]
    else:
        parts = [LEFT_OUT if part == LEFT_OUT else rendered(part, column=inner, indent=inner) for part in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    lines = ",\n".join([" " * inner + part for part in parts])
    return f"{opening}\n{lines}\n{' ' * indent}{closing}"


def _member(name: str, value: Any, *, indent: int) -> str:
    if name == LEFT_OUT:
        return LEFT_OUT
    begin = f"{json.dumps(name)}: "
    return begin + rendered(value, column=indent + len(begin) + 1, indent=indent)


def _on_one_line(value: Any) -> str:
    if isinstance(value, dict):
        members = [n if n == LEFT_OUT else f"{json.dumps(n)}: {_on_one_line(part)}" for n, part in value.items()]
        return "{" + ", ".join(members) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([LEFT_OUT if part == LEFT_OUT else _on_one_line(part) for part in value]) + "]"
    return json.dumps(value, ensure_ascii=False)
