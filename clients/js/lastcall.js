/**
 * A client of Lastcall's native API: one module without dependencies, for browsers and Node.js 20 and newer.
 *
 *     const client = new Client("http://localhost:8000", { apiKey: "…" });
 *     const session = await client.createSession();
 *     for await (const event of client.stream(session.id, "What is a nursery?")) console.log(event);
 *
 * A stream survives cuts, silent connections, restarts of the server and times without a network: it comes back with
 * `Last-Event-ID`, and yields each event once and in order. Each POST has an `Idempotency-Key`, so a call that was sent
 * again does its work once. Copy this file where you need it, with `lastcall.d.ts` for its types. Refusals are
 * `LastcallError`.
 *
 * Options of this client have names like `idempotencyKey`; the fields of the API keep theirs, like `on_disconnect`.
 */

/** The types of the events that end a turn. */
export const ENDS = new Set(["turn.completed", "turn.failed", "turn.cancelled", "turn.interrupted"]);

/** How long a client waits for what. `lastcall.d.ts` says what each means. */
export const BOUNDS = Object.freeze({
  timeoutS: 65,
  silenceS: 45,
  pauseS: 0.5,
  pauseMaxS: 10,
  patienceS: 120,
  eventBytesMax: 16 * 1024 * 1024,
});

const PASSING = new Set([408, 429, 502, 503, 504]); // the same call may succeed a moment later
const UNSENT = new Set(["ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "UND_ERR_CONNECT_TIMEOUT"]); // as Node.js says it
const LOST = new Set(["events_lost", "events_deleted"]);
const TURN_PATH = /\/sessions\/([^/?#]+)\/turns\/(turn_[0-9a-f]{32})(?:[/?#]|$)/;
const WAIT_S = 30;
const LATE_MS = 1000; // a timer that is later than this was held up: the page was hidden, or the machine slept
const GRACE_S = 5;
const CLOSING_MS = 200; // how long the end of the answer may come after the last event, to use the connection again

/** A call was refused, or got no answer in time. `code` is for programs, `message` and `detail` are for people. */
export class LastcallError extends Error {
  constructor(detail, { code, status = null, title = "", requestId = null, retryAfterS = null, problem = {}, cause }) {
    super(detail, { cause });
    this.name = "LastcallError";
    this.detail = detail;
    this.code = code;
    this.status = status;
    this.title = title;
    this.requestId = requestId;
    this.retryAfterS = retryAfterS;
    this.turnId = problem.turn_id ?? null;
    this.problem = problem;
  }

  /** Whether the same call may succeed a moment later. */
  get isPassing() {
    return PASSING.has(this.status) || ["unreachable", "timeout", "cut"].includes(this.code);
  }
}

const turnsOfErrors = new WeakMap(); // the turn that the `Location` of a refusal names

/** A client of one server. */
export class Client {
  #apiKey;
  #owner;
  #onWait;
  #fetch;

  constructor(url, { apiKey, owner, bounds = {}, onWait, fetch = (...request) => globalThis.fetch(...request) } = {}) {
    this.url = new URL(url, globalThis.location?.href).href.replace(/\/+$/, "");
    this.bounds = { ...BOUNDS, ...bounds };
    this.#apiKey = apiKey;
    this.#owner = owner;
    this.#onWait = onWait;
    this.#fetch = fetch;
  }

  // Sessions

  createSession({ idempotencyKey, signal, onWait, ...body } = {}) {
    return this.#post("/sessions", body, { idempotencyKey, signal, onWait });
  }

  getSession(sessionId, options) {
    return this.#json("GET", ofSession(sessionId), options);
  }

  /** A session with its `ETag`, for `ifMatch`. */
  async sessionEtag(sessionId, options) {
    const { value, headers } = await this.#call("GET", ofSession(sessionId), options);
    return [value, headers.get("ETag")];
  }

  listSessions({ limit = 20, after, status, q, metadata = {}, count, signal, onWait } = {}) {
    const named = Object.entries(metadata).map(([name, value]) => [`metadata.${name}`, value]);
    const query = { limit, after, status, q, count: count ? "true" : undefined, ...Object.fromEntries(named) };
    return this.#json("GET", "/sessions", { query, signal, onWait });
  }

  /** All sessions, the newest first: read in pages while you iterate. */
  sessions(options = {}) {
    return new Pages((after) => this.listSessions({ limit: 100, ...options, after }));
  }

  /** All sessions that have these words, each with its `match`. */
  search(q, options = {}) {
    return this.sessions({ ...options, q });
  }

  updateSession(sessionId, { ifMatch, signal, onWait, ...body }) {
    const headers = ifMatch === undefined ? {} : { "If-Match": ifMatch };
    const isConditional = ifMatch !== undefined || body.seen_head !== undefined;
    return this.#json("PATCH", ofSession(sessionId), { body, headers, isConditional, signal, onWait });
  }

  renameSession(sessionId, title, options = {}) {
    return this.updateSession(sessionId, { ...options, title });
  }

  /** Shows another branch: moves the head to this turn. With `seenHead` only if the head is still that one. */
  switchTo(sessionId, turnId, { seenHead, ...options } = {}) {
    return this.updateSession(sessionId, { ...options, head: turnId, seen_head: seenHead });
  }

  async deleteSession(sessionId, { ifMatch, ...options } = {}) {
    const headers = ifMatch === undefined ? {} : { "If-Match": ifMatch };
    await this.#call("DELETE", ofSession(sessionId), { ...options, headers, isConditional: ifMatch !== undefined });
  }

  /** Copies a conversation up to the turn `at`, the head if left out, into a session of its own. */
  forkSession(sessionId, { at, id, ...options } = {}) {
    return this.#post(`${ofSession(sessionId)}/fork`, { at, id }, options);
  }

  // Messages

  /** The conversation: the messages on the path to the head, oldest first. */
  messages(sessionId, options) {
    return this.#pages(`${ofSession(sessionId)}/messages`, {}, options);
  }

  /** Adds messages without asking a model, all or none. */
  async addMessages(sessionId, items, options) {
    return (await this.#post(`${ofSession(sessionId)}/messages`, { items }, options)).messages;
  }

  async deleteMessage(sessionId, messageId, options) {
    await this.#call("DELETE", `${ofSession(sessionId)}/messages/${part(messageId)}`, options);
  }

  // Turns

  /** Starts a turn that runs without a client, and answers at once. */
  async startTurn(sessionId, message, { idempotencyKey, signal, onWait, ...options } = {}) {
    const body = { input: message, on_disconnect: "continue", ...options, background: true };
    try {
      return await this.#post(`${ofSession(sessionId)}/turns`, body, { idempotencyKey, signal, onWait, isLocated: true });
    } catch (error) {
      const turn = turnsOfErrors.get(error);
      if (!turn || ![503, 504].includes(error.status)) throw error;
      return this.getTurn(...turn, { signal, onWait }); // the turn was accepted, and this is where it is
    }
  }

  /**
   * Sends a message, and streams the reply: the turn begins with the first iteration.
   *
   * The turn outlives this stream, unless `on_disconnect` is `cancel`: call `cancel` to end it.
   */
  stream(sessionId, message, options = {}) {
    return this.#starting(`${ofSession(sessionId)}/turns`, { input: message }, sessionId, options);
  }

  /** Sends a message to this session, which is made if it is not there, or to a new one. */
  chat(message, { sessionId, ...options } = {}) {
    return this.#starting("/chat", { message, session_id: sessionId }, sessionId, options);
  }

  /** Asks the same again, as a sibling of this turn; options replace the turn's. */
  retry(sessionId, turnId, options = {}) {
    return this.#starting(`${ofTurn(sessionId, turnId)}/retry`, {}, sessionId, options);
  }

  /** Asks something else in the place of this turn: a sibling of it. */
  edit(turn, message, options = {}) {
    return this.stream(turn.session_id, message, { ...options, parent: turn.parent });
  }

  /** The events of a turn that was started elsewhere, after the seq `after`, where you have its text up to there. */
  events(sessionId, turnId, { after = 0, text = "", ...options } = {}) {
    ofTurn(sessionId, turnId);
    return this.#streamOf({ sessionId, turnId, seq: after, text, options });
  }

  /** A turn; with `waitS`, up to 60, when it has ended, or after so many seconds as it stands. */
  getTurn(sessionId, turnId, { waitS, ...options } = {}) {
    return this.#json("GET", ofTurn(sessionId, turnId), { ...options, query: { wait: waitS || undefined } });
  }

  /** A turn once it has ended. Its end is bounded by the server's `turn_timeout_s`. */
  async waitTurn(sessionId, turnId, options = {}) {
    for (;;) {
      const turn = await this.getTurn(sessionId, turnId, { ...options, waitS: WAIT_S });
      if (turn.ended_at !== null) return turn;
      await pause(50, options.signal); // if an answer comes at once, all the same
    }
  }

  /** All turns of a session, in the order in which they were accepted. */
  turns(sessionId, options) {
    return this.#pages(`${ofSession(sessionId)}/turns`, {}, options);
  }

  /** The turns with the parent of this one, itself included. */
  siblings(turn, options) {
    return this.#pages(`${ofSession(turn.session_id)}/turns`, { parent: turn.parent ?? "null" }, options);
  }

  /** The conversation as turns: those from the first one to `head`, the session's head if left out. */
  async path(sessionId, { head, ...options } = {}) {
    const last = head ?? (await this.getSession(sessionId, options)).head;
    const all = last === null ? [] : await this.turns(sessionId, options).collect();
    const byId = new Map(all.map((turn) => [turn.id, turn]));
    const found = [];
    for (let turn = byId.get(last); turn; turn = byId.get(turn.parent)) found.push(turn);
    return found.reverse();
  }

  /** Ids, parents, states and times of all turns. */
  tree(sessionId, options) {
    return this.#pages(`${ofSession(sessionId)}/tree`, { limit: 1000 }, options);
  }

  /** Ends a turn, and answers when it has ended. A turn that has ended already stays as it is. */
  cancel(sessionId, turnId, options) {
    return this.#json("POST", `${ofTurn(sessionId, turnId)}/cancel`, options);
  }

  /** Deletes a turn with all that follow it. */
  async deleteTurn(sessionId, turnId, options) {
    await this.#call("DELETE", ofTurn(sessionId, turnId), options);
  }

  // Requests

  #starting(path, body, sessionId, { idempotencyKey = newKey(), requestId, signal, onWait, onOpen, ...rest }) {
    const headers = { "Idempotency-Key": idempotencyKey, ...(requestId && { "X-Request-ID": requestId }) };
    const start = { path, body: { on_disconnect: "continue", ...body, ...rest }, headers };
    return this.#streamOf({ start, sessionId, options: { signal, onWait, onOpen } });
  }

  #streamOf({ options, ...place }) {
    const onWait = options.onWait ?? this.#onWait;
    const open = (...request) => this.#attempt(...request, { isStream: true });
    return new TurnStream(this, open, place, { ...options, onWait });
  }

  #pages(path, query, options) {
    return new Pages((after) => this.#json("GET", path, { ...options, query: { limit: 100, ...query, after } }));
  }

  #post(path, body, { idempotencyKey = newKey(), ...options } = {}) {
    return this.#json("POST", path, { ...options, body, headers: { "Idempotency-Key": idempotencyKey } });
  }

  async #json(method, path, options) {
    return (await this.#call(method, path, options)).value;
  }

  /** Makes a call, again while the server is away or busy. A change with a condition is not made again if it may be done. */
  async #call(method, path, { isConditional, isLocated, onWait = this.#onWait, signal, ...request } = {}) {
    const patience = new Patience(this.bounds, onWait, signal);
    let mayBeDone = false;
    for (;;) {
      patience.begin();
      let error;
      try {
        const answer = await this.#attempt(method, path, { ...request, signal });
        if (answer.ok || (method === "DELETE" && mayBeDone && answer.status === 404)) return readAnswer(answer);
        error = refusal(answer);
        mayBeDone ||= error.isPassing && error.retryAfterS === null;
      } catch (failed) {
        if (!(failed instanceof LastcallError) || !failed.isPassing) throw failed;
        error = failed;
        mayBeDone ||= !UNSENT.has(error.cause?.cause?.code);
      }
      if (!error.isPassing || (isConditional && mayBeDone) || (isLocated && turnsOfErrors.has(error))) throw error;
      await patience.wait(error);
    }
  }

  /**
   * One request. The answer has its whole text in `text`; or, if it is a stream, its body in `connection`.
   *
   * Throws: the signal's reason, if it is aborted; `LastcallError`, if there is no answer in time.
   */
  async #attempt(method, path, { body, query = {}, headers = {}, signal }, { isStream = false } = {}) {
    const given = Object.entries(query).filter(([, value]) => value !== undefined);
    const search = given.length ? `?${new URLSearchParams(given)}` : "";
    const url = `${this.url}${path}${search}`;
    const key = typeof this.#apiKey === "function" ? await this.#apiKey() : this.#apiKey;
    const named = new Headers({ Accept: "application/json", ...headers });
    if (key !== undefined) named.set("Authorization", `Bearer ${key}`);
    if (this.#owner !== undefined) named.set("Lastcall-Owner", this.#owner);
    if (body !== undefined) named.set("Content-Type", "application/json");
    const content = body === undefined ? undefined : JSON.stringify(body);
    const request = { method, headers: named, body: content, redirect: "manual", cache: "no-store" };

    const connection = new Connection(isStream ? this.bounds.silenceS : this.bounds.timeoutS, signal);
    let isOpen = false;
    try {
      const response = await connection.watch(() => this.#fetch(url, { ...request, signal: connection.signal }));
      const answer = { ok: response.ok, status: response.status, headers: response.headers, method, url };
      answer.isRedirect = response.type === "opaqueredirect" || (response.status >= 300 && response.status < 400);
      isOpen = isStream && response.status === 200;
      if (isOpen) return { ...answer, connection: connection.take(response.body) };
      return { ...answer, text: await connection.watch(() => response.text()) };
    } finally {
      if (!isOpen) connection.close();
    }
  }
}

/** A list that is read in pages while you iterate. */
export class Pages {
  #load;

  constructor(load) {
    this.#load = load;
  }

  async *[Symbol.asyncIterator]() {
    for (let after; after !== null; ) {
      const page = await this.#load(after);
      yield* page.data;
      after = page.next;
    }
  }

  async collect() {
    const all = [];
    for await (const item of this) all.push(item);
    return all;
  }
}

/** The events of a turn, each once and in order, across cuts and restarts. Made by the calls of `Client`. */
export class TurnStream {
  #client;
  #open;
  #start;
  #options;
  #isRead = false;

  constructor(client, open, { start = null, sessionId = null, turnId = null, seq = 0, text = "" }, options) {
    this.sessionId = sessionId;
    this.turnId = turnId;
    this.seq = seq;
    this.text = text;
    this.end = null;
    this.#client = client;
    this.#open = open;
    this.#start = start;
    this.#options = options;
  }

  /** Reads to the end, and returns the event that ended the turn: null if it was seen before. */
  async finish() {
    for await (const _ of this);
    return this.end;
  }

  /** Ends the turn, and answers when it has ended. */
  async cancel(options) {
    if (this.turnId === null) throw new Error("the turn has not begun: read its first event, or leave the stream");
    return this.#client.cancel(this.sessionId, this.turnId, options);
  }

  /** Leaving the loop closes the connection. Another loop goes on after the last event. */
  async *[Symbol.asyncIterator]() {
    if (this.#isRead) throw new Error("this stream is being read already");
    this.#isRead = true;
    try {
      yield* this.#attempts();
    } finally {
      this.#isRead = false;
    }
  }

  async *#attempts() {
    const { bounds } = this.#client;
    const patience = new Patience(bounds, this.#options.onWait, this.#options.signal);
    while (this.end === null) {
      const decoder = new EventDecoder(bounds.eventBytesMax);
      let answer;
      let trouble = new LastcallError("The stream has ended before its turn.", { code: "cut" });
      patience.begin();
      try {
        answer = await this.#connect();
        if (answer.status === 204) return; // the turn has ended, and all its events were seen
        if (answer.connection) {
          this.#options.onOpen?.();
          for await (const event of eventsOf(answer.connection, decoder)) {
            if (!this.#isNew(event)) continue;
            patience.renew();
            yield this.#yielded(event);
            if (this.end !== null) return await answer.connection.end();
          }
        } else {
          yield this.#yielded(await this.#record(answer));
        }
      } catch (error) {
        if (!(error instanceof LastcallError) || !(error.isPassing || this.#isInterrupted(error))) throw error;
        trouble = error;
      } finally {
        answer?.connection?.close();
      }
      if (this.end !== null) return;
      patience.pauseS = decoder.retryS || patience.pauseS; // a pause of 0 would stay 0 at each attempt
      // A server that has handed the turn over is asked again at once, but not twice without an event between.
      if (decoder.hasMoved && patience.attempts === 0) patience.attempts = 1;
      else await patience.wait(trouble);
    }
  }

  async #connect() {
    const headers = { Accept: "text/event-stream" };
    const { signal } = this.#options;
    let answer;
    if (this.turnId !== null) {
      if (this.seq) headers["Last-Event-ID"] = String(this.seq);
      answer = await this.#open("GET", `${ofTurn(this.sessionId, this.turnId)}/events`, { headers, signal });
    } else {
      const { path, body, headers: own } = this.#start;
      answer = await this.#open("POST", path, { body, headers: { ...headers, ...own }, signal });
    }
    if (answer.ok) this.#learn(turnOf(answer));
    if (answer.connection && !answer.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      answer.connection.close();
      throw new LastcallError(`${answer.url} answers no event stream.`, { code: "malformed_answer", status: 200 });
    }
    return answer;
  }

  /** Whether another server seems to have answered in place of this one, for a moment. */
  #isInterrupted(error) {
    return error.code === "malformed_answer" && this.seq > 0;
  }

  #learn(turn) {
    if (turn && this.turnId === null) [this.sessionId, this.turnId] = turn;
  }

  /** The end of a turn whose events are gone, from its record. Throws: LastcallError, for any other refusal. */
  async #record(answer) {
    const error = refusal(answer);
    if (!LOST.has(error.code) || this.turnId === null) {
      // A refusal that says where the turn is: it was accepted, and its events are there.
      if ([503, 504].includes(error.status)) this.#learn(turnsOfErrors.get(error));
      throw error;
    }
    const { signal, onWait } = this.#options;
    const turn = await this.#client.waitTurn(this.sessionId, this.turnId, { signal, onWait });
    const { reason, error: failure, finish_reason, usage, text } = turn;
    const kept = { reason, error: failure, finish_reason, usage, text, text_length: lengthOf(text) };
    return { type: `turn.${turn.state}`, replaces: error.code, ...kept };
  }

  #isNew(event) {
    return Number.isInteger(event.seq) && event.seq > this.seq;
  }

  #yielded(event) {
    this.seq = event.seq ?? this.seq;
    if (event.session_id && event.turn_id) this.#learn([event.session_id, event.turn_id]);
    if (event.type === "turn.delta") this.text += event.text;
    else if (event.type === "turn.resumed") this.text = firstOf(this.text, event.text_length ?? 0);
    else if (ENDS.has(event.type)) {
      this.end = event;
      if (event.replaces !== undefined) this.text = event.text;
      else if (event.reason === "crash") this.text = firstOf(this.text, event.text_length); // it may have taken a part
    }
    return event;
  }
}

/** The events of an open connection. Ends with the connection. */
async function* eventsOf(connection, decoder) {
  const text = new TextDecoder("utf-8", { fatal: true });
  try {
    for (let chunk = await connection.read(); chunk !== undefined; chunk = await connection.read()) {
      yield* decoder.feed(text.decode(chunk, { stream: true }));
    }
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof TypeError) {
      throw new LastcallError("The stream has an event that is no JSON.", { code: "cut", cause: error });
    }
    throw error;
  }
  yield* decoder.end();
}

/**
 * Server-sent events, from texts that end anywhere, also between the two characters of a line end.
 *
 * Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
 */
class EventDecoder {
  retryS = null; // the pause before a reconnect that the stream asks for
  hasMoved = false; // whether the last comment says that the turn was handed over to another process
  #max;
  #line = [];
  #data = [];
  #size = 0;
  #afterReturn = false;

  constructor(max) {
    this.#max = max;
  }

  /** The events that are whole now. Throws: SyntaxError, for one that is no JSON; LastcallError, for a huge one. */
  *feed(text) {
    if (this.#afterReturn && text.startsWith("\n")) text = text.slice(1);
    this.#afterReturn = text.endsWith("\r");
    const lines = text.split(/\r\n|\r|\n/);
    const rest = lines.pop();
    for (const line of lines) {
      this.#add(line);
      const whole = this.#line.join("");
      this.#line = [];
      yield* this.#take(whole);
    }
    if (rest) this.#add(rest);
  }

  /** The end of the stream: an event without its blank line is none, but a comment is one. */
  *end() {
    const rest = this.#line.join("");
    if (rest.startsWith(":")) yield* this.#take(rest);
  }

  #add(piece) {
    this.#line.push(piece);
    this.#size += piece.length;
    if (this.#size > this.#max) {
      throw new LastcallError(`An event has more than ${this.#max} bytes.`, { code: "event_too_large" });
    }
  }

  *#take(line) {
    if (line === "") {
      const data = this.#data.join("\n");
      const isEvent = this.#data.length > 0;
      this.#data = [];
      this.#size = 0;
      if (isEvent) yield eventOf(JSON.parse(data));
      return;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") {
      this.#data.push(value);
      this.hasMoved = false;
      return;
    }
    this.#size -= line.length; // of no event: a stream may have any number of them
    if (name === "") this.hasMoved = value.trim() === "moved";
    else if (name === "retry" && /^[0-9]{1,8}$/.test(value)) this.retryS = Number(value) / 1000;
  }
}

function eventOf(data) {
  if (typeof data?.type !== "string") throw new SyntaxError("an event is an object with a type");
  return data;
}

/** A request and its answer, given up when the caller aborts them or the server is silent for too long. */
class Connection {
  #aborted = new AbortController();
  #caller;
  #silenceS;
  #isSilent = false;
  #reader;
  #leave = () => this.#aborted.abort(this.#caller.reason);

  constructor(silenceS, caller) {
    this.#silenceS = silenceS;
    this.#caller = caller;
    if (caller?.aborted) this.#leave();
    else caller?.addEventListener("abort", this.#leave, { once: true });
  }

  get signal() {
    return this.#aborted.signal;
  }

  take(body) {
    this.#reader = body.getReader();
    return this;
  }

  /** The next bytes; undefined at the end. */
  async read() {
    const { value, done } = await this.watch(() => this.#reader.read());
    return done ? undefined : value;
  }

  /** Reads the end of the answer, if it comes at once, so that the connection can be used again. */
  async end() {
    let timer;
    const late = new Promise((resolve) => (timer = setTimeout(resolve, CLOSING_MS)));
    await Promise.race([this.#reader.read().catch(() => {}), late]);
    clearTimeout(timer);
  }

  close() {
    this.#caller?.removeEventListener("abort", this.#leave);
    this.#reader?.cancel().catch(() => {});
    this.#aborted.abort();
  }

  /** Waits for something of the network. Throws: the caller's reason; LastcallError, in any other trouble. */
  async watch(wait) {
    const dog = watchdog(this.#silenceS, () => {
      this.#isSilent = true;
      this.#aborted.abort();
    });
    try {
      return await wait();
    } catch (cause) {
      this.#caller?.throwIfAborted();
      if (this.#isSilent) throw new LastcallError("The server does not answer.", { code: "timeout", cause });
      const why = cause?.cause?.message ?? cause?.message;
      const detail = `The server cannot be reached, or does not answer to this page's origin: ${why}`;
      throw new LastcallError(detail, { code: "unreachable", cause });
    } finally {
      dog.stop();
    }
  }
}

/**
 * Calls `bark` after so many seconds. Once, when the timer itself comes late, it waits for a moment more: the page was
 * hidden or the machine slept, and what has arrived by now is to be read first. When the browser is online again, only
 * one heartbeat is waited for: the connection may be of the network that is gone.
 */
function watchdog(seconds, bark) {
  let timer;
  let due;
  let hasGrace = true;
  const set = (s) => {
    clearTimeout(timer);
    due = Date.now() + s * 1000;
    timer = setTimeout(look, s * 1000);
  };
  const look = () => {
    if (!hasGrace || Date.now() - due < LATE_MS) return bark();
    hasGrace = false;
    set(GRACE_S);
  };
  const onOnline = () => set(Math.min(seconds / 3 + 1, Math.max(0, due - Date.now()) / 1000));
  globalThis.addEventListener?.("online", onOnline);
  set(seconds);
  return {
    stop() {
      clearTimeout(timer);
      globalThis.removeEventListener?.("online", onOnline);
    },
  };
}

/** The pauses between the attempts of one call, or of one stream until its next event. */
class Patience {
  attempts = 0;
  pauseS;
  #bounds;
  #onWait;
  #signal;
  #spentS = 0;
  #beganAt = null;

  constructor(bounds, onWait, signal) {
    this.pauseS = bounds.pauseS;
    this.#bounds = bounds;
    this.#onWait = onWait;
    this.#signal = signal;
  }

  begin() {
    this.#beganAt = Date.now();
  }

  /** There was progress. */
  renew() {
    this.attempts = 0;
    this.#spentS = 0;
    this.#beganAt = null;
  }

  /** Waits before the next attempt. Throws `error` if the patience is over: times without a network do not count. */
  async wait(error) {
    const { pauseMaxS, patienceS, timeoutS } = this.#bounds;
    const isOffline = globalThis.navigator?.onLine === false;
    const backoffS = Math.min(pauseMaxS, this.pauseS * 2 ** Math.min(this.attempts, 30));
    let delayS = backoffS * (0.5 + Math.random() / 2);
    if (isOffline) delayS = pauseMaxS; // the end of this pause is the event `online`; servers on this machine answer before
    if (error.retryAfterS !== null) delayS = Math.max(delayS, error.retryAfterS + Math.random() * this.pauseS);
    if (!isOffline) {
      // A machine that slept for an hour has not been patient for an hour.
      if (this.#beganAt !== null) this.#spentS += Math.min(timeoutS, Math.max(0, Date.now() - this.#beganAt) / 1000);
      if (patienceS !== null && this.#spentS + delayS > patienceS) throw error;
      this.#spentS += delayS;
    }
    this.#beganAt = null;
    this.attempts += 1;
    this.#onWait?.({ attempt: this.attempts, delayS, error, isOffline });
    await pause(delayS * 1000, this.#signal, { canWake: error.retryAfterS === null });
  }
}

/** Waits. With `canWake` less long, if the page is shown again, where timers were slow, or the browser is online again. */
async function pause(ms, signal, { canWake = false } = {}) {
  signal?.throwIfAborted();
  const page = globalThis.document;
  const wakers = [[signal, "abort"]];
  if (canWake) wakers.push([globalThis, "online"], [page, "visibilitychange"]);
  let timer;
  let onWake;
  await new Promise((resolve) => {
    onWake = () => (signal?.aborted || page?.visibilityState !== "hidden") && resolve();
    timer = setTimeout(resolve, Math.min(ms, 2 ** 31 - 1));
    for (const [target, name] of wakers) target?.addEventListener?.(name, onWake);
  });
  clearTimeout(timer);
  for (const [target, name] of wakers) target?.removeEventListener?.(name, onWake);
  signal?.throwIfAborted();
}

/** The value of an answer that is a success. */
function readAnswer({ text, status, headers, url }) {
  if (status === 204 || status === 404) return { value: null, headers };
  try {
    return { value: JSON.parse(text), headers };
  } catch (cause) {
    throw new LastcallError(`${url} answers no JSON.`, { code: "malformed_answer", status, cause });
  }
}

/** The error of an answer that is no success. */
function refusal(answer) {
  const { status, headers, text = "", method, url, isRedirect } = answer;
  let problem;
  try {
    problem = JSON.parse(text);
  } catch {
    problem = null;
  }
  if (typeof problem?.code !== "string") problem = { code: isRedirect ? "redirected" : "unknown" };
  const error = new LastcallError(problem.detail ?? `The server answered ${status} to ${method} ${url}.`, {
    code: problem.code,
    status,
    title: problem.title ?? "",
    requestId: headers.get("X-Request-ID"),
    retryAfterS: retryAfterS(headers.get("Retry-After")),
    problem,
  });
  const turn = turnOf(answer);
  if (turn) turnsOfErrors.set(error, turn);
  return error;
}

/** `Retry-After` in seconds: a number, or the date that a proxy sends. */
function retryAfterS(value) {
  if (value === null) return null;
  if (/^\s*[0-9]+\s*$/.test(value)) return Number(value);
  const date = Date.parse(value);
  return Number.isNaN(date) ? null : Math.max(0, (date - Date.now()) / 1000);
}

/** The ids of the session and the turn that `Location` names: its path may have a prefix that is not ours. */
function turnOf({ headers }) {
  const found = TURN_PATH.exec(headers.get("Location") ?? "");
  return found && [decodeURIComponent(found[1]), found[2]];
}

const ofSession = (sessionId) => `/sessions/${part(sessionId)}`;
const ofTurn = (sessionId, turnId) => `${ofSession(sessionId)}/turns/${part(turnId)}`;

/** A part of a path. Throws: RangeError, if a URL cannot have it. */
function part(value) {
  if (typeof value !== "string" || ["", ".", ".."].includes(value)) {
    throw new RangeError(`${JSON.stringify(value)} is no id: a URL cannot have it`);
  }
  return encodeURIComponent(value);
}

/** As random as `crypto.randomUUID`, which browsers have only on https pages and on localhost. */
function newKey() {
  const bytes = globalThis.crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** How many code points a text has: what the API counts, where JavaScript counts UTF-16 units. */
function lengthOf(text) {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

/** The first so many code points of a text. */
function firstOf(text, count) {
  let place = 0;
  for (const character of text) {
    if (count-- <= 0) break;
    place += character.length;
  }
  return text.slice(0, place);
}
