"""What the database promises of a commit, told at the start: only what is kept there is kept."""

import psycopg
import structlog

logger = structlog.get_logger("lastcall.store")

_LOOK = (
    "SELECT current_setting('synchronous_commit'), current_setting('synchronous_standby_names'), "
    "(SELECT count(*) FROM pg_stat_replication)"
)


def warn_of_losses(connection: "psycopg.Connection[tuple[object, ...]]", *, place: str) -> None:
    """Log a warning if the server may lose what it has acknowledged."""
    row = connection.execute(_LOOK.encode()).fetchone()
    assert row is not None, "it is a row without a condition"
    commit, standby_names, standbys = row
    if commit == "off":
        logger.warning(
            "a crash of the database may lose what was acknowledged: its synchronous_commit is off; set it to on",
            store=place,
        )
    elif standbys and (commit == "local" or not standby_names):
        logger.warning(
            "a failover may lose what was acknowledged: the database has standbys and waits for none of them; set "
            "synchronous_standby_names, and synchronous_commit to on",
            store=place,
            standbys=standbys,
        )
