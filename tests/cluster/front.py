"""A proxy in front of all replicas: nginx or HAProxy, configured as the service's users would."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.clients.surroundings import open_proxy
from tests.cluster.cluster import Door

START_S = 20
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
    template, options = _HAPROXY, ["-db", "-f"]
    servers = "\n  ".join(f"server s{number} {door.host}:{door.port}" for number, door in enumerate(doors))
    if proxy == "nginx":
        # A POST is sent again, too: the clients' keys make that safe.
        servers = "\n    ".join(f"server {door.host}:{door.port} max_fails=0;" for door in doors)
        template, options = _NGINX, ["-e", "stderr", "-p", "{folder}", "-c"]
    log = within / f"{proxy}.log"
    async with open_proxy(proxy, template, options, log=log, start_s=START_S, servers=servers) as (port, _):
        yield Door("127.0.0.1", port)
