"""Import takes every session that a service has exported, and refuses data that would break its readers."""

import copy
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from service.api.native.event_frames import encode_frame
from service.cli import exported_events, whole_turn
from service.cli.import_bounds import check_bounds
from service.cli.main import main
from service.cli.session_export import ExportedSession, read_exported
from service.cli.store_commands import _check_turns
from service.clock import wall_clock
from service.errors import StartupError, StoreError
from service.ids import new_item_id
from service.models.client import FunctionTool, Options, TextFormat, Tools
from service.sessions.commands import NewItems, NewSession, NewTurn, text_input
from service.sessions.events.events import Event, TurnDelta
from service.sessions.sessions import Sessions
from service.settings import Settings, Upstream
from service.stop_state import Phase
from service.storage.pieces import STARTED, Run, are_of
from service.storage.records import FACE_BYTES_MAX, SEQ_AFTER_CRASH, Checkpoint, Item, SuspendedTurn, TurnRecord
from service.storage.sqlite import open_sqlite_store
from service.storage.store import Store
from service.supervisor import open_service
from tests.storage.rows import a_session, adopt, said
from tests.storage.sqlite import file_exports
from tests.storage.test_store_suspended import a_lasting_turn, so_far

Output = pytest.CaptureFixture[str]
MODELS = {
    "echoes": "rate=0&first_token_s=0",
    "whole": "tokens=3&rate=0&first_token_s=0&reasoning=2",
    "fails": "tokens=3&rate=0&first_token_s=0&fail_after=2",
    "refuses": "rate=0&first_token_s=0&fail_after=0&fail_code=context_too_long",
    "calls": "tokens=1&rate=0&first_token_s=0&reasoning=1&encrypted=3&call=f:{%22a%22:1}&call=g",
    "hangs": "tokens=9&rate=0&first_token_s=0&silent_after=2",
}
INPUT = 'line\u2028 end \u0085 "quoted" \\u2028 \u00e9 \U0001f642'


OPTIONS = Options(
    top_p=0.5,
    text_format=TextFormat(type="json_schema", name="x", schema={"n": [1, 1.5, None, INPUT]}, strict=True),
    reasoning_effort="low",
    verbosity="low",
    presence_penalty=-1,
    frequency_penalty=1,
    stop=(INPUT,),
    seed=7,
)


async def fill(path: Path) -> None:
    """Make a session ``s`` with turns of every kind of end, and its fork ``f``."""
    upstreams = tuple(Upstream(name=name, url=f"scripted:?{script}", models=(name,)) for name, script in MODELS.items())
    settings = Settings(store_url=f"sqlite:{path}", upstreams=upstreams, model="whole")
    with trio.fail_after(30):
        async with open_service(settings) as service:
            sessions = service.sessions
            await sessions.create_session(NewSession(id="s", title="\u00e9", metadata={"k": "v"}))
            for model in ("whole", "fails", "refuses", "echoes"):
                turn, watch = await sessions.start_turn("s", NewTurn(text=INPUT, model=model, temperature=0.5))
                with watch:
                    await turn.wait_ended()
            for new in (
                NewTurn(
                    text=INPUT,
                    model="calls",
                    tools=Tools(functions=(FunctionTool(name="f", parameters={}),)),
                    options=OPTIONS,
                    face={"metadata": msgspec.Raw(msgspec.json.encode({"k": [INPUT, 1.5, None]}))},
                ),
                NewTurn(items=(an_output("call_1_0"), *text_input(INPUT), an_output("none")), model="calls"),
            ):
                turn, watch = await sessions.start_turn("s", new)
                with watch:
                    await turn.wait_ended()
            history = (*text_input(INPUT), *added_items(), *text_input("now"))
            asked, watch = await sessions.start_turn("s", NewTurn(items=history, model="echoes", parent=None))
            with watch:
                await asked.wait_ended()
            echo, watch = await sessions.start_turn("s", NewTurn(text=INPUT, parent=None))
            with watch:
                await echo.wait_ended()
            await sessions.add_items("s", NewItems(items=(*text_input(INPUT), *added_items())))
            (doomed,) = await sessions.add_items("s", NewItems(items=text_input("doomed")))
            await delete_some(sessions, doomed.id)
            running, watch = await sessions.start_turn("s", NewTurn(text="x", model="hangs", background=True))
            watch.release()
            queued, watch = await sessions.start_turn("s", NewTurn(text="x", on_conflict="queue", background=True))
            watch.release()
            while running.log.last_seq < 3:
                await running.log.wait_beyond(running.log.last_seq)
            await sessions.cancel_turn("s", queued.id)
            await sessions.cancel_turn("s", running.id)
            running, watch = await sessions.start_turn("s", NewTurn(text="x", model="hangs", background=True))
            watch.release()
            while running.log.last_seq < 3:
                await running.log.wait_beyond(running.log.last_seq)
            service.shutdown.notice("test")
            await service.shutdown.reached(Phase.RELEASING)
        await crash(path)
        async with open_service(settings) as service:
            await service.sessions.fork_session("s", at=None, copy_id="f")


async def delete_some(sessions: Sessions, turn_id: str) -> None:
    """Delete a turn, and parts of others: a long reply, a call with its output, and an input."""
    await sessions.delete_turn("s", turn_id)
    turns = (await sessions.list_turns("s", limit=100)).data
    calling = next(turn for turn in turns if turn.model == "calls")
    doomed = [next(item.id for item in calling.output if item.type == "function_call"), turns[1].input[0].id]
    doomed += [item.id for turn in turns if turn.was_added for item in turn.output if item.text == "again"]
    for item_id in doomed:
        await sessions.delete_item("s", item_id)


def added_items() -> Iterator[Item]:
    """A conversation of all kinds of items, of which some turns have no input or no output."""
    for text in (INPUT, "again", 5000 * "long"):
        yield Item(id=new_item_id("message"), role="assistant", text=text)
    call = Item(
        id=new_item_id("function_call"), type="function_call", role="assistant", text="{}", call_id="1", name="f"
    )
    yield from (call, an_output("1"), Item(id=new_item_id("message"), role="system", text=INPUT))


def an_output(call_id: str) -> Item:
    return Item(
        id=new_item_id("function_call_output"), type="function_call_output", role="user", text=INPUT, call_id=call_id
    )


async def crash(path: Path) -> None:
    """Add one more turn, whose owner dies after a checkpoint."""
    async with open_sqlite_store(path) as store:
        now = wall_clock()
        session = await store.get_session("s", now=now)
        turn = NewTurn(text="x", model="whole").record(session, queued=False, now=now, settings=Settings())
        await have_two_attempts(store, turn)
        await store.begin_turn(turn, now=now)
        runs = (Run(STARTED), *said("Hel"))
        items = (Item(id="msg_" + 32 * "e", role="assistant", text=""),)
        await store.checkpoint_turns(
            [Checkpoint(session_id="s", turn_id=turn.id, after=0, runs=runs, text="Hel", items=items)]
        )


async def have_two_attempts(store: Store, like: TurnRecord) -> None:
    """Add a turn beside another one, which a second process goes on with after a crash of the first."""
    now, item = like.created_at, Item(id="msg_" + 32 * "d", role="assistant", text="Hel")
    changes = {"id": "turn_" + 32 * "d", "on_interrupt": "continue", "input": text_input("y")}
    turn = msgspec.structs.replace(like, **changes)
    await store.begin_turn(turn, now=now)
    runs = (Run(STARTED), *said("H", "el"))
    crashed = msgspec.structs.replace(turn, output=(item,), last_seq=2 * SEQ_AFTER_CRASH)
    await store.suspend_turns([SuspendedTurn(turn=crashed, runs=runs)], now=now)
    (adopted,) = await adopt(store, "s", now=now)
    end = msgspec.structs.replace(
        adopted.turn,
        state="completed",
        finish_reason="stop",
        ended_at=now,
        output=(msgspec.structs.replace(item, text="Hello"),),
        last_seq=adopted.turn.last_seq + 2,
    )
    await store.end_turn(end, runs=(*adopted.runs, *said("lo")), now=now)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("filled") / "kept.db"
    trio.run(fill, path)
    return {session: file_exports.export_session(path, session) for session in ("s", "f")}


def check(exported: bytes) -> ExportedSession:
    """Check an export as the command does before it writes. Raises: StartupError."""
    whole = read_exported(exported)
    check_bounds(whole, Settings())
    _check_turns(whole)
    return whole


@pytest.mark.parametrize("session", ["s", "f"])
def test_an_exported_session_is_imported_into_an_empty_folder_unchanged(
    exports: dict[str, bytes], session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    ends = {(it["turn"]["state"], it["turn"]["reason"]) for it in json.loads(exports[session])["turns"]}
    assert ("interrupted", "crash") in ends
    if session == "s":
        assert {state for state, _ in ends} == {"completed", "failed", "cancelled", "interrupted"}
        assert ("interrupted", "shutdown") in ends
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:new.db")
    Path("exported.json").write_bytes(exports[session])
    assert main(["import", "exported.json"]) == 0
    capsys.readouterr()
    assert main(["export", session]) == 0
    assert capsys.readouterr().out.rstrip("\n").encode() == exports[session]
    assert main(["check"]) == 0
    assert (tmp_path / "new.db").stat().st_mode & 0o777 == 0o600


def test_a_session_has_used_at_least_what_its_turns_have(exports: dict[str, bytes]) -> None:
    """It may have used more: for a title, and for turns that were deleted."""
    whole = json.loads(exports["s"])
    used = whole["session"]["input_tokens"]
    whole["session"]["input_tokens"] = used + 100
    check(json.dumps(whole).encode())
    for wrong in (used - 1, -1, 10**19):
        whole["session"]["input_tokens"] = wrong
        with pytest.raises(StartupError, match=f"input_tokens {wrong} of the session is not between {used} and"):
            check(json.dumps(whole).encode())


def test_a_session_of_an_earlier_version_gets_the_totals_that_it_lacks(
    exports: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:new.db")
    whole = json.loads(exports["s"])
    reasoning = whole["session"].pop("reasoning_tokens")
    assert reasoning > 0
    del whole["session"]["cached_tokens"]
    whole["session"]["output_tokens"] += 5
    Path("exported.json").write_text(json.dumps(whole))
    assert main(["import", "exported.json"]) == 0
    capsys.readouterr()
    assert main(["export", "s"]) == 0
    imported = json.loads(capsys.readouterr().out)["session"]
    assert (imported["reasoning_tokens"], imported["cached_tokens"]) == (reasoning, 0)
    assert imported["output_tokens"] == whole["session"]["output_tokens"], "what was used is not forgotten"


def test_a_refused_import_makes_no_store(
    exports: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:new.db")
    Path("exported.json").write_bytes(exports["s"].replace(b'"completed"', b'"failed"', 1))
    assert main(["import", "exported.json"]) == 78
    assert "error None of turn" in capsys.readouterr().err
    assert [it.name for it in tmp_path.iterdir()] == ["exported.json"]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a value, at any depth, with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


WRONG: tuple[Any, ...] = (None, "", "x", "cancelled", "failed", "crash", "a\rb", -1, 0, 7, 1e300, True, [], {}, ["x"])


def test_a_changed_export_is_refused_in_one_line_or_can_be_served(exports: dict[str, bytes]) -> None:
    whole = json.loads(exports["s"])
    refused: list[str] = []
    served = 0
    for number, (container, key) in enumerate(list(places(whole))):
        kept = container[key]
        # All wrong values in all places would take minutes: each place gets three of them, and each is in many places.
        changes: list[Any] = [WRONG[(number + step) % len(WRONG)] for step in (0, 4, 8)]
        if isinstance(kept, str):
            changes += [kept + kept, kept.replace("\n", "\r", 1), kept.replace("text", "tex", 1)]
        if isinstance(kept, list):
            changes += [kept[1:], kept[:-1], kept + kept[-1:], kept[::-1]]
        if isinstance(kept, int | float):
            changes += [kept + 1]
        for change in (change for change in changes if change != kept):
            container[key] = copy.deepcopy(change)
            try:
                accepted = check(json.dumps(whole).encode())
            except StartupError as error:
                refused.append(str(error))
            else:
                served += 1
                for it in accepted.turns:
                    runs = exported_events.runs_of(it.turn, it.events)
                    assert exported_events.runs_of(it.turn, exported_events.frames_of(it.turn, runs)) == runs
                    assert it.turn.is_open or are_of(runs, [item.text for item in it.turn.output])
        container[key] = kept
    assert len(refused) > 1000
    assert served > 20
    assert not any("\n" in told for told in refused)


def edit_event(index: int, old: str, new: str) -> Callable[[Any], None]:
    def edit(it: Any) -> None:
        assert old in it["events"][index]
        it["events"][index] = it["events"][index].replace(old, new)

    return edit


FORGED: dict[str, Callable[[Any], object]] = {
    "two terminal events": lambda it: (
        it["events"].append(it["events"][-1].replace(str(len(it["events"])), str(len(it["events"]) + 1))),
        it["turn"].update(last_seq=len(it["events"])),
    ),
    "another end": lambda it: it["turn"].update(state="cancelled", reason="requested", finish_reason=None),
    "failed without an error": lambda it: it["turn"].update(state="failed", finish_reason=None),
    "completed, and an error": lambda it: it["turn"].update(error={"code": "x", "message": "y"}),
    "an input of the assistant": lambda it: it["turn"]["input"][0].update(role="assistant"),
    "an end that was to remove it": lambda it: it["turn"].update(ephemeral=True),
    "a face that is too large": lambda it: it["turn"].update(face={"x": "x" * FACE_BYTES_MAX}),
    "text unlike its deltas": lambda it: it["turn"]["output"][-1].update(text="another"),
    "a delta that is not in the text": edit_event(4, '"text":"', '"text":"more '),
    "another length": edit_event(-1, '"text_length":', '"text_length":1'),
    "a bare CR in a frame": edit_event(0, '{"type"', '{\r"type"'),
    "JSON that is none": edit_event(0, '{"type"', '{"type'),
    "an event of no kind": edit_event(0, "turn.started", "turn.begun"),
    "a member more": edit_event(0, '"type"', '"more":1,"type"'),
    "another turn's name": edit_event(0, '"turn_id":"turn_', '"turn_id":"turn_0'),
    "a delta before the start": lambda it: it["events"].__setitem__(
        slice(0, 2),
        [it["events"][1].replace("2", "1"), it["events"][0].replace("id: 1", "id: 2").replace('"seq":1', '"seq":2')],
    ),
    "no events": lambda it: it.update(events=[]),
    "a field that is not known": lambda it: it["turn"].update(tool=[]),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_data_that_no_service_could_have_made_is_refused_with_session_turn_and_field(
    exports: dict[str, bytes], forgery: str
) -> None:
    whole = json.loads(exports["s"])
    it = whole["turns"][0]
    FORGED[forgery](it)
    with pytest.raises(StartupError) as refused:
        check(json.dumps(whole).encode())
    told = str(refused.value)
    assert len(told.splitlines()) == 1
    if forgery == "a field that is not known":
        assert "turns[0].turn.'tool' is not known to this version" in told
    else:
        assert it["turn"]["id"] in told
        assert "of session 's'" in told


@pytest.mark.parametrize(
    "forgery",
    [
        ('"attempt":2', '"attempt":1'),
        ('"attempt":2', '"attempt":3'),
        ('"text_length":3', '"text_length":4'),
        ('"text_length":3', '"text_length":0'),
        ('"mode":"continue"', '"mode":"retry"'),
        (str(2 * SEQ_AFTER_CRASH + 1), "3"),
    ],
)
def test_a_resumption_that_no_service_could_have_told_is_refused(
    exports: dict[str, bytes], forgery: tuple[str, str]
) -> None:
    whole = json.loads(exports["s"])
    it = next(it for it in whole["turns"] if it["turn"]["attempt"] == 2)
    assert any(forgery[0] in event for event in it["events"])
    it["events"] = [event.replace(*forgery) if "turn.resumed" in event else event for event in it["events"]]
    with pytest.raises(StartupError, match="turn_d"):
        check(json.dumps(whole).encode())


def test_attempts_go_only_with_a_turn_that_may_have_some(exports: dict[str, bytes]) -> None:
    whole = json.loads(exports["s"])
    whole["turns"][0]["turn"]["attempt"] = 2
    with pytest.raises(StartupError, match="attempt"):
        check(json.dumps(whole).encode())


def test_a_suspended_turn_is_not_in_an_import(tmp_path: Path, imported: Callable[[Any], int]) -> None:
    path = tmp_path / "from.db"

    async def suspend() -> None:
        async with open_sqlite_store(path) as store:
            now = wall_clock()
            moments = {"created_at": now, "last_accessed_at": now, "expires_at": now + timedelta(minutes=1)}
            await store.create_session(msgspec.structs.replace(a_session(), **moments), now=now)
            turn = a_lasting_turn("turn_" + 32 * "a", created_at=now, input=text_input(INPUT))
            await store.begin_turn(turn, now=now)
            await store.suspend_turns([so_far(turn, "Hello")], now=now)

    trio.run(suspend)
    whole = json.loads(file_exports.export_session(path, "s"))
    assert [(it["turn"]["state"], it["turn"]["output"], it["events"]) for it in whole["turns"]] == [("running", [], [])]
    assert imported(whole) == 0
    assert json.loads(file_exports.export_session(tmp_path / "new.db", "s"))["turns"] == []


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], int]:
    """Import a session into an empty folder; returns the exit code."""

    def run(whole: Any) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("LASTCALL_STORE_URL", "sqlite:new.db")
        Path("exported.json").write_text(json.dumps(whole), encoding="utf-8")
        return main(["import", "exported.json"])

    return run


def with_pieces(exported: bytes, output: list[dict[str, object]], *pieces: dict[str, object]) -> Any:
    """A session with one completed turn, which has this output, and these events between its start and its end."""
    whole = json.loads(exported)
    it = next(it for it in whole["turns"] if it["turn"]["state"] == "completed" and it["turn"]["parent"] is None)
    started, ended = it["events"][0], json.loads(it["events"][-1].split("data: ", 1)[1])
    assert "turn.started" in started
    events = [dict(piece) for piece in (*pieces, ended)]
    events[-1]["text_length"] = sum(len(str(item["text"])) for item in output if item["type"] == "message")
    for seq, event in enumerate(events, start=2):
        event["seq"] = seq
    frames = [encode_frame(msgspec.convert(event, Event)).decode() for event in events]
    it["turn"] |= {"output": output, "last_seq": len(events) + 1}
    it["events"] = [started, *frames]
    whole["turns"] = [it]
    whole["session"] |= {"head": it["turn"]["id"], "open_turns": 0}
    whole["session"]["message_count"] = len(it["turn"]["input"]) + len(output)
    usage = it["turn"]["usage"] or {"input_tokens": 0, "output_tokens": 0}
    whole["session"] |= {name: usage[name] for name in ("input_tokens", "output_tokens")}
    return whole


def a_message(text: str) -> dict[str, object]:
    return {"id": new_item_id("message"), "type": "message", "role": "assistant", "text": text}


def a_delta(text: str) -> dict[str, object]:
    return {"type": "turn.delta", "text": text}


A_CALL: dict[str, object] = {
    "id": new_item_id("function_call"),
    "type": "function_call",
    "role": "assistant",
    "text": "",
}
A_CALL |= {"call_id": "c", "name": "f"}
CALLED = {"type": "turn.call", "item": 1, "id": A_CALL["id"], "call_id": "c", "name": "f"}


@pytest.mark.parametrize(
    ("pieces", "code"),
    [
        ([a_delta("ab"), CALLED, a_delta("cd")], 0),
        ([a_delta("ab"), CALLED, a_delta("cd"), a_delta("")], 78),
        ([a_delta("ab"), a_delta(""), CALLED, a_delta("cd")], 78),
        ([a_delta("abc"), CALLED, a_delta("d")], 78),
    ],
)
def test_a_piece_that_is_not_within_one_item_is_refused(
    exports: dict[str, bytes],
    imported: Callable[[Any], int],
    capsys: Output,
    pieces: list[dict[str, object]],
    code: int,
) -> None:
    output = [a_message("ab"), A_CALL, a_message("cd")]
    assert imported(with_pieces(exports["s"], output, *pieces)) == code
    if code:
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1
        assert "is empty, or longer than the rest of its item" in told
        assert not Path("new.db").exists()


def test_an_ephemeral_session_is_not_imported(
    exports: dict[str, bytes], imported: Callable[[Any], int], capsys: Output
) -> None:
    whole = json.loads(exports["s"])
    whole["session"]["ephemeral"] = True
    assert imported(whole) == 78
    assert "made for a turn that is not kept" in capsys.readouterr().err


def test_a_history_in_an_input_has_the_bounds_of_a_request_with_a_history_and_of_added_messages(
    exports: dict[str, bytes], imported: Callable[[Any], int], capsys: Output
) -> None:
    whole = json.loads(exports["s"])
    turn = next(it["turn"] for it in whole["turns"] if any(item["role"] == "assistant" for item in it["turn"]["input"]))
    call = next(item for item in turn["input"] if item["type"] == "function_call")
    for name in ("a b", "x" * 65):
        kept, call["name"] = call["name"], name
        assert imported(whole) == 78
        assert "items" in capsys.readouterr().err
        call["name"] = kept
    turn["input"][0]["text"] = "x" * Settings().history_bytes
    assert imported(whole) == 78
    assert "input" in capsys.readouterr().err


def test_inputs_that_are_together_as_long_as_the_bound_are_imported(
    exports: dict[str, bytes], imported: Callable[[Any], int]
) -> None:
    whole = with_pieces(exports["s"], [a_message("ab")], a_delta("ab"))
    half = "x" * (Settings().history_bytes // 2)
    whole["turns"][0]["turn"]["input"] = [a_message(half) | {"role": "user"}, a_message(half) | {"role": "user"}]
    whole["session"]["message_count"] = 3
    assert imported(whole) == 0
    whole["turns"][0]["turn"]["input"][0]["text"] += "x"
    assert imported(whole) == 78


@pytest.mark.parametrize("text", ["a\u2028b\u0085", "\\u2028", '"\\\u2028', "\U0001f642\u2029", "\x7f\r\n"])
def test_an_event_that_an_earlier_version_escaped_less_is_the_same_event(text: str) -> None:
    event = TurnDelta(seq=7, text=text)
    earlier = b"id: 7\ndata: %b\n\n" % msgspec.json.encode({"type": "turn.delta", "seq": 7, "text": text})
    for frame in (encode_frame(event), earlier):
        assert whole_turn._read(frame) == event
    assert whole_turn._read(earlier.replace(b"data: {", b"data: { ")) is None
    assert whole_turn._read(earlier.replace(b'"seq":7', b'"seq":7,"seq":7')) is None


def test_an_import_beside_a_service_whose_file_was_moved_makes_no_new_file(
    exports: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "kept.db"

    async def import_meanwhile() -> None:
        async with open_sqlite_store(path):
            for file in tmp_path.iterdir():  # noqa: ASYNC240
                file.unlink()
            with pytest.raises(StartupError, match="still serves the file that was there before"):
                file_exports.import_session(path, check(exports["s"]), now=wall_clock())
            assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240

    with pytest.raises(StoreError, match="replaced while it was open"):
        trio.run(import_meanwhile)
