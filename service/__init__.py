"""Lastcall, a Trio-native service for AI chat sessions.

The import direction, which ``tests/test_architecture.py`` checks::

    cli, asgi -> hosting -> api -> supervisor, shutdown -> sessions -> models, storage -> errors, settings, clock
"""

__version__ = "0.1.0"
