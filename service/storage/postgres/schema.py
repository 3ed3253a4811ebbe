"""The tables, as the scripts that made them: the schema of version n is scripts 1 to n in an empty schema.

Moments are microseconds since 1970 in UTC. Texts that a caller chose are JSON in ``bytea``, because PostgreSQL's own
texts have no NUL. Ids sort by their bytes, as in the other stores.

No table refers to another one by a foreign key: each check would take a lock and a search, and a step that removes a
row removes what belongs to it in the same transaction.

Processes of the version before go on beside a schema that was brought up, and may even start: a script only adds
(docs/cluster.md, "Versions side by side").
"""

import time
from secrets import token_bytes
from typing import NamedTuple

import psycopg
import structlog

from service.errors import StartupError

logger = structlog.get_logger("lastcall.store")

SECRET_BYTES = 32
SERVER_VERSION_MIN = 140000
WAIT_MAX_S = 600.0
"""How long a start waits for another process that brings the tables up, or for those that hold one of them."""
TABLE_LOCK_S = 2.0
"""How long a script waits for a table, because all others that need the table wait behind it meanwhile."""
_PAUSE_S = 1.0

VERSION_1 = """
CREATE TABLE {s}.store (
    version int NOT NULL,
    secret bytea NOT NULL       -- by which the owners know each other
);

CREATE TABLE {s}.owners (
    fence bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    nonce bytea NOT NULL,       -- after a failover a fence may be given twice
    address text COLLATE "C",
    opened_at bigint NOT NULL,
    epoch bigint NOT NULL DEFAULT 0,    -- of its connections: each one that may have left a commit in flight has an end
    dead boolean NOT NULL DEFAULT false
);
-- Apart from the owners, whose rows each write locks: a long write holds up no beat.
CREATE TABLE {s}.beats (
    fence bigint PRIMARY KEY,
    beats bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

CREATE TABLE {s}.sessions (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id text COLLATE "C" NOT NULL UNIQUE,
    owner_name text COLLATE "C" NOT NULL,       -- of the keys that may use the session
    created_at bigint NOT NULL,
    last_accessed_at bigint NOT NULL,
    expires_at bigint NOT NULL,
    idle_us bigint NOT NULL,    -- the idle timeout: after a use the session expires so many microseconds later
    deletion bigint,            -- the owner that marked it as deleted; 0 once it is removed for every reader
    ephemeral boolean NOT NULL,
    head text COLLATE "C",
    owner bigint,               -- of its open turns
    open_turns int NOT NULL DEFAULT 0 CHECK (open_turns >= 0),
    turns int NOT NULL DEFAULT 0,       -- begun so far: the next ordinal
    edits int NOT NULL DEFAULT 0,       -- deletions of turns and items so far
    message_count bigint NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    cached_tokens bigint NOT NULL,
    text_bytes bigint NOT NULL, -- of the texts in the settings
    settings bytea NOT NULL,    -- JSON (postgres/rows.py)
    CHECK ((owner IS NULL) = (open_turns = 0))
) WITH (fillfactor = 80);
CREATE INDEX sessions_by_owner ON {s}.sessions (owner_name, created_at, id)
    WHERE deletion IS NULL AND NOT ephemeral AND owner_name <> '';
CREATE INDEX plain_sessions_by_age ON {s}.sessions (created_at, id)
    WHERE deletion IS NULL AND NOT ephemeral AND owner_name = '';
CREATE INDEX owned_sessions_by_age ON {s}.sessions (created_at, id)
    WHERE deletion IS NULL AND NOT ephemeral AND owner_name <> '';
CREATE INDEX running_sessions_by_age ON {s}.sessions (created_at, id)
    WHERE deletion IS NULL AND NOT ephemeral AND open_turns > 0;
CREATE INDEX plain_idle_sessions_by_deadline ON {s}.sessions (expires_at, id)
    WHERE deletion IS NULL AND open_turns = 0 AND owner_name = '';
CREATE INDEX owned_idle_sessions_by_deadline ON {s}.sessions (expires_at, id)
    WHERE deletion IS NULL AND open_turns = 0 AND owner_name <> '';
CREATE INDEX marked_sessions ON {s}.sessions (deletion) WHERE deletion IS NOT NULL;

CREATE TABLE {s}.session_metadata (
    pair bytea NOT NULL,        -- a digest (postgres/metadata.py)
    created_at bigint NOT NULL, -- of the session
    id text COLLATE "C" NOT NULL,       -- of the session
    session bigint NOT NULL,
    PRIMARY KEY (pair, created_at, id, session)
);
CREATE INDEX metadata_by_session ON {s}.session_metadata (session);

CREATE TABLE {s}.turns (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session bigint NOT NULL,
    ordinal int NOT NULL,       -- from 0, in the order of acceptance
    id text COLLATE "C" NOT NULL UNIQUE,
    parent text COLLATE "C",
    -- A path is made of chains: the first child of a turn is in the chain of its parent, a further one begins a chain.
    chain bigint NOT NULL,
    depth int NOT NULL,         -- on the path, from 0; a chain begins at the depth of its first turn
    chain_parent bigint,        -- the key of the turn that the first turn of the chain follows
    place int NOT NULL,         -- from 1, among the turns with the same parent
    owner bigint,               -- while it is open
    segment bigint,             -- while it is open: the first segment that may have a part of it
    state text COLLATE "C" NOT NULL,
    created_at bigint NOT NULL,
    started_at bigint,
    ended_at bigint,
    last_seq bigint NOT NULL,
    message_bytes bigint NOT NULL,      -- in a prompt
    message_items int NOT NULL,
    messages int NOT NULL,      -- the messages, calls and outputs: TurnRecord.message_count
    text_bytes bigint NOT NULL, -- of all texts, and of what else may be large
    ephemeral boolean NOT NULL,
    events_deleted boolean NOT NULL,
    settings bytea NOT NULL,    -- JSON of the small other fields (postgres/turn_rows.py)
    options bytea,              -- JSON (storage/turn_options.py)
    input bytea NOT NULL,       -- JSON
    output bytea NOT NULL,      -- JSON
    runs bytea,                 -- packed events of an ended turn (storage/pieces.py); NULL if they are in event_pages
    CHECK ((owner IS NOT NULL) = (state IN ('queued', 'running')))
) WITH (fillfactor = 90);
ALTER TABLE {s}.turns ALTER COLUMN settings SET STORAGE MAIN;
CREATE UNIQUE INDEX turns_by_ordinal ON {s}.turns (session, ordinal);
CREATE UNIQUE INDEX turns_by_chain ON {s}.turns (chain, depth);
CREATE INDEX branches ON {s}.turns (session) WHERE key = chain AND chain_parent IS NOT NULL;
CREATE INDEX turns_by_parent ON {s}.turns (session, (coalesce(parent, '')), place);
CREATE INDEX open_turns ON {s}.turns (owner, segment) WHERE owner IS NOT NULL;

-- What the replies of open turns grew by: one row for each call of an owner, with the growth of all its turns.
CREATE TABLE {s}.segments (
    owner bigint NOT NULL,
    seq bigint GENERATED ALWAYS AS IDENTITY,
    turns bigint[] NOT NULL,    -- their keys; 0 in place of a turn that was not the owner's any more
    afters int[] NOT NULL,      -- the seq before the first event of each
    ends int[] NOT NULL,        -- where the part of each ends in the body
    body bytea NOT NULL,        -- postgres/segments.py
    PRIMARY KEY (owner, seq)
);
ALTER TABLE {s}.segments ALTER COLUMN body SET STORAGE EXTERNAL;     -- so that a part of it can be read

-- The events of ended turns that are too long for one row, and their texts.
CREATE TABLE {s}.event_pages (
    turn bigint NOT NULL,
    after bigint NOT NULL,      -- the seq before the first of them
    runs bytea NOT NULL,
    text bytea NOT NULL,
    PRIMARY KEY (turn, after)
);

-- What is searched: the titles of sessions and the ended turns, numbered in the order in which they became so.
CREATE TABLE {s}.documents (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session bigint NOT NULL,
    turn bigint,                -- NULL: the title
    terms text[] COLLATE "C" NOT NULL   -- and marks (postgres/documents.py)
);
CREATE UNIQUE INDEX documents_of_turns ON {s}.documents (turn) WHERE turn IS NOT NULL;
CREATE UNIQUE INDEX documents_of_titles ON {s}.documents (session) WHERE turn IS NULL;
CREATE INDEX documents_by_session ON {s}.documents (session, key);
-- New terms wait in a short list until many are merged at once: half of the time and of the log. Each search reads the
-- list, and the write that finds it full merges it, so it is short.
CREATE INDEX documents_by_term ON {s}.documents USING gin (terms) WITH (fastupdate = on, gin_pending_list_limit = 256);

CREATE TABLE {s}.idempotency_keys (
    caller text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    fingerprint bytea NOT NULL,
    session bigint,             -- the session that was made, or whose turn was; NULL once what was made is gone
    session_id text COLLATE "C" NOT NULL,
    turn text COLLATE "C",      -- the turn that was made, or the last one of several
    first_turn text COLLATE "C",        -- the first one of several
    gone_at bigint,             -- when it was found that what was made is gone
    PRIMARY KEY (caller, key)
);
CREATE INDEX idempotency_keys_by_session ON {s}.idempotency_keys (session, turn) WHERE session IS NOT NULL;
CREATE INDEX idempotency_keys_by_end ON {s}.idempotency_keys (gone_at) WHERE session IS NULL;
"""

# The processes of the version before go on beside: what they write into the columns fits, too.
VERSION_2 = """
-- The version of the oldest schema whose code works with these tables.
ALTER TABLE {s}.store ADD COLUMN oldest int NOT NULL DEFAULT 1;
ALTER TABLE {s}.segments ALTER COLUMN afters TYPE bigint[];     -- the seqs of a later attempt at a turn are large
"""

SCRIPTS = (VERSION_1, VERSION_2)
"""Each script takes the schema one version further. A released script never changes; new scripts are added."""
OLDEST = 1
"""The version of the schema whose code still works with these tables. A script that takes something away raises it."""

_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('lastcall ' || %s, 0))"
_TRY_LOCK = _LOCK.replace("pg_advisory", "pg_try_advisory")
# The tables of version 1 have no column for the oldest version.
_FIND = "SELECT version, coalesce((to_jsonb(it) ->> 'oldest')::int, 1), secret FROM {s}.store AS it"
# Not by to_regclass(): within a transaction it may not see what another one has committed meanwhile.
_MADE = (
    "SELECT true FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE nspname = %s AND relname = 'store'"
)
_HAS_SCHEMA = "SELECT true FROM pg_namespace WHERE nspname = %s"


class Prepared(NamedTuple):
    """The tables as they are now.

    Attributes:
        secret: The secret of the processes that share the store.
        version: The version of the tables.
        before: Their version before; 0 if there were none.
    """

    secret: bytes
    version: int
    before: int


class _Found(NamedTuple):
    version: int
    oldest: int
    secret: bytes


class _BusyError(Exception):
    """Another process has what the change needs."""


_NONE = _Found(0, 0, b"")


def prepare(
    connection: "psycopg.Connection[tuple[object, ...]]", schema: str, *, place: str, wait_max_s: float = WAIT_MAX_S
) -> Prepared:
    """Bring the tables to this version. Of several processes at once one does it, and the others wait.

    Raises:
        StartupError: The server or the tables are of a version that this service does not know, or the wait was over.
    """
    if connection.info.server_version < SERVER_VERSION_MIN:
        raise StartupError(
            f"{place} is PostgreSQL {_shown(connection.info.server_version)}; Lastcall needs PostgreSQL "
            f"{_shown(SERVER_VERSION_MIN)} or a later one."
        )
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StartupError(f"The encoding of {place} is {encoding}; make a database with the encoding UTF8.")
    deadline = time.monotonic() + wait_max_s
    waits = False
    while True:
        found = _found(connection, schema)
        _check_is_known(found, schema, place)
        if found.version >= len(SCRIPTS):
            return Prepared(found.secret, found.version, found.version)
        try:
            with connection.transaction():
                return _bring_up(connection, schema, found.version, deadline=deadline if waits else None)
        except _BusyError:
            pass
        except psycopg.errors.LockNotAvailable:
            time.sleep(min(_PAUSE_S, max(deadline - time.monotonic(), 0)))  # those that wait behind go on meanwhile
        if time.monotonic() >= deadline:
            raise StartupError(
                f"The schema {schema} of {place} could not be brought up within {wait_max_s:g} s: another process "
                "changes its tables, or holds one of them. See pg_stat_activity, and try again."
            )
        if not waits:
            logger.info("the tables are to be brought up: waiting for the processes that use them", store=place)
        waits = True


def _bring_up(
    connection: "psycopg.Connection[tuple[object, ...]]", schema: str, before: int, *, deadline: float | None
) -> Prepared:
    """Change the tables, in a transaction.

    Args:
        deadline: Until when this waits for another process that changes them; with None not at all.

    Raises:
        _BusyError
        psycopg.errors.LockNotAvailable
    """
    connection.execute(b"SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0")
    if deadline is None:
        if connection.execute(_TRY_LOCK.encode(), (schema,)).fetchone() != (True,):
            raise _BusyError
    else:
        _bound_locks(connection, max(deadline - time.monotonic(), 0.001))
        connection.execute(_LOCK.encode(), (schema,))
    if (found := _found(connection, schema)).version != before:
        raise _BusyError  # another process has done it meanwhile, and what it did is not checked yet
    _bound_locks(connection, TABLE_LOCK_S)
    if connection.execute(_HAS_SCHEMA, (schema,)).fetchone() is None:
        connection.execute(f"CREATE SCHEMA {quoted(schema)}".encode())
    for script in SCRIPTS[before:]:
        connection.execute(script.replace("{s}", quoted(schema)).encode())
    secret = found.secret
    if not before:
        secret = token_bytes(SECRET_BYTES)
        insert = f"INSERT INTO {quoted(schema)}.store (version, secret) VALUES (%s, %s)".encode()
        connection.execute(insert, (len(SCRIPTS), secret))
    else:
        logger.info("the tables are brought up", schema=schema, version=len(SCRIPTS), before=before)
    values = (len(SCRIPTS), OLDEST)
    connection.execute(f"UPDATE {quoted(schema)}.store SET version = %s, oldest = %s".encode(), values)
    return Prepared(secret, len(SCRIPTS), before)


def _bound_locks(connection: "psycopg.Connection[tuple[object, ...]]", seconds: float) -> None:
    connection.execute(f"SET LOCAL lock_timeout = '{max(int(seconds * 1000), 1)}ms'".encode())


def _check_is_known(found: _Found, schema: str, place: str) -> None:
    """Raises: StartupError: This code is too old for the tables."""
    if found.version > len(SCRIPTS) and found.oldest > len(SCRIPTS):
        raise StartupError(
            f"The schema {schema} of {place} was made by a later version of Lastcall: it has version {found.version}, "
            f"which works with code that knows version {found.oldest} or a later one, and this code knows "
            f"{len(SCRIPTS)}. Run a later version."
        )


def _found(connection: "psycopg.Connection[tuple[object, ...]]", schema: str) -> _Found:
    if connection.execute(_MADE, (schema,)).fetchone() is None:
        return _NONE
    row = connection.execute(_FIND.replace("{s}", quoted(schema)).encode()).fetchone()
    assert row is not None, "the table has one row"
    version, oldest, secret = row
    assert isinstance(version, int)
    assert isinstance(oldest, int)
    assert isinstance(secret, bytes)
    return _Found(version, oldest, secret)


def has_tables(connection: "psycopg.Connection[tuple[object, ...]]", schema: str) -> bool:
    """Whether there is a store in a schema."""
    return _found(connection, schema).version > 0


def is_up(connection: "psycopg.Connection[tuple[object, ...]]", schema: str) -> bool:
    """Whether the tables of a store have this version, or a later one."""
    return _found(connection, schema).version >= len(SCRIPTS)


def quoted(schema: str) -> str:
    """The name of a schema as it stands in a statement. Settings allow no quotes in it."""
    assert '"' not in schema
    return f'"{schema}"'


def _shown(version: int) -> str:
    return str(version // 10000)
