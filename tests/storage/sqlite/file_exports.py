"""Exports and imports of a file, as ``lastcall export`` and ``lastcall import`` make them."""

from datetime import datetime
from pathlib import Path

from service.cli.exported_events import decoded, encoded
from service.cli.session_export import ExportedSession
from service.storage.sqlite import maintenance


def export_session(path: Path, session_id: str) -> bytes:
    return encoded(*maintenance.export_session(path, session_id))


def import_session(path: Path, whole: ExportedSession, *, now: datetime) -> None:
    maintenance.import_session(path, *decoded(whole), now=now)
