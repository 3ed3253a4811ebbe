// What happened in a turn, and when: noted as it comes, and drawn along the time.

import { h, svg } from "./dom.js";
import { clock, count, counted, duration, roundAbove } from "./format.js";
import { ENDS } from "./lastcall.js";

const BIN_MS = 40;
const BINS_MAX = 240; // with more, two become one
const MOMENTS_MAX = 60;
const GAP_MS = 1500; // a silence that is worth a word
const CATCHING_UP_MS = 120; // events that come so soon after a return were waiting for it
const FAR = 1 << 30; // seqs from here on come after a crash: those between belong to no event
const BURST = 10; // events in one bin: more are as high, or the others would be too low to see
const HEIGHT = 92;
const BAR_TOP = 10;
const BAR_HEIGHT = 54;
const DRAW_MS = 120;

/** The notes of one turn: moments, and how many events came when. Times are of this device's clock, in milliseconds. */
export class TurnLog {
  moments = []; // {at, kind, words, ...}: kinds are those of WORDS
  bins = []; // {at, events, isLate}: `isLate` if the events had waited for a return
  binMs = BIN_MS;
  received = 0;
  missing = 0;
  lastSeq = 0;
  from = null; // the first event's seq
  isConnected = false;
  end = null;
  isOver = false; // whether nothing more is noted, also without an end
  startedAt;
  firstAt = null;
  #lastAt = null;
  #backAt = null;
  #late = 0;
  #mayJump = false;

  constructor(startedAt = Date.now()) {
    this.startedAt = startedAt;
  }

  note(kind, more = {}) {
    if (this.moments.length < MOMENTS_MAX || kind === "end") this.moments.push({ at: Date.now(), kind, ...more });
  }

  /** The stream is open, first or again. */
  opened() {
    if (this.isConnected) return;
    this.isConnected = true;
    const cut = this.moments.findLast((it) => it.kind === "cut");
    if (cut && !this.#backAt) {
      this.#backAt = Date.now();
      this.#late = 0;
      this.note("back", { after: Date.now() - cut.at, caught: 0 });
    } else if (!this.moments.some((it) => it.kind === "accepted")) this.note("accepted");
  }

  /** The connection is gone, or an attempt to come back has failed. */
  waits({ attempt, delayS, error, isOffline }) {
    if (this.isConnected || !this.moments.some((it) => it.kind === "cut" || it.kind === "refused")) {
      const kind = this.received || this.isConnected ? "cut" : "refused";
      this.note(kind, { seq: this.lastSeq, code: error.code, isOffline });
    } else this.note("retry", { attempt, delayS, code: error.code });
    this.isConnected = false;
    this.#backAt = null;
  }

  event(event) {
    const now = Date.now();
    if (event.seq !== undefined) {
      if (this.from === null) this.from = event.seq;
      else if (event.seq !== this.lastSeq + 1 && event.seq < FAR && !this.#mayJump) this.missing += event.seq - this.lastSeq - 1;
      this.#mayJump = event.type === "turn.resumed";
      this.lastSeq = event.seq;
    }
    this.received += 1;
    const isLate = this.#backAt !== null && now - this.#backAt < CATCHING_UP_MS;
    if (isLate) {
      this.#late += 1;
      const back = this.moments.findLast((it) => it.kind === "back");
      if (back) back.caught = this.#late;
    } else if (this.#lastAt !== null && now - this.#lastAt > GAP_MS && this.firstAt !== null && this.#backAt === null) {
      this.note("gap", { at: this.#lastAt, after: now - this.#lastAt });
    }
    if (!isLate && this.#backAt !== null) this.#backAt = null;
    this.#lastAt = now;
    this.#count(now, isLate);
    switch (event.type) {
      case "turn.queued":
        return this.note("queued");
      case "turn.started":
        return this.note("started", { model: event.model });
      case "turn.resumed":
        return this.note("resumed", { attempt: event.attempt, mode: event.mode, seq: event.seq });
      case "turn.delta":
      case "turn.reasoning":
      case "turn.call":
        if (this.firstAt === null) {
          this.firstAt = now;
          this.note("first", { after: now - this.startedAt, isReplay: this.from !== null && this.isReplay });
        }
        return;
      default:
    }
    if (ENDS.has(event.type)) {
      this.end = { at: now, state: event.type.slice(5), reason: event.reason ?? null };
      this.note("end", this.end);
    }
  }

  /** Events from before this page came are sent at once: when they really came, this page does not know. */
  isReplay = false;

  #count(at, isLate) {
    const start = at - ((at - this.startedAt) % this.binMs);
    const last = this.bins.at(-1);
    if (last && last.at >= start) {
      last.events += 1;
      last.isLate ||= isLate;
      return;
    }
    this.bins.push({ at: start, events: 1, isLate });
    if (this.bins.length <= BINS_MAX) return;
    this.binMs *= 2;
    const merged = [];
    for (const bin of this.bins) {
      const place = bin.at - ((bin.at - this.startedAt) % this.binMs);
      if (merged.at(-1)?.at === place) {
        merged.at(-1).events += bin.events;
        merged.at(-1).isLate ||= bin.isLate;
      } else merged.push({ ...bin, at: place });
    }
    this.bins = merged;
  }
}

/** The notes of a turn that this page has not seen, from its record: only begin, start and end are known. */
export function logOf(turn) {
  const log = new TurnLog(Date.parse(turn.created_at));
  const at = (moment) => Date.parse(moment);
  log.moments.push({ at: at(turn.created_at), kind: "accepted" });
  if (turn.started_at) log.moments.push({ at: at(turn.started_at), kind: "started", model: turn.model });
  if (turn.ended_at) {
    log.end = { at: at(turn.ended_at), state: turn.state, reason: turn.reason };
    log.moments.push({ kind: "end", ...log.end });
  }
  log.isRecord = true;
  return log;
}

const RESUMES = { retry: "from the beginning", continue: "after what was kept" };
const CUTS = { timeout: "silent for too long", unreachable: "the connection was cut", cut: "the stream stopped in its middle" };

const WORDS = {
  accepted: () => ["Accepted", "the server has stored the message"],
  queued: () => ["Queued", "behind another turn of this conversation"],
  started: ({ model }) => ["Started", model ? `asked ${model}` : ""],
  first: ({ after, isReplay }) => ["First token", isReplay ? "sent again to this page" : `after ${duration(after)}`],
  gap: ({ after }) => ["Silence", `nothing for ${duration(after)}`],
  refused: ({ code }) => ["Not taken yet", code],
  cut: ({ seq, code, isOffline }) => ["Cut", `${isOffline ? "the network is gone" : (CUTS[code] ?? code)}, after event ${count(seq)}`],
  retry: ({ attempt, delayS, code }) => [`Attempt ${attempt}`, `${code}; the next one in ${duration(delayS * 1000)}`],
  back: ({ after, caught }) => ["Back", `after ${duration(after)}${caught ? `; ${count(caught)} events caught up` : ""}`],
  resumed: ({ mode, attempt }) => ["Resumed", `attempt ${attempt} of the server, ${RESUMES[mode] ?? mode}`],
  end: ({ state, reason }) => [state[0].toUpperCase() + state.slice(1), reason ?? ""],
};

/** The picture of a turn's notes, with the same in words below it. Redraws itself until the turn has ended. */
export class Timeline {
  element;
  #log;
  #picture;
  #list;
  #sum;
  #drawn = 0;
  #timer = null;
  #sizes;

  /** @param tools Elements beside the title, e.g. a button. */
  constructor(log, tools = []) {
    this.#log = log;
    this.#picture = svg("svg", { class: "strip", role: "img", height: HEIGHT });
    this.#list = h("ol", { class: "moments" });
    this.#sum = h("p", { class: "sum" });
    const head = h("div", { class: "timeline-head" }, h("h3", { text: "Timeline" }), this.#sum, h("div", { class: "timeline-tools" }, tools));
    this.element = h("section", { class: "timeline", "aria-label": "Timeline of this turn" }, head, this.#picture, this.#list);
    this.#sizes = new ResizeObserver(() => this.draw());
    this.#sizes.observe(this.element);
  }

  /** Shows other notes: those of the record of the turn, when it has ended. */
  show(log) {
    this.#log = log;
    this.draw();
  }

  /** Draws again soon: a few times a second at most. */
  touch() {
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      this.draw();
    }, Math.max(0, DRAW_MS - (performance.now() - this.#drawn)));
  }

  close() {
    clearTimeout(this.#timer);
    this.#timer = -1; // draws no more
    this.#sizes.disconnect();
  }

  draw() {
    if (!this.element.isConnected || this.#timer === -1) return;
    this.#drawn = performance.now();
    this.#drawPicture();
    this.#drawWords();
    if (!this.#log.end && !this.#log.isOver) this.touch();
  }

  #drawWords() {
    const log = this.#log;
    const all = log.moments;
    while (this.#list.children.length > all.length) this.#list.lastChild.remove();
    all.forEach((moment, index) => {
      const [name, words] = WORDS[moment.kind](moment);
      const key = `${moment.at} ${name} ${words}`;
      if (this.#list.children[index]?.dataset.key === key) return;
      const made = h(
        "li",
        { data: { key, kind: moment.kind, state: moment.state ?? "" }, title: clock(moment.at) },
        h("span", { class: "moment-at", text: `${duration(moment.at - log.startedAt)}` }),
        h("b", { text: name }),
        words ? h("span", { class: "soft", text: words }) : null,
      );
      if (this.#list.children[index]) this.#list.children[index].replaceWith(made);
      else this.#list.append(made);
    });
    this.#sum.textContent = sumOf(log);
  }

  #drawPicture() {
    const log = this.#log;
    const width = Math.max(200, Math.floor(this.element.clientWidth - 2));
    const now = log.end?.at ?? Date.now();
    const span = spanOf(now - log.startedAt, Boolean(log.end));
    const x = (at) => Math.max(0, Math.min(width, ((at - log.startedAt) / span) * width));
    const parts = [svg("rect", { class: "track", x: 0, y: BAR_TOP, width, height: BAR_HEIGHT, rx: 3 })];
    const block = (kind, from, to) => {
      if (to > from) parts.push(svg("rect", { class: kind, x: x(from), y: BAR_TOP, width: Math.max(1, x(to) - x(from)), height: BAR_HEIGHT }));
    };
    const atOf = (kind) => log.moments.find((it) => it.kind === kind)?.at;
    const started = atOf("started");
    const first = log.firstAt;
    if (atOf("queued") !== undefined || (log.isRecord && started)) block("queued", log.startedAt, started ?? now);
    if (log.isRecord) block("ran", started ?? now, now);
    else block("waited", started ?? log.startedAt, first ?? now);
    const most = Math.min(BURST, Math.max(4, ...log.bins.map((it) => it.events)));
    for (const bin of log.bins) {
      const height = Math.max(3, (Math.log1p(Math.min(bin.events, most)) / Math.log1p(most)) * (BAR_HEIGHT - 8));
      const left = x(bin.at);
      const wide = Math.max(bin.isLate ? 4 : 1.5, x(bin.at + log.binMs) - left - 0.75);
      parts.push(svg("rect", { class: bin.isLate ? "late" : "tokens", x: left, y: BAR_TOP + BAR_HEIGHT - height, width: wide, height, rx: 1 }));
    }
    log.moments.forEach((moment, index) => {
      if (moment.kind !== "cut") return;
      const back = log.moments.slice(index).find((it) => it.kind === "back");
      const left = x(moment.at);
      const right = x(back?.at ?? now);
      parts.push(svg("rect", { class: "away", x: left, y: BAR_TOP - 4, width: Math.max(2, right - left), height: BAR_HEIGHT + 8 }));
      for (let at = left - BAR_HEIGHT; at < right; at += 9) {
        const [a, b] = [Math.max(at, left), Math.min(at + BAR_HEIGHT + 8, right)];
        if (b > a) parts.push(svg("line", { class: "hatch", x1: a, x2: b, y1: BAR_TOP + BAR_HEIGHT + 4 - (a - at), y2: BAR_TOP + BAR_HEIGHT + 4 - (b - at) }));
      }
    });
    for (const moment of log.moments) {
      if (!["first", "cut", "back", "end", "resumed"].includes(moment.kind)) continue;
      const at = Math.min(width - 1, Math.max(1, x(moment.at)));
      parts.push(svg("line", { class: `mark ${moment.kind} ${moment.state ?? ""}`, x1: at, x2: at, y1: BAR_TOP - 6, y2: BAR_TOP + BAR_HEIGHT + 4 }));
    }
    const step = roundAbove(span / Math.max(2, width / 90));
    for (let at = 0; at <= span + 1; at += step) {
      const place = (at / span) * width;
      const anchor = at === 0 ? "start" : place > width - 24 ? "end" : "middle";
      parts.push(svg("line", { class: "tick", x1: place, x2: place, y1: BAR_TOP + BAR_HEIGHT, y2: BAR_TOP + BAR_HEIGHT + 5 }));
      parts.push(svg("text", { class: "tick-words", x: Math.min(place, width), y: HEIGHT - 8, "text-anchor": anchor }, at === 0 ? "0" : shortly(at)));
    }
    this.#picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.#picture.setAttribute("width", width);
    this.#picture.setAttribute("aria-label", `${sumOf(log)}. The same is in the list below.`);
    this.#picture.replaceChildren(...parts);
  }
}

/** The length of the axis: grows in steps while the turn runs, so that the picture does not creep. */
function spanOf(ms, hasEnded) {
  if (hasEnded) return Math.max(ms * 1.02, 200);
  let span = 4000;
  while (span < ms * 1.05) span *= 1.5;
  return span;
}

function shortly(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 120_000) return `${Number((ms / 1000).toFixed(2))} s`;
  return `${Number((ms / 60_000).toFixed(1))} min`;
}

function sumOf(log) {
  const spent = duration((log.end?.at ?? Date.now()) - log.startedAt);
  if (log.isRecord) return `${spent}, from the server's record`;
  const cuts = log.moments.filter((it) => it.kind === "cut").length;
  const words = [`${spent}, ${counted(log.received, "event")}`];
  if (cuts) words.push(counted(cuts, "cut"));
  words.push(log.missing ? `${count(log.missing)} missing` : "none missing");
  return words.join(", ");
}
