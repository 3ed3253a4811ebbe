"""The application for a server: ``hypercorn --worker-class trio service.asgi:app``."""

from service.hosting.application import create_hosted_app
from service.setting_sources import load_settings

app = create_hosted_app(load_settings)
