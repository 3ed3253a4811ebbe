"""For hypercorn's command line: ``hypercorn --config python:service.hosting.hypercorn_config service.asgi:app``.

Takes the address and the certificate from our settings, and mends the master. hypercorn copies every name of this
module that does not begin with two underscores into the configuration that it sends to its workers.
"""

from service.hosting.master import mend as __mend

__settings = __mend()
worker_class = "trio"
bind = [__settings.bind]
certfile = __settings.tls_certfile
keyfile = __settings.tls_keyfile
backlog = 1024
"""Clients that wait during a reload; beyond that the kernel drops them, and they try again a second later."""
