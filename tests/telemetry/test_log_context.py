"""Each line has the ids of the work that it belongs to, and of no other work."""

import structlog
import trio

from service.telemetry.log_context import add_to_log_context, log_context
from tests.kept_log import kept_log, lines_of

logger = structlog.get_logger("lastcall.tests")
IDS = {"request_id", "session_id", "turn_id"}


def ids_in(log: str) -> list[dict[str, str]]:
    return [{name: line[name] for name in IDS & set(line)} for line in lines_of(log, "told")]


def test_the_innermost_work_alone_is_named_and_the_outer_one_again_afterwards() -> None:
    with kept_log("json") as read:
        with log_context(request_id="a", session_id=None):
            with log_context(session_id="s", turn_id="t"):
                add_to_log_context(request_id="b")
                logger.info("told")
            logger.info("told")
        logger.info("told")
        assert ids_in(read()) == [{"session_id": "s", "turn_id": "t", "request_id": "b"}, {"request_id": "a"}, {}]


def test_an_id_of_none_removes_the_id() -> None:
    with kept_log("json") as read, log_context(request_id="a", turn_id="t"):
        add_to_log_context(turn_id=None)
        logger.info("told")
        assert ids_in(read()) == [{"request_id": "a"}]


async def test_a_task_that_binds_its_own_ids_forgets_those_of_the_task_that_started_it() -> None:
    async def work(session_id: str) -> None:
        with log_context(session_id=session_id):
            await trio.lowlevel.checkpoint()
            logger.info("told")

    with kept_log("json") as read, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            with log_context(request_id="a"):
                nursery.start_soon(work, "s")
                nursery.start_soon(work, "z")
        assert sorted(it["session_id"] for it in ids_in(read())) == ["s", "z"]
        assert all(set(it) == {"session_id"} for it in ids_in(read()))


def test_a_line_s_own_fields_win() -> None:
    with kept_log("json") as read, log_context(turn_id="t"):
        logger.info("told", turn_id="another")
        assert ids_in(read()) == [{"turn_id": "another"}]
