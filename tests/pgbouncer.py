"""A pgbouncer in transaction mode before the PostgreSQL server of the tests."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from bench.unprivileged import user_without_rights

START_S = 30
POOL_SIZE = 20
CONFIG = "pgbouncer.ini"

_CONFIG = """
[databases]
* = host={server} port=5432
[pgbouncer]
listen_addr =
listen_port = 5432
unix_socket_dir = {directory}
auth_type = hba
auth_file = {directory}/users
auth_hba_file = {directory}/hba
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 1000
query_wait_timeout = {query_wait_s}
server_login_retry = 1
server_round_robin = 1
log_connections = 0
log_disconnections = 0
"""
# Each transaction may get another connection than the one before: `server_round_robin` makes it the usual case.


class Pooler:
    """A running pgbouncer.

    Attributes:
        directory: The folder of its socket.
    """

    def __init__(self, directory: Path, process: "subprocess.Popen[bytes]") -> None:
        self.directory = directory
        self.process = process

    def set_query_wait(self, seconds: float) -> None:
        """Bound the waits for a connection of the pool. The pooler reads it some moments later."""
        config = self.directory / CONFIG
        config.write_text(re.sub(r"(query_wait_timeout) = .*", rf"\1 = {seconds}", config.read_text()))
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)  # at once: its clients are gone, or are cut
        try:
            self.process.wait(START_S)
        finally:
            self.process.kill()
            self.process.wait()
            shutil.rmtree(self.directory, ignore_errors=True)


def program() -> str | None:
    """The program; None if it is not on this machine."""
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


def start_pooler(
    program: str,
    directory: Path,
    server: Path,
    users: Mapping[str, str],
    hba: str,
    *,
    pool_size: float = POOL_SIZE,
    query_wait_s: float = 10,
) -> Pooler:
    """Start a pooler in a new folder, where its socket is.

    Args:
        server: The folder of the server's socket.
        users: Those that it lets in, with their passwords.
        hba: How it lets them in, as the server's ``pg_hba.conf``.
    """
    directory.mkdir()
    (directory / "users").write_text("".join(f'"{user}" "{password}"\n' for user, password in users.items()))
    (directory / "hba").write_text(hba)
    config = directory / CONFIG
    config.write_text(
        _CONFIG.format(server=server, directory=directory, pool_size=pool_size, query_wait_s=query_wait_s)
    )
    user = user_without_rights(directory)
    process = subprocess.Popen(
        [program, "--quiet", config],
        user=user,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    pooler = Pooler(directory, process)
    deadline = time.monotonic() + START_S
    while not (directory / ".s.PGSQL.5432").exists():
        if process.poll() is not None or time.monotonic() >= deadline:
            pooler.stop()
            raise RuntimeError("pgbouncer does not start")
        time.sleep(0.01)
    return pooler
