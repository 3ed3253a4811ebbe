"""Runs Lastcall in front of model servers that others wrote, and prints the table of docs/openai.md about them.

``just upstreams`` installs the servers into environments of their own, asks each of them all questions of
:mod:`tests.upstreams.observations`, and compares the answers with the table; ``just upstreams --write`` writes the
table. ``just upstreams llama.cpp`` runs one of them.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

from tests.clients.surroundings import MissingError
from tests.upstreams.kinds import KINDS, Kind
from tests.upstreams.observations import observe
from tests.upstreams.table import DOCUMENT, LABELS, Columns, columns_in, render, with_table


async def observe_all(kinds: Sequence[Kind]) -> tuple[Columns, list[str]]:
    """The columns of these servers, and the promises of Lastcall that were broken."""
    columns: Columns = {}
    failed: list[str] = []
    for kind in kinds:
        print(f"== {kind.head}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            columns[kind.head], broken = await observe(kind, Path(folder))
        failed += broken
        for label, cell in zip(LABELS[1:], columns[kind.head], strict=True):
            print(f"{label}: {cell}", flush=True)
    return columns, failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="just upstreams", description="Lastcall in front of others' model servers")
    parser.add_argument("--write", action="store_true", help="write the table into docs/openai.md")
    parser.add_argument("names", nargs="*", help=f"run these alone: {', '.join(kind.name for kind in KINDS)}")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if not arguments.names or kind.name in arguments.names]
    if unknown := set(arguments.names) - {kind.name for kind in KINDS}:
        parser.error(f"no such server: {', '.join(sorted(unknown))}")
    try:
        columns, failed = trio.run(observe_all, kinds)
    except (MissingError, RuntimeError) as error:
        print(f"FAILED  {error}")
        return 1
    document = DOCUMENT.read_text()
    try:
        known = columns_in(document)
    except ValueError:
        known = {}  # it is of other questions
    print(render(columns))
    if failed:
        print("\n".join(f"FAILED  {line}" for line in failed))
        return 1
    if arguments.write:
        kept = known | columns
        DOCUMENT.write_text(with_table(document, {kind.head: kept[kind.head] for kind in KINDS if kind.head in kept}))
        return 0
    others = [head for head in columns if columns[head] != known.get(head)]
    print(f"upstreams: the table differs for {', '.join(others)}" if others else "upstreams: as in the table")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
