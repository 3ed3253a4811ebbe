"""The link between our master and one of its workers: what each tells the other, and the worker's end of it.

A message is one line: a word, and what belongs to it after a space. The master's end is in
:mod:`service.hosting.worker_process`.

=============  ==========  ========================================================================================
message        to          what it says
=============  ==========  ========================================================================================
``begun``      the master  the worker handles signals now; with its bound on a stop in seconds
``serving``    the master  it takes clients; with its peer address, if it has one
``successor``  the master  it asks for a worker in its place, because of ``--max-requests``
``refused``    the master  its start was refused; with the reason
``drain``      the master  an operator has asked it to stop the whole service; with what the reports call the reason
``workers``    the worker  all workers that there are, as JSON; told whenever one of them begins, serves, drains or ends
``leave``      the worker  other workers serve in its place: it is to drain; with their peer addresses
``stop``       the worker  the whole service stops; with the reason, if it is an operator's
=============  ==========  ========================================================================================
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from multiprocessing.connection import Connection

import msgspec
import trio

from service.cluster.workers import KnownWorker
from service.hosting.hypercorn.worker import Master
from service.hosting.listeners.worker_status import open_common_file

REASON_CHARS_MAX = 1000


class Message(StrEnum):
    BEGUN = "begun"
    SERVING = "serving"
    SUCCESSOR = "successor"
    REFUSED = "refused"
    DRAIN = "drain"
    WORKERS = "workers"
    LEAVE = "leave"
    STOP = "stop"


class MasterLink(Master):
    """The worker's end of the link.

    Args:
        status_file: The descriptor of the file on which workers show their status, as this process got it.

    Attributes:
        successors: The peer addresses of the workers that serve in this worker's place.
        workers: All workers of the service, this one among them, as the master has told them last.
    """

    def __init__(self, pid: int, connection: Connection, status_file: int) -> None:
        self.pid = pid
        self.successors: Sequence[str] = ()
        self.workers: Sequence[KnownWorker] = ()
        self._connection = connection
        self._status_file = status_file
        self._told: Message | None = None
        self._asked = self._asked_stop = False
        self._sending = threading.Lock()

    def open_status_file(self) -> int | None:
        return open_common_file(f"/proc/self/fd/{self._status_file}")

    def open_metrics_file(self) -> int | None:
        """Open the same file: the status of workers is in its locks, and their metrics are its content."""
        return self.open_status_file()

    @property
    def leaves(self) -> bool:
        return self._told is Message.LEAVE

    def wants_stop(self) -> bool:
        return self._told is Message.STOP

    def worker_follows(self, _sockets: Sequence[trio.socket.SocketType]) -> bool | None:
        if self._told is Message.STOP or not self.is_alive():
            return False
        return True if self._told is Message.LEAVE else None

    def watch(self, tell: Callable[[str], None]) -> None:
        while True:
            try:
                word, _, rest = self._connection.recv_bytes().decode().partition(" ")
            except (EOFError, OSError):
                self._told = Message.STOP  # the workers in this one's place stop, too
                return tell("the master died")
            if word == Message.WORKERS:
                self.workers = msgspec.json.decode(rest, type=list[KnownWorker])
            elif word == Message.LEAVE:
                self.successors = rest.split()
                self._told = self._told or Message.LEAVE
                tell("max requests" if self._asked else "the master reloads")
            else:
                self._told = Message.STOP
                tell(rest or "the master stops")

    def tell_begun(self, stop_within_s: float) -> None:
        self._send(Message.BEGUN, str(stop_within_s))

    def tell_serving(self, peer_address: str | None) -> None:
        self._send(Message.SERVING, peer_address or "")

    def tell_refused(self, reason: str) -> None:
        self._send(Message.REFUSED, reason)

    def ask_stop(self, reason: str) -> None:
        """Ask for the stop of the whole service. Asked once: the master does not forget it."""
        if not self._asked_stop:
            self._asked_stop = True
            self._send(Message.DRAIN, reason)

    def ask_for_successor(self) -> bool:
        if not self._asked:
            self._asked = True
            self._send(Message.SUCCESSOR)
        return True

    def _send(self, word: Message, text: str = "") -> None:
        """Send a message. It is short, so it does not wait; where the master has died it is lost."""
        line = " ".join(text.split())[:REASON_CHARS_MAX]
        with self._sending, suppress(OSError):
            self._connection.send_bytes(f"{word} {line}".encode(errors="backslashreplace"))
