// What the console computes without a page: the tree's rows, figures of Prometheus' text, JSON to read, and words. Run by test_pure_modules.py.

import assert from "node:assert/strict";
import { test } from "node:test";

const CONSOLE = "../../service/console";
const { TreeModel } = await import(`${CONSOLE}/tree_model.js`);
const { buckets, increase, parse, quantile, sum } = await import(`${CONSOLE}/prometheus.js`);
const { figuresOf, zerosOf } = await import(`${CONSOLE}/figures.js`);
const { laidOut } = await import(`${CONSOLE}/json_text.js`);
const { ended, refused, resumed, waits } = await import(`${CONSOLE}/words.js`);

// The tree

const node = (id, parent, kind = "task", fields = {}) => ({ id, parent, kind, name: `${kind} ${id}`, ...fields });
const nodes = () => [
  node("1", null, "process"),
  node("2", "1", "nursery"),
  node("3", "2", "session"),
  node("4", "3", "turn", { deadline: 9 }),
  node("5", "2", "session"),
  node("6", "5", "turn"),
];
const seen = (model) => model.rows().map(({ node: { id }, level }) => `${" ".repeat(level - 1)}${id}`);

test("rows stand below their owners, with their places among their siblings", () => {
  const model = new TreeModel();
  model.replace(nodes());
  assert.deepEqual(seen(model), ["1", " 2", "  3", "   4", "  5", "   6"]);
  const last = model.rows()[4];
  assert.deepEqual([last.place, last.siblings, last.isOpen], [2, 2, true]);
  assert.deepEqual(model.rows()[3].lines, [false, false, true]);
});

test("nodes without rows of their own hand their children to their owners", () => {
  const model = new TreeModel({ isShown: ({ kind }) => kind !== "nursery" });
  model.replace(nodes());
  assert.deepEqual(seen(model), ["1", " 3", "  4", " 5", "  6"]);
  assert.equal(model.owner(model.nodes.get("3")).id, "1");
});

test("a change takes nodes away, adds them at the end and changes their fields", () => {
  const model = new TreeModel();
  model.replace(nodes(), 1);
  const { added, removed } = model.change(
    {
      removed: ["3", "4", "unknown"],
      added: [node("7", "2", "session"), node("8", "7", "turn"), node("9", "gone", "turn")],
      changed: [{ id: "6", deadline: 7, state: "ending" }, { id: "5", name: "session renamed" }, { id: "4", seq: 1 }],
    },
    3,
  );
  assert.deepEqual(seen(model), ["1", " 2", "  5", "   6", "  7", "   8"]);
  assert.deepEqual(removed.map(({ id }) => id), ["3", "4"]);
  assert.deepEqual(added.map(({ id }) => id), ["7", "8"]);
  const turn = model.nodes.get("6");
  assert.deepEqual([turn.data.deadline, turn.deadlineSetAt, turn.data.state], [7, 3, "ending"]);
  assert.equal(model.nodes.get("5").name, "session renamed");
  model.change({ changed: [{ id: "6", deadline: null }, { id: "8", kind: "stream" }] }, 4);
  assert.equal(model.nodes.get("8").kind, "stream");
  assert.equal("deadline" in turn.data, false);
});

test("a snapshot keeps what a person has closed, and tells what came and went", () => {
  const model = new TreeModel();
  model.replace(nodes(), 1);
  model.setOpen(model.nodes.get("3"), false);
  const { added, removed } = model.replace([...nodes().slice(0, 4), node("7", "1")], 2);
  assert.deepEqual(seen(model), ["1", " 2", "  3", " 7"]);
  assert.deepEqual([added.map(({ id }) => id), removed.map(({ id }) => id)], [["7"], ["5", "6"]]);
  assert.equal(model.nodes.get("4").deadlineSetAt, 1, "a deadline that is the same was not set anew");
});

test("a filter shows matches with their owners and with all that is below them", () => {
  const model = new TreeModel();
  model.replace(nodes());
  model.setOpen(model.nodes.get("2"), false);
  model.filter = "SESSION 5";
  assert.deepEqual(seen(model), ["1", " 2", "  5", "   6"]);
  const match = model.rows()[2];
  assert.deepEqual([match.isMatch, match.place, match.siblings], [true, 1, 1]);
  model.filter = "nothing like it";
  assert.deepEqual(seen(model), []);
});

test("one branch can be shown alone, and none if its node is away", () => {
  const model = new TreeModel();
  model.replace(nodes());
  model.branch = "5";
  assert.deepEqual(seen(model), ["5", " 6"]);
  model.branch = "gone";
  assert.deepEqual(seen(model), []);
});

test("nodes are counted by kind, and below each node", () => {
  const model = new TreeModel();
  model.replace(nodes());
  assert.deepEqual(Object.fromEntries(model.count()), { process: 1, nursery: 1, session: 2, turn: 2 });
  assert.deepEqual([model.nodes.get("1").size, model.nodes.get("5").size], [5, 1]);
});

test("5 000 tasks of one nursery come and go", () => {
  const model = new TreeModel();
  const many = Array.from({ length: 5000 }, (_, index) => node(String(10 + index), "2"));
  model.replace([...nodes(), ...many]);
  assert.equal(model.rows().length, 5006);
  model.change({ removed: many.map(({ id }) => id) });
  assert.equal(model.rows().length, 6);
});

// Prometheus' text

const scrape = (lines) => parse(lines.join("\n"));

test("samples are read with their labels, escapes and infinities", () => {
  const samples = scrape([
    "# HELP a_total words",
    "# TYPE a_total counter",
    'a_total{outcome="completed",reason="said \\"no\\", \\\\ and\\n"} 3',
    'a_total{outcome="failed"} 2 1700000000000',
    'h_bucket{le="+Inf"} 4',
    "plain 1e3",
    "",
    "no sample at all",
  ]);
  assert.equal(samples.get("a_total")[0].labels.reason, 'said "no", \\ and\n');
  assert.equal(sum(samples, "a_total"), 5);
  assert.equal(sum(samples, "a_total", { outcome: "failed" }), 2);
  assert.equal(sum(samples, "plain"), 1000);
  assert.equal(sum(samples, "unknown"), null);
  assert.deepEqual([...buckets(samples, "h")], [[Infinity, 4]]);
});

test("a counter that begins anew has come as far as it counts now", () => {
  assert.equal(increase(5, 8), 3);
  assert.equal(increase(null, 8), 8);
  assert.equal(increase(8, 2), 2);
  assert.equal(increase(8, null), null);
});

test("quantiles are of what was counted between two scrapes", () => {
  const before = new Map([[0.1, 100], [0.5, 100], [1, 100], [Infinity, 100]]);
  const now = new Map([[0.1, 100], [0.5, 110], [1, 110], [Infinity, 120]]);
  assert.equal(quantile(before, now, 0.25), 0.1 + 0.4 * 0.5);
  assert.equal(quantile(before, now, 0.95), 1, "beyond the last bound");
  assert.equal(quantile(now, now, 0.5), null, "nothing was counted");
  assert.equal(quantile(now, new Map([[0.1, 4], [0.5, 4], [1, 4], [Infinity, 4]]), 0.5), 0.05, "begun anew");
});

test("figures are rates per second, also where a series has just appeared", () => {
  const before = scrape(["lastcall_output_tokens_total 100"]);
  const now = scrape([
    "lastcall_output_tokens_total 300",
    'lastcall_turns_total{outcome="completed",reason=""} 4',
    'lastcall_streams{face="native"} 2',
    'lastcall_streams{face="responses"} 3',
  ]);
  const figures = figuresOf(before, now, 2);
  assert.deepEqual(
    [figures.outputTokens, figures.completed, figures.failed, figures.streams, figures.firstToken50],
    [100, 2, 0, 5, null],
  );
});

test("a counter that must be zero and is not there is not taken for zero", () => {
  const found = zerosOf(scrape(["lastcall_resume_gaps_total 0", "lastcall_turns_crashed_total 2"]));
  const by = Object.fromEntries(found.map(({ label, value }) => [label, value]));
  assert.deepEqual([by["Resume gaps"], by["Turns crashed"], by["Tasks left"]], [0, 2, null]);
});

// JSON to read

test("a JSON text is laid out, and says the same", () => {
  const text = String.raw`{"a":[1,-2.50e3,{"b":{}}],"big":12345678901234567890,"a":"x\"{,:\u002c\\",  "c":[ ],"d":true,"":null}`;
  const shown = laidOut(text);
  assert.equal(shown.split("\n").length, 14);
  assert.ok(shown.includes('\n      "b": {}\n'), shown);
  assert.ok(shown.includes('\n  "big": 12345678901234567890,\n  "a": "x'), "no number is rounded, no name is lost");
  assert.deepEqual(JSON.parse(shown), JSON.parse(text));
  const bare = (it) => it.replaceAll(/("(?:[^"\\]|\\.)*")|\s/g, "$1");
  assert.equal(bare(shown), bare(text));
});

test("what is no JSON, or much of it, stays as it is", () => {
  for (const text of ["", "now", '{"city":"Os', '{"a":1}}', `[${"1,".repeat(30_000)}1]`]) assert.equal(laidOut(text), text);
  const deep = laidOut("[".repeat(9000) + "]".repeat(9000));
  assert.ok(deep.length < 600_000, `${deep.length}`);
  assert.equal(laidOut("7"), "7");
});

// Words

test("a wait says what it is for and how long it takes, and a refusal is a sentence", () => {
  const busy = { code: "turn_limit", detail: "1000 turns run." };
  const words = "The server writes as many replies as it may. Attempt 3 in 7 s.";
  assert.equal(waits({ error: busy, delayS: 6.6, attempt: 2, isOffline: false }), words);
  assert.equal(refused(busy), "The server writes as many replies as it may.");
  const unknown = { code: "teapot", detail: "Short and stout" };
  assert.equal(refused(unknown), "Short and stout.");
  assert.equal(waits({ error: unknown, delayS: 0.2, attempt: 1, isOffline: false }), "Short and stout. Attempt 2 in a moment.");
});

test("a reply that outlives its process, and one that does not, say so", () => {
  assert.match(resumed({ mode: "retry" }), /the model is asked anew\.$/);
  assert.match(resumed({ mode: "continue" }), /goes on after what was kept\.$/);
  assert.match(ended({ state: "interrupted", reason: "crash" }), /^The server crashed /);
  assert.match(ended({ state: "interrupted", reason: "shutdown" }), /^The server was stopped /);
  assert.equal(ended({ state: "completed", finish_reason: "stop", stored: false }), "The server's store has not taken this end yet.");
});
