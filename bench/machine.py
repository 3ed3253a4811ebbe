"""The machine of a measurement: its processor, its load, and the versions of all programs that took part."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import trio

from bench.database import binaries

_PACKAGES = (
    *("trio", "hypercorn", "quart-trio", "quart", "h11", "httpx", "msgspec", "apsw", "psycopg"),
    *("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "aiohttp", "orjson", "sse-starlette"),
)
BUSY_SHARE_MAX = 0.1
"""If other processes use more than this share of the cores, the report says that the machine was busy."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and the versions. The first row of each file of raw rows."""

    kind: str = "machine"
    date: str
    cpu: str
    cores: int
    memory_gib: int
    kernel: str
    python: str
    node: str | None
    versions: dict[str, str]
    load_average: tuple[float, float, float]
    server_cpus: str | None
    client_cpus: str | None


def look_at_machine(*, server_cpus: str | None, client_cpus: str | None) -> Machine:
    """Describe this machine as it is now."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory_kib = int(next(line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")))
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cpu=cpu,
        cores=os.cpu_count() or 1,
        memory_gib=round(memory_kib / 1024 / 1024),
        kernel=platform.release(),
        python=sys.version.split()[0],
        node=_output(("node", "--version")) if shutil.which("node") else None,
        versions={name: found for name in _PACKAGES if (found := _version(name))} | _version_of_postgres(),
        load_average=os.getloadavg(),
        server_cpus=server_cpus,
        client_cpus=client_cpus,
    )


def describe_machine(machine: Machine) -> str:
    """Return the machine's description as a paragraph."""
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return (
        f"{machine.date}, {machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB, Linux {machine.kernel}, "
        f"Python {machine.python}, node {machine.node or 'absent'}. Server on core {machine.server_cpus}, clients and "
        f"model server on {machine.client_cpus}. Load average at the start {machine.load_average[0]:.1f}. {versions}."
    )


def describe_busyness(rows: Iterable[Any]) -> str:
    """Return a sentence if other processes used much of the machine before one of these rows was measured."""
    busiest = max((getattr(row, "busy_before", None) or 0 for row in rows), default=0)
    if busiest <= BUSY_SHARE_MAX:
        return ""
    return f"**The machine was busy**: before a run, others used up to {busiest:.0%} of it. Figures are upper bounds."


def choose_cpus() -> tuple[str | None, str | None]:
    """Return a core for the server, and the others for clients and the model server; no pinning on one core."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return None, None
    return str(cpus[0]), ",".join(map(str, cpus[1:]))


async def busy_share(interval_s: float = 0.2) -> float:
    """Return the share of all cores that other processes use now, while no part of the benchmark runs."""
    before = _cpu_times()
    await trio.sleep(interval_s)
    idle, total = (now - then for now, then in zip(_cpu_times(), before, strict=True))
    return 1 - idle / total if total else 0.0


def _cpu_times() -> tuple[int, int]:
    times = [int(field) for field in _lines("/proc/stat")[0].split()[1:]]
    return times[3] + times[4], sum(times)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _version_of_postgres() -> dict[str, str]:
    programs = binaries()
    return {} if programs is None else {"PostgreSQL": _output((str(programs / "postgres"), "--version")).split()[2]}


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
