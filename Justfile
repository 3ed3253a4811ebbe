# The commands of this project: `uv run just` lists them.

set positional-arguments

# Where this is set, as in many images, each process compiles all that it imports: most of what a server's start takes.
export PYTHONDONTWRITEBYTECODE := ""

# uv names itself to the programs that it runs. What runs with the tools of the `dev` group installs them when they are missing.
uv := env("UV", "uv")
dev := uv + " run --group dev"

# Of flake8-async not what ruff checks too (110, 222), the checkpoints that Trio does not ask for (9), async functions that
# a protocol makes so (124) and that httpx, this project's choice, has a successor (127).
disabled := "ASYNC110,ASYNC222,ASYNC9,ASYNC124,ASYNC127"
# What `nursery.start` starts; ASYNC114 tells what is missing here.
startable := "run,run_checkpoints,run_expiry,run_heartbeats,run_recovery,_run_http2,_run_idle,_run_unfinished,_run_until_lost"
# Tests that take seconds lie beside each other: no worker is given many at once.
parallel := "-n auto --maxschedchunk 1"

_list:
    @just --list --unsorted

# install all that a contributor needs: the tools of the tests and of the bench
setup:
    {{ uv }} sync --all-groups
    @echo "A commit can be checked before it is made: {{ uv }} tool run pre-commit install"

# serve on 127.0.0.1:8000; `just serve --reload` starts anew when the code changes
[no-exit-message]
serve *args:
    @exec python -m service serve "$@"

# run the tests, on all cores where they allow it; arguments go to pytest (`-n0`: in one process)
test *args:
    {{ dev }} python -m pytest {{ parallel }} "$@"

# run what is quick: sessions, storage, models and the API, without other processes, with fewer examples of properties
quick *args:
    {{ dev }} python -m pytest {{ parallel }} -n 4 --hypothesis-profile quick -m "not processes and not serial" -k "not postgres" tests/sessions tests/storage tests/models tests/api "$@"

# look for mistakes: ruff, and flake8-async for what only it knows about cancellation
lint:
    {{ dev }} ruff check
    {{ dev }} ruff format --check
    find service tests bench clients -name '*.py' -not -path 'bench/contenders/*' -print0 | xargs -0 -n 50 -P {{ num_cpus() }} \
        {{ dev }} flake8-async --disable {{ disabled }} --startable-in-context-manager {{ startable }}

# check the types, strictly
types:
    {{ dev }} mypy

# format the code, and apply the fixes of ruff
fmt:
    {{ dev }} ruff check --fix-only --quiet
    {{ dev }} ruff format

# all that CI checks
check: test lint types
    {{ uv }} lock --check

# a minute for an operator: start the real server, talk, stop it in mid-stream, read its log
smoke:
    @python tests/smoke.py

# run real clients and proxies (npm, PyPI, Debian) against a server; `--newest` takes their newest versions, `--codex` Codex CLI alone
clients *args:
    @{{ dev }} python -m tests.clients "$@"

# run model servers that others wrote (PyPI, npm) behind a server, as the table in docs/openai.md has it; `--write` renews it
upstreams *args:
    @{{ dev }} python -m tests.upstreams "$@"

# kill a loaded service so many times, and see that nothing it said is lost
crash times="200":
    @{{ dev }} python -m tests.storage.sqlite.crash {{ times }}

# let three replicas, their links and their PostgreSQL fail by chance for so many minutes (20), and check what clients were told
chaos *args:
    @{{ dev }} python -m tests.cluster.chaos "$@"

# write down this version's tables, statements and forwards, to which later versions are held: before a release
freeze:
    @{{ dev }} python -m tests.storage.postgres.freeze
    @{{ dev }} python -m tests.cluster.freeze

# look for faults in generated histories of sessions, so many times longer than the tests do
histories times="10":
    @EXAMPLES=$(( 100 * {{ times }} )) {{ dev }} python -m pytest {{ parallel }} --hypothesis-profile long tests/sessions/trees

# what the store's calls cost with so many sessions in it, and what search costs with so many messages
scale sessions="1000000" messages="1000000":
    @{{ dev }} python -m tests.storage.sqlite.many_rows {{ sessions }}
    @{{ dev }} python -m tests.storage.sqlite.many_documents {{ messages }}

# measure; arguments go to the bench, which is installed with what it compares
bench *args:
    @{{ uv }} run --group bench python -m bench "$@"

# check the files for Kubernetes and Docker Compose in deploy/ against the schemas of these programs, which are installed for it
manifests:
    {{ uv }} tool run --quiet "check-jsonschema>=0.39" --builtin-schema vendor.compose-spec deploy/compose.yaml
    {{ uv }} tool run --quiet --from "kubernetes-validate>=1.37" kubernetes-validate --strict deploy/kubernetes.yaml deploy/kubernetes-replicas.yaml

# count what a token and a start execute, and warn where it is 15 % more than recorded; `--record` renews the record, `--telemetry` counts with all of it on
hot-path *args:
    @{{ uv }} run --extra otel python -m bench.hot_path "$@"

# which workarounds the newest hypercorn, quart-trio and trio still need; `--python 3.13` for those of another Python
removal *args:
    @{{ dev }} python -m tests.removal "$@"
