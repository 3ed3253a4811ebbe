# The front door: `uv run just` lists what there is.

set positional-arguments

_list:
    @just --list --unsorted

# serve on 127.0.0.1:8000; `just serve --reload` starts anew when the code changes
serve *args:
    @exec python -m service serve "$@"

# run the tests; arguments go to pytest
test *args:
    python -m pytest "$@"

# look for mistakes: ruff, and flake8-async for what only it knows about cancellation
lint:
    ruff check
    ruff format --check
    find service tests bench -name '*.py' -exec flake8-async {} +

# check the types, strictly
types:
    mypy

# put the code into its one format, and mend what ruff can mend
fmt:
    ruff check --fix-only --quiet
    ruff format

# all that CI checks
check: test lint types
    uv lock --check

# a minute for an operator: start the real server, talk, stop it in mid-stream, read its log
smoke:
    @python tests/smoke.py

# measure; arguments go to the bench
bench *args:
    @python -m bench "$@"
