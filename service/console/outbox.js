// What this tab has sent, until the server has told its turn. All of it is sent again with its key, and so done once: after a
// reload, when the server is back, and wherever its writer is meanwhile. What is refused is kept for the box it came from.

import { Follower } from "./follower.js";
import { toast } from "./toasts.js";
import { refused } from "./words.js";

const NAME = "lastcall.outbox";

/**
 * What a follower opens to send a message, `{key, sessionId, input}`: `title` names the conversation that it begins, `retry` is the
 * turn that is asked again, `parent` the one that it follows, `isQueued` lets it wait. `made(session)` tells of the new conversation.
 */
export const sending = (sent, made) => async (client, options) => {
  const { sessionId } = sent;
  const named = { ...options, idempotencyKey: sent.key };
  if (sent.title !== undefined) {
    const { signal, onWait } = options;
    made(await client.createSession({ id: sessionId, title: sent.title, idempotencyKey: `${sent.key}-session`, signal, onWait }));
  }
  if (sent.retry) return client.retry(sessionId, sent.retry, named);
  if (sent.parent !== undefined) named.parent = sent.parent;
  if (sent.isQueued) named.on_conflict = "queue";
  return client.stream(sessionId, sent.input, named);
};

class Outbox {
  #sent = new Map([JSON.parse(sessionStorage.getItem(NAME) ?? "[]")].flat().map((it) => [it.key, it]));
  #couriers = new Map(); // by key: the followers of what is sent while its conversation is not open
  #asked = null; // what `deliver` was called with last

  put(sent) {
    this.#sent.set(sent.key, sent);
    this.#keep();
  }

  drop(sent) {
    this.#sent.delete(sent.key);
    this.#keep();
  }

  /** What waits in this conversation; what was refused there has `refusal`, in words. null: of a conversation that was not made. */
  of(sessionId) {
    return [...this.#sent.values()].find((it) => it.sessionId === sessionId) ?? null;
  }

  /** As `of`, for the conversation that is opened and sends it from now on by itself. */
  claim(sessionId) {
    const sent = this.of(sessionId);
    this.#couriers.get(sent?.key)?.leave();
    this.#couriers.delete(sent?.key);
    return sent;
  }

  /**
   * Sends what waits in all conversations but the open one. It goes on when the view is left, and what was refused for want of a
   * key is sent again when one is entered, whichever view is shown. `made(session)`: as of `sending`.
   */
  deliver(service, openId, made) {
    if (this.#asked === null) service.addEventListener("key", () => service.wantsKey || this.deliver(...this.#asked));
    this.#asked = [service, openId, made];
    for (const sent of this.#sent.values()) {
      if (sent.refusal || sent.sessionId === openId || this.#couriers.has(sent.key)) continue;
      this.#deliver(service, sent, made);
    }
  }

  #deliver(service, sent, made) {
    let isMade = sent.title === undefined;
    const end = () => this.#couriers.delete(sent.key);
    const courier = new Follower(service, {
      onTurn: () => {
        end();
        this.drop(sent);
        courier.leave(); // the turn goes on
      },
      onEvent() {},
      onWait() {},
      onOpen() {},
      onEnd: (error) => {
        end();
        if (error && error.status !== 401) this.#refused(sent, error, isMade);
      },
    });
    this.#couriers.set(sent.key, courier);
    courier.run(
      sending(sent, (session) => {
        isMade = true;
        made(session);
      }),
    );
  }

  #refused(sent, error, isMade) {
    const refusal = refused(error);
    const isThere = isMade && error.code !== "session_not_found";
    if (sent.retry) this.drop(sent);
    else this.put({ ...sent, sessionId: isThere ? sent.sessionId : null, refusal });
    toast(`A message to another conversation was refused. ${refusal}`, { kind: "error" });
  }

  #keep() {
    try {
      sessionStorage.setItem(NAME, JSON.stringify([...this.#sent.values()]));
    } catch {
      // The browser's place for it is full: it is sent all the same, but does not outlive a reload.
    }
  }
}

export const outbox = new Outbox();
