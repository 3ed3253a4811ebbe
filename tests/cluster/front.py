"""A proxy in front of all replicas: nginx or HAProxy, configured as the service's users would."""

import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.clients.surroundings import free_port, open_process, program_path, wait_listening
from tests.cluster.cluster import Door

_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream lastcall {{
    {servers}
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://lastcall;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_next_upstream error timeout http_503 non_idempotent;
      proxy_connect_timeout 2s;
      proxy_read_timeout 60s;
    }}
  }}
}}
"""
_HAPROXY = """
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
  retries 3
  option redispatch 1
  retry-on conn-failure empty-response 503
frontend clients
  bind 127.0.0.1:{port}
  default_backend lastcall
backend lastcall
  balance roundrobin
  option httpchk GET /readyz
  default-server check inter 200ms rise 1 fall 1
  {servers}
"""


@asynccontextmanager
async def open_front(proxy: str, doors: Sequence[Door], within: Path) -> AsyncIterator[Door]:
    """A proxy that sends each request to one of the doors, and to another one where that one refuses or is gone."""
    port = free_port()
    template, options = _HAPROXY, ["-db", "-f"]
    servers = "\n  ".join(f"server s{number} {door.host}:{door.port}" for number, door in enumerate(doors))
    if proxy == "nginx":
        # A POST is sent again, too: the clients' keys make that safe.
        servers = "\n    ".join(f"server {door.host}:{door.port} max_fails=0;" for door in doors)
        template, options = _NGINX, ["-e", "stderr", "-p", "{folder}", "-c"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _lay_out(folder, template.format(folder=folder, port=port, servers=servers))
        command = [program_path(proxy) or proxy, *(it.format(folder=folder) for it in options), f"{folder}/config"]
        user = {"user": "nobody"} if os.geteuid() == 0 else {}
        log = within / f"{proxy}.log"
        async with open_process(command, log=log, **user):
            with trio.fail_after(20):
                await wait_listening(port, log)
            yield Door("127.0.0.1", port)


def _lay_out(folder: Path, config: str) -> None:
    folder.chmod(0o777)  # the proxy runs as another user
    (folder / "config").write_text(config)
