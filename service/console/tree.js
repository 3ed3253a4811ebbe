// The view Tree: who owns whom in the process that answers, what is alive, and which deadline is next.

import { drainButton, eventsOf, mayPass, pause, refusal, set, whenShown, write } from "./admin.js";
import { button, h, icon } from "./dom.js";
import { clock as timeOfDay, count, counted, duration } from "./format.js";
import { copy } from "./markdown.js";
import { treeCanopy } from "./tree_canopy.js";
import { COUNTED, deadlineWords, isPlumbing, kindOf, shortName } from "./tree_kinds.js";
import { TreeModel } from "./tree_model.js";
import { phaseRail, phaseWords } from "./tree_phases.js";
import { treeRows } from "./tree_rows.js";

const INTERVAL_MS = 200; // between two looks of the service
const NODES_MAX = 20_000;
const TICK_MS = 100; // deadlines count down
const TICK_STILL_MS = 1000;
const AGAIN_MS = 1000;
const BRIGHT_MS = 900;
const NEAR_S = 10;
const LENS = "lastcall.tree.lens";

/** Shows the view in `root`, until `context.signal`. */
export function mount(root, context) {
  const { service, signal } = context;
  const model = new TreeModel();
  let process = null; // what the last snapshot says of its process
  let shutdown = null;
  let clockOf = { clock: 0, at: performance.now() };
  let counts = { nodes: 0, tasks: 0, left_out: 0 };
  let sampling = null;
  let worker = null; // the pid that was chosen
  let followed = null; // {kind, id}: what is shown alone, also while it is away
  let chosen = null; // the node in the details, also after its end
  let isPaused = false;
  let isLive = false;
  let looking = new AbortController();
  let isDirty = false;
  let gone = [];
  let ends = {};
  const came = new Map(); // when nodes came, by id, while they are bright

  // The page

  const lamp = h("span", { class: "lamp", "aria-hidden": "true" });
  const liveWords = h("span", { text: "Connecting…" });
  const live = h("p", { class: "tree-live", data: { state: "connecting" } }, lamp, liveWords);
  const workerPicker = h("select", { class: "input", "aria-label": "Worker process", on: { change: pickWorker } });
  const workerField = h("label", { class: "worker-field", hidden: true }, h("span", { text: "Worker" }), workerPicker);
  const drain = drainButton(context);
  const summary = h("div", { class: "tree-summary", role: "group", "aria-label": "Show only" });
  const chips = COUNTED.map(([kind, noun]) => {
    const number = h("strong", { text: "0" });
    const words = h("span", { text: `${noun}s` });
    const chip = h("button", {
      type: "button", class: "chip", "aria-pressed": "false", data: { tone: kindOf(kind).tone },
      on: { click: () => filterBy(search.value === kind ? "" : kind) },
    }, number, words);
    return { kind, noun, number, words, chip };
  });
  const next = h("button", { type: "button", class: "tree-next", hidden: true, on: { click: showNext } });
  summary.append(...chips.map(({ chip }) => chip));
  const rail = phaseRail();
  const canvas = h("canvas", { class: "canopy", "aria-hidden": "true" });
  const pointed = h("p", { class: "canopy-words", "aria-hidden": "true" });
  const search = h("input", {
    class: "input", type: "search", placeholder: "Filter by name or id", "aria-label": "Filter the tree by name, id or kind",
    spellcheck: false, autocomplete: "off", on: { input: () => filterBy(search.value) },
  });
  const lenses = [
    ["owners", "Owners", "Tasks and what has a name; each row has the deadline of the scopes inside of it"],
    ["everything", "Everything", "All nurseries and cancel scopes too"],
  ].map(([name, text, title]) => ({
    name,
    press: h("button", { type: "button", class: "button small", title, on: { click: () => setLens(name) } }, text),
  }));
  const lens = h("div", { class: "tree-lens", role: "group", "aria-label": "How much is shown" }, lenses.map(({ press }) => press));
  const openAll = button({ label: "Open all", icon: "plus", kind: "bare small", press: () => openEvery(true) });
  const closeAll = button({ label: "Close all", icon: "minus", kind: "bare small", press: () => openEvery(false) });
  const pauser = h("button", { type: "button", class: "button small", "aria-pressed": "false", on: { click: switchPause } }, "Pause");
  const path = h("div", { class: "tree-path", hidden: true });
  const scroller = h("div", {
    class: "tree-rows", role: "tree", tabIndex: 0, "aria-label": "Supervision tree of the process", "aria-busy": "true",
  });
  const nothing = h("p", { class: "tree-nothing soft", hidden: true });
  const details = h("aside", { class: "tree-details", "aria-label": "Details of the chosen node", hidden: true });
  const foot = h("p", { class: "tree-foot soft" });
  const trouble = h("div", { class: "tree-trouble", hidden: true });
  const farewell = h("p", { class: "tree-farewell", role: "status", hidden: true });
  const content = h(
    "div",
    { class: "tree-content" },
    rail.element,
    farewell,
    h("div", { class: "tree-over" }, summary, h("div", { class: "tree-tools" }, search, lens, openAll, closeAll, pauser)),
    h("div", { class: "canopy-box" }, canvas, h("div", { class: "canopy-foot" }, pointed, next)),
    path,
    h("div", { class: "tree-body" }, h("div", { class: "tree-frame" }, scroller, nothing), details),
    foot,
  );
  root.append(
    h("header", { class: "view-head" }, h("h1", { text: "Tree" }), live, workerField, h("div", { class: "view-actions" }, drain)),
    trouble,
    content,
  );

  const rows = treeRows({
    scroller, model, signal, describe, isStill: context.isStill,
    onActive: (node, isAsked) => isAsked && choose(node), // the details of a node stay when its row goes
    onChange: () => render(),
  });
  const canopy = treeCanopy(canvas, { model, signal, onChoose: (node) => rows.show(node), onPoint: point });

  // What comes from the service

  async function run() {
    while (!signal.aborted) {
      await whenShown(signal);
      looking = new AbortController();
      const either = AbortSignal.any([signal, looking.signal]);
      try {
        if (!isPaused) {
          const of = worker === null ? "" : `&worker=${worker}`;
          const address = `/admin/tree/events?interval_ms=${INTERVAL_MS}&nodes=${NODES_MAX}${of}`;
          for await (const event of eventsOf(service, address, { signal: either })) take(event);
          showLive("away", "The stream has ended; looking again…");
        }
      } catch (error) {
        if (signal.aborted) return;
        if (looking.signal.aborted) continue; // hidden, paused, or another worker
        if (worker !== null && error.status === 404) worker = null;
        else {
          showTrouble(error);
          if (!mayPass(error)) {
            await serverIsBack(); // another key shows the view anew
            continue;
          }
        }
      }
      if (isPaused) await resumed();
      else await pause(AGAIN_MS, signal);
    }
  }

  /** Asks first whether the server is there: a proxy without a server behind it may have refused in its place. */
  const serverIsBack = () => new Promise((done) => {
    signal.addEventListener("abort", done, { once: true });
    service.addEventListener("back", done, { once: true, signal });
    service.probe();
  });

  const resumed = () => new Promise((done) => {
    signal.addEventListener("abort", done, { once: true });
    whenResumed = done;
  });
  let whenResumed = () => {};

  function take({ type, data }) {
    if (type === "end") return takeEnd(data);
    trouble.hidden = true;
    content.hidden = false;
    drain.hidden = false;
    clockOf = { clock: data.clock, at: performance.now() };
    if (type === "snapshot") takeSnapshot(data);
    else if (type === "change") note(model.change(data, data.clock), data.ends ?? {});
    process = { ...process, ...data.worker };
    shutdown = data.shutdown ?? shutdown;
    counts = data.counts ?? counts;
    sampling = data.sampling ?? sampling;
    if (data.workers) showWorkers(data.workers);
    schedule();
  }

  function takeSnapshot(data) {
    const isOther = process !== null && (process.pid !== data.worker.pid || process.started_at !== data.worker.started_at);
    if (isOther) {
      model.replace([]);
      choose(null);
      if (shutdown && shutdown.phase !== "serving") void tellLast();
    }
    const { added, removed } = model.replace(data.nodes, data.clock);
    note({ added: isLive && !isOther ? added : [], removed: isOther ? [] : removed }, {});
    set(scroller, "aria-busy", null);
    showLive("live", `Live: process ${data.worker.pid}`);
  }

  function note({ added, removed }, endsNow) {
    const now = performance.now();
    for (const node of added) came.set(node.id, now);
    for (const node of removed) came.delete(node.id);
    gone.push(...removed);
    Object.assign(ends, endsNow);
    if (chosen !== null && removed.includes(chosen)) chosen.end = endsNow[chosen.id] ?? "gone";
  }

  function takeEnd({ reason, shutdown: last }) {
    shutdown = last ?? shutdown;
    const words = {
      shutdown: "The process has released all that it held. Waiting for the next one…",
      replaced: "Another worker serves in its place",
      gone: "This worker is gone",
    }[reason];
    if (reason === "shutdown") {
      const held = [...model.nodes.values()].filter(({ parent }) => parent !== null).map(({ id }) => id);
      note(model.change({ removed: held }), {});
    } else worker = null;
    showLive("gone", words);
    render();
  }

  /** Tells how the process before has stopped, once another one answers. */
  async function tellLast() {
    try {
      const { data } = await service.json("GET", "/admin/shutdowns?limit=1", { signal });
      const last = data[0];
      const total = last?.phases_ms?.total;
      farewell.hidden = total === undefined;
      if (total === undefined) return;
      farewell.replaceChildren(
        icon("check"),
        h("span", { text: `Process ${last.pid} stopped in ${duration(total)}, with ${counted(last.faults?.length ?? 0, "fault")}. This is another one. ` }),
        h("a", { href: "#/shutdowns", text: "Its report" }),
        button({ label: "Close this message", icon: "close", kind: "bare small", press: () => (farewell.hidden = true) }),
      );
    } catch {
      // the view Shutdowns tells why
    }
  }

  function showLive(state, words) {
    isLive = state === "live";
    live.dataset.state = state;
    write(liveWords, words);
    content.dataset.live = state;
  }

  function showTrouble(error) {
    const isOver = !mayPass(error);
    if (isOver || process === null) {
      content.hidden = true;
      drain.hidden = true;
      trouble.hidden = false;
      if (trouble.dataset.code !== error.code) trouble.replaceChildren(refusal(error));
      trouble.dataset.code = error.code;
    }
    showLive(isOver ? "refused" : "away", isOver ? "Not shown" : "The server does not answer; looking again…");
  }

  // Frames

  function schedule() {
    if (isDirty) return;
    isDirty = true;
    requestAnimationFrame(() => {
      isDirty = false;
      if (!signal.aborted) render();
    });
  }

  function render() {
    const kinds = model.count();
    model.branch = followed === null ? null : (findFollowed()?.id ?? "");
    const now = model.rows();
    rows.replace(now, gone, ends);
    [gone, ends] = [[], {}];
    for (const { kind, noun, number, words, chip } of chips) {
      const found = kinds.get(kind) ?? 0;
      write(number, count(found));
      write(words, found === 1 ? noun : `${noun}s`);
      set(chip, "aria-pressed", model.filter === kind ? "true" : "false");
    }
    nothing.hidden = now.length > 0;
    if (now.length === 0) write(nothing, wordsForNothing());
    drawCanopy();
    showPath();
    showDetails();
    rail.show(shutdown, nowOnClock());
    showFoot();
    tick();
  }

  function drawCanopy() {
    const now = performance.now();
    for (const [id, at] of came) if (now - at > BRIGHT_MS) came.delete(id);
    canopy.draw({ active: rows.active, isBright: ({ id }) => came.has(id) });
  }

  function wordsForNothing() {
    if (followed !== null) {
      return `${kindOf(followed.kind).word} ${shortName(followed.id)} has no task now: nothing runs for it. It is shown again as soon as it has work.`;
    }
    return model.filter ? "Nothing in the tree has this name, id or kind." : "Waiting for the first look at the process…";
  }

  const nowOnClock = () => clockOf.clock + (isPaused || !isLive ? 0 : (performance.now() - clockOf.at) / 1000);

  function tick() {
    rows.tick();
    showNextDeadline();
    if (shutdown && shutdown.phase !== "serving") rail.show(shutdown, nowOnClock());
    if (chosen !== null) tickDetails();
  }

  const ticker = setInterval(() => document.visibilityState === "visible" && isLive && tick(), context.isStill() ? TICK_STILL_MS : TICK_MS);
  signal.addEventListener("abort", () => clearInterval(ticker));
  document.addEventListener("visibilitychange", () => document.visibilityState === "hidden" && looking.abort(), { signal });
  addEventListener("resize", () => schedule(), { signal });

  // What a row says

  function describe({ node, isOpen }) {
    const { data } = node;
    const said = [];
    let spoken = "";
    switch (node.kind) {
      case "turn":
        if (data.model) said.push(data.model);
        if (data.text_length) said.push(counted(data.text_length, "character"));
        if (data.seq) said.push(`event ${count(data.seq)}`);
        break;
      case "stream":
        if (data.face) said.push(data.face.replaceAll("_", " "));
        if (data.seq !== undefined) said.push(cursorWords(data));
        break;
      case "session":
        if (data.owner) said.push(`of ${data.owner}`);
        break;
      case "model_connection":
        if (data.upstream) said.push(data.upstream);
        break;
      case "scope":
      case "nursery":
        if (data.shielded) said.push("shielded");
        break;
      default:
    }
    if (isOpen === false) said.push(`+ ${count(node.size)} below`);
    if (data.left_out) said.push(`+ ${count(data.left_out)} not sent`);
    let state = data.cancelled ? "cancelled" : (data.state ?? "");
    if (node.kind === "process") state = "";
    if (state) spoken += `, ${state}`;
    if (said.length > 0) spoken += `, ${said.join(", ")}`;
    return { state, details: said.join(" · "), spoken, deadline: () => deadlineOf(node) };
  }

  /** Where a stream stands in its turn's events: its cursor, and how far it is behind. */
  function cursorWords({ seq, turn }) {
    const behind = (turns.get(turn)?.data.seq ?? seq) - seq;
    return behind > 0 ? `cursor ${count(seq)}, ${count(behind)} behind` : `cursor ${count(seq)}`;
  }

  const turns = {
    get(id) {
      const node = id === undefined ? undefined : model.nodes.get(this.ids.get(id));
      if (node?.data.turn === id) return node;
      for (const it of model.nodes.values()) if (it.kind === "turn") this.ids.set(it.data.turn, it.id);
      return model.nodes.get(this.ids.get(id));
    },
    ids: new Map(),
  };

  /** What has the deadline of a row: its node, or else the soonest of the plumbing right below it that has no row. */
  function soonest(node) {
    if (node.data.deadline !== undefined) return node;
    let found = null;
    for (const child of node.children) {
      if (model.isShown(child)) continue;
      const below = soonest(child);
      if (below !== null && (found === null || below.data.deadline < found.data.deadline)) found = below;
    }
    return found;
  }

  function deadlineOf(node) {
    const found = soonest(node);
    if (found === null) return null;
    const { deadline, deadline_name: name } = found.data;
    const left = deadline - nowOnClock();
    const whole = deadline - (found.deadlineSetAt ?? deadline);
    const share = whole > 0 ? Math.max(0, Math.min(1, left / whole)) : 0;
    const of = name ? deadlineWords(name) : "";
    return {
      of,
      left: leftWords(left),
      share,
      isNear: left < NEAR_S && share < 0.25 && name !== undefined,
      title: `${of || "The time limit of this scope"}: it is cancelled in ${leftWords(left)}`,
    };
  }

  function nextDeadline() {
    let found = null;
    for (const node of model.nodes.values()) {
      if (node.kind === "turn" && node.data.deadline !== undefined && !(found?.data.deadline <= node.data.deadline)) found = node;
    }
    return found;
  }

  function showNextDeadline() {
    const node = nextDeadline();
    next.hidden = node === null;
    if (node === null) return;
    const { deadline, deadline_name: name } = node.data;
    write(next, `Next deadline: ${shortName(node.name)}, ${deadlineWords(name)}, in ${leftWords(deadline - nowOnClock())}`);
  }

  function showNext() {
    const node = nextDeadline();
    if (node !== null) rows.show(node);
  }

  // Filter, lens, workers

  function filterBy(text) {
    search.value = text;
    model.filter = text;
    render();
  }

  function setLens(name) {
    model.isShown = name === "everything" ? () => true : (node) => !isPlumbing(node);
    for (const it of lenses) set(it.press, "aria-pressed", String(it.name === name));
    sessionStorage.setItem(LENS, name);
    render();
  }

  function openEvery(isOpen) {
    model.setAllOpen(isOpen);
    render();
  }

  function switchPause() {
    isPaused = !isPaused;
    set(pauser, "aria-pressed", String(isPaused));
    write(pauser, isPaused ? "Go on" : "Pause");
    if (isPaused) {
      clockOf = { clock: nowOnClock(), at: performance.now() };
      looking.abort();
      showLive("paused", `Paused at ${timeOfDay(new Date())}`);
    } else {
      showLive("connecting", "Connecting…");
      whenResumed();
    }
  }

  function showWorkers(all) {
    workerField.hidden = all.length < 2;
    const options = all.map(({ pid, status }) => h("option", { value: String(pid), selected: pid === process.pid }, `${pid}, ${status}`));
    workerPicker.replaceChildren(...options);
  }

  function pickWorker() {
    worker = Number(workerPicker.value);
    looking.abort();
  }

  function point(node) {
    write(pointed, node === null ? "" : model.ancestors(node).concat(node).filter((it) => !isPlumbing(it)).map(({ name }) => shortName(name)).join(" › "));
  }

  // Details, and what is followed

  function choose(node) {
    chosen = node;
    details.hidden = node === null;
    showDetails();
    drawCanopy();
  }

  const close = () => {
    details.hidden = true;
    chosen = null;
    scroller.focus();
  };

  const detailHead = h("h2", {});
  const detailKind = h("p", { class: "soft" });
  const detailEnd = h("p", { class: "detail-end", hidden: true });
  const owners = h("ol", { class: "detail-owners", "aria-label": "Owned by, from the outside in" });
  const fields = h("dl", { class: "detail-fields" });
  const follow = h("button", { type: "button", class: "button small primary", on: { click: () => chosen && followNode(chosen) } }, "Follow");
  const copyId = button({ text: "Copy its id", icon: "copy", kind: "small", press: (event) => copy(idOf(chosen), event.currentTarget) });
  details.append(
    h("div", { class: "detail-head" }, h("div", {}, detailKind, detailHead), button({ label: "Close the details", icon: "close", kind: "bare small", press: close })),
    detailEnd,
    fields,
    h("div", { class: "detail-actions" }, follow, copyId),
    h("h3", { text: "Owned by" }),
    owners,
  );

  let ownersShown = "";

  function showDetails() {
    if (details.hidden || chosen === null) return;
    const { data } = chosen;
    write(detailHead, shortName(chosen.name));
    write(detailKind, kindOf(chosen.kind).word);
    const isGone = !model.nodes.has(chosen.id);
    detailEnd.hidden = !isGone;
    if (isGone) write(detailEnd, `It has left the tree${chosen.end && chosen.end !== "gone" ? `: ${chosen.end}` : ""}.`);
    set(detailEnd, "data-end", isGone ? (chosen.end ?? "gone") : null);
    copyId.hidden = idOf(chosen) === null;
    set(follow, "aria-pressed", String(followed !== null && findFollowed()?.id === chosen.id));
    const above = model.ancestors(chosen).filter((node) => model.isShown(node));
    const key = `${chosen.id}/${above.map(({ id }) => id).join()}`;
    if (!isGone && ownersShown !== key) {
      ownersShown = key;
      owners.replaceChildren(...above.map((node) => h("li", {}, h("button", { type: "button", class: "link", on: { click: () => rows.show(node) } }, shortName(node.name)))));
    }
    tickDetails(data);
  }

  function tickDetails() {
    if (details.hidden) return;
    const { data } = chosen;
    const isGone = !model.nodes.has(chosen.id);
    const told = [
      ["State", data.cancelled ? "cancelled, still unwinding" : data.state],
      ["Id", data.turn && chosen.kind === "turn" ? data.turn : chosen.kind === "session" ? data.session : null],
      ["Session", chosen.kind === "session" ? null : data.session],
      ["Turn", chosen.kind === "turn" ? null : data.turn],
      ["Owner", data.owner],
      ["Model", data.model],
      ["Upstream", data.upstream],
      ["API", data.face?.replaceAll("_", " ")],
      [chosen.kind === "stream" ? "Cursor" : "Newest event", data.seq === undefined ? null : count(data.seq)],
      ["Text so far", data.text_length === undefined ? null : counted(data.text_length, "character")],
      ["Alive for", data.since === undefined || isGone ? null : duration((nowOnClock() - data.since) * 1000)],
      ["Deadline", data.deadline === undefined || isGone ? null : `${data.deadline_name ? `${deadlineWords(data.deadline_name)}, ` : ""}in ${leftWords(data.deadline - nowOnClock())}`],
      ["Shielded", data.shielded ? "yes: a cancellation from outside does not reach into it" : null],
      ["Below it", isGone ? null : counted(chosen.size, "node")],
    ].filter(([, value]) => value !== null && value !== undefined && value !== "");
    if (fields.childElementCount !== told.length) {
      fields.replaceChildren(...told.map(() => h("div", {}, h("dt", {}), h("dd", {}))));
    }
    told.forEach(([name, value], index) => {
      const [term, words] = fields.children[index].children;
      write(term, name);
      write(words, String(value));
    });
  }

  const idOf = (node) => node.data.turn ?? node.data.session ?? null;

  function followNode(node) {
    const isSame = followed !== null && findFollowed()?.id === node.id;
    if (isSame) return unfollow();
    const id = node.kind === "session" ? node.data.session : node.kind === "turn" ? node.data.turn : node.id;
    context.go(node.kind, id);
  }

  function unfollow() {
    context.go();
  }

  /** The node that is followed. A session has a new one each time it gets work. */
  function findFollowed() {
    const { kind, id } = followed;
    if (model.nodes.get(id)?.kind === kind) return model.nodes.get(id);
    const field = kind === "session" || kind === "turn" ? kind : null;
    if (field === null) return null;
    for (const node of model.nodes.values()) if (node.kind === kind && node.data[field] === id) return node;
    return null;
  }

  function showPath() {
    path.hidden = followed === null;
    if (followed === null) return;
    const node = findFollowed();
    const above = node ? model.ancestors(node).filter((it) => !isPlumbing(it)) : [];
    const words = above.map(({ name }) => shortName(name)).join(" › ");
    write(pathWords, `Following ${kindOf(followed.kind).word} ${shortName(followed.id)}`);
    write(pathOwners, words ? `owned by ${words}` : "");
  }

  const pathWords = h("strong", {});
  const pathOwners = h("span", { class: "soft" });
  path.append(pathWords, pathOwners, button({ text: "Whole tree", icon: "close", kind: "small", press: unfollow }));

  function goTo(parts) {
    followed = parts.length >= 2 ? { kind: parts[0], id: parts[1] } : null;
    if (followed !== null && findFollowed()) model.setOpen(findFollowed(), true);
    render();
  }

  function showFoot() {
    const said = [counted(counts.nodes, "node"), counted(counts.tasks, "task"), rows.words()];
    if (counts.left_out) said.push(`${count(counts.left_out)} nodes left out: there are too many to send`);
    if (sampling) said.push(`a look costs ${duration(sampling.cpu_ms ?? sampling.took_ms)}, at most ${duration(sampling.longest_step_ms)} at once`);
    if (shutdown) said.push(phaseWords(shutdown.phase));
    write(foot, said.join(" · "));
  }

  context.onRoute(goTo);
  context.shortcut("/", "filter the tree", () => search.focus());
  context.shortcut("t", "go to the tree", () => scroller.focus());
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      scroller.focus();
    }
  });
  details.addEventListener("keydown", (event) => event.key === "Escape" && close());
  setLens(sessionStorage.getItem(LENS) === "everything" ? "everything" : "owners");
  goTo(context.parts);
  run();
}

/** What is left, with a steady width while it counts down. */
function leftWords(seconds) {
  if (seconds <= 0) return "0.0 s";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return seconds < 60 ? `${Math.ceil(seconds)} s` : duration(Math.ceil(seconds) * 1000);
}
