// A small client for Lastcall in the browser: no dependency, no build step. docs/client-guide.md explains each part.

export const ENDS = ["turn.completed", "turn.failed", "turn.cancelled", "turn.interrupted"];
const PASSING = [502, 503, 504]; // the server, or the proxy before it, may answer a moment later
const SILENCE_MS = 60_000; // the server sends a comment every 15 s: a connection that is silent for longer is dead
const PAUSE_MAX_S = 10;

/** An answer that refuses the call. `problem` is the problem document: `code` for programs, `detail` for people. */
export class Refused extends Error {
  constructor(problem) {
    super(problem.detail);
    this.problem = problem;
  }

  static async from(response) {
    const unknown = { status: response.status, code: "unknown", detail: `The server answered ${response.status}.` };
    return new Refused(await response.json().catch(() => unknown));
  }
}

/** The events of a streamed response, one after the other. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const silence = setTimeout(() => reader.cancel(), SILENCE_MS);
      const { value, done } = await reader.read().finally(() => clearTimeout(silence));
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop(); // a line that has not wholly arrived
      for (const line of lines) {
        if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // closes the connection where the caller has stopped reading
  }
}

/** Waits before the next attempt: longer each time, by chance, and at least as long as `Retry-After` says. */
export async function pause(attempt, response, signal) {
  const backoff = Math.min(PAUSE_MAX_S, 0.5 * 2 ** attempt) * (0.5 + Math.random() / 2);
  const seconds = Math.max(backoff, Number(response?.headers.get("Retry-After") ?? 0));
  await new Promise((resolve) => {
    setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", resolve, { once: true });
  });
  signal?.throwIfAborted();
}

/**
 * The header that makes a POST safe to repeat: one for each thing that is to be made, and not for each attempt.
 * Browsers have `randomUUID` on https pages and on localhost.
 */
export const newKey = () => ({ "Idempotency-Key": crypto.randomUUID() });

/** What `read` takes from the answer to a call that is safe to repeat. While the server is away, it is called again. */
async function repeat(url, read, { signal, onWait, ...request }) {
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(url, { ...request, signal });
      if (response.ok) return await read(response);
    } catch (error) {
      if (signal?.aborted) throw error;
    }
    if (response && !response.ok && !PASSING.includes(response.status)) throw await Refused.from(response);
    onWait?.();
    await pause(attempt, response, signal);
  }
}

/** The JSON that a call answers. For calls that are safe to repeat: reads, cancel, a POST with a key. */
export const ask = (url, options = {}) => repeat(url, (response) => response.json(), options);

/**
 * The reply after an event, given the reply before it.
 * A turn that goes on after a restart says how many Unicode code points of the text count: an emoji is one of them.
 */
export function textAfter(text, event) {
  if (event.type === "turn.delta") return text + event.text;
  if (ENDS.includes(event.type) && event.text !== undefined) return event.text; // what was kept, where events are gone
  const counts = event.type === "turn.resumed" || event.reason === "crash"; // a crash may take what was shown
  return counts ? [...text].slice(0, event.text_length).join("") : text;
}

/**
 * All events of a turn to its last one, each once, across cuts and restarts.
 * `response` is the stream that started the turn, where there is one.
 */
export async function* follow(turnUrl, { response, signal, onWait } = {}) {
  let seen = 0;
  for (let attempt = 0; ; attempt++) {
    let moved = false;
    try {
      response ??= await fetch(`${turnUrl}/events`, { headers: { "Last-Event-ID": seen }, signal });
      if (response.status === 204) return; // the turn has ended, and all its events were seen
      if (response.status === 410) break; // a crash took events that this client may have seen
      if (!response.ok && !PASSING.includes(response.status)) throw await Refused.from(response);
      for await (const event of response.ok ? events(response) : []) {
        attempt = 0;
        moved = true; // if no other event follows
        seen = event.seq;
        yield event;
        if (ENDS.includes(event.type)) return;
      }
    } catch (error) {
      if (signal?.aborted || error instanceof Refused) throw error;
      moved = false;
    }
    if (!moved) {
      onWait?.();
      await pause(attempt, response, signal);
    }
    response = undefined;
  }
  const { state, reason, error, text } = await ask(turnUrl, { signal, onWait });
  yield { type: `turn.${state}`, reason, error, text }; // `text` is what was kept: show it in place of what was shown
}

/**
 * Starts a turn: gives its URL, and the response that streams it from its first event on.
 *
 * A call without an answer may have arrived all the same. All attempts have one key, so they start one turn.
 */
export function start(sessionUrl, { input, parent }, options) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream", ...newKey() };
  const body = JSON.stringify({ input, parent, on_disconnect: "continue" });
  const read = (response) => ({ url: new URL(response.headers.get("Location"), sessionUrl).href, response });
  return repeat(`${sessionUrl}/turns`, read, { ...options, method: "POST", headers, body });
}

/** Ends a turn. Its streams get `turn.cancelled`; the answer is the turn, ended. */
export const cancel = (turnUrl, options) => ask(`${turnUrl}/cancel`, { ...options, method: "POST" });

/** All turns of a session, oldest first. */
export async function turns(sessionUrl, options) {
  const all = [];
  for (let next = ""; next !== null; ) {
    const page = await ask(`${sessionUrl}/turns?limit=100${next && `&after=${encodeURIComponent(next)}`}`, options);
    all.push(...page.data);
    next = page.next;
  }
  return all;
}

/** The conversation: of all turns those on the path from the first one to `head`. */
export function path(all, head) {
  const byId = new Map(all.map((turn) => [turn.id, turn]));
  const found = [];
  for (let turn = byId.get(head); turn; turn = byId.get(turn.parent)) found.unshift(turn);
  return found;
}
