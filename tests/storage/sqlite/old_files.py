"""Writes a file as the last version of schema 2 did: its events are encoded frames.

A file with 10 000 turns was written by that version itself, and read with these checks, when schema 3 came.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from service.storage.sqlite.schema import APPLICATION_ID, SCRIPTS

VERSION = 2
SESSIONS = 2
TURNS = 15
ENDS = ("completed", "failed", "cancelled", "interrupted", "queued first", "long", "crashed", "empty")
RUNNING = "running"
MOMENT = 1_900_000_000_000_000
TEXT = 'Héllo \u2028\x85\U0001f642 "quoted" {number}\n'


def frame(seq: int, kind: str, **fields: object) -> bytes:
    event = {"type": kind, "seq": seq} | fields
    return b"id: %d\ndata: %b\n\n" % (seq, json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode())


class OldTurn(msgspec.Struct):
    """A turn in the old file, and the frames that its replay sends, apart from escaped line ends."""

    id: str
    session: str
    kind: str
    frames: list[bytes]
    output: list[dict[str, str]]
    last_seq: int
    columns: dict[str, object] = {}


def a_turn(session: str, number: int) -> OldTurn:
    kind = RUNNING if number == TURNS - 1 else ENDS[number % len(ENDS)]
    turn = OldTurn(f"turn_{int(session[5:], 16):016x}{number:016x}", session, kind, [], [], 0)
    told = turn.frames

    def tell(event: str, **fields: object) -> None:
        told.append(frame(len(told) + 1, event, **fields))

    ids = {"session_id": session, "turn_id": turn.id}
    if kind == "queued first":
        tell("turn.queued", **ids)
    tell("turn.started", **ids, model="a-model")
    texts = [] if kind == "empty" else [TEXT.format(number=n) for n in range(4000 if kind == "long" else 10)]
    tell("turn.reasoning", text="hm")
    for text in texts:
        tell("turn.delta", text=text)
    reply = "".join(texts)
    turn.output = [{"id": f"msg_a{turn.id[6:]}", "type": "reasoning", "text": "hm"}]
    turn.output += [{"id": f"msg_b{turn.id[6:]}", "type": "message", "text": reply}] if reply else []
    turn.columns = {"state": "completed", "finish_reason": "stop", "usage": '{"input_tokens":1,"output_tokens":2}'}
    match kind:
        case "running":
            turn.columns = {"state": "running", "owner": 1}
        case "crashed":
            turn.columns = {"state": "interrupted", "reason": "crash"}
            turn.last_seq = 1 << 30
        case "failed":
            error = {"code": "upstream_error", "message": "It broke."}
            turn.columns = {"state": "failed", "error": json.dumps(error)}
            tell("turn.failed", error=error, text_length=len(reply))
        case "cancelled":
            turn.columns = {"state": "cancelled", "reason": "requested"}
            tell("turn.cancelled", reason="requested", text_length=len(reply))
        case "interrupted":
            turn.columns = {"state": "interrupted", "reason": "shutdown"}
            tell("turn.interrupted", reason="shutdown", text_length=len(reply))
        case _:
            usage = {"input_tokens": 1, "output_tokens": 2, "reasoning_tokens": 0}
            tell("turn.completed", finish_reason="stop", usage=usage, text_length=len(reply))
    turn.last_seq = turn.last_seq or (0 if kind == "running" else len(told))
    return turn


def rows_of(frames: Sequence[bytes], *, per_row: int = 3000) -> Iterator[tuple[int, bytes]]:
    for after in range(0, len(frames), per_row):
        yield after, msgspec.msgpack.encode(frames[after : after + per_row])


@contextmanager
def old_file(path: Path, version: int) -> Iterator[sqlite3.Connection]:
    """A new file of an old version of the schema, of an owner that is gone: number 1."""
    with closing(sqlite3.connect(path)) as db:
        for script in SCRIPTS[:version]:
            db.executescript(script)
        db.execute(f"PRAGMA user_version = {version}")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("INSERT INTO owners (fence, address, opened_at) VALUES (1, NULL, 0)")
        yield db


def write(path: Path) -> list[OldTurn]:
    """Write the file. The last turn of each session runs, in a process that is gone."""
    turns: list[OldTurn] = []
    with old_file(path, VERSION) as db:
        for key in range(1, SESSIONS + 1):
            session = f"sess_{key:032x}"
            own = [a_turn(session, number) for number in range(TURNS)]
            db.execute(
                "INSERT INTO sessions (key, id, created_at, last_accessed_at, expires_at, idle_timeout_s, head, "
                "message_count, open_turns, owner, turns_begun, input_tokens, output_tokens) "
                "VALUES (?, ?, ?, ?, ?, 1e9, ?, ?, 1, 1, ?, 0, 0)",
                (key, session, MOMENT, MOMENT, MOMENT + 10**15, own[-1].id, TURNS, TURNS),
            )
            db.execute("INSERT INTO session_settings (session, metadata) VALUES (?, '{}')", (key,))
            for ordinal, turn in enumerate(own):
                _insert(db, key, ordinal, turn, parent=own[ordinal - 1].id if ordinal else None)
            turns += own
        db.commit()
    return turns


def _insert(db: sqlite3.Connection, session: int, ordinal: int, turn: OldTurn, *, parent: str | None) -> None:
    items = [item | {"role": "assistant"} for item in turn.output]
    question = [{"id": f"msg_c{turn.id[6:]}", "type": "message", "role": "user", "text": "Hi"}]
    columns = {
        "session": session,
        "ordinal": ordinal,
        "id": turn.id,
        "parent": parent,
        "model": "a-model",
        "created_at": MOMENT,
        "started_at": MOMENT,
        "ended_at": None if turn.kind == RUNNING else MOMENT,
        "background": 0,
        "last_seq": turn.last_seq,
        "message_bytes": 2,
        "message_items": 1,
        "input": json.dumps(question),
        "output": json.dumps([] if turn.kind == RUNNING else items, ensure_ascii=False),
    } | turn.columns
    names = ", ".join(columns)
    marks = ", ".join("?" * len(columns))
    key = db.execute(f"INSERT INTO turns ({names}) VALUES ({marks})", tuple(columns.values())).lastrowid
    for after, frames in rows_of(turn.frames):
        db.execute("INSERT INTO events (turn, after, frames) VALUES (?, ?, ?)", (key, after, frames))
    if turn.kind == RUNNING:
        db.execute("INSERT INTO outputs (turn, after, items) VALUES (?, 0, ?)", (key, json.dumps(items)))
