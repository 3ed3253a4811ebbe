"""Two commits are compared side by side: the arguments that are refused, the folders, and what is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import revisions
from bench.__main__ import parse_arguments
from bench.contenders import choose
from bench.revisions import RevisionError, Version, open_versions, sides, split
from bench.rows import read_rows
from bench.scenarios import Programme
from bench.server_process import ROOT

CAP_S = 300
"""Bound of a run of the bench, which starts some ten processes."""
_BENCH = """
import sys
from pathlib import Path
from bench import __main__, revisions
revisions.ROOT = Path(sys.argv.pop(1))
__main__.main()
"""


def git(folder: Path, *arguments: str) -> str:
    """Run git as a developer without any settings does."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ("git", "-C", str(folder), *identity, *arguments)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a service in two commits, ``old`` and the newest one; worktrees lie in a folder beside it."""
    folder = tmp_path / "repository"
    (folder / "service").mkdir(parents=True)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(revisions, "ROOT", folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    git(folder, "init", "--quiet")
    for version in ("old", "new"):
        (folder / "service" / "__init__.py").write_text(f"VERSION = {version!r}\n")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", version)
    git(folder, "tag", "old", "HEAD~1")
    return folder


def left_behind(repository: Path) -> tuple[list[Path], int]:
    """The folders beside the repository, and its worktrees beside the first one."""
    worktrees = git(repository, "worktree", "list", "--porcelain").count("worktree ")
    return list((repository.parent / "temporary").iterdir()), worktrees - 1


def texts(versions: tuple[Version, Version]) -> list[str]:
    return [(version.folder / "service" / "__init__.py").read_text().split()[-1] for version in versions]


def test_a_commit_lies_beside_the_working_directory_and_is_removed(repository: Path) -> None:
    (repository / "service" / "__init__.py").write_text("VERSION = 'mine'\n")
    with open_versions("old") as versions:
        assert texts(versions) == ["'old'", "'mine'"]
        assert versions[0].name == f"old ({git(repository, 'rev-parse', '--short=7', 'old')})"
        head = git(repository, "rev-parse", "--short=7", "HEAD")
        assert versions[1].name == f"working directory ({head} and changes)"
    assert left_behind(repository) == ([], 0)


def test_two_commits_lie_beside_each_other_and_the_working_directory_is_left_alone(repository: Path) -> None:
    (repository / "service" / "__init__.py").write_text("VERSION = 'mine'\n")
    with open_versions("old..HEAD") as versions:
        assert texts(versions) == ["'old'", "'new'"]
        assert repository not in [version.folder for version in versions]
    assert left_behind(repository) == ([], 0)
    assert (repository / "service" / "__init__.py").read_text() == "VERSION = 'mine'\n"


def test_one_commit_twice_shows_the_noise_of_the_machine(repository: Path) -> None:
    with open_versions("old..old") as versions:
        a, b = sides(choose(["lastcall"])[0], versions)
        assert (a.name, b.name) == ("lastcall-A", "lastcall-B")
        launch = a.launch(upstream_url="http://127.0.0.1:9/v1", store=Path("/there"), cpus=None)
        assert launch.folder == versions[0].folder != b.folder
        programme = Programme("relay", "usual", compared=(a, b))
        assert [programme.in_turn(repeat) for repeat in range(programme.times)] == [[a, b]] * 5
    assert left_behind(repository) == ([], 0)


def test_a_second_ctrl_c_does_not_keep_the_folders(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def interrupted(command: tuple[str, ...], **options: object) -> object:
        if "remove" in command:
            signal.raise_signal(signal.SIGINT)
        return run(command, **options)  # type: ignore[call-overload]

    def measure() -> None:
        with open_versions("old..HEAD"):
            monkeypatch.setattr("subprocess.run", interrupted)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure()
    monkeypatch.setattr("subprocess.run", run)
    assert left_behind(repository) == ([], 0)


def hanging_at(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on each command with this word hangs."""
    run = subprocess.run

    def hangs(command: Sequence[str], **options: Any) -> object:
        if word in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return run(command, **options)

    monkeypatch.setattr("subprocess.run", hangs)


@pytest.mark.parametrize("word", ["rev-parse", "add", "-c"])
def test_a_command_that_hangs_is_said_and_leaves_nothing_behind(
    repository: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    with monkeypatch.context() as patched:
        hanging_at(word, patched)
        with pytest.raises(RevisionError, match="did not end within 60 s"), open_versions("old"):
            pass
    assert left_behind(repository) == ([], 0)


@pytest.mark.parametrize("word", ["remove", "prune"])
def test_a_removal_that_hangs_leaves_no_folder_and_hides_no_error(
    repository: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    def measure() -> None:
        with open_versions("old"):
            hanging_at(word, patched)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        measure()
    assert left_behind(repository) == ([], 0)


@pytest.mark.parametrize("argument", ["", "..", "old..", "..HEAD", "old...HEAD", "--force", "old..-x", "old..HEAD..x"])
def test_an_argument_that_is_no_commit_is_refused(repository: Path, argument: str) -> None:
    with pytest.raises(RevisionError, match=r"--compare"), open_versions(argument):
        pass
    assert left_behind(repository) == ([], 0)


@pytest.mark.parametrize("argument", ["nowhere", "old..nowhere", "service", "old:service", "HEAD~9", "-- old", "ölt"])
def test_an_unknown_commit_is_named(repository: Path, argument: str) -> None:
    with pytest.raises(RevisionError, match=r"--compare"), open_versions(argument):
        pass
    assert left_behind(repository) == ([], 0)


def test_a_commit_without_the_service_is_refused_and_its_folder_removed(repository: Path) -> None:
    """The package that is installed would be measured instead."""
    git(repository, "rm", "--quiet", "-r", "service")
    git(repository, "commit", "--quiet", "--message", "none")
    with pytest.raises(RevisionError, match="Python does not take the service from HEAD"), open_versions("HEAD..old"):
        pass
    assert left_behind(repository) == ([], 0)


def test_a_folder_that_is_no_checkout_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions, "ROOT", tmp_path)
    with pytest.raises(RevisionError, match="needs a git checkout"), open_versions("HEAD"):
        pass


def test_a_branch_with_a_slash_and_an_ancestor_are_commits() -> None:
    assert split("origin/main~3..v1.0^{}") == ("origin/main~3", "v1.0^{}")
    assert split("@{yesterday}") == ("@{yesterday}", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("store", "--compare", "HEAD"), "--compare has no figures of store: choose from shutdown, relay"),
        (("relay", "--compare", "HEAD", "--only", "tuned"), "it is a Lastcall: not tuned"),
        (("relay", "--compare", "HEAD", "--only", "lastcall,lastcall-2"), "measures one server"),
        (("relay", "--compare", "HEAD.."), "give a commit"),
        (("herd", "--modes", "live"), "--modes belongs to relay, and herd has none"),
        (("relay", "--modes", "lively"), "no such mode: lively"),
        (("herd", "--faces", "responses"), "--faces belongs to relay without --compare"),
        (("relay", "--faces", "responses", "--compare", "HEAD"), "--faces belongs to relay without --compare"),
        (("relay", "--faces", "native"), "no such face: native"),
        (("idle", "--telemetry"), "--telemetry belongs to relay and herd without --faces"),
        (("relay", "--faces", "responses", "--telemetry"), "--telemetry belongs to relay and herd without --faces"),
        (("relay", "--faces", "responses", "--only", "tuned,node"), "only a Lastcall has them, not tuned, node"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_at_once(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        parse_arguments(arguments)
    assert exited.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("compared", [(), ("--compare", "HEAD")])
def test_telemetry_is_not_left_out_silently_where_its_libraries_are_missing(
    compared: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("relay", "--only", "lastcall", "--telemetry", *compared)
    assert parse_arguments(arguments)[0].telemetry
    monkeypatch.setattr("bench.__main__.find_spec", lambda _: None)
    with pytest.raises(SystemExit) as exited:
        parse_arguments(arguments)
    assert exited.value.code == 2
    assert "the extra otel is not installed" in capsys.readouterr().err


@pytest.fixture
def served(repository: Path) -> Iterator[Path]:
    """The repository with this project's service in its newest commit."""
    shutil.rmtree(repository / "service")
    shutil.copytree(ROOT / "service", repository / "service", ignore=shutil.ignore_patterns("__pycache__"))
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "service")
    yield repository
    assert left_behind(repository) == ([], 0)


def start_bench(repository: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the bench as ``just bench`` does, on another repository."""
    env = os.environ | {"TMPDIR": str(repository.parent / "temporary")}
    command = (sys.executable, "-c", _BENCH, str(repository), *arguments)
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_comparison_measures_both_in_turn_and_prints_the_ratio_of_the_pairs(served: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ("--streams", "2", "--repeats", "1", "--quick", "--out", str(out))
    bench = start_bench(served, "herd", "--compare", "HEAD", *sizes)
    said, _ = bench.communicate(timeout=CAP_S)
    assert bench.returncode == 0, said
    _, *rows = read_rows(out / "herd.jsonl")
    assert [(row["contender"], row["began"]) for row in rows] == [("lastcall-A", 2), ("lastcall-B", 2)]
    report = (out / "herd.md").read_text()
    assert "# working directory (" in report
    assert "| 2 chats | CPU us a start |" in report
    assert "working directory" in said


def test_each_side_is_its_own_code_and_a_commit_that_does_not_start_is_said_so(served: Path, tmp_path: Path) -> None:
    asgi = served / "service" / "asgi.py"
    good = asgi.read_text()
    asgi.write_text(f"{good}\nraise RuntimeError('broken on purpose')\n")
    git(served, "commit", "--quiet", "--all", "--message", "broken")
    asgi.write_text(good)
    bench = start_bench(served, "herd", "--compare", "HEAD", "--streams", "2", "--out", str(tmp_path / "out"))
    said, _ = bench.communicate(timeout=CAP_S)
    assert bench.returncode == 1
    assert "a server under test failed" in said
    assert "broken on purpose" in said


def test_ctrl_c_ends_a_comparison_and_leaves_nothing_behind(served: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench = start_bench(served, "capacity", "--compare", "HEAD", "--out", str(out))
    try:
        give_up_at = time.monotonic() + CAP_S
        while not (out / "capacity.jsonl").exists():
            assert bench.poll() is None
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        bench.send_signal(signal.SIGINT)
        said, _ = bench.communicate(timeout=CAP_S)
    finally:
        bench.kill()
        bench.wait()
    assert bench.returncode == 130, said
