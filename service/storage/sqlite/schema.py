"""The tables, as the scripts that made them: the schema of version n is scripts 1 to n on an empty file.

Moments are microseconds since 1970 in UTC. Items, metadata, usage, errors and what was left out are JSON.

A removal first only cuts a session off: the session loses its id, so that no query finds its rows. The rows are
reclaimed in small steps afterwards. For this reason turns refer to a number and not to the session's id.
"""

VERSION_1 = """
CREATE TABLE owners (
    fence INTEGER PRIMARY KEY AUTOINCREMENT,
    address TEXT,
    opened_at INTEGER NOT NULL
) STRICT;

CREATE TABLE sessions (
    key INTEGER PRIMARY KEY,
    id TEXT UNIQUE,
    deletion INTEGER NOT NULL DEFAULT 0 CHECK (deletion IN (0, 1, 2)), -- 0 none, 1 marked, 2 removed
    deleter INTEGER,            -- the owner that marked it
    created_at INTEGER NOT NULL,
    last_accessed_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    idle_timeout_s REAL NOT NULL,
    head TEXT,
    message_count INTEGER NOT NULL DEFAULT 0,
    open_turns INTEGER NOT NULL DEFAULT 0 CHECK (open_turns >= 0),
    owner INTEGER,              -- of its open turns
    turns_begun INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    CHECK ((id IS NULL) = (deletion = 2)),
    CHECK ((owner IS NULL) = (open_turns = 0))
) STRICT;
CREATE INDEX sessions_by_age ON sessions (created_at, id) WHERE deletion = 0;
CREATE INDEX running_sessions_by_age ON sessions (created_at, id) WHERE deletion = 0 AND open_turns > 0;
CREATE INDEX idle_sessions_by_deadline ON sessions (expires_at, id) WHERE deletion = 0 AND open_turns = 0;
CREATE INDEX marked_sessions ON sessions (deleter) WHERE deletion = 1;
CREATE INDEX removed_sessions ON sessions (key) WHERE deletion = 2;

-- Apart from the counters, which every turn rewrites.
CREATE TABLE session_settings (
    session INTEGER PRIMARY KEY REFERENCES sessions (key),
    title TEXT,
    model TEXT,
    system_message TEXT,
    metadata TEXT NOT NULL
) STRICT;

CREATE TABLE turns (
    key INTEGER PRIMARY KEY,
    session INTEGER NOT NULL REFERENCES sessions (key),
    ordinal INTEGER NOT NULL,   -- from 0, in the order of acceptance
    id TEXT NOT NULL,
    parent TEXT,
    owner INTEGER,              -- while it is open
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled', 'interrupted')),
    model TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    ended_at INTEGER,
    temperature REAL,
    max_output_tokens INTEGER,
    background INTEGER NOT NULL,
    reason TEXT,
    error TEXT,
    finish_reason TEXT,
    usage TEXT,
    last_seq INTEGER NOT NULL,
    message_bytes INTEGER NOT NULL,
    input TEXT NOT NULL,
    output TEXT NOT NULL,
    CHECK ((owner IS NOT NULL) = (state IN ('queued', 'running')))
) STRICT;
CREATE UNIQUE INDEX turns_by_id ON turns (id, session);
CREATE UNIQUE INDEX turns_by_ordinal ON turns (session, ordinal);
CREATE INDEX open_turns ON turns (owner) WHERE owner IS NOT NULL;

-- Encoded events, many to a row: a list of byte strings in MessagePack.
CREATE TABLE events (
    key INTEGER PRIMARY KEY,
    turn INTEGER NOT NULL REFERENCES turns (key),
    after INTEGER NOT NULL,     -- the seq before the first of them
    frames BLOB NOT NULL
) STRICT;
CREATE INDEX events_by_turn ON events (turn, after);

-- What the reply of an open turn grew by, checkpoint by checkpoint; gone with its end.
CREATE TABLE outputs (
    key INTEGER PRIMARY KEY,
    turn INTEGER NOT NULL REFERENCES turns (key),
    after INTEGER NOT NULL,
    items TEXT NOT NULL
) STRICT;
CREATE INDEX outputs_by_turn ON outputs (turn, after);
"""

VERSION_2 = """
ALTER TABLE turns ADD COLUMN message_items INTEGER;     -- beside message_bytes; NULL in turns of version 1
ALTER TABLE turns ADD COLUMN left_out TEXT;
"""

VERSION_3 = """
-- Packed runs (storage/pieces.py): all events of an ended turn, whose texts are in the output; empty if they are in
-- event_pages; NULL in open turns, and in turns of versions 1 and 2, whose encoded events are in the table events.
ALTER TABLE turns ADD COLUMN runs BLOB;
ALTER TABLE turns ADD COLUMN output_bytes INTEGER;  -- of the texts that are in event_pages, if they are there
ALTER TABLE turns ADD COLUMN text_length INTEGER;   -- the code points of the messages, if their texts are there
ALTER TABLE turns ADD COLUMN options TEXT;          -- {"tools": …}: what else the caller asked of the model

-- Events and their texts: of an open turn, checkpoint by checkpoint; and of an ended turn that is too long for one row.
CREATE TABLE event_pages (
    key INTEGER PRIMARY KEY,
    turn INTEGER NOT NULL REFERENCES turns (key),
    after INTEGER NOT NULL,     -- the seq before the first of them
    runs BLOB NOT NULL,
    text BLOB NOT NULL          -- of the pieces, in the order of arrival
) STRICT;
CREATE INDEX event_pages_by_turn ON event_pages (turn, after);
"""

VERSION_4 = """
-- The places of turns among the turns with the same parent, where there are at least two; the parent of roots is ''.
CREATE TABLE siblings (
    session INTEGER NOT NULL REFERENCES sessions (key),
    parent TEXT NOT NULL,
    ordinal INTEGER NOT NULL,   -- of the turn
    place INTEGER NOT NULL,     -- from 1
    PRIMARY KEY (session, parent, ordinal)
) STRICT, WITHOUT ROWID;
CREATE INDEX turns_by_parent ON turns (session, coalesce(parent, ''), ordinal);
INSERT INTO siblings (session, parent, ordinal, place)
    SELECT turns.session, coalesce(turns.parent, ''), ordinal,
        row_number() OVER (PARTITION BY turns.session, coalesce(turns.parent, '') ORDER BY ordinal)
    FROM (
        SELECT session, coalesce(parent, '') AS parent FROM turns
        GROUP BY session, coalesce(parent, '') HAVING count(*) > 1
    ) AS shared CROSS JOIN turns ON turns.session = shared.session AND coalesce(turns.parent, '') = shared.parent;

-- What few turns have. For a new column of a STRICT table SQLite would read all turns, with their texts.
CREATE TABLE turn_marks (
    turn INTEGER PRIMARY KEY REFERENCES turns (key),
    events_deleted INTEGER NOT NULL DEFAULT 0,  -- 1: a text was deleted, its events with it
    ephemeral INTEGER NOT NULL DEFAULT 0        -- 1: the end of the turn removes it
) STRICT;

-- Changes with too many parts for one step (sqlite/tree_changes.py). First the parts are noted, step by step; the step
-- that sets the state changes all of them at once for all readers; then, step by step, rows are changed and reclaimed.
CREATE TABLE tree_changes (
    key INTEGER PRIMARY KEY,    -- a random number
    state INTEGER NOT NULL CHECK (state IN (0, 1, 2, 3)),   -- 0 parts are being noted, 1 deleted, 2 over, 3 being added
    owner INTEGER NOT NULL      -- the one that notes the parts
) STRICT;
CREATE INDEX unfinished_tree_changes ON tree_changes (owner) WHERE state IN (0, 3);
CREATE INDEX ended_tree_changes ON tree_changes (state) WHERE state IN (1, 2);
CREATE TABLE changed_parts (
    change INTEGER NOT NULL REFERENCES tree_changes (key),
    turn INTEGER NOT NULL REFERENCES turns (key),
    items TEXT,                 -- the ids of items of the input, a JSON list without its brackets; NULL: the whole turn
    PRIMARY KEY (change, turn)
) STRICT, WITHOUT ROWID;
CREATE INDEX changed_parts_by_turn ON changed_parts (turn);
CREATE VIEW edited_turns AS SELECT *, (
    SELECT '[' || group_concat(items) || ']' FROM changed_parts CROSS JOIN tree_changes ON tree_changes.key = change
    WHERE changed_parts.turn = turns.key AND tree_changes.state = 1
) AS deleted_items,
    coalesce((SELECT events_deleted FROM turn_marks WHERE turn = turns.key), 0) AS events_deleted,
    coalesce((SELECT ephemeral FROM turn_marks WHERE turn = turns.key), 0) AS ephemeral
FROM turns;
-- What readers find by an id, a place or a parent. All that is above such a turn is shown, too.
CREATE VIEW shown_turns AS SELECT * FROM edited_turns WHERE NOT EXISTS (
    SELECT 1 FROM changed_parts CROSS JOIN tree_changes ON tree_changes.key = change
    WHERE changed_parts.turn = edited_turns.key AND tree_changes.state IN (1, 3) AND items IS NULL
);
ALTER TABLE sessions ADD COLUMN edits INTEGER NOT NULL DEFAULT 0;   -- deletions of turns and items so far

ALTER TABLE sessions ADD COLUMN owner_name TEXT NOT NULL DEFAULT '';    -- of the keys that may use the session
ALTER TABLE sessions ADD COLUMN reasoning_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sessions ADD COLUMN cached_tokens INTEGER NOT NULL DEFAULT 0;
UPDATE sessions SET reasoning_tokens = counted.tokens FROM (
    SELECT session, sum(usage ->> '$.reasoning_tokens') AS tokens FROM turns
    WHERE usage IS NOT NULL AND state NOT IN ('queued', 'running') GROUP BY session
) AS counted WHERE key = counted.session AND counted.tokens > 0;
-- 1: made for an ephemeral turn, whose end removes the session. No listing has such a session.
ALTER TABLE sessions ADD COLUMN ephemeral INTEGER NOT NULL DEFAULT 0;
CREATE INDEX sessions_by_owner ON sessions (owner_name, created_at, id)
    WHERE deletion = 0 AND ephemeral = 0 AND owner_name <> '';
-- In place of one index of all sessions: what is listed or counted without an owner walks past no others.
DROP INDEX sessions_by_age;
CREATE INDEX plain_sessions_by_age ON sessions (created_at, id)
    WHERE deletion = 0 AND ephemeral = 0 AND owner_name = '';
CREATE INDEX owned_sessions_by_age ON sessions (created_at, id)
    WHERE deletion = 0 AND ephemeral = 0 AND owner_name <> '';
DROP INDEX running_sessions_by_age;
CREATE INDEX running_sessions_by_age ON sessions (created_at, id)
    WHERE deletion = 0 AND ephemeral = 0 AND open_turns > 0;
DROP INDEX idle_sessions_by_deadline;   -- an ephemeral session is never idle
CREATE INDEX plain_idle_sessions_by_deadline ON sessions (expires_at, id)
    WHERE deletion = 0 AND open_turns = 0 AND owner_name = '';
CREATE INDEX owned_idle_sessions_by_deadline ON sessions (expires_at, id)
    WHERE deletion = 0 AND open_turns = 0 AND owner_name <> '';

ALTER TABLE session_settings ADD COLUMN options TEXT;   -- {"temperature": …}: of turns that name none
ALTER TABLE session_settings ADD COLUMN titled_at INTEGER;  -- when a model wrote the title

CREATE TABLE session_metadata (
    pair BLOB NOT NULL,             -- a digest (sqlite/metadata.py)
    created_at INTEGER NOT NULL,    -- of the session
    id TEXT NOT NULL,               -- of the session, also after its removal
    session INTEGER NOT NULL REFERENCES sessions (key),
    PRIMARY KEY (pair, created_at, id, session)
) STRICT, WITHOUT ROWID;
CREATE INDEX metadata_by_session ON session_metadata (session);

-- What is searched: the titles of sessions and the ended turns, numbered in the order in which they became so. The
-- numbers are the rows of the index, whose columns are terms (storage/terms.py) and marks (sqlite/documents.py).
CREATE TABLE documents (
    key INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given again: search pages go on from it
    session INTEGER NOT NULL,
    turn INTEGER REFERENCES turns (key)     -- NULL: the title
) STRICT;
CREATE UNIQUE INDEX documents_of_turns ON documents (turn) WHERE turn IS NOT NULL;
CREATE UNIQUE INDEX documents_of_titles ON documents (session) WHERE turn IS NULL;
CREATE VIRTUAL TABLE search USING fts5 (terms, content='', contentless_delete=1, detail=none, tokenize='ascii');
INSERT INTO search (search, rank) VALUES ('automerge', 0);      -- the writer merges between the commits
INSERT INTO search (search, rank) VALUES ('crisismerge', 256);

-- What is not in the indexes yet; no row once all is. For the sessions and turns of earlier versions it has the key of
-- the row that is next, from the newest one to the oldest; besides, each document that waits for its terms.
CREATE TABLE unindexed (
    kind TEXT NOT NULL CHECK (kind IN ('sessions', 'turns', 'document')),
    key INTEGER NOT NULL,
    PRIMARY KEY (kind, key)
) STRICT, WITHOUT ROWID;
INSERT INTO unindexed (kind, key) SELECT 'sessions', max(key) FROM sessions HAVING max(key) IS NOT NULL;
INSERT INTO unindexed (kind, key) SELECT 'turns', max(key) FROM turns HAVING max(key) IS NOT NULL;

CREATE TABLE idempotency_keys (
    caller TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    session INTEGER,            -- the session that was made, or whose turn was; NULL once what was made is gone
    session_id TEXT NOT NULL,
    turn TEXT,                  -- the turn that was made, or the last one of several
    first_turn TEXT,            -- the first one of several
    gone_at INTEGER,            -- when it was found that what was made is gone
    PRIMARY KEY (caller, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_keys_by_session ON idempotency_keys (session, turn) WHERE session IS NOT NULL;
CREATE INDEX idempotency_keys_by_end ON idempotency_keys (gone_at) WHERE session IS NULL;
"""

SCRIPTS = (VERSION_1, VERSION_2, VERSION_3, VERSION_4)
"""Each script takes the schema one version further. A released script never changes; new scripts are added."""

APPLICATION_ID = 0x4C415354
"""Marks a file as ours: "LAST"."""
