"""The worker's end of the link to our master."""

import os
from datetime import UTC, datetime
from multiprocessing import Pipe

import msgspec
import pytest

from service.cluster.workers import KnownWorker
from service.hosting.master_link import MasterLink


@pytest.mark.parametrize("told", [(), (b"leave unix:a unix:b",)], ids=["serving", "replaced"])
def test_where_the_master_dies_no_worker_serves_in_this_ones_place(told: tuple[bytes, ...]) -> None:
    """The others die of it, too, so a worker that drains must not go on waiting for its clients."""
    masters, workers = Pipe()
    link = MasterLink(os.getppid(), workers, status_file=-1)
    for message in told:
        masters.send_bytes(message)
    masters.close()
    reasons: list[tuple[str, bool]] = []
    with workers:
        link.watch(lambda reason: reasons.append((reason, link.leaves)))
    assert reasons == [*[("the master reloads", True) for _ in told], ("the master died", False)]
    assert link.wants_stop()
    assert link.worker_follows(()) is False


def test_a_worker_learns_of_the_others_and_passes_on_what_an_operator_asks() -> None:
    masters, workers = Pipe()
    link = MasterLink(os.getppid(), workers, status_file=-1)
    known = [KnownWorker(pid=1, status="serving", started_at=datetime.now(UTC), address="@a")]
    for _ in range(2):
        link.ask_stop("admin drain")
    assert masters.recv_bytes() == b"drain admin drain"
    assert not masters.poll(), "asked once"
    masters.send_bytes(b"workers " + msgspec.json.encode(known))
    masters.send_bytes(b"stop admin drain")
    masters.close()
    reasons: list[str] = []
    with workers:
        link.watch(reasons.append)
    assert link.workers == known
    assert reasons == ["admin drain", "the master died"]
