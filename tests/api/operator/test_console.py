"""The console's page and its files: what a browser is given, what it may keep, and what it is told to refuse."""

import re
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from service.api.app import create_app
from service.api.operator.console import FOLDER, Console, console_of
from tests.api.inprocess import Api, Reply, open_api
from tests.docs.blocks import ROOT

KEY = "a-key-that-is-long-enough"
CLIENT = ROOT / "clients/js/lastcall.js"
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}


def addresses_in(page: Reply) -> list[str]:
    return re.findall(r"""(?:src|href)="(console/[^"]+)""", page.body.decode())


async def file_of(api: Api, name: str) -> tuple[str, Reply]:
    """The address of a file of the console, and the answer to it."""
    [script] = [it for it in addresses_in(await api.call("GET", "/")) if it.endswith("/app.js")]
    address = f"/{script.removesuffix('app.js')}{name}"
    return address, await api.call("GET", address)


async def test_the_root_is_the_console_and_json_for_who_asks_for_it() -> None:
    async with open_api() as api:
        for headers in (BROWSER, {"Accept": "*/*"}, {}, {"Accept": "text/html, application/json;q=0.9"}):
            page = await api.call("GET", "/", headers=headers)
            assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
            assert page.headers["vary"] == "Accept"
        found = await api.call("GET", "/", headers={"Accept": "application/json"})
        assert found.json | {"version": ""} == {
            "name": "lastcall",
            "version": "",
            "docs": "/docs",
            "openapi": "/openapi.json",
        }
        assert (found.headers["vary"], found.headers["cache-control"]) == ("Accept", "no-store")
        assert (await api.call("HEAD", "/")).headers["content-type"] == "text/html; charset=utf-8"


async def test_the_page_is_asked_for_each_time_and_its_files_are_kept_for_ever() -> None:
    async with open_api() as api:
        page = await api.call("GET", "/")
        assert page.headers["cache-control"] == "no-cache"
        address, file = await file_of(api, "app.js")
        assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
        for path, reply in (("/", page), (address, file)):
            for tag in (reply.headers["etag"], f"W/{reply.headers['etag']}", f'"other", {reply.headers["etag"]}', "*"):
                again = await api.call("GET", path, headers={"If-None-Match": tag})
                assert (again.status, again.body) == (304, b""), tag
                assert again.headers["etag"] == reply.headers["etag"]
                assert again.headers["cache-control"] == reply.headers["cache-control"]
            assert (await api.call("GET", path, headers={"If-None-Match": '"other"'})).status == 200


async def test_callers_that_leave_while_the_files_are_read_take_no_thread_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, may_answer, reads = threading.Event(), threading.Event(), []
    load = Console.load

    def hang() -> Console:
        reads.append(threading.get_ident())
        begun.set()
        may_answer.wait()
        return load()

    monkeypatch.setattr(Console, "load", hang)
    app = create_app()
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(console_of, app)
                await trio.to_thread.run_sync(begun.wait)
                await wait_all_tasks_blocked()
                assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
                nursery.cancel_scope.cancel()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(console_of, app)
                await wait_all_tasks_blocked()
                may_answer.set()
            assert (await console_of(app)).page.content == load().page.content
    finally:
        may_answer.set()
    assert len(reads) == 1, "those that came later wait for the first"


async def test_a_page_of_another_version_gets_files_but_keeps_none() -> None:
    async with open_api() as api:
        address, file = await file_of(api, "app.js")
        other = await api.call("GET", "/console/0123456789abcdef/app.js")
        assert (other.body, other.headers["cache-control"]) == (file.body, "no-store")
        for name in ("none.js", "index.html", "..%2fapp.js", "%2e%2e", ".", "app.py"):
            (await api.call("GET", address.replace("app.js", name))).problem(404, "not_found")


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("app.js", "text/javascript; charset=utf-8"),
        ("theme.js", "text/javascript; charset=utf-8"),
        ("lastcall.js", "text/javascript; charset=utf-8"),
        ("tokens.css", "text/css; charset=utf-8"),
        ("mark.svg", "image/svg+xml"),
    ],
)
async def test_a_file_has_the_type_that_a_browser_wants(name: str, media_type: str) -> None:
    async with open_api() as api:
        _, file = await file_of(api, name)
    assert (file.status, file.headers["content-type"]) == (200, media_type)
    assert file.headers["x-content-type-options"] == "nosniff"


async def test_page_and_files_allow_nothing_inline_nothing_foreign_and_no_frame() -> None:
    async with open_api() as api:
        page = await api.call("GET", "/")
        for reply in (page, (await file_of(api, "app.js"))[1], (await file_of(api, "mark.svg"))[1]):
            policy = dict(it.strip().partition(" ")[::2] for it in reply.headers["content-security-policy"].split(";"))
            assert policy == {
                "default-src": "'none'",
                "script-src": "'self'",
                "style-src": "'self'",
                "connect-src": "'self'",
                "img-src": "'self' data:",
                "frame-ancestors": "'none'",
                "base-uri": "'none'",
                "form-action": "'none'",
                "require-trusted-types-for": "'script'",
                "trusted-types": "'none'",
            }
            assert reply.headers["referrer-policy"] == "no-referrer"
    text = page.body.decode()
    assert re.findall(r"<style|style=|<script>| on[a-z]+=|javascript:|https?://", text) == []


async def test_page_and_files_need_no_key_and_without_keys_they_are_for_this_machine() -> None:
    async with open_api(api_keys=(KEY,)) as api:
        address, file = await file_of(api, "app.js")
        assert file.status == 200
        (await api.call("GET", "/sessions")).problem(401, "unauthorized")
    async with open_api() as api:
        for path in ("/", address):
            (await api.call("GET", path, headers={"Host": "app.example.org"})).problem(403, "loopback_only")
            forwarded = await api.call("GET", path, headers={"X-Forwarded-For": "192.0.2.1"})
            forwarded.problem(403, "proxied_without_keys")


async def test_below_a_prefix_the_page_and_its_files_find_each_other() -> None:
    async with open_api() as api:
        for path in ("/ai/", "/"):
            page = await api.call("GET", path, scope={"root_path": "/ai"})
            assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
            assert {it.partition("/")[0] for it in addresses_in(page)} == {"console"}, "relative to the page"
            file = await api.call("GET", path + addresses_in(page)[0], scope={"root_path": "/ai"})
            assert file.status == 200
        bare = await api.call("GET", "/ai", scope={"root_path": "/ai", "raw_path": b"/ai"})
        assert (bare.status, bare.headers["location"]) == (302, "/ai/")
        found = await api.call("GET", "/", headers={"Accept": "application/json"}, scope={"root_path": "/ai"})
        assert found.json["docs"] == "/ai/docs"


async def test_the_page_uses_the_client_that_others_copy_unchanged() -> None:
    async with open_api() as api:
        _, client = await file_of(api, "lastcall.js")
    assert client.body == CLIENT.read_bytes()
    assert not (FOLDER / "lastcall.js").exists(), "clients/js has the only copy"


def test_each_file_that_the_page_and_its_modules_name_is_there() -> None:
    console = Console.load()
    named = set(re.findall(rf'"console/{console.version}/([^"]+)"', console.page.content.decode()))
    for name, file in console.files.items():
        if name.endswith(".js"):
            named |= set(re.findall(r"""(?:from|import)\s*\(?\s*"\./([^"]+)\"""", file.content.decode()))
    assert {"app.js", "tokens.css", "lastcall.js"} <= named
    assert named - console.files.keys() == set()


def test_no_module_of_the_page_makes_html_or_code_of_a_text() -> None:
    """The policy forbids it in browsers that know trusted types; the page must be as safe in all others."""
    makers = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|"
        r"\beval\(|new Function|setHTML|\.cssText"
    )
    assert [(path.name, makers.findall(path.read_text())) for path in FOLDER.glob("*.js")] == [
        (path.name, []) for path in FOLDER.glob("*.js")
    ]


@pytest.mark.processes
async def test_the_wheel_has_the_page_its_files_and_the_client(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    await trio.run_process(command, cwd=ROOT, capture_stdout=True, capture_stderr=True)
    [wheel] = tmp_path.glob("*.whl")  # noqa: ASYNC240
    with zipfile.ZipFile(wheel) as packed:
        names = [it.removeprefix("service/console/") for it in packed.namelist() if it.startswith("service/console/")]
        assert packed.read("service/console/lastcall.js") == CLIENT.read_bytes()
    assert sorted(names) == sorted([*Console.load().files, "index.html"])
