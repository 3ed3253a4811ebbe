"""What the live tree shows of the connections to a model server: those at work below their tasks, and the idle ones."""

from service.models.http.transport import Transport
from service.steps import Steps
from service.telemetry.tree_nodes import Node, Notes


def note_connections(transport: Transport, notes: Notes, *, upstream: str) -> Steps[None]:
    """Show the connections of a transport. Their names have neither a path nor a query nor a user: no secret."""
    client = Node(parent=None, kind="model_client", name=f"model client {upstream}", upstream=upstream)
    notes.add(transport, client, below=None)
    for connection in tuple(transport.at_work):
        work = transport.at_work.get(connection)
        if work is None:
            continue  # it has ended since the last step
        task, since = work
        notes.add(
            connection,
            Node(
                parent=None,
                kind="model_connection",
                name=transport.address,
                state="in use",
                since=notes.moment(since),
                upstream=upstream,
            ),
            below=task,
        )
        yield
    for connection in transport.idle:
        notes.add(
            connection,
            Node(parent=None, kind="model_connection", name=transport.address, state="idle", upstream=upstream),
            below=transport,
        )
        yield
