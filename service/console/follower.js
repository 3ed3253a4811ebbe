// Follows one turn: its events across cuts and restarts, with notes for its timeline. The connection can be cut on purpose.

import { Client } from "./lastcall.js";
import { ADDRESS } from "./service.js";
import { TurnLog } from "./timeline.js";

/** A page waits for as long as its person does. */
const BOUNDS = { patienceS: null, pauseMaxS: 4 };

export class Follower {
  log;
  stream = null;
  #service;
  #acts;
  #cutter = new AbortController();
  #left = new AbortController();

  /**
   * @param acts `onTurn(stream)` once the turn's id is known, `onEvent(event, stream)`, `onWait(waiting)` before each
   *   further attempt, `onOpen()` when the connection is there, `onEnd(error)`, with null if the turn has ended.
   */
  constructor(service, acts, startedAt) {
    this.#service = service;
    this.#acts = acts;
    this.log = new TurnLog(startedAt);
  }

  /** Reads the turn that `open(client, options)` begins or finds, perhaps after other calls. Returns when it has ended, or was left. */
  async run(open) {
    const client = new Client(ADDRESS, { apiKey: () => this.#service.key, fetch: this.#fetch, bounds: BOUNDS });
    let isKnown = false;
    const tell = () => {
      if (isKnown || this.stream?.turnId == null) return;
      isKnown = true;
      this.#acts.onTurn(this.stream);
    };
    const options = {
      signal: this.#left.signal,
      onWait: (waiting) => {
        this.log.waits(waiting);
        this.#acts.onWait(waiting);
      },
      onOpen: () => {
        this.log.opened();
        tell();
        this.#acts.onOpen();
      },
    };
    try {
      this.stream = await open(client, options);
      for await (const event of this.stream) {
        this.log.event(event);
        tell();
        this.#acts.onEvent(event, this.stream);
      }
      tell();
      this.log.isOver = true;
      this.#acts.onEnd(null);
    } catch (error) {
      this.log.isOver = true;
      if (!this.#left.signal.aborted) this.#acts.onEnd(error);
    }
  }

  /** Closes the connection under the stream, as a bad network does. The stream comes back by itself. */
  cut() {
    this.#cutter.abort();
    this.#cutter = new AbortController();
  }

  /** Stops to follow. The turn goes on. */
  leave() {
    this.#left.abort();
  }

  #fetch = (url, options) => {
    const signal = AbortSignal.any([options.signal, this.#cutter.signal]);
    return this.#service.fetch(url, { ...options, signal });
  };
}
