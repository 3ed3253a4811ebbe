"""Run the removal tests against the newest libraries that install together, and say which workaround can go.

    python -m tests.removal [--python 3.13]

The project is installed into a new environment without its ceilings: the newest hypercorn, quart-trio, quart, trio, h11
and h2 for this Python. The exit code is 1 if a workaround is no longer needed, or if a test cannot decide.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.version import Version

from service.hosting.hypercorn.patches import FAULTS, Fault
from tests.removal.verdicts import VERDICTS_FILE, Verdict, joined

ROOT = Path(__file__).parents[2]
LIBRARIES = ("hypercorn", "quart-trio", "quart", "trio", "h11", "h2", "hpack")
UV = os.environ.get("UV", "uv")
"""uv sets this variable for the programs that it runs."""
RUN_S = 1800
"""Bound of all tests together. Some of them start servers."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="just removal", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="for which Python: a version, or a path")
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        install(environment, parser.parse_args(arguments).python)
        versions = versions_in(environment)
        said = run_tests(environment, Path(folder) / "verdicts")
    rows = [(fault, *verdict_on(fault, said, versions)) for fault in FAULTS]
    print(table(rows, versions))
    return exit_code(verdict for _, verdict, _ in rows)


def install(environment: Path, python: str) -> None:
    overrides = environment.with_name("overrides.txt")
    overrides.write_text("hypercorn\n")  # the one library with an upper bound in this project
    run(UV, "venv", "--quiet", "--python", python, str(environment))
    run(
        *(UV, "pip", "install", "--quiet", "--python", str(environment / "bin/python"), "--upgrade"),
        *("--override", str(overrides), "--group", f"{ROOT / 'pyproject.toml'}:dev", "--editable", str(ROOT)),
    )


def run(*command: str) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


def versions_in(environment: Path) -> dict[str, str]:
    [packages] = environment.glob("lib/python*/site-packages")
    found: Iterable[Distribution] = distributions(path=[str(packages)])
    versions = {it.name.lower().replace("_", "-"): it.version for it in found}
    return {name: versions[name] for name in LIBRARIES}


def run_tests(environment: Path, verdicts: Path) -> dict[str, tuple[list[Verdict], str]]:
    """Run the removal tests. Returns for each test the verdicts of its cases and its first error, by the test's id."""
    # The faults are not warnings: warnings of newer versions do not count.
    options = [
        "-m",
        "removal",
        "-n0",
        "-q",
        "--no-header",
        "--tb=line",
        "-W",
        "default",
        "-p",
        "tests.removal.verdicts",
    ]
    files = sorted({fault.removal_test.partition("::")[0] for fault in FAULTS})
    subprocess.run(
        [environment / "bin/python", "-m", "pytest", *options, *files],
        check=False,
        cwd=ROOT,
        env=os.environ | {VERDICTS_FILE: str(verdicts)},
        stdout=sys.stderr,
        timeout=RUN_S,
    )
    said: dict[str, tuple[list[Verdict], str]] = {}
    for line in verdicts.read_text().splitlines() if verdicts.exists() else ():
        case = json.loads(line)
        cases, first = said.setdefault(case["test"], ([], ""))
        said[case["test"]] = [*cases, Verdict(case["verdict"])], first or case["said"]
    return said


def verdict_on(
    fault: Fault, said: dict[str, tuple[list[Verdict], str]], versions: dict[str, str]
) -> tuple[Verdict, str]:
    """Whether the workaround for this fault is needed, and the test's error if that is not clear."""
    if fault.removal_test not in said:
        return Verdict.UNKNOWN, "the test did not run"
    if fault.since is not None and Version(versions[fault.since[0]]) < Version(fault.since[1]):
        return Verdict.ELSEWHERE, f"since {' '.join(fault.since)}"
    cases, first = said[fault.removal_test]
    return joined(cases), first


def table(rows: list[tuple[Fault, Verdict, str]], versions: dict[str, str]) -> str:
    lines = [", ".join(f"{name} {version}" for name, version in versions.items()), ""]
    for fault, verdict, why in rows:
        lines.append(f"{verdict:<22} {fault.title}")
        if verdict in (Verdict.NOT_NEEDED, Verdict.UNKNOWN):
            lines += [f"{'':<22}   can go: {fault.goes}", f"{'':<22}   {fault.removal_test}", f"{'':<22}   {why}"]
    counts = {verdict: sum(it is verdict for _, it, _ in rows) for verdict in Verdict}
    lines += ["", ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)]
    return "\n".join(lines)


def exit_code(verdicts: Iterable[Verdict]) -> int:
    return int(any(it in (Verdict.NOT_NEEDED, Verdict.UNKNOWN) for it in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
