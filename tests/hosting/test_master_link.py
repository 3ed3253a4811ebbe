"""The worker's end of the link to our master."""

import os
from multiprocessing import Pipe

import pytest

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
