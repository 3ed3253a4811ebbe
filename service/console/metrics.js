// The view Metrics: small charts of the service's own figures, and the counters that must stay 0.

import { mayPass, pause, refusal, set, whenShown, write } from "./admin.js";
import { chart } from "./chart.js";
import { h } from "./dom.js";
import { figuresOf, gaugesOf, zerosOf } from "./figures.js";
import { boundWords, bytes, count, duration } from "./format.js";
import { parse } from "./prometheus.js";

const INTERVAL_MS = 2000;
const SPAN_MS = 5 * 60_000;
const SPAN_MIN_MS = 60_000; // the charts begin with so much, and grow
const GAP_MS = 3 * INTERVAL_MS; // after a longer pause a line breaks: the page did not look

/** A figure with about three digits: `0.42`, `8.3`, `96`, `1,204`. */
function figure(number) {
  const size = Math.abs(number);
  if (size >= 99.5 || Number.isInteger(number)) return count(Math.round(number));
  return number.toFixed(size < 0.995 ? 2 : 1);
}

const seconds = (value) => duration(value * 1000);
const roundSeconds = (value) => boundWords(value * 1000);

const CHARTS = [
  {
    title: "Turns ended",
    about: "per second, by outcome",
    series: [
      { name: "completed", label: "completed", tone: "good" },
      { name: "cancelled", label: "cancelled", tone: "quiet" },
      { name: "interrupted", label: "interrupted", tone: "warm" },
      { name: "failed", label: "failed", tone: "bad" },
    ],
    format: (value) => `${figure(value)}/s`,
    top: 1,
  },
  {
    title: "Time to the first token",
    about: "from the start of a turn; of the turns between two looks",
    series: [
      { name: "firstToken50", label: "p50", tone: "first" },
      { name: "firstToken95", label: "p95", tone: "second" },
    ],
    format: seconds,
    scaleFormat: roundSeconds,
    top: 0.1,
  },
  {
    title: "Tokens",
    about: "per second",
    series: [
      { name: "outputTokens", label: "out", tone: "first" },
      { name: "inputTokens", label: "in", tone: "second" },
    ],
    format: (value) => `${figure(value)}/s`,
    top: 10,
  },
  {
    title: "Turns at work",
    about: "now",
    series: [
      { name: "running", label: "running", tone: "first" },
      { name: "queued", label: "queued", tone: "second" },
    ],
    format: figure,
    top: 5,
  },
  {
    title: "Event streams",
    about: "open, of all faces",
    series: [{ name: "streams", label: "open", tone: "first" }],
    format: figure,
    top: 5,
  },
  {
    title: "Event-loop lag",
    about: "how late the loop wakes: what every client waits",
    series: [
      { name: "lag50", label: "p50", tone: "first" },
      { name: "lag99", label: "p99", tone: "second" },
    ],
    format: seconds,
    scaleFormat: roundSeconds,
    top: 0.01,
  },
];

const TILES = [
  { label: "Sessions at work", value: (it) => whole(it.sessionsRunning), about: (it) => `${whole(it.sessionsIdle)} idle` },
  { label: "Turns running", value: (it) => whole(it.turnsRunning), about: (it) => `${whole(it.turnsQueued)} queued` },
  { label: "Event streams", value: (it) => whole(it.streams), about: (it) => faces(it.streamsByFace) },
  { label: "Model calls", value: (it) => whole(it.upstreamActive), about: (it) => `${whole(it.upstreamIdle)} idle connections` },
  { label: "Tasks", value: (it) => whole(it.tasks), about: (it) => workers(it.workers) },
  { label: "Memory", value: (it) => (it.memory === null ? "–" : bytes(it.memory)), about: (it) => cores(it.cpu) },
];

const whole = (value) => (value === null ? "–" : count(value));
const workers = (number) => (number === null ? "" : `in ${number === 1 ? "one worker" : `${number} workers`}`);
const cores = (cpu) => (cpu === null || cpu === undefined ? "resident" : `CPU ${Math.round(cpu * 100)} % of a core`);

function faces(byFace) {
  const open = [...byFace].filter(([, value]) => value > 0).map(([face, value]) => `${whole(value)} ${face.replaceAll("_", " ")}`);
  return open.length > 0 ? open.join(", ") : "none open";
}

/** Shows the view in `root`, until `context.signal`. It asks every two seconds, and not while the page is hidden. */
export async function mount(root, { service, signal }) {
  const points = [];
  let before = null; // the scrape before, with its time

  const tiles = TILES.map(({ label }) => {
    const value = h("dd", { class: "tile-value", text: "–" });
    const about = h("dd", { class: "tile-about" });
    return { value, about, tile: h("div", { class: "tile" }, h("dt", { text: label }), value, about) };
  });
  const verdict = h("p", { class: "zeros-verdict", role: "status" });
  const zeros = h("ul", { class: "zeros" });
  const zeroPart = h(
    "section",
    { class: "zeros-part", "aria-labelledby": "zeros-title" },
    h("div", {}, h("h2", { id: "zeros-title", text: "What must be zero" }), verdict),
    zeros,
  );
  const charts = CHARTS.map((options) => chart(options));
  const trouble = h("div", {});
  const figures = h(
    "div",
    { class: "figures", hidden: true },
    h("dl", { class: "tiles" }, tiles.map(({ tile }) => tile)),
    zeroPart,
    h("div", { class: "charts" }, charts.map((it) => it.element)),
  );
  const about = h(
    "p",
    { class: "view-about" },
    "From ",
    h("a", { href: "metrics", text: "/metrics" }),
    ", of all workers together, every two seconds while you look. A monitoring system keeps more: docs/operations.md has a dashboard and alerts.",
  );
  root.append(h("header", { class: "view-head" }, h("h1", { text: "Metrics" }), about), trouble, figures);

  async function look() {
    const answer = await service.answer("GET", "/metrics", { signal, accept: "text/plain" });
    const scrape = parse(await answer.text());
    const at = Date.now();
    const gauges = gaugesOf(scrape);
    if (before !== null) {
      const point = { at, ...figuresOf(before.scrape, scrape, (at - before.at) / 1000) };
      point.afterGap = at - before.at > GAP_MS;
      points.push(point);
      while (points[0].at < at - SPAN_MS) points.shift();
      gauges.cpu = point.cpu;
    }
    before = { at, scrape };
    TILES.forEach(({ value, about: below }, index) => {
      write(tiles[index].value, value(gauges));
      write(tiles[index].about, below(gauges));
    });
    showZeros(zerosOf(scrape), gauges.isStoreRefusing);
    const since = Math.min(points[0]?.at ?? at, at - SPAN_MIN_MS);
    for (const it of charts) it.draw(points, since, at);
  }

  function showZeros(found, isStoreRefusing) {
    const wrong = found.filter(({ value }) => value > 0);
    const isLoud = wrong.length > 0 || isStoreRefusing;
    set(zeroPart, "data-state", isLoud ? "loud" : "calm");
    const said = [];
    if (wrong.length > 0) said.push(`${wrong.length} of ${found.length} are not: docs/operations.md says what to do.`);
    if (isStoreRefusing) said.push("The store refuses writes.");
    write(verdict, isLoud ? said.join(" ") : "All are: nothing was lost, and nothing leaked.");
    zeros.replaceChildren(
      ...found.map(({ label, means, value }) =>
        h(
          "li",
          { data: { state: value > 0 ? "loud" : value === null ? "unknown" : "calm" }, title: means },
          h("strong", { text: whole(value) }),
          h("span", { text: label }),
          value > 0 ? h("em", { text: means }) : null,
        ),
      ),
    );
  }

  while (!signal.aborted) {
    await whenShown(signal);
    try {
      await look();
      trouble.replaceChildren();
      figures.hidden = false;
    } catch (error) {
      if (signal.aborted) return;
      if (!mayPass(error) || before === null) {
        figures.hidden = true;
        trouble.replaceChildren(refusal(error));
      }
      if (!mayPass(error)) return; // another key shows the view anew
    }
    await pause(INTERVAL_MS, signal);
  }
}
