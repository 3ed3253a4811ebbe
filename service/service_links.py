"""Environment variables that Kubernetes and Docker make, and whose names begin with the prefix of our settings.

The kubelet gives each pod variables of every Service in its namespace (service links). A Service called ``lastcall``
makes ``LASTCALL_PORT=tcp://10.96.12.7:80``, ``LASTCALL_SERVICE_HOST`` and more; a Service called ``lastcall-db`` makes
``LASTCALL_DB_PORT``. Docker makes the same variables for a linked container (``--link x:lastcall``), and also
``LASTCALL_NAME`` and ``LASTCALL_ENV_…``. This module knows these variables by their form, so that a mistyped setting
is not taken for one of them.

Source: Kubernetes, "Accessing the Service", and ``pkg/kubelet/envvars``; Docker, "Legacy container links".
"""

import re
from collections.abc import Iterator, Mapping

_BY_NAME = re.compile(
    r"[A-Z0-9_]+(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_[0-9]{1,5}_(TCP|UDP|SCTP)(_[A-Z_]+)?)"
)
_URL = re.compile(r"(tcp|udp|sctp)://\S+")
_LINK = re.compile(r"/[^/]+/([^/]+)")
"""The value that Docker gives a link: the container that has the link, and the alias."""


def made_by_links(environ: Mapping[str, str], prefix: str) -> frozenset[str]:
    """The names of the variables that begin with ``prefix`` and were made by service links or Docker links."""
    ours = {name: value for name, value in environ.items() if name.startswith(prefix)}
    aliases = list(_linked_aliases(ours))
    names, variables = {f"{alias}_NAME" for alias in aliases}, tuple(f"{alias}_ENV_" for alias in aliases)
    return frozenset(
        name
        for name, value in ours.items()
        if _BY_NAME.fullmatch(name)
        or (name.endswith("_PORT") and _URL.fullmatch(value))
        or name in names
        or name.startswith(variables)
    )


def _linked_aliases(environ: Mapping[str, str]) -> Iterator[str]:
    """The aliases of Docker links: a ``…_NAME`` whose value is a link proves that its ``…_ENV_…`` are Docker's, too."""
    for name, value in environ.items():
        link = _LINK.fullmatch(value)
        if link is not None and name == link[1].upper().replace("-", "_") + "_NAME":
            yield name.removesuffix("_NAME")
