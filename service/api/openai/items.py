"""Items in the form of OpenAI's API, for responses and conversations: as they are shown, and as they are taken.

What this service cannot pass to a model is refused by its name: images, audio, files, and items of hosted tools. The
text parts of a message are one text inside of the service.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Never, Self

import msgspec
from msgspec import UNSET, Meta, UnsetType

from service.api.http.strict_json import shown
from service.api.openai.errors import ParameterError
from service.api.openai.ids import flat_name, item_name
from service.api.openai.signatures import extra_content_of, sealed_call, sealed_reasoning, unsealed, upstream_of
from service.ids import new_item_id
from service.models.client import Role
from service.steps import Steps, at_once
from service.storage.records import Item

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Namespaces = Mapping[str, tuple[str, str]]
"""The namespace and the name of each function that the model knows by a flat name, by this name."""
NO_NAMESPACES: Namespaces = {}

PARTS_MAX = 4096
"""The most parts of one text, which are read in one step."""
_READ_IN_STEP = 16
"""The items that are read in one step, which takes a tenth of a millisecond if they have few parts."""
_NAME_LENGTH_MAX = 64
CALL_ID_LENGTH_MAX = 16_384
"""The longest ids that model servers were seen to send have a signature in them."""
_NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


# Items as they are shown


class InputText(msgspec.Struct, frozen=True, tag="input_text", tag_field="type"):
    """``{"type": "input_text", "text": "Hi"}``"""

    text: str


class OutputText(msgspec.Struct, frozen=True, tag="output_text", tag_field="type"):
    """``{"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}``"""

    text: str
    annotations: Annotated[tuple[str, ...], Meta(max_length=0)] = ()
    logprobs: Annotated[tuple[str, ...], Meta(max_length=0)] = ()


class ReasoningText(msgspec.Struct, frozen=True, tag="reasoning_text", tag_field="type"):
    """``{"type": "reasoning_text", "text": "The user greets me."}``"""

    text: str


class ShownMessage(msgspec.Struct, frozen=True, kw_only=True, tag="message", tag_field="type"):
    """A message.

    ``{"type": "message", "id": "msg_9c…", "status": "completed", "role": "assistant", "content": [{"type":
    "output_text", "text": "Hello.", "annotations": [], "logprobs": []}]}``
    """

    id: str
    status: ItemStatus
    role: Role
    content: tuple[InputText | OutputText, ...]


class ShownReasoning(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning", tag_field="type"):
    """Reasoning, in words, encrypted, or both. Model servers send whole texts and no summaries.

    ``{"type": "reasoning", "id": "rs_5d…", "status": "completed", "summary": [], "content": [{"type": "reasoning_text",
    "text": "The user greets me."}]}``
    """

    id: str
    status: ItemStatus
    summary: Annotated[tuple[str, ...], Meta(max_length=0)] = ()
    content: tuple[ReasoningText, ...] | UnsetType = UNSET
    encrypted_content: str | UnsetType = UNSET


class ShownFunctionCall(msgspec.Struct, frozen=True, kw_only=True, tag="function_call", tag_field="type"):
    """A call of the model.

    ``{"type": "function_call", "id": "fc_3e…", "status": "completed", "call_id": "call_6f…", "name": "get_weather",
    "arguments": "{\\"city\\": \\"Oslo\\"}"}``
    """

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    namespace: str | UnsetType = UNSET
    extra_content: Annotated[
        dict[str, Any] | UnsetType, Meta(description="What the model server wants back with the call, unchanged.")
    ] = UNSET


class ShownFunctionCallOutput(msgspec.Struct, frozen=True, kw_only=True, tag="function_call_output", tag_field="type"):
    """The result of a call.

    ``{"type": "function_call_output", "id": "fco_8a…", "status": "completed", "call_id": "call_6f…", "output": "4"}``
    """

    id: str
    status: ItemStatus
    call_id: str
    output: str


ShownItem = ShownMessage | ShownReasoning | ShownFunctionCall | ShownFunctionCallOutput


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """Some items of a conversation, or of a response's input. Without items both ids are empty.

    ``{"object": "list", "data": [{"id": "msg_9c0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a", "type": "message", "role": "user",
    "status": "completed", "content": [{"type": "input_text", "text": "Hi"}]}],
    "first_id": "msg_9c0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a", "last_id": "msg_9c0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a",
    "has_more": false}``
    """

    object: Literal["list"] = "list"
    data: tuple[ShownItem, ...]
    first_id: str
    last_id: str
    has_more: bool

    @classmethod
    def of(cls, items: Sequence[Item], data: tuple[ShownItem, ...], *, has_more: bool) -> Self:
        """The list of these items, which ``data`` shows."""
        return cls(
            data=data,
            first_id=item_name(items[0]) if items else "",
            last_id=item_name(items[-1]) if items else "",
            has_more=has_more,
        )


def shown_item(
    item: Item,
    *,
    status: ItemStatus = "completed",
    namespaces: Namespaces = NO_NAMESPACES,
    encrypted: bool = False,
) -> ShownItem:
    """An item as clients of OpenAI's API see it.

    Args:
        namespaces: The names of the functions of the turn that are in namespaces.
        encrypted: Whether encrypted reasoning is shown, as ``include`` asks for it.
    """
    name = item_name(item)
    match item.type:
        case "message":
            part = OutputText(item.text) if item.role == "assistant" else InputText(item.text)
            return ShownMessage(id=name, status=status, role=item.role, content=(part,))
        case "reasoning":
            return ShownReasoning(
                id=name,
                status=status,
                content=(ReasoningText(item.text),) if item.text else UNSET,
                encrypted_content=sealed_reasoning(item) if encrypted and item.encrypted else UNSET,
            )
        case "function_call":
            namespace, function = namespaces.get(item.name, (UNSET, item.name))
            return ShownFunctionCall(
                id=name,
                status=status,
                call_id=item.call_id,
                name=function,
                arguments=item.text,
                namespace=namespace,
                extra_content=extra_content_of(item),
            )
        case "function_call_output":
            return ShownFunctionCallOutput(id=name, status=status, call_id=item.call_id, output=item.text)


def reasoning_before(call: Item) -> ShownReasoning | None:
    """The reasoning before an item, if that is a call whose server wants more back than clients keep of a call.

    It is shown in responses that were asked for encrypted reasoning: see :mod:`service.api.openai.signatures`.
    """
    sealed = sealed_call(call) if call.type == "function_call" else ""
    if not sealed:
        return None
    return ShownReasoning(id=f"rs_{call.id.removeprefix('fc_')}", status="completed", encrypted_content=sealed)


def status_of(items: Sequence[Item], index: int, *, is_open: bool, is_whole: bool) -> ItemStatus:
    """The status of an item of a reply, by what follows it: a text does not go on after a call.

    Args:
        is_open: Whether the reply may still grow.
        is_whole: Whether the model has ended the reply by itself.
    """
    item = items[index]
    if is_whole:
        return "completed"
    if item.type == "function_call":
        return "in_progress" if is_open else "completed" if item.complete else "incomplete"
    if any(later.type == "function_call" for later in items[index + 1 :]):
        return "completed"
    if is_open:
        return "in_progress"
    has_answer = item.type == "reasoning" and any(later.type == "message" for later in items[index + 1 :])
    return "completed" if has_answer else "incomplete"


# Items as they are taken

_REFUSED_PARTS = {
    "input_image": "Images are",
    "input_audio": "Audio is",
    "output_audio": "Audio is",
    "input_file": "Files are",
    "input_video": "Videos are",
    "computer_screenshot": "Images are",
}
_ROLES: Mapping[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TAKEN = "`message`, `reasoning`, `function_call` and `function_call_output`"
_FIELDS = {
    "message": frozenset({"type", "id", "status", "role", "content", "phase"}),
    "reasoning": frozenset({"type", "id", "status", "summary", "content", "encrypted_content"}),
    "function_call": frozenset(
        {"type", "id", "status", "call_id", "name", "arguments", "namespace", "caller", "created_by", "extra_content"}
    ),
    "function_call_output": frozenset(
        {"type", "id", "status", "call_id", "output", "name", "namespace", "caller", "created_by"}
    ),
}


def read_items(told: Sequence[object], *, field: str) -> tuple[Item, ...]:
    """Do :func:`items_read` at once."""
    return at_once(items_read(told, field=field))


def items_read(told: Sequence[object], *, field: str) -> Steps[tuple[Item, ...]]:
    """Read items that a caller brings, of every role. They get new ids: a history may be brought many times.

    ``developer`` is ``system`` here. A message without text, and reasoning without words and without encrypted content,
    is left out: it says nothing.

    Args:
        told: Items as a caller sends them; an :class:`Item` stays as it is, and None is left out.
        field: The name of the parameter.

    Raises:
        ParameterError: An item is wrong, or is of a kind that this service does not take.
    """
    signed: dict[str, str] = {}
    items: list[Item] = []
    for index, it in enumerate(told):
        if index % _READ_IN_STEP == 0:
            yield
        item = _read_item(it, f"{field}[{index}]", signed)
        if item is not None:
            items.append(item)
    return tuple(items)


def namespaces_in(told: Iterable[object]) -> dict[str, tuple[str, str]]:
    """The namespace and the name of each call that a caller brings with a namespace, by its flat name.

    The items are those of :func:`read_items`, which has not refused them.
    """
    calls = [it for it in told if isinstance(it, dict) and it.get("type") == "function_call" and it.get("namespace")]
    return {flat_name(call["namespace"], call["name"]): (call["namespace"], call["name"]) for call in calls}


def _read_item(told: object, field: str, signed: dict[str, str]) -> Item | None:
    """Read an item. ``signed`` has the fields of calls to come that reasoning before them has brought."""
    if told is None or isinstance(told, Item):
        return told
    item = _object(told, field)
    kind = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
    if not isinstance(kind, str) or kind not in _FIELDS:
        _refuse_type(kind, field)
    unknown = next((name for name, value in item.items() if name not in _FIELDS[kind] and value is not None), None)
    if unknown is not None:
        raise ParameterError(
            f"Unknown parameter: {shown(unknown)!r}.", param=f"{field}.{shown(unknown)}", code="unknown_parameter"
        )
    match kind:
        case "message":
            return _read_message(item, field)
        case "reasoning":
            return _read_reasoning(item, field, signed)
        case "function_call":
            return _read_call(item, field, signed)
        case _:
            return Item(
                id=new_item_id("function_call_output"),
                type="function_call_output",
                role="user",
                call_id=_call_id(item, field),
                text=_read_text(item.get("output"), f"{field}.output", ("input_text", "text"), between="\n"),
            )


def _refuse_type(kind: object, field: str) -> Never:
    if not isinstance(kind, str):
        raise ParameterError(f"Expected an item with a type: {_TAKEN}.", param=f"{field}.type")
    if kind == "item_reference":
        raise ParameterError(
            "References to items are taken in the input of a response only: send the items.",
            param=field,
            code="unsupported_value",
        )
    raise ParameterError(
        f"Items of the type {shown(kind)!r} are not supported: this server takes {_TAKEN}.",
        param=f"{field}.type",
        code="unsupported_value",
    )


def _read_message(item: Mapping[str, Any], field: str) -> Item | None:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ParameterError("Expected `user`, `assistant`, `system` or `developer`.", param=f"{field}.role")
    is_models = role == "assistant"
    text = _read_text(
        item.get("content"),
        f"{field}.content",
        ("output_text", "input_text", "text", "refusal") if is_models else ("input_text", "text", "output_text"),
        between="" if is_models else "\n",
    )
    return Item(id=new_item_id("message"), role=_ROLES[role], text=text) if text else None


def _read_reasoning(item: Mapping[str, Any], field: str, signed: dict[str, str]) -> Item | None:
    text = "".join(
        _read_text(item.get(name) or (), f"{field}.{name}", kinds, between="\n\n")
        for name, kinds in (("summary", ("summary_text",)), ("content", ("reasoning_text", "text")))
    )
    content = item.get("encrypted_content")
    encrypted, upstream = "", ""
    if content is not None:
        where = f"{field}.encrypted_content"
        encrypted, upstream, calls = unsealed(_text(content, where), where)
        _checked(encrypted, where)
        signed |= calls
    if not text and not encrypted:
        return None
    return Item(
        id=new_item_id("reasoning"),
        type="reasoning",
        role="assistant",
        text=text,
        encrypted=encrypted,
        upstream=upstream,
    )


def _read_call(item: Mapping[str, Any], field: str, signed: dict[str, str]) -> Item:
    name, namespace = _name(item.get("name"), f"{field}.name"), item.get("namespace")
    if namespace is not None:
        name = flat_name(_name(namespace, f"{field}.namespace"), name)
    call_id = _call_id(item, field)
    upstream = signed.pop(call_id, "")
    return Item(
        id=new_item_id("function_call"),
        type="function_call",
        role="assistant",
        call_id=call_id,
        name=name,
        text=_text(item.get("arguments"), f"{field}.arguments"),
        upstream=upstream_of(item.get("extra_content"), f"{field}.extra_content") or upstream,
    )


def _read_text(content: object, field: str, kinds: Sequence[str], *, between: str) -> str:
    """Read a text, or an array of parts with texts."""
    if isinstance(content, str):
        return _checked(content, field)
    if not isinstance(content, list | tuple):
        raise ParameterError("Expected a text, or an array of parts.", param=field, code="invalid_type")
    if len(content) > PARTS_MAX:
        raise ParameterError(f"These are {len(content)} parts; at most {PARTS_MAX} are taken.", param=field)
    return between.join([_read_part(part, f"{field}[{index}]", kinds) for index, part in enumerate(content)])


def _read_part(told: object, field: str, kinds: Sequence[str]) -> str:
    part = _object(told, field)
    kind = part.get("type")
    if isinstance(kind, str) and kind in _REFUSED_PARTS:
        raise ParameterError(
            f"{_REFUSED_PARTS[kind]} not supported: this server takes texts.",
            param=f"{field}.type",
            code="unsupported_value",
        )
    if kind not in kinds:
        raise ParameterError(
            f"Expected a part of the type {' or '.join(f'`{it}`' for it in kinds)}.",
            param=f"{field}.type",
            code="invalid_value",
        )
    name = "refusal" if kind == "refusal" else "text"
    return _text(part.get(name), f"{field}.{name}")


def _object(told: object, field: str) -> dict[str, Any]:
    if not isinstance(told, dict):
        raise ParameterError("Expected an object.", param=field, code="invalid_type")
    return told


def _call_id(item: Mapping[str, Any], field: str) -> str:
    call_id = _text(item.get("call_id"), f"{field}.call_id")
    if not 1 <= len(call_id) <= CALL_ID_LENGTH_MAX:
        raise ParameterError(f"Expected 1 to {CALL_ID_LENGTH_MAX} characters.", param=f"{field}.call_id")
    return call_id


def _name(told: object, field: str) -> str:
    name = _text(told, field)
    if not 1 <= len(name) <= _NAME_LENGTH_MAX or not _NAME_CHARACTERS.issuperset(name):
        raise ParameterError("Expected a name: 1-64 of `A-Z a-z 0-9 _ -`.", param=field)
    return name


def _text(told: object, field: str) -> str:
    if not isinstance(told, str):
        raise ParameterError("Expected a text.", param=field, code="invalid_type")
    return _checked(told, field)


def _checked(text: str, field: str) -> str:
    """A text that can be stored and sent on. Raises: ParameterError."""
    if "\0" in text:
        raise ParameterError("A text may not have NUL characters.", param=field)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ParameterError("A text may not have half of a surrogate pair.", param=field) from None
    return text
