"""The calls under ``/admin``, each in a module of its own. Who may call: :mod:`service.api.http.admin_access`."""

from quart import Blueprint

blueprint = Blueprint("admin", __name__, url_prefix="/admin")
