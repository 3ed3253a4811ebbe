"""The application as hypercorn hosts it: the API, with the lifespan that holds the service."""

from collections.abc import Callable

from quart_trio import QuartTrio

from service.api.app import create_app
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.lifespan import LOAD_SETTINGS, ServiceLifespan
from service.settings import Settings


def create_hosted_app(load_settings: Callable[[], Settings]) -> QuartTrio:
    """Make an application for hypercorn. It reads and opens nothing before its lifespan begins.

    Args:
        load_settings: Loads the settings; raises StartupError if they cannot be used.
    """
    app = create_app()
    app.asgi_http_class = AsgiRequest
    app.asgi_lifespan_class = ServiceLifespan  # type: ignore[assignment]
    app.extensions[LOAD_SETTINGS] = load_settings
    return app
