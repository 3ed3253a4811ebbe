"""What a deletion from the memory store takes out of turns."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from service.steps import Steps
from service.storage import rules
from service.storage.memory.kept import KeptSession, KeptTurn
from service.storage.records import Item, TurnRecord
from service.storage.search import searched_texts
from service.storage.terms import TERMS_MAX, document_terms


def find_turn(turns: Sequence[KeptTurn], item_id: str) -> Steps[KeptTurn | None]:
    """The turn of an item, searched from the newest turn on."""
    for turn in reversed(turns):
        yield
        if turn.record.find_item(item_id) is not None and not turn.is_deleted():
            return turn
    return None


def lost_terms(before: TurnRecord, after: TurnRecord) -> Steps[tuple[set[str], bool]]:
    """The terms by which a turn is not found any more, and whether it was found by all that it had."""
    found_by = yield from document_terms(searched_texts(before))
    still_found_by = yield from document_terms(searched_texts(after))
    return found_by - still_found_by, len(found_by) < TERMS_MAX


@dataclass
class CallAnswers:
    """The turns with outputs of a call, each with its record and with its record without them."""

    changes: list[tuple[KeptTurn, TurnRecord, TurnRecord]] = field(default_factory=list)
    messages: int = 0
    """How many messages the outputs are."""

    def are_current(self) -> bool:
        return all(turn.record is record for turn, record, _ in self.changes)


def without_answers(session: KeptSession, turn: KeptTurn, item: Item) -> Steps[CallAnswers]:
    """The outputs of a call in the turns that follow, up to the first turn with a reply on each branch.

    There are none if the item is no call.
    """
    answers, following = CallAnswers(), [turn] if item.type == "function_call" else []
    while following:
        for child in session.children.get(following.pop().record.id, ()):
            yield
            record = child.record
            if outputs := rules.answers_to(item, record):
                without = rules.without_items(record, outputs)
                answers.changes.append((child, record, without))
                answers.messages += record.message_count - without.message_count
            if not record.has_reply:
                following.append(child)
    return answers


def delete_from(turn: KeptTurn, item_ids: Collection[str]) -> int:
    """Delete items of an ended turn. Returns how many messages there are less."""
    before, turn.record = turn.record, rules.without_items(turn.record, item_ids)
    if turn.record.events_deleted:
        turn.pages, turn.kept = (), 0
    return before.message_count - turn.record.message_count
