"""The values of all names in the libraries that a worker and a master use, and which of them have changed."""

import logging
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

LIBRARIES = frozenset(
    {"h11", "h2", "hpack", "hyperframe", "hypercorn", "multiprocessing", "priority", "quart", "quart_trio", "trio"}
    | {"werkzeug", "wsproto"}
)

Name = tuple[int, object]
"""The identity (``id``) of the object that has a name, and the name."""


class LibraryNames:
    """All names of the libraries' modules and classes, the items of their dictionaries, and their loggers' filters."""

    def __init__(self) -> None:
        self._values: dict[Name, object] = {}
        self._written: dict[Name, str] = {}
        self._holders: dict[int, object] = {}
        for name, module in sorted(sys.modules.items()):
            if name.partition(".")[0] in LIBRARIES:
                self._note(name, module, vars(module))
        for name, logger in sorted(logging.root.manager.loggerDict.items()):
            if name.partition(".")[0] in LIBRARIES and isinstance(logger, logging.Logger):
                self._values[id(logger), "filters"] = tuple(logger.filters)
                self._written[id(logger), "filters"] = f"the filters of the logger {name}"
                self._holders[id(logger)] = logger

    def _note(self, written: str, holder: object, names: Mapping[Any, object]) -> None:
        self._holders[id(holder)] = holder
        for name, value in list(names.items()):
            self._values[id(holder), name] = value
            self._written[id(holder), name] = f"{written}.{name}"
            if _holds_names(name, value) and id(value) not in self._holders:
                self._note(f"{written}.{name}", value, value if isinstance(value, dict) else vars(value))

    def changed_since(self, earlier: "LibraryNames") -> dict[Name, str]:
        """The names that had another value earlier, each as it is written in code."""
        both = self._values.keys() & earlier._values.keys()
        changed = (key for key in both if not _is_same(self._values[key], earlier._values[key]))
        return {key: self._written[key] for key in changed}


def _holds_names(name: object, value: object) -> bool:
    """Whether the value is a class of a library, or a dictionary of functions or classes."""
    if isinstance(value, type):
        return value.__module__.partition(".")[0] in LIBRARIES
    is_private = str(name).startswith("__")
    return (
        not is_private
        and isinstance(value, dict)
        and any(callable(it) or isinstance(it, dict) for it in value.values())
    )


def _is_same(value: object, earlier: object) -> bool:
    if isinstance(value, tuple) and isinstance(earlier, tuple):
        return len(value) == len(earlier) and all(map(_is_same, value, earlier))
    return value is earlier


def module_of(name: str, **values: object) -> ModuleType:
    """A new module with these names and values."""
    module = ModuleType(name)
    vars(module).update(values)
    return module
