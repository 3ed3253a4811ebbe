"""An operator's commands for the store. A service may be running at the same time."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from service.cli.session_export import ExportedSession, not_exported, owned_by, problems_of_totals, read_exported, shown
from service.clock import wall_clock
from service.errors import RefusedError, SessionExistsError, SessionNotFoundError, StartupError
from service.ids import is_owner_name
from service.setting_types import checked_schema_name, checked_store_url, missing_driver, shown_store_url
from service.settings import Settings

if TYPE_CHECKING:  # only these commands need SQLite and the API
    from service.cli.exported_events import Turns
    from service.storage.records import SessionRecord
    from service.storage.sqlite.database import BackupProgress

FAILED = 1
"""The exit code if the store is fine but refuses the command, or if a check finds a problem."""


PROGRESS_INTERVAL_S = 1.0
"""The pause between two lines that say how far a backup is; a backup that takes less time writes none."""
_MB = 1_000_000


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add these commands to a command line."""
    add = partial(commands.add_parser, parents=[_store_option()])
    backup = add("backup", help="write a consistent copy of the store to a new file")
    backup.add_argument("path", type=Path, help="the new file")
    add("check", help="check the whole store; exit code 1 if there are problems")
    either = partial(commands.add_parser, parents=[_store_option(file_only=False)])
    export = either("export", help="print a session with its turns and events, as JSON")
    export.add_argument("session", help="the session's id; OWNER/ID if it has an owner")
    imported = either("import", help="add an exported session, under its own id and owner")
    imported.add_argument("--owner", metavar="NAME", help="give the session to this owner; '' for none")
    imported.add_argument("file", type=Path, nargs="?", help="the output of export; standard input if left out")
    copied = commands.add_parser("copy", help="copy a whole store into a new one, and compare the two")
    for name, what in (("from", "the store"), ("to", "the new store")):
        copied.add_argument(
            f"{name}_url", metavar=name.upper(), type=_store_url, help=f"{what}: sqlite:path or postgresql://…"
        )
        copied.add_argument(
            f"--{name}-schema",
            metavar="NAME",
            type=_schema_name,
            help=f"the schema of {what}, in place of store_schema",
        )
    either("migrate", help="bring the schema of the store up")
    add("vacuum", help="give the space of removed data back to the disk, in short steps")


def _store_option(*, file_only: bool = True) -> argparse.ArgumentParser:
    kinds = "sqlite:path" if file_only else "sqlite:path or postgresql://…"
    option = argparse.ArgumentParser(add_help=False)
    option.add_argument("--store", metavar="URL", help=f"{kinds}, in place of the setting store_url")
    return option


def run_store_command(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run one of these commands. Returns the exit code.

    Raises:
        StartupError: The store does not exist or cannot be used, or the given file cannot be used.
    """
    run_by_command = {"copy": _run_copy, "migrate": _run_migrate, "export": _run_export, "import": _run_import}
    run = run_by_command.get(arguments.command, _run_on_file)
    try:
        done, code = run(settings, arguments)
    except RefusedError as error:
        sys.stderr.write(f"lastcall: {error}\n")
        return FAILED
    sys.stdout.write(f"{done}\n")
    return code


def _check_is_kept(settings: Settings) -> None:
    """Raises: StartupError: The store of the settings keeps nothing."""
    if not settings.store_capabilities.durable:
        raise StartupError(
            f"store_url is {settings.store_url}, where nothing is kept; name the store with --store sqlite:path."
        )


def _check_is_file(settings: Settings) -> None:
    """Raises: StartupError: The store of the settings is not the file of a SQLite store."""
    _check_is_kept(settings)
    if settings.store_scheme != "sqlite":
        raise StartupError(
            f"store_url is {shown_store_url(settings.store_url)}, and this command is for the file of a SQLite store; "
            "PostgreSQL has commands of its own: pg_dump, pg_amcheck, VACUUM."
        )


def _run_copy(settings: Settings, arguments: argparse.Namespace) -> tuple[str, int]:
    """Run the copy. Returns the text for standard output, and the exit code."""
    from service.cli.store_copy import copy_store, told  # noqa: PLC0415  only this command needs both stores

    name, contents = copy_store(
        arguments.from_url,
        arguments.to_url,
        source_schema=arguments.from_schema or settings.store_schema,
        target_schema=arguments.to_schema or settings.store_schema,
        now=wall_clock(),
    )
    return f"{name} has {told(contents)}, as its source", 0


def _run_migrate(settings: Settings, _: argparse.Namespace) -> tuple[str, int]:
    """Bring the schema up. Returns the text for standard output, and the exit code."""
    _check_is_kept(settings)
    if settings.store_scheme == "sqlite":
        from service.storage.sqlite import maintenance, open_files  # noqa: PLC0415  only this kind needs SQLite

        path = open_files.real_path(settings.store_url.removeprefix("sqlite:"))
        name, (before, version) = str(path), maintenance.bring_up(path)
    else:
        try:
            from service.storage.postgres.whole_store import bring_up  # noqa: PLC0415  only this kind needs psycopg
        except ModuleNotFoundError as error:
            raise missing_driver(settings.store_url) from error
        name, before, version = bring_up(settings.store_url, schema_name=settings.store_schema)
    was = "as before" if before == version else f"before {before}" if before else "newly made"
    return f"{name} has schema version {version}, {was}", 0


def _run_export(settings: Settings, arguments: argparse.Namespace) -> tuple[str, int]:
    """Export a session. Returns it as JSON, and the exit code."""
    from service.cli import exported_events  # noqa: PLC0415  only these commands need the API

    store = _single_sessions(settings)
    try:
        return exported_events.encoded(*store.export(arguments.session)).decode(), 0
    except SessionNotFoundError as error:
        raise RefusedError(f"There is no session {error.session_id!r} in {store.name}.") from None


def _run_import(settings: Settings, arguments: argparse.Namespace) -> tuple[str, int]:
    """Import a session. Returns its id, and the exit code."""
    from service.cli import exported_events, import_bounds  # noqa: PLC0415  only these commands need the API

    store = _single_sessions(settings)
    whole = read_exported(_read(arguments.file))
    if arguments.owner is not None:
        whole = owned_by(whole, _owner_of_import(arguments.owner))
    import_bounds.check_bounds(whole, settings)
    _check_turns(whole)
    try:
        store.add(*exported_events.decoded(whole), now=wall_clock())
    except SessionExistsError as error:
        raise RefusedError(
            f"A session {error.session_id!r} is in {store.name} already; delete it first, or name another store with "
            "--store."
        ) from None
    return whole.session.id, 0


class _SingleSessions(NamedTuple):
    """The store of the settings, for a session that is exported or imported."""

    name: str
    export: "Callable[[str], tuple[SessionRecord, Turns]]"
    add: "Callable[..., None]"


def _single_sessions(settings: Settings) -> _SingleSessions:
    """Raises: StartupError: The store keeps nothing, or its driver is not installed."""
    _check_is_kept(settings)
    url = settings.store_url
    if settings.store_scheme == "sqlite":
        from service.storage.sqlite import maintenance, open_files  # noqa: PLC0415  only this kind needs SQLite

        path = open_files.real_path(url.removeprefix("sqlite:"))
        export, add = partial(maintenance.export_session, path), partial(maintenance.import_session, path)
        return _SingleSessions(str(path), export, add)
    try:
        from service.storage.postgres import connections, single_sessions  # noqa: PLC0415  only this kind needs psycopg
    except ModuleNotFoundError as error:
        raise missing_driver(url) from error
    schema = settings.store_schema
    return _SingleSessions(
        connections.name_of_store(url, schema),
        partial(single_sessions.export_session, url, schema_name=schema),
        partial(single_sessions.import_session, url, schema_name=schema),
    )


def _store_url(text: str) -> str:
    """Raises: ArgumentTypeError: This is not the URL of a store."""
    try:
        return checked_store_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _schema_name(text: str) -> str:
    """Raises: ArgumentTypeError: No schema can have this name."""
    try:
        return checked_schema_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run_on_file(settings: Settings, arguments: argparse.Namespace) -> tuple[str, int]:
    """Run a command for a SQLite store. Returns the text for standard output, and the exit code."""
    _check_is_file(settings)
    from service.storage.sqlite import maintenance, open_files  # noqa: PLC0415  only these commands need SQLite

    path = open_files.real_path(settings.store_url.removeprefix("sqlite:"))
    match arguments.command:
        case "backup":
            with _ended_by_sigterm():
                maintenance.backup(path, arguments.path, on_progress=_progress_lines(path))
            return f"{path} is copied to {arguments.path}", 0
        case "check":
            problems = maintenance.check(path)
            return "\n".join(problems) or f"{path} is whole", FAILED if problems else 0
        case _:
            return f"{path} gave {maintenance.vacuum(path)} bytes back", 0


def _owner_of_import(name: str) -> str:
    """Raises: StartupError: No owner can have this name."""
    if name and not is_owner_name(name):
        raise StartupError(f"--owner: {shown(name)} should be 1 to 128 of A-Z a-z 0-9 _ . ~ @ | : + = -.")
    return name


def _progress_lines(path: Path) -> "Callable[[BackupProgress], None]":
    """Return a function that writes a line to standard error, once a second, that says how far a backup is."""
    told_at = time.monotonic()

    def tell(progress: "BackupProgress") -> None:
        nonlocal told_at
        if time.monotonic() - told_at < PROGRESS_INTERVAL_S:
            return
        told_at = time.monotonic()
        sys.stderr.write(
            f"lastcall: {progress.copied_bytes // _MB} of {progress.total_bytes // _MB} MB are copied; "
            f"{path.name}-wal has {progress.log_bytes // _MB} MB and grows until the copy is whole\n"
        )
        sys.stderr.flush()

    return tell


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as an error does, so that what is unfinished is removed."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read(file: Path | None) -> bytes:
    try:
        return sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise StartupError(f"{file} cannot be read: {error.strerror}.") from error


def _check_turns(whole: ExportedSession) -> None:
    """Refuse a turn that the service cannot have produced, and a session with wrong totals. Raises: StartupError."""
    from service.cli.whole_turn import problems_of  # noqa: PLC0415  only imports need it

    for it in whole.turns:
        for field, value, what in problems_of(it.turn, [event.encode() for event in it.events]):
            raise not_exported(
                f"{field} {shown(value)} of turn {shown(it.turn.id)} of session {shown(whole.session.id)} {what}"
            )
    for problem in problems_of_totals(whole):
        raise not_exported(problem)
