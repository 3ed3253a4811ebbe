PRAGMA page_size=4096;
PRAGMA writable_schema=ON;
BEGIN TRANSACTION;
DROP TABLE IF EXISTS changed_parts;
CREATE TABLE changed_parts (
    change INTEGER NOT NULL REFERENCES tree_changes (key),
    turn INTEGER NOT NULL REFERENCES turns (key),
    items TEXT,                 -- the ids of items of the input, a JSON list without its brackets; NULL: the whole turn
    PRIMARY KEY (change, turn)
) STRICT, WITHOUT ROWID;
CREATE INDEX changed_parts_by_turn ON changed_parts (turn);
DROP TABLE IF EXISTS documents;
CREATE TABLE documents (
    key INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given again: search pages go on from it
    session INTEGER NOT NULL,
    turn INTEGER REFERENCES turns (key)     -- NULL: the title
) STRICT;
INSERT INTO documents VALUES(1,1,NULL);
INSERT INTO documents VALUES(2,1,1);
CREATE UNIQUE INDEX documents_of_titles ON documents (session) WHERE turn IS NULL;
CREATE UNIQUE INDEX documents_of_turns ON documents (turn) WHERE turn IS NOT NULL;
DROP TABLE IF EXISTS event_pages;
CREATE TABLE event_pages (
    key INTEGER PRIMARY KEY,
    turn INTEGER NOT NULL REFERENCES turns (key),
    after INTEGER NOT NULL,     -- the seq before the first of them
    runs BLOB NOT NULL,
    text BLOB NOT NULL          -- of the pieces, in the order of arrival
) STRICT;
INSERT INTO event_pages VALUES(1,2,0,X'919200C40103',X'48656C');
CREATE INDEX event_pages_by_turn ON event_pages (turn, after);
DROP TABLE IF EXISTS events;
CREATE TABLE events (
    key INTEGER PRIMARY KEY,
    turn INTEGER NOT NULL REFERENCES turns (key),
    after INTEGER NOT NULL,     -- the seq before the first of them
    frames BLOB NOT NULL
) STRICT;
CREATE INDEX events_by_turn ON events (turn, after);
DROP TABLE IF EXISTS idempotency_keys;
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
INSERT INTO idempotency_keys VALUES('','k',X'66',2,'other',NULL,NULL,NULL);
CREATE INDEX idempotency_keys_by_end ON idempotency_keys (gone_at) WHERE session IS NULL;
CREATE INDEX idempotency_keys_by_session ON idempotency_keys (session, turn) WHERE session IS NOT NULL;
DROP TABLE IF EXISTS outputs;
CREATE TABLE outputs (
    key INTEGER PRIMARY KEY,
    turn INTEGER NOT NULL REFERENCES turns (key),
    after INTEGER NOT NULL,
    items TEXT NOT NULL
) STRICT;
INSERT INTO outputs VALUES(1,2,0,'[{"id":"t2-out","type":"message","role":"assistant","text":""}]');
CREATE INDEX outputs_by_turn ON outputs (turn, after);
DROP TABLE IF EXISTS owners;
CREATE TABLE owners (
    fence INTEGER PRIMARY KEY AUTOINCREMENT,
    address TEXT,
    opened_at INTEGER NOT NULL
) STRICT;
INSERT INTO owners VALUES(1,NULL,1795943670939817);
DELETE FROM sqlite_schema WHERE name='search' AND type='table';
INSERT INTO sqlite_schema(type,name,tbl_name,rootpage,sql) VALUES('table','search','search',0,'CREATE VIRTUAL TABLE search USING fts5 (terms, content='''', contentless_delete=1, detail=none, tokenize=''ascii'')');
DROP TABLE IF EXISTS search_config;
CREATE TABLE 'search_config'(k PRIMARY KEY, v) WITHOUT ROWID;
INSERT INTO search_config VALUES('automerge',0);
INSERT INTO search_config VALUES('crisismerge',256);
INSERT INTO search_config VALUES('version',4);
DROP TABLE IF EXISTS search_data;
CREATE TABLE 'search_data'(id INTEGER PRIMARY KEY, block BLOB);
INSERT INTO search_data VALUES(1,X'0209');
INSERT INTO search_data VALUES(10,X'00000002FF000001010200000201010101010000010201010202000001');
INSERT INTO search_data VALUES(137438953473,X'000000190330C3A9010104EE8080310103018101030282300104050704');
INSERT INTO search_data VALUES(274877906945,X'00000020063068656C6C6F02020169020104EE808031020301810203028230020408040704');
DROP TABLE IF EXISTS search_docsize;
CREATE TABLE 'search_docsize'(id INTEGER PRIMARY KEY, sz BLOB, origin INTEGER);
INSERT INTO search_docsize VALUES(1,X'04',1);
INSERT INTO search_docsize VALUES(2,X'05',2);
DROP TABLE IF EXISTS search_idx;
CREATE TABLE 'search_idx'(segid, term, pgno, PRIMARY KEY(segid, term)) WITHOUT ROWID;
INSERT INTO search_idx VALUES(1,X'',2);
INSERT INTO search_idx VALUES(2,X'',2);
DROP TABLE IF EXISTS session_metadata;
CREATE TABLE session_metadata (
    pair BLOB NOT NULL,             -- a digest (sqlite/metadata.py)
    created_at INTEGER NOT NULL,    -- of the session
    id TEXT NOT NULL,               -- of the session, also after its removal
    session INTEGER NOT NULL REFERENCES sessions (key),
    PRIMARY KEY (pair, created_at, id, session)
) STRICT, WITHOUT ROWID;
INSERT INTO session_metadata VALUES(X'F3311567412CB8CC3F619E4199AAFDAC',1772366400123456,'s',1);
CREATE INDEX metadata_by_session ON session_metadata (session);
DROP TABLE IF EXISTS session_settings;
CREATE TABLE session_settings (
    session INTEGER PRIMARY KEY REFERENCES sessions (key),
    title TEXT,
    model TEXT,
    system_message TEXT,
    metadata TEXT NOT NULL
, options TEXT, titled_at INTEGER) STRICT;
INSERT INTO session_settings VALUES(1,'é',NULL,NULL,'{"a":"b"}',NULL,NULL);
INSERT INTO session_settings VALUES(2,NULL,NULL,NULL,'{}',NULL,NULL);
INSERT INTO session_settings VALUES(3,NULL,NULL,NULL,'{}',NULL,NULL);
DROP TABLE IF EXISTS sessions;
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
    output_tokens INTEGER NOT NULL DEFAULT 0, edits INTEGER NOT NULL DEFAULT 0, owner_name TEXT NOT NULL DEFAULT '', reasoning_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0, ephemeral INTEGER NOT NULL DEFAULT 0,
    CHECK ((id IS NULL) = (deletion = 2)),
    CHECK ((owner IS NULL) = (open_turns = 0))
) STRICT;
INSERT INTO sessions VALUES(1,'s',0,NULL,1772366400123456,1772366400123456,1772366460123456,60.0,'t2',3,1,1,2,0,0,0,'',0,0,0);
INSERT INTO sessions VALUES(2,'other',0,NULL,1772366400123456,1772366400123456,1772366460123456,60.0,NULL,0,0,NULL,0,0,0,0,'',0,0,0);
INSERT INTO sessions VALUES(3,'marked',1,1,1772366400123456,1772366400123456,1772366460123456,60.0,NULL,0,0,NULL,0,0,0,0,'',0,0,0);
CREATE INDEX marked_sessions ON sessions (deleter) WHERE deletion = 1;
CREATE INDEX owned_idle_sessions_by_deadline ON sessions (expires_at, id)
    WHERE deletion = 0 AND open_turns = 0 AND owner_name <> '';
CREATE INDEX owned_sessions_by_age ON sessions (created_at, id)
    WHERE deletion = 0 AND ephemeral = 0 AND owner_name <> '';
CREATE INDEX plain_idle_sessions_by_deadline ON sessions (expires_at, id)
    WHERE deletion = 0 AND open_turns = 0 AND owner_name = '';
CREATE INDEX plain_sessions_by_age ON sessions (created_at, id)
    WHERE deletion = 0 AND ephemeral = 0 AND owner_name = '';
CREATE INDEX removed_sessions ON sessions (key) WHERE deletion = 2;
CREATE INDEX running_sessions_by_age ON sessions (created_at, id)
    WHERE deletion = 0 AND ephemeral = 0 AND open_turns > 0;
CREATE INDEX sessions_by_owner ON sessions (owner_name, created_at, id)
    WHERE deletion = 0 AND ephemeral = 0 AND owner_name <> '';
DROP TABLE IF EXISTS siblings;
CREATE TABLE siblings (
    session INTEGER NOT NULL REFERENCES sessions (key),
    parent TEXT NOT NULL,
    ordinal INTEGER NOT NULL,   -- of the turn
    place INTEGER NOT NULL,     -- from 1
    PRIMARY KEY (session, parent, ordinal)
) STRICT, WITHOUT ROWID;
DROP TABLE IF EXISTS tree_changes;
CREATE TABLE tree_changes (
    key INTEGER PRIMARY KEY,    -- a random number
    state INTEGER NOT NULL CHECK (state IN (0, 1, 2, 3)),   -- 0 parts are being noted, 1 deleted, 2 over, 3 being added
    owner INTEGER NOT NULL      -- the one that notes the parts
) STRICT;
CREATE INDEX ended_tree_changes ON tree_changes (state) WHERE state IN (1, 2);
CREATE INDEX unfinished_tree_changes ON tree_changes (owner) WHERE state IN (0, 3);
DROP TABLE IF EXISTS turn_marks;
CREATE TABLE turn_marks (
    turn INTEGER PRIMARY KEY REFERENCES turns (key),
    events_deleted INTEGER NOT NULL DEFAULT 0,  -- 1: a text was deleted, its events with it
    ephemeral INTEGER NOT NULL DEFAULT 0        -- 1: the end of the turn removes it
) STRICT;
DROP TABLE IF EXISTS turns;
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
    output TEXT NOT NULL, message_items INTEGER, left_out TEXT, runs BLOB, output_bytes INTEGER, text_length INTEGER, options TEXT,
    CHECK ((owner IS NOT NULL) = (state IN ('queued', 'running')))
) STRICT;
INSERT INTO turns VALUES(1,1,0,'t',NULL,NULL,'completed','a-model',1772366400123456,1772366400123456,1772366400123456,NULL,NULL,0,NULL,NULL,'stop',NULL,3,7,'[{"id":"t-in-0","type":"message","role":"user","text":"Hello"}]','[{"id":"t-out","type":"message","role":"assistant","text":"Hi"}]',2,'{"items":1,"bytes":2}',X'9292FEC4009200C40102',NULL,NULL,NULL);
INSERT INTO turns VALUES(2,1,1,'t2','t',1,'running','a-model',1772366400123456,1772366400123456,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,0,5,'[{"id":"t2-in-0","type":"message","role":"user","text":"Hello"}]','[]',1,NULL,NULL,NULL,NULL,NULL);
CREATE INDEX open_turns ON turns (owner) WHERE owner IS NOT NULL;
CREATE UNIQUE INDEX turns_by_id ON turns (id, session);
CREATE UNIQUE INDEX turns_by_ordinal ON turns (session, ordinal);
CREATE INDEX turns_by_parent ON turns (session, coalesce(parent, ''), ordinal);
DROP TABLE IF EXISTS unindexed;
CREATE TABLE unindexed (
    kind TEXT NOT NULL CHECK (kind IN ('sessions', 'turns', 'document')),
    key INTEGER NOT NULL,
    PRIMARY KEY (kind, key)
) STRICT, WITHOUT ROWID;
DROP VIEW IF EXISTS edited_turns;
CREATE VIEW edited_turns AS SELECT *, (
    SELECT '[' || group_concat(items) || ']' FROM changed_parts CROSS JOIN tree_changes ON tree_changes.key = change
    WHERE changed_parts.turn = turns.key AND tree_changes.state = 1
) AS deleted_items,
    coalesce((SELECT events_deleted FROM turn_marks WHERE turn = turns.key), 0) AS events_deleted,
    coalesce((SELECT ephemeral FROM turn_marks WHERE turn = turns.key), 0) AS ephemeral
FROM turns;
DROP VIEW IF EXISTS shown_turns;
CREATE VIEW shown_turns AS SELECT * FROM edited_turns WHERE NOT EXISTS (
    SELECT 1 FROM changed_parts CROSS JOIN tree_changes ON tree_changes.key = change
    WHERE changed_parts.turn = edited_turns.key AND tree_changes.state IN (1, 3) AND items IS NULL
);
DELETE FROM main.sqlite_sequence WHERE name='documents';
INSERT INTO main.sqlite_sequence VALUES ('documents', 2);
DELETE FROM main.sqlite_sequence WHERE name='owners';
INSERT INTO main.sqlite_sequence VALUES ('owners', 1);
pragma user_version=4;
pragma application_id=1279349588;
COMMIT TRANSACTION;
PRAGMA writable_schema=OFF;
BEGIN;
CREATE TABLE no_such_table(x,y,z);
ROLLBACK;
