"""What the live tree shows of sessions: the open turns, and the open event streams with their places in the logs."""

from collections.abc import Iterable

from service.ids import owner_of, public_id
from service.sessions.events.streams import Streams, StreamSlot
from service.sessions.turns.turn import Turn
from service.steps import Steps
from service.telemetry.tree_nodes import Node, Notes


def note_turns(turns: Iterable[Turn], notes: Notes) -> Steps[None]:
    """Name the scopes in which turns do their work. A turn whose task has not begun has no such scope yet."""
    for turn in turns:
        notes.name(turn.deadlines.scope, _node_of_turn(turn, notes), end=turn.ending)
        yield


def note_streams(streams: Streams, notes: Notes) -> Steps[None]:
    """Show the streams below the tasks that send them."""
    for slot in tuple(streams.slots):
        if slot.task is not None:
            notes.add(slot, _node_of_stream(slot, notes), below=slot.task)
        yield


def _node_of_turn(turn: Turn, notes: Notes) -> Node:
    deadline = turn.deadlines.next_one()
    begun_at = turn.started_at if turn.started_at is not None else turn.accepted_at
    return Node(
        parent=None,
        kind="turn",
        name=f"turn {turn.id}",
        state="ending" if turn.end is not None else turn.state,
        deadline=None if deadline is None else notes.moment(deadline[0]),
        deadline_name=None if deadline is None else deadline[1],
        since=notes.moment(begun_at),
        seq=turn.log.last_seq,
        text_length=turn.text_length,
        session=public_id(turn.session_id),
        owner=owner_of(turn.session_id) or None,
        turn=turn.id,
        model=turn.model,
    )


def _node_of_stream(slot: StreamSlot, notes: Notes) -> Node:
    progress = slot.progress
    turn = "" if progress is None else progress.turn_id
    return Node(
        parent=None,
        kind="stream",
        name=f"events of {turn}" if turn else "event stream",
        state="passed on" if progress is None else "open",
        since=notes.moment(slot.opened_at),
        seq=None if progress is None else progress.seq,
        turn=turn or None,
        face=slot.face,
    )
