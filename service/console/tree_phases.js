// The phases of a shutdown as they pass, each against its bound.

import { set, write } from "./admin.js";
import { h } from "./dom.js";
import { boundWords, duration } from "./format.js";

const PHASES = [
  { name: "lame_duck", title: "Lame duck", about: "not ready; everything still works" },
  { name: "draining", title: "Drain", about: "new work is refused; running turns may finish" },
  { name: "interrupting", title: "Interrupt", about: "what still runs is ended and stored" },
  { name: "releasing", title: "Release", about: "streams, connections, model clients, the store" },
];
const ORDER = ["serving", "expected", "lame_duck", "draining", "closing", "interrupting", "releasing", "released"];
const WORDS = {
  serving: "serving",
  expected: "a stop signal has come",
  lame_duck: "lame duck",
  draining: "draining",
  closing: "closing the listeners",
  interrupting: "interrupting",
  releasing: "releasing",
  released: "released",
};

/** A phase in words. */
export const phaseWords = (phase) => WORDS[phase] ?? phase;

/** The rail. `show` is called with what the service tells of its shutdown, and the moment on its clock. */
export function phaseRail() {
  const title = h("p", { class: "rail-title", role: "status" });
  const steps = PHASES.map(({ name, title: words, about }) => {
    const time = h("span", { class: "rail-time" });
    const bar = h("i");
    const step = h(
      "li",
      { class: "rail-step", data: { phase: name, state: "ahead" } },
      h("div", { class: "rail-words" }, h("strong", { text: words }), time),
      h("div", { class: "rail-bar" }, bar),
      h("p", { class: "soft", text: about }),
    );
    return { name, step, time, bar };
  });
  const element = h("section", { class: "rail", "aria-label": "Shutdown", hidden: true }, title, h("ol", {}, ...steps.map(({ step }) => step)));

  function show(shutdown, now) {
    element.hidden = !shutdown || shutdown.phase === "serving";
    if (element.hidden) return;
    const { phase, reason, entered, bounds_s: bounds } = shutdown;
    write(title, `Shutting down${reason ? `, by ${reason}` : ""}: ${phaseWords(phase)}`);
    steps.forEach(({ name, step, time, bar }, index) => {
      const since = beginOf(entered, name);
      const isPast = ORDER.indexOf(phase) > ORDER.indexOf(name);
      const isNow = since !== null && !isPast;
      const until = isNow ? now : endOf(entered, index, now);
      const bound = bounds[name] ?? 0;
      const most = boundWords(bound * 1000);
      step.hidden = name === "lame_duck" && bound === 0 && since === null;
      const state = since === null ? (isPast ? "skipped" : "ahead") : isNow ? "now" : "done";
      set(step, "data-state", state);
      set(step, "aria-current", isNow ? "step" : null);
      const took = since === null ? 0 : Math.max(0, until - since);
      write(time, since === null ? `up to ${most}` : `${duration(took * 1000)} of ${most}`);
      bar.style.transform = `scaleX(${bound > 0 ? Math.min(1, took / bound).toFixed(3) : since === null ? 0 : 1})`;
    });
  }

  return { element, show };
}

/** The report counts the closing of the listeners as a part of the interrupting. */
function beginOf(entered, name) {
  if (name === "interrupting") return entered.closing ?? entered.interrupting ?? null;
  return entered[name] ?? null;
}

function endOf(entered, index, now) {
  for (const { name } of PHASES.slice(index + 1)) {
    const at = beginOf(entered, name);
    if (at !== null) return at;
  }
  return entered.released ?? now;
}
