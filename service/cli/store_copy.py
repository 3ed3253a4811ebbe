"""Copies a whole store into an empty one of another place or kind, while no service uses them, and compares the two."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

from service.errors import RefusedError, StartupError
from service.setting_types import missing_driver, shown_store_url, store_scheme_of
from service.storage.whole_store import Contents, WholeStore, contents_of, copy_all

PROGRESS_INTERVAL_S = 1.0
"""The pause between two lines that say how far a copy is; a copy that takes less time writes none."""


def copy_store(
    source_url: str, target_url: str, *, source_schema: str, target_schema: str, now: datetime
) -> tuple[str, Contents]:
    """Copy a store. Returns the name of the copy, and what both stores have.

    Args:
        source_schema: The schema of the source, if it is in a PostgreSQL database.
        target_schema: That of the copy.

    Raises:
        StartupError: A store cannot be used, or a process uses it.
        RefusedError: The target is not empty; or the copy differs from its source.
    """
    if (source_url, source_schema) == (target_url, target_schema):
        raise RefusedError(f"{shown_store_url(source_url)} would be copied into itself; name another store.")
    with (
        _opened(source_url, source_schema, now, makes=False) as source,
        _opened(target_url, target_schema, now, makes=True) as target,
    ):
        if not target.is_empty():
            raise RefusedError(f"{target.name} is not empty; name a new store for the copy.")
        copy_all(source, target, on_session=_progress_lines())
        before, after = contents_of(source), contents_of(target)
        if before != after:
            raise RefusedError(
                f"The copy differs: {source.name} has {told(before)}, and {target.name} has {told(after)}. Delete the "
                "copy, and report this."
            )
        return target.name, after


def told(contents: Contents) -> str:
    """The contents of a store in words."""
    return (
        f"{contents.sessions} sessions, {contents.turns} turns, {contents.events} events and {contents.keys} "
        f"idempotency keys ({contents.digest})"
    )


def _opened(url: str, schema_name: str, now: datetime, *, makes: bool) -> AbstractContextManager[WholeStore]:
    """Raises: StartupError: A copy of this kind of store is not possible."""
    match store_scheme_of(url):
        case "sqlite":
            from service.storage.sqlite import open_files  # noqa: PLC0415  only this kind needs SQLite
            from service.storage.sqlite.whole_store import open_whole_store as open_sqlite  # noqa: PLC0415

            return open_sqlite(open_files.real_path(Path(url.removeprefix("sqlite:"))), now=now, makes=makes)
        case "postgresql":
            try:
                from service.storage.postgres.whole_store import (  # noqa: PLC0415  only this kind needs psycopg
                    open_whole_store as open_postgres,
                )
            except ModuleNotFoundError as error:
                raise missing_driver(url) from error
            return open_postgres(url, schema_name=schema_name, now=now, makes=makes)
        case _:
            raise StartupError(
                "memory: keeps nothing that could be copied; name sqlite:path or postgresql://host/database."
            )


def _progress_lines() -> Callable[[int], None]:
    told_at = time.monotonic()

    def tell(sessions: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= PROGRESS_INTERVAL_S:
            told_at = time.monotonic()
            sys.stderr.write(f"lastcall: {sessions} sessions are copied\n")
            sys.stderr.flush()

    return tell
