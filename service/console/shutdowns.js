// The view Shutdowns: the last reports, each phase as a bar on one scale with its bound.

import { drainButton, mayPass, pause, refusal } from "./admin.js";
import { h } from "./dom.js";
import { ago, boundWords, count, counted, date, duration } from "./format.js";

const LIMIT = 50;
const AGAIN_MS = 10_000;
const PHASES = [
  ["notice", "Notice"],
  ["lame_duck", "Lame duck"],
  ["draining", "Drain"],
  ["interrupting", "Interrupt"],
  ["releasing", "Release"],
];
const CODES = {
  0: "clean",
  70: "ended by its watchdog",
  71: "its supervisor crashed",
  75: "finished with faults",
  78: "start refused",
};

/** Shows the view in `root`, until `context.signal`. */
export async function mount(root, context) {
  const { service, signal } = context;
  const actions = h("div", { class: "view-actions", hidden: true }, drainButton(context));
  const about = h("p", {
    class: "view-about",
    text: "How the processes of this server have stopped, the newest first. All phases of a stop share one scale; a phase takes only the time that it needs.",
  });
  const place = h("div", { "aria-live": "off" });
  root.append(h("header", { class: "view-head" }, h("h1", { text: "Shutdowns" }), actions, about), place);
  let shown = "";
  service.addEventListener("back", () => look(), { signal });

  async function look() {
    try {
      const found = await service.json("GET", `/admin/shutdowns?limit=${LIMIT}`, { signal });
      const key = JSON.stringify(found);
      actions.hidden = false;
      if (key === shown) return true; // nothing new: whoever reads or has marked something is not disturbed
      shown = key;
      place.replaceChildren(found.data.length > 0 ? listOf(found.data) : nothing(found.kept));
    } catch (error) {
      if (signal.aborted) return false;
      if (!mayPass(error) || shown === "") {
        actions.hidden = true;
        shown = "";
        place.replaceChildren(refusal(error));
      }
      return mayPass(error);
    }
    return true;
  }

  while (!signal.aborted && (await look())) await pause(AGAIN_MS, signal);
}

function nothing(kept) {
  const words =
    kept === "none"
      ? "This server keeps no reports: its store has no file beside which they could lie. Name a file in the setting shutdowns_file (LASTCALL_SHUTDOWNS_FILE), and each stop leaves its report there."
      : "No process of this server has stopped so far. When one does, its report is kept, and the next process shows it here: how long each phase took, which turns and streams were ended, and what went wrong.";
  return h("div", { class: "blank" }, h("h2", { text: kept === "none" ? "Reports are not kept" : "No shutdown yet" }), h("p", { text: words }));
}

const listOf = (reports) => h("ol", { class: "reports" }, reports.map((it) => (it.kind === "stop" ? stop(it) : unreported(it))));

const UNREPORTED = {
  crash: "This process is gone and has said nothing: it was killed (kill -9, out of memory) or the machine stopped. The next start ended its turns as interrupted, or went on with them.",
  unknown: "This process has left no report so far. It is or was in another container or on another machine: this process cannot see whether it still runs or was killed.",
};

function unreported({ kind, pid, started_at: startedAt }) {
  return h(
    "li",
    { class: "report", data: { state: kind } },
    h(
      "div",
      { class: "report-head" },
      h("h2", { text: "No report" }),
      h("span", { class: "soft", text: `process ${pid}, started ${date(startedAt)}` }),
      h("span", { class: "report-result", text: kind }),
    ),
    h("p", { class: "soft", text: UNREPORTED[kind] }),
  );
}

function stop(report) {
  const { at, reason, faults = [], phases_ms: took, exit_code: code } = report;
  const isClean = faults.length === 0 && code === 0;
  return h(
    "li",
    { class: "report", data: { state: isClean ? "clean" : "faults" } },
    h(
      "div",
      { class: "report-head" },
      h("h2", {}, `${reasonWords(reason)}${took?.total === undefined ? "" : ` in ${duration(took.total)}`}`),
      h("span", { class: "soft" }, h("time", { dateTime: at, title: at, text: `${date(at)}, ${agoWords(at)}` }), ` · process ${report.pid} · ran ${ran(report)}`),
      h("span", { class: "report-result", text: `exit ${code ?? "?"} · ${CODES[code] ?? "by a signal"}` }),
    ),
    took?.total === undefined ? null : bars(report), // another version may have written it otherwise
    tallies(report),
    faults.length > 0 ? h("ul", { class: "faults", "aria-label": "Faults" }, faults.map((it) => h("li", { text: it }))) : null,
  );
}

const reasonWords = (reason) => (reason ? `${reason[0].toUpperCase()}${reason.slice(1)}: stopped` : "Stopped");
const agoWords = (moment) => (ago(moment) === "now" ? "just now" : `${ago(moment)} ago`);
const ran = ({ began_at: began, started_at: started }) => duration(Date.parse(began) - Date.parse(started));

/** One row for each phase: its name, its bar where it lies in the whole, its time. The scale ends with the last bar. */
function bars({ phases_ms: took, bounds_ms: bounds }) {
  const total = Math.max(took.total, 1);
  const rows = h("dl", { class: "phases" });
  let begin = 0;
  for (const [name, title] of PHASES) {
    const ms = took[name];
    const bound = bounds?.[name];
    if (ms === undefined || (name === "lame_duck" && ms < 0.5 && !bound)) continue;
    const bar = h("div", { class: "phase-bar", data: { phase: name } });
    bar.style.left = `${(begin / total) * 100}%`;
    bar.style.width = `${(ms / total) * 100}%`;
    const track = h("div", { class: "phase-track", "aria-hidden": "true" }, bar);
    if (bound > 0 && begin + bound <= total * 1.0001) {
      const tick = h("div", { class: "phase-bound", title: `at most ${boundWords(bound)}` });
      tick.style.left = `calc(${((begin + bound) / total) * 100}% - 1px)`;
      track.append(tick);
    }
    const isOver = bound > 0 && ms > bound * 1.1 + 100;
    const share = bound > 0 ? `, ${percent(ms / bound)} of ${boundWords(bound)}` : "";
    rows.append(
      h("dt", { text: title }),
      h("dd", { class: "phase-cell" }, track),
      h("dd", { class: "phase-time", data: isOver ? { over: "true" } : {} }, duration(ms), h("span", { class: "soft", text: share })),
    );
    begin += ms;
  }
  return rows;
}

function percent(share) {
  if (share < 0.01) return "under 1 %";
  return `${Math.round(share * 100)} %`;
}

function tallies(report) {
  const told = [
    ["turns finished", report.turns_finished],
    ["interrupted", report.turns_interrupted],
    ["suspended", report.turns_suspended],
    ["streams ended", report.streams_ended],
    ["streams not read to their end", report.streams_aborted],
    ["connections cut", report.connections_aborted, true],
    ["model clients closed", report.clients_closed],
    ["tasks left", report.tasks_left, true],
  ];
  return h(
    "dl",
    { class: "tallies", "aria-label": `What the stop did: ${counted(report.turns_finished, "turn")} finished` },
    told.map(([name, value, mustBeZero]) =>
      h("div", { data: mustBeZero && value > 0 ? { bad: "true" } : {} }, h("dt", { text: name }), h("dd", { text: count(value) })),
    ),
  );
}
