"""The types of the client in JavaScript, written by hand, name what the module has. ``just clients`` compiles them."""

import json
import re

import pytest
import trio

from tests.docs.blocks import ROOT
from tests.node import NODE

pytestmark = pytest.mark.processes

MODULE = ROOT / "clients/js/lastcall.js"
PRINT_NAMES = """
const client = await import(process.argv[1]);
const names = (it) => Object.getOwnPropertyNames(it.prototype).filter((name) => name !== "constructor");
const arguments_ = { Client: ["http://x"], TurnStream: [{}, {}, {}, {}], Pages: [], LastcallError: ["", {}] };
const made = (name, it) => Object.keys(new it(...arguments_[name]));
const classes = Object.entries(client).filter(([, it]) => typeof it === "function" && it.prototype);
console.log(JSON.stringify({
  exported: Object.keys(client),
  classes: Object.fromEntries(classes.map(([name, it]) => [name, [...names(it), ...made(name, it)]])),
  bounds: Object.keys(client.BOUNDS),
}));
"""


def declared(kind: str, text: str) -> set[str]:
    """The names of a class or an interface, without what only the types have."""
    found = re.search(rf"(?ms)^export (?:declare )?{kind}\b[^{{]*{{\n(.*?)^}}", text)
    assert found is not None, kind
    return set(re.findall(r"(?m)^  (?:readonly )?(\w+)\??[(:]", found[1])) - {"constructor"}


async def test_the_types_name_what_the_module_has() -> None:
    command = [NODE, "--input-type=module", "--eval", PRINT_NAMES, str(MODULE)]
    done = await trio.run_process(command, capture_stdout=True)
    has = json.loads(done.stdout)
    types = MODULE.with_suffix(".d.ts").read_text()
    assert set(re.findall(r"(?m)^export declare (?:const|class) (\w+)", types)) == set(has["exported"])
    assert declared("interface Bounds", types) == set(has["bounds"])
    for name in ("Client", "Pages", "TurnStream"):
        assert declared(f"class {name}", types) == set(has["classes"][name]), name
