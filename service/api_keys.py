"""The API keys in force: who calls with which key, and what the caller may do.

Only digests of keys are compared. The keys of files are read again when a file changes, so that a key is added or
withdrawn without a restart. A file is read once it has not changed for one look, because it may be half written; one
that cannot be used leaves the keys in force as they are.
"""

import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from service.errors import SettingsError
from service.sessions.upkeep.run_every import run_every
from service.setting_sources import ENV_PREFIX, Sources
from service.setting_types import Permission
from service.settings import NamedKey, Settings, digest_of, digests_of
from service.telemetry.logging import mask_secrets_of
from service.watched_files import LOOK_INTERVAL_S, WatchedFiles

logger = structlog.get_logger("lastcall.keys")


@dataclass(frozen=True)
class Caller:
    """Who calls. The name is the owner of the sessions that the caller makes; callers with a plain key have none."""

    name: str = ""
    may: frozenset[Permission] = frozenset(("talk", "read"))


PLAIN = Caller()
"""A caller with a plain key, one without a name."""
LOCAL = Caller(may=frozenset(("talk", "read", "administer", "metrics")))
"""A caller without a key, on a server without keys: this machine's own user."""


class ApiKeys:
    """The keys in force.

    Args:
        read_sources: Reads the settings again; None if the keys never change.
    """

    def __init__(self, settings: Settings, *, read_sources: Callable[[], Sources] | None = None) -> None:
        self._known = _known(settings)
        self._read_sources = read_sources
        self._watched = WatchedFiles()
        self._told = ""

    @property
    def are_set(self) -> bool:
        """Whether callers need a key. A server that needs keys always will, until it is started anew."""
        return bool(self._known)

    def find(self, key: str) -> Caller | None:
        """The caller with this key. All digests are always compared, so the time tells nothing about the keys."""
        digest = digest_of(key)
        found = [caller for known, caller in self._known.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look at the files until cancelled; end at once if no file has keys. A child task of the service."""
        task_status.started()
        if self._read_sources is None or not self.are_set:
            return
        self._read_again(self._read_sources)
        if self._watched.files:
            await run_every(LOOK_INTERVAL_S, self.look, name="key loop")

    async def look(self) -> None:
        """Look at the files once, and read them if they have changed, and not since the last look."""
        if self._watched.have_changed() and self._read_sources is not None:
            self._read_again(self._read_sources)

    def _read_again(self, read_sources: Callable[[], Sources]) -> None:
        try:
            sources = read_sources()
            self._watched.files = _files_of(sources)
            settings = sources.settings()
            if not settings.api_keys:
                raise SettingsError("no api_keys are set any more; a start is needed to serve without keys")
        except SettingsError as error:
            told = "; ".join(str(error).splitlines())
            if told != self._told:
                logger.warning("the changed API keys cannot be used: the keys stay as they were", error=told)
            self._told = told
            self._watched.note_unread()
            return
        self._told = ""
        mask_secrets_of(settings)
        known, before = _known(settings), self._known
        if known != before:
            self._known = known
            # The same key under another name, or with other permissions, is removed and added.
            changed = len(dict(known.items() - before.items())), len(dict(before.items() - known.items()))
            logger.info("API keys have changed", keys=len(known), added=changed[0], removed=changed[1])


def _known(settings: Settings) -> dict[bytes, Caller]:
    callers = {
        entry.name: Caller(entry.name, frozenset(entry.may))
        for entry in settings.api_keys
        if isinstance(entry, NamedKey)
    }
    pairs = (pair for entry in settings.api_keys for pair in digests_of(entry))
    return {digest: callers.get(name, PLAIN) for name, digest in pairs}


def _files_of(sources: Sources) -> Iterable[Path]:
    """The files on which the keys depend: none if they are in the environment, which never changes."""
    if sources.origins.get("api_keys") == f"{ENV_PREFIX}API_KEYS":
        return ()
    return (sources.file, *sorted(sources.key_files))
