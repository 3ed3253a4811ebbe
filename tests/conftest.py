"""Settings for every test: the leak checks, the lanes and the profile of the property tests."""

import os

from hypothesis import HealthCheck, settings

pytest_plugins = (
    "tests.httpx_bodies",
    "tests.leak_checks",
    "tests.lanes",
    "tests.machine",
    "tests.postgres_server",
    "tests.reserved_port",
)

# No deadlines by the wall clock; the same examples in every CI run, new ones on a developer's machine.
settings.register_profile(
    "lastcall",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lastcall")
# For `just quick`, which is run many times a day: a quarter of the examples.
settings.register_profile("quick", settings.get_profile("lastcall"), max_examples=25)
# For `just histories`, which looks for what the usual number of examples does not find: always new ones.
settings.register_profile(
    "long",
    settings.get_profile("lastcall"),
    derandomize=False,
    max_examples=int(os.environ.get("EXAMPLES", "100")),
)
