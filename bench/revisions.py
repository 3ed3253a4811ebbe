"""Two commits of this repository, or a commit and the working directory, laid out beside each other.

A commit is checked out as a git worktree in a temporary folder, which is removed again. Both are served by this
interpreter with the packages that are installed, and measured by the bench of the working directory: so only the
service differs.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from bench.contenders import Contender
from bench.server_process import ROOT

_TIME_MAX_S = 60


class RevisionError(Exception):
    """There are no two versions to compare. The message says why, and what to give instead."""


@dataclass(frozen=True)
class Version:
    """A version of the repository that lies in a folder."""

    name: str  # as it was asked for, and the commit
    folder: Path


def split(argument: str) -> tuple[str, str | None]:
    """Read ``REV`` or ``REV..OTHER``; None stands for the working directory.

    Raises:
        RevisionError: It is neither.
    """
    first, dots, second = argument.partition("..")
    if second.startswith(".") or (dots and not second) or not first or any(n.startswith("-") for n in (first, second)):
        raise RevisionError(
            f"--compare {argument!r}: give a commit, to compare it with the working directory, or two, as in main..HEAD"
        )
    return first, second or None


@contextmanager
def open_versions(argument: str) -> Iterator[tuple[Version, Version]]:
    """Lay out the two versions that the argument names. What was made is removed on every way out.

    Raises:
        RevisionError: The argument names no two versions of this repository.
    """
    first, second = split(argument)
    commits = [_commit(name) for name in (first, second) if name is not None]
    with ExitStack() as stack:
        versions = [
            Version(f"{name} ({commit[:7]})", stack.enter_context(_open_worktree(commit)))
            for name, commit in zip((first, second), commits, strict=False)
            if name is not None
        ]
        if second is None:
            versions.append(Version(f"working directory ({_describe_work()})", ROOT))
        for version in versions:
            _check_service(version)
        yield versions[0], versions[1]


def sides(contender: Contender, versions: tuple[Version, Version]) -> tuple[Contender, Contender]:
    """Return the same server from both versions. Replies are not counted: that would be one version's code."""
    a, b = (
        replace(
            contender, name=f"{contender.name}-{side}", label=version.name, folder=version.folder, count_replies=None
        )
        for side, version in zip("AB", versions, strict=True)
    )
    return a, b


def _commit(name: str) -> str:
    if not shutil.which("git"):
        raise RevisionError("--compare needs git, which is not installed")
    top = _git("rev-parse", "--show-toplevel")
    if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
        raise RevisionError(f"--compare needs a git checkout of this repository, and {ROOT} is none")
    found = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if found.returncode:
        raise RevisionError(
            f"--compare: this repository has no commit {name!r}; `git log --oneline` shows those it has"
        )
    return found.stdout.strip()


def _describe_work() -> str:
    head = _git("rev-parse", "--short=7", "HEAD").stdout.strip()
    changed = bool(_git("status", "--porcelain", "--untracked-files=no").stdout.strip())
    return f"{head} and changes" if changed else head


@contextmanager
def _open_worktree(commit: str) -> Iterator[Path]:
    folder = Path(mkdtemp(prefix="bench-compare-")).resolve()
    try:
        added = _git("worktree", "add", "--quiet", "--detach", str(folder), commit)
        if added.returncode:
            raise RevisionError(f"git cannot check out {commit[:7]}: {added.stderr.strip()}")
        yield folder
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl+C must not leave half of it behind
        try:
            with suppress(RevisionError):  # it hangs: the folder is removed below
                _git("worktree", "remove", "--force", str(folder))
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(RevisionError):  # it hangs: any later prune forgets the folder, which is gone
                _git("worktree", "prune")
        finally:
            signal.signal(signal.SIGINT, before)


def _check_service(version: Version) -> None:
    """Make sure that a server which is started in the folder runs the folder's own service."""
    command = [sys.executable, "-c", "import service; print(service.__file__)"]
    done = _run(command, cwd=version.folder)
    found = done.stdout.strip()
    if done.returncode or not Path(found).resolve().is_relative_to(version.folder):
        raise RevisionError(
            f"--compare: Python does not take the service from {version.name} but from {found or 'nowhere'}: "
            "is PYTHONSAFEPATH set?"
        )


def _git(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run git on this repository, in a session of its own, so that Ctrl+C does not end it in the middle."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return _run(["git", "-C", str(ROOT), *arguments], env=env, start_new_session=True)


def _run(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a short command to its end. Raises: RevisionError, if it takes too long."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIME_MAX_S,
            check=False,
            **options,
        )
    except subprocess.TimeoutExpired:
        raise RevisionError(
            f"--compare: `{shlex.join(command)}` did not end within {_TIME_MAX_S} s, and was stopped"
        ) from None
