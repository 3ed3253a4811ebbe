"""The application as hypercorn hosts it: the API, with the lifespan that holds the service."""

from collections.abc import Callable

from quart_trio import QuartTrio

from service.api.app import create_app
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.lifespan import LOAD_SETTINGS, READ_SOURCES, ServiceLifespan
from service.setting_sources import Sources, read_sources
from service.settings import Settings


def create_hosted_app(
    load_settings: Callable[[], Settings], *, read_sources: Callable[[], Sources] = read_sources
) -> QuartTrio:
    """Make an application for hypercorn. It reads and opens nothing before its lifespan begins.

    Args:
        load_settings: Loads the settings; raises StartupError if they cannot be used.
        read_sources: Reads the same settings again while the application serves, for API keys that change.
    """
    app = create_app()
    app.asgi_http_class = AsgiRequest
    app.asgi_lifespan_class = ServiceLifespan  # type: ignore[assignment]
    app.extensions[LOAD_SETTINGS] = load_settings
    app.extensions[READ_SOURCES] = read_sources
    return app
