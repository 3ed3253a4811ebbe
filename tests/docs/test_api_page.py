"""The page of calls has each call of the native API, and its examples print the answers that it shows.

``python -m tests.docs.test_api_page`` runs the examples of the shell, and writes the answers and the errors anew.
"""

import re
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from bench.server_process import Launch, ServerProcess, open_server, python_command
from service.api.app import create_app
from service.api.http.problems import ADVICE
from service.api.reference.openapi import build_document
from tests.docs import blocks
from tests.docs.api_page import KEY, LANGUAGES, PAGE, Example, Section, run_examples, sections_of
from tests.docs.blocks import ROOT
from tests.docs.shown_answers import LEFT_OUT, agrees, printed_values, refreshed, rendered, shown_values
from tests.docs.test_shell_blocks import environ
from tests.kept_log import lines_of

CAP_S = 60
"""Bound of the server's stop; not a promise of the server."""
CANCELLED = "Say A B C D E F G H I J K L M N O P Q R S T U V W X Y Z."
"""The message of the turn that the page cancels: see tests/docs/held_reply.py."""
Call = tuple[str, str]
"""A method and a path with its parameters' names."""
COMMON = re.compile(r"(?<=<!-- errors -->\n).*?(?=<!-- /errors -->)", re.DOTALL)
OWN = re.compile(r"(?m)^Errors: .*$")


def native_calls() -> dict[Call, dict[str, Any]]:
    """The operations of the native API. The calls of other APIs, and those for operators, have pages of their own."""
    return {
        (method.upper(), path): operation
        for path, methods in build_document(create_app())["paths"].items()
        for method, operation in methods.items()
        if not path.startswith(("/v1/", "/admin/", "/metrics"))
    }


def page_sections() -> list[Section]:
    return list(sections_of(PAGE.read_text()))


SECTIONS = page_sections()
EXAMPLES = [example for section in SECTIONS for example in section.examples]


# The calls


def test_each_call_has_one_section_and_each_section_has_a_call() -> None:
    assert sorted(it.operation for it in SECTIONS if it.operation is not None) == sorted(native_calls())


def test_the_section_of_a_call_says_what_the_call_does_and_has_an_example_with_its_answer() -> None:
    for section in SECTIONS:
        if section.operation is not None:
            assert re.match(r"[A-Z].*\.", section.text), f"{section.heading} begins with a sentence"
            assert section.examples, section.heading
            assert all(example.shown is not None for example in section.examples), section.heading


SAFE = {"Idempotency-Key": r"new_?[kK]ey\(\)|\$\(new_key\)", "If-Match": "If-Match", "Last-Event-ID": "Last-Event-ID"}
"""How an example sends each header that makes a call safe."""
WITHOUT = {("DELETE", "/sessions/{session_id}"): "If-Match"}
"""The headers that a section only mentions."""


def test_the_examples_make_their_calls_in_the_safe_way() -> None:
    for call, operation in native_calls().items():
        taken = {it["name"] for it in operation["parameters"] if it["in"] == "header"} & SAFE.keys()
        if "Idempotency-Key" in taken:
            taken.discard("Last-Event-ID")
        [section] = [it for it in SECTIONS if it.operation == call]
        for header in taken - {WITHOUT.get(call)}:
            for example in section.examples:
                for language, code in example.code.items():
                    assert re.search(SAFE[header], code), f"{example}: {language} sends no {header}"


def test_each_link_within_the_page_has_a_target() -> None:
    anchors = {re.sub(r"[^a-z0-9_ -]", "", section.heading.lower()).replace(" ", "-") for section in SECTIONS}
    links = re.findall(r"\]\(#([^)]*)\)", PAGE.read_text())
    assert len(links) > len(native_calls()) - 2
    assert set(links) <= anchors


# The errors


def errors_of(operation: dict[str, Any]) -> set[tuple[str, str]]:
    """The statuses and codes with which an operation may refuse a call."""
    return {
        (status, code)
        for status, response in operation["responses"].items()
        if "application/problem+json" in response.get("content", {})
        for code in re.findall(r"`(\w+)`", response["description"])
    }


def common_errors(calls: dict[Call, dict[str, Any]]) -> set[tuple[str, str]]:
    """The errors of every call, of every call that needs a key, and of every call with a body."""
    groups = (
        list(calls.values()),
        [it for it in calls.values() if it.get("security") != []],
        [it for it in calls.values() if "requestBody" in it],
    )
    return {error for group in groups for error in set.intersection(*map(errors_of, group))}


def common_table() -> str:
    rows = ["| Status, code | What to do |", "|---|---|"]
    rows += [f"| {status} `{code}` | {ADVICE[code]} |" for status, code in sorted(common_errors(native_calls()))]
    return "\n".join(rows) + "\n"


def line_of_errors(operation: dict[str, Any], common: set[tuple[str, str]]) -> str:
    own = [f"{status} `{code}`" for status, code in sorted(errors_of(operation) - common)]
    return f"Errors: {', '.join(own)}." if own else "Errors: none of its own."


def test_the_page_has_the_errors_of_the_code() -> None:
    assert COMMON.findall(PAGE.read_text()) == [common_table()]
    calls = native_calls()
    common = common_errors(calls)
    for section in SECTIONS:
        expected = [line_of_errors(calls[section.operation], common)] if section.operation is not None else []
        assert OWN.findall(section.text) == expected, section.heading


# The examples


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[ServerProcess]:
    """Run the server of the page's reader: all settings are the default ones, except for the key on the page."""
    env = {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_LOG_FORMAT": "json", "LASTCALL_ACCESS_LOG": "on"}
    env |= {"LASTCALL_API_KEYS": KEY, "LASTCALL_MODEL_URL": "scripted:", "PYTHONPATH": str(ROOT)}
    command = python_command("-m", "tests.docs.held_reply", CANCELLED, "serve")
    launch = Launch(command, env=env, folder=folder)
    async with open_server(launch, log_path=folder / "server.log", start_timeout_s=60) as server:
        yield server


async def run_page(language: str, folder: Path) -> tuple[list[str], str]:
    """Run all examples in a language. Returns what each has printed, and the server's log."""
    async with serving(folder) as server:
        run = partial(run_examples, EXAMPLES, language, folder=folder, environ=environ(), port=server.port)
        printed = await trio.to_thread.run_sync(run)
        server.signal_main(signal.SIGTERM)  # a server that is killed has lines of its log unwritten
        with trio.fail_after(CAP_S):
            await server.wait_gone()
    return printed, server.log()


def calls_in(log: str) -> set[Call]:
    """The calls that a server has answered."""
    asked = [line for line in lines_of(log, "request") if line["route"] is not None]
    return native_calls().keys() & {(line["method"], re.sub(r"<(\w+)>", r"{\1}", line["route"])) for line in asked}


@pytest.mark.parametrize("language", LANGUAGES)
async def test_the_examples_print_the_answers_that_the_page_shows(language: str, tmp_path: Path) -> None:
    printed, log = await run_page(language, tmp_path)
    for example, output in zip(EXAMPLES, printed, strict=True):
        shown = shown_values(example.shown or "")
        real = printed_values(output)
        assert agrees(shown, real), f"{example} in {language}\nshown:\n{example.shown}\nprinted:\n{output[:4000]}"
        if language == "sh" and is_stream(example):
            assert blocks.agrees(example.shown or "", output), f"{example}\nshown:\n{example.shown}\nprinted:\n{output}"
    assert calls_in(log) == native_calls().keys()


def is_stream(example: Example) -> bool:
    return "\ndata: " in (example.shown or "")


# The comparison


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ('{"a": 1}', '{"a":1}', True),
        ('{"a": 1}', '{"a":2}', False),
        ('{"a": 1}', '{"a":true}', False),
        ('{"a": 1}', '{"a":1,"b":2}', False),
        ('{"a": 1, ...}', '{"b":2,"a":1}', True),
        ('{"a": 1, ...}', '{"b":2}', False),
        ('{"a": {}}', '{"a":{"b":2}}', False),
        ("[1, 2]", "[1,2]", True),
        ("[1, 2]", "[1,2,3]", False),
        ("[1, ...]", "[1,2,3]", True),
        ("[1, ..., 3]", "[1,2,3]", True),
        ("[1, ..., 4]", "[1,2,3]", False),
        ("[1, ..., 1]", "[1]", False),
        ('{"text": "You said…"}', '{"text":"You said: no."}', True),
        ('{"text": "You said…"}', '{"text":"They said: no."}', False),
        ('{"text": "..."}', '{"text":"You said: no."}', False),
        (f'{{"id": "turn_{"0" * 32}"}}', f'{{"id":"turn_{"f" * 32}"}}', True),
        (f'{{"id": "turn_{"0" * 32}"}}', f'{{"id":"sess_{"f" * 32}"}}', False),
        ('{"a": 1}', "", False),
        ("", '{"a":1}', False),
        ("204", "204", True),
        ("204", "404", False),
        ("text/html", "text/html", True),
        (
            'retry: 1000\nid: 1\ndata: {"seq":1}\n\n...\nid: 3\ndata: {"seq":3}\n',
            '{"seq":1}\n{"seq":2}\n{"seq":3}',
            True,
        ),
        ('id: 1\ndata: {"seq":1}\n\n...\nid: 3\ndata: {"seq":3}\n', '{"seq":1}\n{"seq":2}', False),
    ],
)
def test_an_answer_is_compared_without_ids_and_times_and_with_what_is_left_out(
    shown: str, printed: str, *, same: bool
) -> None:
    assert agrees(shown_values(shown), printed_values(printed)) is same


def test_a_refreshed_answer_shows_the_same_parts() -> None:
    shown = shown_values('{"id": "a", "text": "Yo…", "data": [{"n": 0, ...}, ...], "all": {}, ...}')
    real = {"text": "Hello", "id": "b", "data": [{"n": 1, "m": 2}, {"n": 3}], "all": {"x": 1}, "more": 1}
    [fresh] = refreshed(shown, [real])
    assert rendered(fresh) == '{"text": "He…", "id": "b", "data": [{"n": 1, ...}, ...], "all": {"x": 1}, ...}'
    assert agrees([fresh], [real])
    assert shown_values(rendered([fresh] * 9)) == [[fresh] * 9]


def test_a_page_with_blocks_that_are_no_example_is_refused() -> None:
    block = "```{}\nx\n```\n"
    languages = "".join([block.format(language) for language in LANGUAGES])
    [section] = sections_of("# Page\n## `GET /x`\nText.\n" + languages + block.format("text") + languages)
    assert [(it.line, it.shown) for it in section.examples] == [(4, "x\n"), (16, None)]
    assert section.operation == ("GET", "/x")
    with pytest.raises(ValueError, match=r"docs/api\.md:2: an example"):
        list(sections_of("## Page\n" + block.format("sh") + block.format("python")))


# The page anew


def frames_anew(shown: str, output: str) -> str:
    """The frames that are shown, taken from a real stream: as many as before at its begin and at its end."""
    first, left_out, last = shown.partition(f"\n{LEFT_OUT}\n")
    frames = [f"{frame}\n" for frame in output.strip("\n").split("\n\n")]
    before, after = frames[: first.count("data: ")], frames[len(frames) - last.count("data: ") :]
    return "\n".join(before) + left_out + "\n".join(after)


def answer_anew(example: Example, output: str) -> str:
    shown = example.shown or ""
    if is_stream(example):
        return shown if blocks.agrees(shown, output) else frames_anew(shown, output)
    values, real = shown_values(shown), printed_values(output)
    if agrees(values, real):
        return shown
    fresh = refreshed(values, real)
    return "".join([f"{value if isinstance(value, str) else rendered(value)}\n" for value in fresh])


def page_anew(page: str, outputs: Iterator[str]) -> str:
    """The page with the answers of a run, and with the errors of the code."""
    calls = native_calls()
    common = common_errors(calls)
    page = anew = COMMON.sub(lambda _: common_table(), page)
    for section in sections_of(page):
        text = section.text
        for example in section.examples:
            output = next(outputs)
            if example.shown is not None:
                was, fresh = (
                    f"{example.code['js']}```\n\n```text\n{it}```"
                    for it in (example.shown, answer_anew(example, output))
                )
                assert text.count(was) == 1, f"{example}: an answer follows its example after a blank line"
                text = text.replace(was, fresh)
        if section.operation is not None:
            line = line_of_errors(calls[section.operation], common)
            text = OWN.sub(lambda _, line=line: line, text)  # type: ignore[misc]
        anew = anew.replace(section.text, text) if section.examples or section.operation else anew
    return anew


async def write_page() -> None:
    with tempfile.TemporaryDirectory() as folder:
        printed, _ = await run_page("sh", Path(folder))
    PAGE.write_text(page_anew(PAGE.read_text(), iter(printed)))


if __name__ == "__main__":
    trio.run(write_page)
