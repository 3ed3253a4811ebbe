"""Items that a request names in place of sending them: ``{"type": "item_reference", "id": "fc_3e…"}``.

An item of a reply is found by its id alone, because the id has the digits of its turn. Another item is looked for among
those of the conversation, or of the responses, that the request follows. What the request follows is not repeated.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import msgspec

from service.api.http.callers import current_owner
from service.api.http.strict_json import InputTooLargeError, shown
from service.api.openai.echo import Echo
from service.api.openai.errors import ParameterError
from service.api.openai.ids import item_id_of, item_name
from service.api.openai.items import reasoning_before
from service.errors import ItemNotFoundError, OwnedElsewhereError, SessionNotFoundError, TurnNotFoundError
from service.ids import new_item_id, owner_of, turn_id_of_item
from service.sessions.sessions import Sessions
from service.storage.records import Item, TurnRecord, text_bytes_of

REFERENCES_MAX = 1024
"""The most references of one request: each may be a look into the store."""
SEARCHES_MAX = 32
"""The most items of one request that are looked for in a session, which reads many of its turns."""
_READ_PER_INPUT = 4
"""How many times as much as an input may have is read of replies for the references of one request."""


class ReferencedItemNotFoundError(ParameterError):
    """An item that a request names is not there for the caller."""

    status = 404

    def __init__(self, name: str, *, param: str) -> None:
        super().__init__(
            f"Item with id {shown(name)!r} not found: it never existed, was not stored, was deleted or has expired. "
            "Send the item itself.",
            param=param,
            code="item_not_found",
        )


class Found(msgspec.Struct, frozen=True):
    """What the references of a request stand for.

    Attributes:
        items: The items by their names; None for an item that the request follows anyway, and for one that says nothing
            to the model that is asked. Reasoning that was shown before a call, and that is not kept, is as clients send
            it.
        namespaces: The namespaces of the calls among them.
    """

    items: Mapping[str, Item | dict[str, Any] | None] = {}
    namespaces: Mapping[str, tuple[str, str]] = {}


NOTHING_FOUND = Found()


async def find_own_session(sessions: Sessions, turn_id: str) -> str:
    """The id of the session of a caller's turn. Raises: TurnNotFoundError, also for a turn of another owner."""
    session_id = await sessions.find_session_of(turn_id)
    if owner_of(session_id) != current_owner():
        raise TurnNotFoundError(turn_id)
    return session_id


def is_reference(told: object) -> TypeGuard[dict[str, Any]]:
    """Whether an item of an input is a reference. Its type may be left out where there is nothing but an id."""
    if not isinstance(told, dict):
        return False
    kind = told.get("type")
    return kind == "item_reference" or (kind is None and told.keys() - {"type"} == {"id"})


def references_in(told: object) -> dict[str, str]:
    """The names of the items that an input refers to, each with the parameter of its first reference.

    Raises:
        ParameterError: A reference is wrong, or there are too many.
    """
    found: dict[str, str] = {}
    for index, item in enumerate(told if isinstance(told, tuple | list) else ()):
        if not is_reference(item):
            continue
        param = f"input[{index}]"
        unknown = next((name for name in item if name not in ("type", "id")), None)
        if unknown is not None:
            raise ParameterError(
                f"Unknown parameter: {shown(unknown)!r}.", param=f"{param}.{shown(unknown)}", code="unknown_parameter"
            )
        name = item.get("id")
        if not isinstance(name, str):
            raise ParameterError("Expected the id of an item.", param=f"{param}.id", code="invalid_type")
        found.setdefault(name, f"{param}.id")
    if len(found) > REFERENCES_MAX:
        raise ParameterError(f"There are {len(found)} references; at most {REFERENCES_MAX} are taken.", param="input")
    return found


class _Source(NamedTuple):
    """What is kept of a turn that has items which a request refers to: no input, no tools."""

    session_id: str
    turn_id: str
    model: str
    is_open: bool
    items: tuple[Item, ...]
    namespaces: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, turn: TurnRecord, items: tuple[Item, ...]) -> "_Source":
        calls = {item.name for item in items if item.type == "function_call"}
        names = Echo.of_face(turn.face).namespaces if calls else {}
        namespaces = {name: names[name] for name in calls & names.keys()}
        return cls(turn.session_id, turn.id, turn.model, turn.is_open, items, namespaces)

    def find_item(self, item_id: str) -> Item | None:
        """The item, or the call before which reasoning with these digits is shown."""
        digits = item_id.removeprefix("msg_")
        return next((item for item in self.items if item.id in (item_id, f"fc_{digits}")), None)


class References:
    """Finds the items that a request refers to.

    Args:
        session_id: The session that the request follows; None for a first response.
        parent: The turn that it follows, if there is one.
        model: The model that is asked.
        bytes_max: The most bytes that an input may have.
    """

    def __init__(
        self, sessions: Sessions, session_id: str | None, parent: str | None, *, model: str, bytes_max: int
    ) -> None:
        self._sessions = sessions
        self._session_id = session_id
        self._parent = parent
        self._model = model
        self._bytes_max = self._bytes_left = _READ_PER_INPUT * bytes_max
        self._replies: dict[str, _Source | None] = {}
        self._searches = 0

    async def find(self, names: Mapping[str, str]) -> Found:
        """Find items by their names, each with the parameter that names it.

        Raises:
            ReferencedItemNotFoundError
            ParameterError: An item is of a response that has not ended, or too many are to be looked for.
            InputTooLargeError
        """
        placed = [(name, *await self._find(name, param)) for name, param in names.items()]
        path = await self._path({source.turn_id for _, _, source in placed if source.session_id == self._session_id})
        items: dict[str, Item | dict[str, Any] | None] = {}
        namespaces: dict[str, tuple[str, str]] = {}
        for name, item, source in placed:
            if source.turn_id in path:
                items[name] = None
                continue
            if name != item_name(item):  # of a call that has its fields if it is referred to, too
                items[name] = msgspec.to_builtins(reasoning_before(item)) if source.model == self._model else None
                continue
            items[name] = item if source.model == self._model else _for_another_model(item)
            if item.type == "function_call" and item.name in source.namespaces:
                namespaces[item.name] = source.namespaces[item.name]
        return Found(items, namespaces)

    async def _find(self, name: str, param: str) -> tuple[Item, _Source]:
        """The item, or the call before which reasoning of this name is shown."""
        item_id = item_id_of(name)
        if item_id is None:
            raise ReferencedItemNotFoundError(name, param=param)
        source = await self._reply(turn_id_of_item(item_id), param)
        item = None if source is None else source.find_item(item_id)
        if (source is None or item is None) and self._session_id is not None:
            source = await self._search(self._session_id, item_id, param)
            item = None if source is None else source.find_item(item_id)
        if source is None or item is None or not _is_shown_as(name, item):
            raise ReferencedItemNotFoundError(name, param=param)
        if source.is_open:
            raise _not_ended(name, param)
        return item, source

    async def _reply(self, turn_id: str, param: str) -> _Source | None:
        """The reply of a turn of the caller's, if there is one."""
        if turn_id not in self._replies:
            self._replies[turn_id] = await self._read(turn_id, param)
        return self._replies[turn_id]

    async def _read(self, turn_id: str, param: str) -> _Source | None:
        try:
            session_id = await find_own_session(self._sessions, turn_id)
            turn = await self._sessions.get_reply(session_id, turn_id)
        except (SessionNotFoundError, TurnNotFoundError):
            return None
        except OwnedElsewhereError:
            raise _not_ended(turn_id, param) from None
        self._count(turn.output)
        return _Source.of(turn, turn.output)

    async def _search(self, session_id: str, item_id: str, param: str) -> _Source | None:
        """Look for an item in the session that the request follows."""
        self._searches += 1
        if self._searches > SEARCHES_MAX:
            raise ParameterError(
                f"More than {SEARCHES_MAX} references are to items that were not the model's, which are looked for one "
                "by one: send the items themselves.",
                param=param,
            )
        try:
            placed = await self._sessions.find_item(session_id, item_id)
        except (SessionNotFoundError, ItemNotFoundError):
            return None
        self._count((placed.item,))
        return _Source.of(placed.turn, (placed.item,))

    def _count(self, items: Sequence[Item]) -> None:
        self._bytes_left -= text_bytes_of(items)
        if self._bytes_left < 0:
            raise InputTooLargeError(
                f"The outputs of the responses whose items are referred to have more than {self._bytes_max} bytes of "
                "UTF-8 together: refer to items of fewer responses, or send the items themselves.",
                field="input",
            )

    async def _path(self, turn_ids: set[str]) -> set[str]:
        """Those of some turns of the session that are on the path which the request follows."""
        if self._session_id is None or self._parent is None or not turn_ids:
            return set()
        return await self._sessions.find_on_path(self._session_id, self._parent, among=turn_ids)


def _is_shown_as(name: str, item: Item) -> bool:
    """Whether a response shows an item by a name, or reasoning before it."""
    if name == item_name(item):
        return True
    before = reasoning_before(item)
    return before is not None and name == before.id


def _for_another_model(item: Item) -> Item | None:
    """An item without what only its own model's server can read; None if nothing else is in it."""
    if item.type == "reasoning" and not item.text:
        return None
    return msgspec.structs.replace(item, encrypted="", upstream="")


def _not_ended(name: str, param: str) -> ParameterError:
    return ParameterError(f"The response of {shown(name)!r} has not ended: wait for it, or cancel it.", param=param)


def with_found(told: Sequence[object], found: Found) -> list[object]:
    """An input with the items in place of their references, and None in place of those that are not repeated."""
    return [_item_of(it["id"], found) if is_reference(it) else it for it in told]


def _item_of(name: str, found: Found) -> Item | dict[str, Any] | None:
    item = found.items[name]
    return msgspec.structs.replace(item, id=new_item_id(item.type)) if isinstance(item, Item) else item
