"""hypercorn's configuration, for ``hypercorn --config file:deploy/hypercorn_config.py service.asgi:app``.

The same as ``--config python:service.hosting.hypercorn_config``, as a file to add to. hypercorn copies every name that
does not begin with two underscores into what it sends to its workers: import under such a name, and no functions.
"""

from service.hosting.hypercorn_config import backlog, bind, certfile, keyfile, worker_class  # noqa: F401  for hypercorn

workers = 1
"""More of them share a durable store (``sqlite:``); with ``memory:`` they refuse to start."""
