// What the views Tree, Shutdowns and Metrics share: streams of `/admin`, readable refusals, and the button that drains.

import { button, h } from "./dom.js";
import { LastcallError } from "./lastcall.js";

const SILENCE_MS = 8000; // the service sends a comment every two seconds

/** Writes a text where it has changed, so that the layout and screen readers hear of changes only. */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Sets or removes an attribute where it has changed. */
export function set(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/**
 * The events of a stream, each with its `type` and its data. Ends when the body does. A stream that is silent for longer
 * than the service ever is counts as cut.
 *
 * Throws: LastcallError, as `service.answer`; the signal's reason.
 */
export async function* eventsOf(service, path, { signal }) {
  const silence = new AbortController();
  const either = AbortSignal.any([signal, silence.signal]);
  let timer = setTimeout(() => silence.abort(), SILENCE_MS);
  try {
    const answer = await service.answer("GET", path, { signal: either, accept: "text/event-stream" });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE_MS);
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = eventOf(block);
        if (event !== null) yield event;
      }
    }
  } catch (error) {
    signal.throwIfAborted();
    if (error instanceof LastcallError) throw error;
    throw new LastcallError("The connection was cut.", { code: "unreachable", cause: error });
  } finally {
    clearTimeout(timer);
    silence.abort(); // closes the connection, whatever has ended the reading
  }
}

function eventOf(block) {
  let type = "message";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) type = line.slice(6).trim();
    else if (line.startsWith("data:")) data += line.slice(5);
  }
  return data === "" ? null : { type, data: JSON.parse(data) };
}

const REFUSALS = {
  unauthorized: [
    "This needs a key",
    "This server has API keys. Enter one that may administer: the key button at the top right.",
  ],
  not_permitted: [
    "This key may not administer",
    "The key of this tab is valid, but it is not one of those that may see and do this. Enter another one with the key button at the top right.",
  ],
  loopback_only: [
    "Only from the machine of the server",
    "This server has no API keys, so it shows this only to a browser on its own machine. Give it keys to look from elsewhere (docs/security.md).",
  ],
  proxied_without_keys: [
    "Not through a proxy",
    "This server has no API keys, so it shows this to no request that came through a proxy. Give it keys (docs/proxies.md).",
  ],
  cross_site: ["Refused: another site", "The request came from a page of another site. Open the console at the server's own address."],
  stream_limit: ["Too many are looking", "The server feeds as many trees as it can. This page tries again."],
  unreachable: ["No answer", "The server cannot be reached. This page tries again."],
  shutting_down: ["The server is shutting down", "It answers this no longer. This page tries again, and finds the next process."],
  not_ready: ["The server is starting", "It answers this in a moment. This page tries again."],
};

/** A refusal in words: what it is, and what to do. Other errors are told as the server tells them. */
export function refusal(error) {
  const [title, words] = REFUSALS[error.code] ?? [
    error.status === 404 ? "Not here" : "This cannot be shown",
    error.status === 404 ? "This server has no such address. It may be of another version than this page." : error.message,
  ];
  return h(
    "div",
    { class: "blank refusal", data: { code: error.code ?? "" }, role: "alert" },
    h("h2", { text: title }),
    h("p", { text: words }),
  );
}

/** Whether trying again without a change of the key may help. */
export const mayPass = (error) => !(error instanceof LastcallError) || ![401, 403, 404].includes(error.status);

/**
 * Waits for a time, for the page to be shown again, or for the signal; and while the page is hidden, for longer.
 */
export function pause(milliseconds, signal) {
  return new Promise((done) => {
    const end = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", end);
      document.removeEventListener("visibilitychange", look);
      done();
    };
    const look = () => document.visibilityState === "visible" && end();
    let timer;
    const wait = () => {
      timer = setTimeout(() => (document.visibilityState === "visible" ? end() : wait()), milliseconds);
    };
    wait();
    signal.addEventListener("abort", end, { once: true });
    document.addEventListener("visibilitychange", look);
    if (signal.aborted) end();
  });
}

/** Returns once the page is shown, or the signal is aborted. */
export async function whenShown(signal) {
  while (document.visibilityState !== "visible" && !signal.aborted) await pause(60_000, signal);
}

/** The button that begins the shutdown of the server, after a question. */
export function drainButton({ service, ask, toast, signal }) {
  return button({
    text: "Drain…",
    label: "Shut the server down as a stop signal would",
    icon: "stop",
    kind: "danger",
    async press() {
      const answer = await ask({
        title: "Shut this server down?",
        words:
          "As a stop signal does: new work is refused from now on, running turns may finish within the drain, then they are interrupted and kept with what they have, and the processes end. Only what supervises the server starts it again.",
        yes: "Drain and stop",
        kind: "danger",
      });
      if (answer === null) return;
      try {
        const { bounds_s: bounds } = await service.json("POST", "/admin/drain", { body: {}, signal });
        toast(`The shutdown has begun. All is over within ${Math.round(bounds.total)} s.`);
        service.probe();
      } catch (error) {
        if (signal.aborted) return;
        toast(error.message, { kind: "error" });
      }
    },
  });
}
