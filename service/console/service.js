// The service behind this page: its address, the key of this tab, and whether it can be reached.

import { Client, LastcallError } from "./lastcall.js";

const KEY = "lastcall.key";
const PROBE_MS = 5000; // while the service answers
const PROBE_SOON_MS = 1000; // while it does not
const PROBE_BOUND_MS = 4000;

/** The address of the service: this file lies in its `console/VERSION/`. Also right below a proxy's prefix. */
export const ADDRESS = new URL("../../", import.meta.url).href.replace(/\/$/, "");

/**
 * Where the service stands: an EventTarget with the events
 *
 * - `state`, when `state` changes: `connecting`, `online`, `closing` (it shuts down and still answers), `unreachable`
 *   (no answer: it is stopped, or the network is gone), `offline` (the browser says so);
 * - `back`, when it answers again after it did not: read again what may have changed;
 * - `key`, at the first call that is refused for want of a key, or of another one than this tab has, and then at each
 *   such call that would change something; and after a key was entered.
 */
export class Service extends EventTarget {
  state = "connecting";
  since = Date.now();
  wantsKey = false;
  #timer;
  #wasAway = false;

  constructor() {
    super();
    this.client = new Client(ADDRESS, { apiKey: () => this.key, fetch: this.fetch });
    addEventListener("online", () => this.probe());
    addEventListener("offline", () => this.#become("offline"));
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.probe());
  }

  /** The key of this tab. It is kept until the tab is closed, and is in no address. */
  get key() {
    return sessionStorage.getItem(KEY) ?? undefined;
  }

  set key(key) {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
    this.wantsKey = false;
    this.dispatchEvent(new Event("key"));
    this.probe();
  }

  /** As the browser's `fetch`, and notes what the answers say of the service. The client uses it for its calls. */
  fetch = async (url, options) => {
    let answer;
    try {
      answer = await fetch(url, options);
    } catch (error) {
      if (!options?.signal?.aborted) this.#soon(0);
      throw error;
    }
    if (answer.status === 401) this.#refused(options?.method ?? "GET");
    if (answer.status === 503) this.#soon(0);
    return answer;
  };

  /**
   * A call that the client does not have, e.g. of `/admin`. The answer's JSON; null where it has none.
   *
   * Throws: LastcallError, with `code`, `status` and `detail`; the signal's reason, if it is aborted.
   */
  async json(method, path, options = {}) {
    const answer = await this.answer(method, path, options);
    return jsonOf(await reached(answer.text(), options.signal));
  }

  /** As `json`, but returns the answer once it has begun: its body is not read yet. */
  async answer(method, path, { accept = "application/json", body, signal } = {}) {
    const headers = { Accept: accept };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const content = body === undefined ? undefined : JSON.stringify(body);
    const options = { method, headers, body: content, signal, cache: "no-store" };
    const answer = await reached(this.fetch(ADDRESS + path, options), signal);
    if (answer.ok) return answer;
    const problem = jsonOf(await reached(answer.text(), signal)) ?? {};
    const detail = problem.detail ?? `The server answers with ${answer.status}.`;
    throw new LastcallError(detail, { code: problem.code ?? "unknown", status: answer.status, problem });
  }

  /** Asks now whether the service is there, and again from then on. */
  async probe() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (document.visibilityState === "hidden" && this.state === "online") return; // asked again when it is shown
    try {
      const signal = AbortSignal.timeout(PROBE_BOUND_MS);
      const answer = await fetch(`${ADDRESS}/readyz`, { cache: "no-store", signal });
      this.#become(answer.ok ? "online" : answer.status === 503 ? "closing" : "unreachable");
    } catch {
      this.#become(navigator.onLine ? "unreachable" : "offline");
    }
    if (this.#timer === undefined) this.#soon(this.state === "online" ? PROBE_MS : PROBE_SOON_MS);
  }

  #soon(ms) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.probe(), ms);
  }

  #refused(method) {
    if (this.wantsKey && method === "GET") return; // what looks goes on by itself, and a person may have put the key off
    this.wantsKey = true;
    this.dispatchEvent(new Event("key"));
  }

  #become(state) {
    if (state === this.state) return;
    this.state = state;
    this.since = Date.now();
    const isBack = this.#wasAway && state === "online";
    this.#wasAway = state !== "online" && (this.#wasAway || state !== "connecting");
    this.dispatchEvent(new Event("state"));
    if (isBack) this.dispatchEvent(new Event("back"));
  }
}

/** What the network gives. Throws: LastcallError `unreachable`; the signal's reason, if it is aborted. */
async function reached(arriving, signal) {
  try {
    return await arriving;
  } catch (error) {
    signal?.throwIfAborted();
    throw new LastcallError("The server cannot be reached.", { code: "unreachable", cause: error });
  }
}

/** The value of a text; null where it is no JSON, as that of something in between may be, e.g. of a proxy. */
function jsonOf(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
