"""No call tells one owner that another owner's session exists: the same calls, in worlds with and without the other.

Ann has a key with a name; Pat has a plain key. Their calls are made twice: once while Bob, and an administrator who
acts for him, use the same ids, keys and words; and once without these. The answers must be the same, but for times and
random ids. Ann and Pat guess Bob's ids, turns and page cursors. In some runs each search ends after one row.
"""

import binascii
import re
import tempfile
from base64 import urlsafe_b64decode
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import trio
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.storage import search
from service.storage.sqlite import metadata
from service.storage.sqlite.writer import Writer
from tests.api.http.test_callers import KEYS, key_of
from tests.api.inprocess import Api, Reply, open_api
from tests.storage.conftest import MEMORY_DISK

RANDOM_IDS = re.compile(r"\b(turn|sess|msg|fc|fco|call|req)_[0-9a-f]{32}")
SEEN_IDS = {kind: re.compile(rf"{kind}_[0-9a-f]{{32}}") for kind in ("turn", "msg")}
TIMES = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
CURSOR = re.compile(r'"next":"([^"]+)"')
COMPARED_HEADERS = ("location", "retry-after", "content-type", "etag", "allow", "www-authenticate", "cache-control")
UPSTREAMS = (
    {"name": "quick", "url": "scripted:?rate=0&tokens=2&first_token_s=0", "models": ("quick",)},
    {"name": "hanging", "url": "scripted:?first_token_s=1000", "models": ("hangs",)},
)


@dataclass(frozen=True)
class Step:
    """A call. ``turn`` is a turn or a message that one of them has seen, or none; ``cursor`` is a cursor of theirs."""

    actor: str
    kind: str
    session: int = 0
    other: int = 1
    word: str = "alpha"
    turn: tuple[str, int] = ("none", 0)
    cursor: str = "none"
    key: int = 0
    status: str = ""


Request = tuple[str, str, object, Mapping[str, str]]
Built = tuple[Any, ...]


def _turn(step: Step, turn: str, **fields: object) -> dict[str, object]:
    parent = {} if step.turn[0] == "none" else {"parent": turn}
    return {"input": step.word, "model": "quick", **parent, **fields}


def _list(step: Step, cursor: str, query: str = "") -> str:
    return f"/sessions?limit=2&count=true{f'&after={cursor}' if cursor else ''}{query}"


KINDS: dict[str, Callable[[Step, str, str, str], Built]] = {
    "create": lambda it, s, _t, _c: ("POST", "/sessions", {"id": s, "title": it.word, "metadata": {"team": it.word}}),
    "create with a new id": lambda it, _s, _t, _c: ("POST", "/sessions", {"title": it.word}),
    "create for Bob": lambda _, s, _t, _c: ("POST", "/sessions", {"id": s, "owner": "bob"}),
    "chat": lambda it, s, _t, _c: (
        "POST",
        "/chat",
        {"message": it.word, "session_id": s},
        {"Accept": "text/event-stream"},
    ),
    "chat in a new session": lambda it, _s, _t, _c: ("POST", "/chat", {"message": it.word}),
    "resume": lambda it, s, _t, _c: ("POST", "/chat", {"message": it.word, "session_id": s}, {"Last-Event-ID": "99"}),
    "get": lambda _, s, _t, _c: ("GET", f"/sessions/{s}"),
    "get as Bob": lambda _, s, _t, _c: ("GET", f"/sessions/{s}", None, {"Lastcall-Owner": "bob"}),
    "get by a scoped id": lambda _, s, _t, _c: ("GET", f"/sessions/bob%2F{s}"),
    "rename": lambda it, s, _t, _c: ("PATCH", f"/sessions/{s}", {"title": it.word}),
    "rename if it matches": lambda it, s, _t, _c: ("PATCH", f"/sessions/{s}", {"title": it.word}, {"If-Match": '"x"'}),
    "move the head": lambda _, s, t, _c: ("PATCH", f"/sessions/{s}", {"head": t}),
    "delete": lambda _, s, _t, _c: ("DELETE", f"/sessions/{s}"),
    "fork": lambda it, s, t, _c: (
        *("POST", f"/sessions/{s}/fork"),
        {"id": f"s{it.other}"} | ({} if it.turn[0] == "none" else {"at": t}),
    ),
    "turn": lambda it, s, t, _c: ("POST", f"/sessions/{s}/turns", _turn(it, t)),
    "turn in place of others": lambda it, s, t, _c: (
        "POST",
        f"/sessions/{s}/turns",
        _turn(it, t, on_conflict="supersede"),
    ),
    "turn that hangs": lambda it, s, t, _c: (
        *("POST", f"/sessions/{s}/turns"),
        _turn(it, t, model="hangs", background=True, on_conflict="queue"),
    ),
    "retry": lambda _, s, t, _c: ("POST", f"/sessions/{s}/turns/{t}/retry", {"model": "quick"}),
    "cancel": lambda _, s, t, _c: ("POST", f"/sessions/{s}/turns/{t}/cancel"),
    "get turn": lambda _, s, t, _c: ("GET", f"/sessions/{s}/turns/{t}"),
    "events": lambda _, s, t, _c: ("HEAD", f"/sessions/{s}/turns/{t}/events"),
    "turns": lambda _, s, _t, c: ("GET", f"/sessions/{s}/turns?limit=2{f'&after={c}' if c else ''}"),
    "siblings": lambda _, s, t, _c: ("GET", f"/sessions/{s}/turns?parent={t}"),
    "tree": lambda _, s, _t, _c: ("GET", f"/sessions/{s}/tree"),
    "messages": lambda _, s, _t, c: ("GET", f"/sessions/{s}/messages?limit=2{f'&after={c}' if c else ''}"),
    "add messages": lambda it, s, _t, _c: (
        *("POST", f"/sessions/{s}/messages"),
        {"items": [{"type": "message", "role": "user", "text": it.word}]},
    ),
    "delete message": lambda _, s, m, _c: ("DELETE", f"/sessions/{s}/messages/{m}"),
    "get turn and wait": lambda _, s, t, _c: ("GET", f"/sessions/{s}/turns/{t}?wait=0"),
    "delete turn": lambda _, s, t, _c: ("DELETE", f"/sessions/{s}/turns/{t}"),
    "list": lambda it, _s, _t, c: ("GET", _list(it, c)),
    "list of a status": lambda it, _s, _t, c: ("GET", _list(it, c, f"&status={it.status or 'idle'}")),
    "list by metadata": lambda it, _s, _t, c: (
        *("GET", f"/sessions?limit=2&metadata.team={it.word}{f'&after={c}' if c else ''}"),
    ),
    "search": lambda it, _s, _t, c: ("GET", f"/sessions?limit=2&q={it.word}{f'&after={c}' if c else ''}"),
    "list as Bob": lambda it, _s, _t, c: ("GET", _list(it, c), None, {"Lastcall-Owner": "bob"}),
}
BEGINNING = (
    Step("bob", "create", 0),
    Step("bob", "chat", 1, key=1),
    Step("root", "turn", 0, key=2),
    Step("bob", "turn that hangs", 1),
    Step("bob", "list"),
    Step("root", "create", 2, word="beta"),
    Step("ann", "chat", 0),
    Step("ann", "create", 1, word="beta"),
    Step("plain", "create", 0, word="beta"),
)
"""What there is in any case: Ann has two of Bob's three ids, and Pat has one of them."""
COMPARED = ("ann", "plain")

SEARCHES_WHILE_BOB_GOES_ON = [
    Step("ann", "rename", 1),
    Step("ann", "create with a new id"),
    Step("ann", "search"),
    Step("bob", "rename", 0, word="beta"),
    Step("ann", "search"),
]
LISTS_BESIDE_BOB = [Step(actor, "list by metadata") for actor in COMPARED]

actors = st.sampled_from(("none", *COMPARED, "bob"))
refs = st.tuples(actors, st.integers(0, 9))
steps = st.builds(
    Step,
    st.sampled_from((*COMPARED, *COMPARED, "bob", "root")),
    st.sampled_from(sorted(KINDS)),
    session=st.integers(0, 2),
    other=st.integers(0, 3),
    word=st.sampled_from(("alpha", "beta")),
    turn=refs,
    cursor=st.just("none") | actors,
    key=st.integers(0, 2),
    status=st.sampled_from(("idle", "running")),
)


@dataclass
class World:
    """One run of the calls.

    Attributes:
        guesses: What Ann and Pat know of Bob, for each of their calls: without him they are those of the other world.
    """

    api: Api
    others_act: bool
    guesses: dict[int, tuple[str, str]]
    seen: defaultdict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    """The ids of turns and messages in the answers of each: those of the administrator are Bob's."""
    cursors: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """What stands for each random id and each cursor in the answers that are compared."""

    async def run(self, history: Sequence[Step]) -> Sequence[object]:
        answers = []
        for index, step in enumerate(history):
            who = step.actor if step.actor in COMPARED else "bob"
            if who == "bob" and not self.others_act:
                continue
            request = self._request(index, step)
            reply = await self._call(step, request)
            text = reply.body.decode() + reply.headers.get("location", "")
            guessed = repr(request)  # a refusal repeats it
            for kind, form in SEEN_IDS.items():
                seen = self.seen[who, kind]
                seen += [it for it in dict.fromkeys(form.findall(text)) if it not in seen and it not in guessed]
            if (found := CURSOR.search(text)) and (who != "bob" or step.kind != "search"):  # his searches are sealed
                self.cursors[who] = found[1]
            if who != "bob":
                for cursor in CURSOR.findall(text):
                    self._check_tells_nothing_of_bob(cursor)
                answers.append((index, step.kind, self._masked(reply)))
        return answers

    def _request(self, index: int, step: Step) -> Built:
        who, number = step.turn
        kind = "msg" if step.kind == "delete message" else "turn"
        item, cursor = self._seen_by(who, kind, number), self.cursors.get(step.cursor, "")
        if step.actor in COMPARED:
            if self.others_act:
                self.guesses[index] = item, cursor
            item = self.guesses[index][0] if who == "bob" else item
            cursor = self.guesses[index][1] if step.cursor == "bob" else cursor
        return KINDS[step.kind](step, f"s{step.session}", item, cursor)

    def _seen_by(self, who: str, kind: str, number: int) -> str:
        seen = self.seen[who, kind]
        return seen[number % len(seen)] if seen else f"{kind}_{'0' * 32}"

    async def _call(self, step: Step, request: Built) -> Reply:
        method, path, body, headers, *_ = (*request, None, None)[:4] if len(request) < 4 else request
        headers = {"Authorization": f"Bearer {key_of(step.actor)}"} | (headers or {})
        if step.actor == "root":
            headers["Lastcall-Owner"] = "bob"
        if method == "POST" and step.key:
            headers["Idempotency-Key"] = f'"key-{step.key}"'
        with trio.fail_after(60):
            return await self.api.call(method, path, body, headers=headers)

    def _masked(self, reply: Reply) -> object:
        def name(found: re.Match[str]) -> str:
            return self.names.setdefault(found[0], f"<{found[1]} {len(self.names)}>")

        headers = [RANDOM_IDS.sub(name, f"{it}: {reply.headers.get(it)}") for it in COMPARED_HEADERS]

        def name_cursor(found: re.Match[str]) -> str:
            return self.names.setdefault(found[0], f'"next":"<cursor {len(self.names)}>"')

        body = TIMES.sub("<time>", CURSOR.sub(name_cursor, RANDOM_IDS.sub(name, reply.body.decode())))
        return reply.status, headers, body

    def _check_tells_nothing_of_bob(self, cursor: str) -> None:
        try:
            inside = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        except binascii.Error:  # a cursor of messages is plain text
            inside = cursor.encode()
        known = [it for (who, _), ids in self.seen.items() if who == "bob" for it in ids]
        assert not any(it.encode() in inside for it in ("bob", *known))


async def answers_of(
    history: Sequence[Step], guesses: dict[int, tuple[str, str]], *, others_act: bool, store: str, search_s: float
) -> Iterable[object]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY_DISK))
        for module in (search, metadata):
            stack.enter_context(patch.object(module, "SEARCH_S", search_s))
        if not search_s:  # a page may end at a row of a deleted session, so these rows stay
            stack.enter_context(patch.object(Writer, "run_housekeeping", lambda _, *, idle: None))  # noqa: ARG005
        url = "memory:" if store == "memory" else f"sqlite:{folder}/lastcall.db"
        async with open_api(
            store_url=url, upstreams=UPSTREAMS, api_keys=KEYS, drain_timeout_s=0, store_timeout_s=30
        ) as api:
            world = World(api, others_act, guesses)
            answers = await world.run(history)
            if others_act:
                root = {"Authorization": f"Bearer {key_of('root')}"}
                everything = await api.call("GET", "/sessions?limit=100", headers=root)
                others = {it["owner"] for it in everything.json["data"] if "owner" in it} - {"ann"}
                deleted = any(it.kind == "delete" for it in history)
                assert others == {"bob"} or deleted
            return answers


@pytest.mark.parametrize("store", ["memory", "sqlite"])
@settings(max_examples=15, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(history=st.lists(steps, min_size=10, max_size=40), is_hurried=st.integers(0, 3).map(lambda n: n == 3))
@example(history=SEARCHES_WHILE_BOB_GOES_ON, is_hurried=False)
@example(history=LISTS_BESIDE_BOB, is_hurried=True)
def test_an_owner_s_answers_are_the_same_without_the_other_owner(
    store: str, history: list[Step], is_hurried: bool
) -> None:
    search_s = 0 if is_hurried else 60  # time for a loaded machine
    whole = [*BEGINNING, *history]
    guesses: dict[int, tuple[str, str]] = {}

    async def run(others_act: bool) -> Iterable[object]:
        return await answers_of(whole, guesses, others_act=others_act, store=store, search_s=search_s)

    with capture_logs():
        beside_bob = trio.run(run, True)
        alone = trio.run(run, False)
    assert beside_bob == alone
