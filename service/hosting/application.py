"""The application as it is hosted: the API, held by our lifespan."""

from collections.abc import Callable

from quart_trio import QuartTrio

from service.api.app import create_app
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.lifespan import LOAD_SETTINGS, ServiceLifespan
from service.settings import Settings


def create_hosted_app(load_settings: Callable[[], Settings]) -> QuartTrio:
    """An application for hypercorn. Reads and opens nothing before its lifespan begins.

    Args:
        load_settings: Raises StartupError where they cannot be used.
    """
    app = create_app()
    app.asgi_http_class = AsgiRequest
    app.asgi_lifespan_class = ServiceLifespan  # type: ignore[assignment]
    app.extensions[LOAD_SETTINGS] = load_settings
    return app
