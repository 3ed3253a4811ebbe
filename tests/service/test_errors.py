"""The tree in the docstring of :mod:`service.errors` is the tree of its types."""

import re
from collections.abc import Iterator

import service.errors
from service.errors import LastcallError

LINE = re.compile(r"^    (?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+Error)\b", re.MULTILINE)
INDENT = len("├── ")


def tree_in_docstring() -> Iterator[tuple[str, str]]:
    """Each type with its parent, as the docstring draws them."""
    parents: list[str] = []
    for line in LINE.finditer(service.errors.__doc__ or ""):
        depth = len(line["indent"]) // INDENT
        del parents[depth:]
        yield line["name"], parents[-1] if parents else "Exception"
        parents.append(line["name"])


def types_in_module() -> Iterator[tuple[str, str]]:
    for kind in vars(service.errors).values():
        if isinstance(kind, type) and issubclass(kind, LastcallError):
            yield kind.__name__, kind.__mro__[1].__name__


def test_tree_in_the_docstring_has_each_error_type_below_its_parent() -> None:
    drawn = list(tree_in_docstring())
    assert len(drawn) == len(set(drawn)), "no type is drawn twice"
    assert set(drawn) == set(types_in_module())
