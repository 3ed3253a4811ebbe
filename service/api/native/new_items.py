"""Items that a caller brings, with new ids."""

from collections.abc import Sequence

from service.api.http.strict_json import InputTooLargeError
from service.api.native.message_wire import AddedFunctionCall, AddedMessage
from service.api.native.turn_requests import NewFunctionCallOutput
from service.errors import InvalidRequestError
from service.ids import new_item_id
from service.sessions.commands import is_callers
from service.settings import Settings
from service.storage.records import Item


def output_item(new: NewFunctionCallOutput) -> Item:
    """The result of a call."""
    return Item(
        id=new_item_id("function_call_output"),
        type="function_call_output",
        role="user",
        text=new.output,
        call_id=new.call_id,
    )


def added_items(
    told: Sequence[AddedMessage | AddedFunctionCall | NewFunctionCallOutput], *, settings: Settings
) -> tuple[Item, ...]:
    """The items of a conversation that a caller adds.

    Raises:
        InvalidRequestError: Two results of one call are beside each other.
        InputTooLargeError: An item of the model is too large for a reply.
    """
    items: list[Item] = []
    answered: set[str] = set()
    for index, new in enumerate(told):
        item = _item_of(new)
        if not is_callers(item):
            answered.clear()
            if item.prompt_bytes > settings.reply_bytes_max:
                raise InputTooLargeError(
                    f"This item of a model has {item.prompt_bytes} bytes of UTF-8; at most {settings.reply_bytes_max} "
                    "are taken (reply_bytes_max).",
                    field=f"items[{index}]",
                )
        elif item.call_id in answered:
            raise InvalidRequestError("This is a second output of the same call.", field=f"items[{index}].call_id")
        elif item.call_id:
            answered.add(item.call_id)
        items.append(item)
    return tuple(items)


def _item_of(new: AddedMessage | AddedFunctionCall | NewFunctionCallOutput) -> Item:
    match new:
        case AddedMessage(role=role, text=text):
            return Item(id=new_item_id("message"), role=role, text=text)
        case AddedFunctionCall(call_id=call_id, name=name, arguments=arguments):
            item_id = new_item_id("function_call")
            return Item(id=item_id, type="function_call", role="assistant", text=arguments, call_id=call_id, name=name)
        case NewFunctionCallOutput():
            return output_item(new)
