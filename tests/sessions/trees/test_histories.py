"""Any sequence of calls, crashes and restarts, on every store and on several workers, against a simple model.

``just histories`` runs many more of them.
"""

from collections.abc import Sequence

from hypothesis import Phase, given, settings
from structlog.testing import capture_logs

from tests.sessions.trees.history import run
from tests.sessions.trees.steps import Step, histories

some = settings(max_examples=settings().max_examples // 2, phases=set(Phase) - {Phase.explain})
few = settings(some, max_examples=settings().max_examples // 5)


@some
@given(histories)
async def test_after_each_step_all_answers_are_those_of_a_simple_model(history: Sequence[tuple[Step, int]]) -> None:
    with capture_logs():
        await run(history, store="memory")


@few
@given(histories)
async def test_a_file_and_its_process_which_crashes_answer_as_the_model(history: Sequence[tuple[Step, int]]) -> None:
    with capture_logs():
        await run(history, store="sqlite")


@few
@given(histories)
async def test_several_workers_of_which_some_crash_answer_as_the_model(history: Sequence[tuple[Step, int]]) -> None:
    with capture_logs():
        await run(history, store="sqlite", workers=3)
