"""Failed assertions in the modules beside the tests say what differs."""

import pytest

pytest.register_assert_rewrite("tests.sessions.trees.comparisons", "tests.sessions.trees.history")
