// A chat in one page: streams, stops, retries and edits; a reload, a lost connection or a restarted server loses nothing.

import { ENDS, Refused, ask, cancel, follow, newKey, path, start, textAfter, turns } from "./small_client.js";

const server = new URLSearchParams(location.search).get("server") ?? "http://127.0.0.1:8000";
const isNew = location.hash === "";
if (isNew) history.replaceState(null, "", `#page-${crypto.randomUUID()}`); // a reload and a copied address find it again
const sessionId = location.hash.slice(1);
const sessionUrl = `${server}/sessions/${sessionId}`;

const [log, status, form, message, sendButton, stopButton, keepButton] =
  ["log", "status", "form", "message", "send", "stop", "keep"].map((id) => document.getElementById(id));
const otherTabs = new BroadcastChannel(sessionUrl);

let work = new AbortController(); // what the page does now: new work ends it
let running = null; // the URL of the turn that is running
let editing = null; // the turn whose input is in the text box

function begin() {
  work.abort();
  work = new AbortController();
  return { signal: work.signal, onWait: () => say("The server is away or busy. Trying again…") };
}

const say = (text) => (status.textContent = text);

/** Runs what a person has asked for. Work that newer work has ended says nothing. */
async function attempt(action) {
  const options = begin();
  try {
    await action(options);
  } catch (error) {
    if (!options.signal.aborted) say(error.message);
  } finally {
    if (!options.signal.aborted) showRunning(null);
  }
}

/** Shows the conversation as the server has it, and follows its newest turn where that is running. */
async function show(options, started = {}) {
  const { head } = await ask(sessionUrl, options);
  const shown = path(await turns(sessionUrl, options), head);
  options.signal.throwIfAborted();
  say("");
  log.replaceChildren(...shown.map(element));
  const newest = shown.at(-1);
  if (!newest || newest.ended_at) return;
  const url = `${sessionUrl}/turns/${newest.id}`;
  showRunning(url);
  await relay(url, log.lastElementChild, { ...options, response: started.url === url ? started.response : undefined });
}

/** Puts a turn's events into the page. All of them from the first one on: the reply so far has no seq to go on from. */
async function relay(url, turn, options) {
  const reply = turn.querySelector(".reply");
  reply.textContent = "";
  for await (const event of follow(url, options)) {
    say("");
    if (event.type === "turn.delta") reply.append(event.text);
    else reply.textContent = textAfter(reply.textContent, event);
    if (ENDS.includes(event.type)) showEnd(turn, { ...event, state: event.type.slice("turn.".length) });
  }
}

async function send(input, parent) {
  await attempt(async (options) => {
    sendButton.disabled = true;
    let started;
    try {
      started = await start(sessionUrl, { input, parent }, options);
    } catch (error) {
      if (!(error instanceof Refused) || error.problem.code !== "turn_in_progress") throw error;
      await show(options); // another tab was first: show its turn, keep this message
      return;
    }
    edit(null);
    otherTabs.postMessage("a turn has begun");
    await show(options, started);
  });
}

/** A turn as a part of the page. The reply is added as text, so nothing in a reply becomes HTML. */
function element(turn) {
  const made = document.createElement("article");
  made.className = "turn";
  const [input, reply, end] = ["input", "reply", "end"].map((name) => {
    const part = document.createElement("div");
    part.className = name;
    return part;
  });
  input.textContent = turn.input;
  reply.textContent = turn.text;
  made.append(input, reply, end, button("Retry", () => send(turn.input, turn.parent)), button("Edit", () => edit(turn)));
  showEnd(made, turn);
  return made;
}

function button(text, action) {
  const made = document.createElement("button");
  made.textContent = text;
  made.addEventListener("click", action);
  return made;
}

function showEnd(turn, { state, reason, error }) {
  turn.dataset.state = state;
  const why = { shutdown: "The server was stopped before the end of the reply.", crash: "The server crashed before the end of the reply." };
  const words = { failed: error?.message, cancelled: "Stopped.", interrupted: why[reason] };
  turn.querySelector(".end").textContent = words[state] ?? "";
}

function showRunning(url) {
  running = url;
  sendButton.disabled = url !== null;
  stopButton.hidden = url === null;
}

function edit(turn) {
  editing = turn;
  message.value = turn?.input ?? "";
  keepButton.hidden = turn === null;
  message.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  send(message.value, editing ? editing.parent : undefined); // with the same parent it takes the place of that turn
});
stopButton.addEventListener("click", () => cancel(running).catch((error) => say(error.message)));
keepButton.addEventListener("click", () => edit(null));
otherTabs.addEventListener("message", () => attempt(show));

attempt(async (options) => {
  if (isNew) {
    const headers = { "Content-Type": "application/json", ...newKey() };
    const body = JSON.stringify({ id: sessionId });
    await ask(`${server}/sessions`, { ...options, method: "POST", headers, body });
  }
  await show(options);
});
