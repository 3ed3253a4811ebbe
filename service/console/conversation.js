// One conversation: the turns on the path to its head, and the box for the next message.

import { dropOutputs, keepOutputs, outputsOf } from "./calls.js";
import { button, h } from "./dom.js";
import { ago, count, counted, until } from "./format.js";
import { Follower } from "./follower.js";
import { LastcallError } from "./lastcall.js";
import { copy } from "./markdown.js";
import { outbox, sending } from "./outbox.js";
import { TurnView } from "./turn.js";
import { refused, waits } from "./words.js";

const TIMELINES = "lastcall.timelines";
const SHOWN = 30; // turns at first, the newest
const AT_ONCE = 6; // requests
const FOLLOWED_MAX = 6; // turns
const POLL_MS = 4000;
const NEAR = 90; // pixels from the end: the page goes on with what arrives
const TITLE_MAX = 60;
const ROWS_MAX = 10;

const drafts = new Map(); // what was written and not sent yet, by session; null: for a new conversation

/** A name for something new. `crypto.randomUUID` is not there on pages that are neither https nor of this machine. */
function newName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((it) => it.toString(16).padStart(2, "0")).join("");
}

/** `acts`: `changed(session)`, `gone(id)`, `tell(id)` other tabs, `rename(session)`, `remove(session)`, `back()`. */
export class Conversation {
  element;
  session = null;
  #id = null;
  #context;
  #acts;
  #work = new AbortController(); // of the conversation that is open
  #tree = new Map();
  #path = [];
  #records = new Map();
  #views = new Map();
  #followers = new Map(); // by turn id
  #resting = new Set(); // turns whose events were refused: they are not followed for a while
  #pending = null; // the view of a message that has no turn yet
  #keyless = null; // what the pending view is of, if its key was refused: it is not sent until the next attempt, or another key
  #shown = SHOWN;
  #isReading = false;
  #isStale = false;
  #known = "";
  #editing = null;
  #sticks = true;

  #title = h("h2", { class: "talk-title", dir: "auto" });
  #facts = h("p", { class: "talk-facts soft" });
  #headTools;
  #log = h("div", { class: "turns" });
  #earlier;
  #blank;
  #scroller;
  #latest;
  #form;
  #box;
  #send;
  #stop;
  #editBar;
  #status;

  constructor(context, acts) {
    this.#context = context;
    this.#acts = acts;
    this.#headTools = h(
      "div",
      { class: "talk-tools", hidden: true },
      button({ label: "Rename", icon: "edit", kind: "bare", press: () => acts.rename(this.session) }),
      button({ label: "Delete", icon: "trash", kind: "bare", press: () => acts.remove(this.session) }),
    );
    const back = button({ label: "All conversations", icon: "list", kind: "bare back", press: () => acts.back() });
    const head = h("header", { class: "talk-head" }, back, h("div", { class: "talk-names" }, this.#title, this.#facts), this.#headTools);
    this.#earlier = button({ text: "Show earlier turns", kind: "small", hidden: true, press: () => this.#showEarlier() });
    this.#blank = h("div", { class: "blank hello" });
    this.#scroller = h(
      "div",
      { class: "talk-scroll", tabIndex: 0, role: "region", "aria-label": "Conversation" },
      h("div", { class: "column" }, this.#earlier, this.#blank, this.#log),
    );
    this.#scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    this.#latest = button({ text: "Latest", icon: "down", kind: "small latest", hidden: true, press: () => this.#toEnd() });
    this.element = h("section", { class: "talk", "aria-label": "Conversation" }, head, this.#scroller, this.#composer());
    const poll = setInterval(() => this.#isVisible() && context.service.state === "online" && this.refresh(), POLL_MS);
    context.signal.addEventListener("abort", () => {
      clearInterval(poll);
      this.#leave();
      this.#id = null;
      this.#deliver();
    });
  }

  #isVisible() {
    return document.visibilityState === "visible";
  }

  #composer() {
    this.#box = h("textarea", {
      class: "input box",
      rows: 1,
      placeholder: "Write a message",
      "aria-label": "Message",
      on: { input: () => this.#typed(), keydown: (event) => this.#pressed(event) },
    });
    this.#send = button({ text: "Send", icon: "send", kind: "primary", type: "submit" });
    this.#stop = button({ text: "Stop", icon: "stop", kind: "", hidden: true, press: () => this.stop() });
    this.#editBar = h("div", { class: "edit-bar", hidden: true }, h("span", { text: "You edit an earlier message: the reply begins a new branch there." }), button({ text: "Do not edit", kind: "small bare", press: () => this.#edit(null) }));
    this.#status = h("p", { class: "status", role: "status" });
    this.#form = h(
      "form",
      { class: "composer", on: { submit: (event) => this.#submitted(event) } },
      this.#latest,
      h("div", { class: "column" }, this.#editBar, h("div", { class: "box-row" }, this.#box, this.#stop, this.#send), this.#status),
    );
    return this.#form;
  }

  focusBox() {
    this.#box.focus();
  }

  // Opening

  /** Shows this conversation; none, if `id` is null: then the first message begins one. */
  async open(id) {
    if (id === this.#id && this.#known !== "") return this.refresh();
    this.#leave();
    this.#id = id;
    const { signal } = this.#work;
    const sent = outbox.claim(id);
    this.#deliver();
    this.#box.value = drafts.get(id) ?? "";
    this.#fit();
    this.#say("");
    this.#showHead();
    this.#showBlank();
    if (sent?.refusal) this.#giveBack(sent, sent.refusal);
    else if (sent) this.#start(sent);
    if (id === null) return;
    if (sent?.title === undefined || sent.refusal) {
      this.#scroller.setAttribute("aria-busy", "true");
      await this.refresh({ isFirst: true });
      this.#scroller.removeAttribute("aria-busy");
    }
    if (!signal.aborted) this.#toEnd();
  }

  /** Has the messages sent that wait in other conversations. */
  #deliver() {
    outbox.deliver(this.#context.service, this.#id, this.#acts.changed);
  }

  #leave() {
    this.#work.abort();
    this.#work = new AbortController();
    if (this.#id !== null || this.#box.value) drafts.set(this.#id, this.#editing ? "" : this.#box.value);
    for (const view of [...this.#views.values(), this.#pending]) view?.close();
    this.#views.clear();
    this.#followers.clear();
    this.#resting.clear();
    this.#records.clear();
    this.#tree.clear();
    this.#log.replaceChildren();
    this.#pending = null;
    this.#keyless = null;
    this.#path = [];
    this.#shown = SHOWN;
    this.#known = "";
    this.#editing = null;
    this.#editBar.hidden = true;
    this.session = null;
    this.#sticks = true;
  }

  /** Reads what has changed, here or in another tab. */
  async refresh({ isFirst = false } = {}) {
    if (this.#id === null) return;
    if (this.#isReading) {
      this.#isStale = true;
      return;
    }
    const { signal } = this.#work;
    this.#isReading = true;
    try {
      do {
        this.#isStale = false;
        await this.#read(signal);
      } while (this.#isStale && !signal.aborted);
    } catch (error) {
      if (!signal.aborted) this.#failedToRead(error, isFirst);
    } finally {
      this.#isReading = false;
      if (signal.aborted && this.#id !== null && this.#known === "") this.refresh({ isFirst });
    }
  }

  async #read(signal) {
    const { client } = this.#context;
    const id = this.#id;
    const session = await client.getSession(id, { signal });
    signal.throwIfAborted();
    this.session = session;
    this.#acts.changed(session);
    this.#showHead();
    const known = `${session.updated_at} ${session.head} ${session.status} ${this.#shown}`;
    if (known === this.#known) return;
    const tree = await client.tree(id, { signal }).collect();
    signal.throwIfAborted();
    this.#tree = new Map(tree.map((it) => [it.id, it]));
    this.#path = [];
    for (let at = this.#tree.get(session.head); at; at = this.#tree.get(at.parent)) this.#path.push(at.id);
    this.#path.reverse();
    await this.#fetchRecords(signal);
    signal.throwIfAborted();
    this.#known = known;
    this.#show();
  }

  get #window() {
    return this.#path.slice(-this.#shown);
  }

  async #fetchRecords(signal) {
    const { client } = this.#context;
    const isWanted = (id) => !this.#records.get(id)?.ended_at && !(this.#records.has(id) && this.#followers.has(id));
    let wanted = this.#window.filter(isWanted);
    if (wanted.length > AT_ONCE && this.#tree.size <= 100) {
      for (const turn of await client.turns(this.#id, { signal }).collect()) this.#records.set(turn.id, turn);
      return;
    }
    while (wanted.length) {
      const some = wanted.slice(0, AT_ONCE);
      wanted = wanted.slice(AT_ONCE);
      const turns = await Promise.all(some.map((it) => client.getTurn(this.#id, it, { signal }).catch(ifGone)));
      for (const turn of turns) if (turn) this.#records.set(turn.id, turn);
    }
  }

  #failedToRead(error, isFirst) {
    if (error.status === 401) return;
    if (error.code === "session_not_found") {
      const id = this.#id;
      if (outbox.of(id)) return; // its first message is on its way
      this.#leave();
      this.#id = null;
      if (!drafts.get(null)) drafts.set(null, drafts.get(id) ?? ""); // its words begin another one
      this.#context.toast(refused(error), { kind: "error" });
      this.#acts.gone(id);
      return;
    }
    if (isFirst || !(error instanceof LastcallError)) this.#say(refused(error), "error");
  }

  // Showing

  #showHead() {
    const { session } = this;
    this.#headTools.hidden = !session;
    this.#title.textContent = session ? session.title || "Untitled" : "New conversation";
    this.#facts.replaceChildren();
    this.#context.title(session?.title);
    if (!session) return;
    const { input_tokens: asked, output_tokens: answered } = session.usage;
    const facts = [counted(session.message_count, "message"), `${count(asked + answered)} tokens`, `used ${ago(session.last_accessed_at)}`, `expires in ${until(session.expires_at)}`];
    if (session.model) facts.unshift(session.model);
    this.#facts.textContent = facts.join(" · ").replace("used now", "in use");
  }

  #showBlank() {
    const isEmpty = this.#path.length === 0 && !this.#pending;
    this.#blank.hidden = !isEmpty;
    this.#earlier.hidden = this.#path.length <= this.#shown;
    if (!isEmpty || this.#blank.hasChildNodes()) return;
    const example = (text) => button({ text, kind: "", press: () => this.#fill(text) });
    this.#blank.append(
      h("h2", { text: "What shall we talk about?" }),
      h("p", { text: "Each reply here ends properly: cut the connection, reload the page or restart the server in its middle, and see." }),
      h("div", { class: "examples" }, example("What is a nursery?"), example("Why do streams end?")),
    );
  }

  #fill(text) {
    this.#box.value = text;
    this.#typed();
    this.focusBox();
  }

  /** Puts the turns of the path on the page: those that are there stay, so nothing flickers and nothing is lost. */
  #show() {
    const wanted = this.#window.filter((it) => this.#records.has(it));
    const known = this.#pending?.id;
    if (known && wanted.includes(known)) this.#settle();
    for (const [id, view] of [...this.#views]) {
      if (wanted.includes(id)) continue;
      view.close();
      view.element.remove();
      this.#views.delete(id);
      this.#followers.delete(id);
    }
    let before = null;
    for (const id of wanted) {
      const turn = this.#records.get(id);
      let view = this.#views.get(id);
      if (!view) {
        view = this.#newView(turn.input);
        this.#views.set(id, view);
      }
      const siblings = this.#siblings(id);
      view.show(turn, { place: siblings.indexOf(id) + 1, total: siblings.length });
      const next = before ? before.nextElementSibling : this.#log.firstElementChild;
      if (next !== view.element) this.#log.insertBefore(view.element, next);
      before = view.element;
      const isFollowable = !turn.ended_at && !this.#followers.has(id) && !this.#resting.has(id);
      if (isFollowable && this.#followers.size < FOLLOWED_MAX) this.#follow(turn, view);
    }
    if (this.#pending) this.#log.append(this.#pending.element);
    this.#askOutputs();
    this.#showBlank();
    this.#showRunning();
    this.#stick();
  }

  /** The message that was on its way has its turn: its view replaces the one that a look at the server may have made meanwhile. */
  #settle() {
    const { id } = this.#pending;
    const twin = this.#views.get(id);
    twin?.close();
    twin?.element.remove();
    this.#views.set(id, this.#pending);
    this.#pending = null;
  }

  /** The last reply asks for the outputs of its calls; and so does the one whose outputs are edited. */
  #askOutputs() {
    const last = this.#pending ? null : this.#path.at(-1);
    const edited = this.#editing && outputsOf(this.#editing.turn).length > 0 ? this.#editing.turn.parent : null;
    for (const [id, view] of this.#views) view.askOutputs(id === last || id === edited);
  }

  #showEarlier() {
    const height = this.#scroller.scrollHeight;
    this.#shown += SHOWN;
    this.#known = "";
    this.#sticks = false;
    this.refresh().then(() => (this.#scroller.scrollTop += this.#scroller.scrollHeight - height));
  }

  #newView(input) {
    return new TurnView(input, {
      retry: (view) => this.#retry(view),
      edit: (view) => this.#edit(view),
      fork: (view) => this.#fork(view),
      step: (view, by) => this.#step(view, by),
      answer: (view, outputs) => this.#answer(view, outputs),
      nameOf: (turn, callId) => this.#functionOf(turn, callId),
      shown: () => this.#stick(),
      wantsTimeline: () => sessionStorage.getItem(TIMELINES) !== "off",
      reasoning: (turn, markdown) => this.#readReasoning(turn, markdown),
    });
  }

  /** The name of the function that was called; the id of the call where the turn with the call is not known here. */
  #functionOf(turn, callId) {
    const items = this.#records.get(turn?.parent)?.items ?? [];
    return items.find((it) => it.type === "function_call" && it.call_id === callId)?.name ?? callId;
  }

  /** All turns with the parent of this one, in their order. */
  #siblings(id) {
    const { parent } = this.#tree.get(id);
    return [...this.#tree.values()].filter((it) => it.parent === parent).map((it) => it.id);
  }

  async #readReasoning(turn, markdown) {
    const { signal } = this.#work;
    try {
      for await (const event of this.#context.client.events(turn.session_id, turn.id, { signal })) {
        if (event.type === "turn.reasoning") markdown.append(event.text);
        if (event.type === "turn.delta") break;
      }
      markdown.end();
    } catch (error) {
      if (!signal.aborted) markdown.append(`*${refused(error)}*`);
    }
  }

  // Sending

  #submitted(event) {
    event.preventDefault();
    const text = this.#box.value;
    if (!this.#mayBegin() || !text.trim()) return;
    const sent = { key: newName(), input: text, isQueued: this.#running.length > 0 && !this.#editing };
    if (this.#editing) sent.parent = this.#editing.turn.parent;
    if (this.#id === null) {
      sent.sessionId = `sess_${newName()}`;
      sent.title = titleOf(text);
    } else sent.sessionId = this.#id;
    this.#box.value = "";
    drafts.delete(this.#id);
    this.#edit(null, { isSent: true });
    this.#fit();
    outbox.put(sent);
    if (sent.title === undefined) this.#start(sent);
    else this.#acts.go(sent.sessionId); // opening it sends what is in the outbox
  }

  /** Whether nothing is on its way: the next message waits for the answer, so that the two keep their order. One without a key is sent again. */
  #mayBegin() {
    if (this.#pending === null || this.#pending.id) return true;
    if (this.#keyless) {
      this.#drop(this.#pending);
      this.#start(this.#keyless);
    } else this.#say("The message before this one is still on its way.", "wait");
    return false;
  }

  #retry(view) {
    if (!view.turn || !this.#mayBegin()) return; // the record of a reply that has just ended is read at this moment
    const { id, parent, input } = view.turn;
    const outputs = outputsOf(view.turn);
    this.#begin({ retry: id, parent, input: outputs.length > 0 ? outputs : input });
  }

  /** Sends the outputs of a turn's calls: the next turn, or another version of it. */
  #answer(view, outputs) {
    if (!this.#mayBegin()) return;
    dropOutputs(view.id, outputs);
    this.#edit(null, { isSent: true });
    this.#begin({ parent: view.id, input: outputs });
  }

  #begin(asked) {
    const sent = { key: newName(), sessionId: this.#id, ...asked };
    outbox.put(sent);
    this.#start(sent);
  }

  /** Sends what is in the outbox, and follows the turn. */
  #start(sent) {
    const { signal } = this.#work;
    if (this.#pending) this.#settle();
    this.#keyless = null;
    this.#say("");
    const view = (this.#pending = this.#newView(sent.input));
    if (sent.parent !== undefined) this.#hideAfter(sent.parent);
    this.#log.append(view.element);
    this.#askOutputs();
    this.#showBlank();
    this.#sticks = true;
    const follower = this.#followerOf(view, sent);
    view.follow(follower);
    this.#showRunning();
    this.#stick();
    follower.run(
      sending(sent, (session) => {
        this.#acts.changed(session);
        if (signal.aborted) return;
        this.session = session;
        this.#showHead();
      }),
    );
  }

  /** While an edit or a retry begins, the turns that it leaves are hidden. */
  #hideAfter(parent) {
    const place = parent === null ? -1 : this.#path.indexOf(parent);
    for (const id of this.#path.slice(place + 1)) this.#views.get(id)?.element.remove();
  }

  #drop(view) {
    view.close();
    view.element.remove();
    if (this.#pending === view) this.#pending = null;
  }

  // Following

  #followerOf(view, sent) {
    const { signal } = this.#work;
    const isMine = () => !signal.aborted;
    const follower = new Follower(this.#context.service, {
      onTurn: (stream) => {
        if (sent) outbox.drop(sent);
        if (!isMine()) return;
        this.#followers.set(stream.turnId, follower);
        if (view === this.#pending && this.#views.has(stream.turnId)) this.#settle();
        this.#waitsNoLonger();
        this.#known = "";
        this.#acts.tell(this.#id);
        this.refresh();
      },
      onEvent: (event, stream) => {
        if (!isMine()) return;
        view.take(event, stream);
        if (event.type === "turn.started" || event.type === "turn.queued" || view.hasEnded) this.#showRunning();
      },
      onOpen: () => {
        if (!isMine()) return;
        view.waiting(false);
        this.#waitsNoLonger();
      },
      onWait: (waiting) => {
        if (!isMine()) return;
        view.waiting(true);
        this.#say(waits(waiting), "wait");
      },
      onEnd: (error) => {
        if (isMine()) this.#ended(view, sent, follower, error);
      },
    });
    return follower;
  }

  #follow(turn, view) {
    const follower = this.#followerOf(view, null);
    follower.log.isReplay = true;
    this.#followers.set(turn.id, follower);
    view.follow(follower);
    follower.run((client, options) => client.events(turn.session_id, turn.id, options));
  }

  async #ended(view, sent, follower, error) {
    const id = follower.stream?.turnId;
    if (error && !id) return this.#refuse(view, sent, error);
    this.#followers.delete(id);
    this.#known = "";
    if (error) {
      this.#say(refused(error), "error");
      this.#rest(id);
    } else this.#context.say(this.#endWords(follower.stream.end));
    await this.refresh();
    this.#showRunning();
    this.#acts.tell(this.#id);
  }

  /** A turn whose events are refused, while its record can be read, is followed again after a pause. */
  #rest(id) {
    const { signal } = this.#work;
    this.#resting.add(id);
    setTimeout(() => {
      if (signal.aborted) return;
      this.#resting.delete(id);
      this.#known = "";
      if (this.#isVisible()) this.refresh();
    }, POLL_MS);
  }

  #endWords(end) {
    if (end?.finish_reason === "tool_calls") return "The reply has ended with calls, and waits for their outputs.";
    return `The reply has ended: ${end?.type.slice(5) ?? "complete"}.`;
  }

  /** The server did not take the message. Without a valid key the message waits: another key shows the view anew, which sends it. */
  #refuse(view, sent, error) {
    const words = refused(error);
    this.#context.say(words);
    if (sent && error.status === 401) {
      this.#keyless = sent;
      view.waiting(true);
      this.#say(words, "error");
      this.#showRunning();
      return;
    }
    this.#drop(view);
    this.#followers.delete(view.id);
    if (sent) this.#giveBack(sent, words);
    else this.#say(words, "error");
    this.#known = "";
    this.refresh();
    this.#showRunning();
  }

  /** A message that was refused goes back into the box, before what was written there since, or into the form of the calls. */
  #giveBack(sent, words) {
    outbox.drop(sent);
    if (Array.isArray(sent.input)) keepOutputs(sent.parent, sent.input);
    else if (!sent.retry) this.#fill([sent.input, this.#box.value].filter(Boolean).join("\n\n"));
    this.#say(words, "error");
  }

  get #running() {
    const views = [...this.#views.values(), this.#pending].filter(Boolean);
    return views.filter((it) => !it.hasEnded);
  }

  #showRunning() {
    const running = this.#running;
    this.#stop.hidden = running.length === 0;
    const waits = running.length > 0 && !this.#keyless;
    this.#send.hidden = waits && !this.#box.value.trim();
    this.#send.querySelector("span").textContent = waits && !this.#editing ? "Queue" : "Send";
    this.#send.title = waits ? "Sent when the reply that is written now has ended" : "Enter";
  }

  /** Ends the reply that is written now. */
  async stop() {
    const view = this.#running.find((it) => it.element.dataset.state === "running") ?? this.#running.at(-1);
    if (!view) return;
    if (!view.id) {
      // Not accepted yet, as far as this page knows: it is sent on, and stopped when its id is known.
      this.#say(this.#keyless ? "The message waits for a key. Send tries it again." : "The message is on its way. It can be stopped when the server has it.", "wait");
      return;
    }
    const { signal } = this.#work;
    this.#stop.disabled = true;
    try {
      await this.#context.client.cancel(this.#id, view.id, { signal });
    } catch (error) {
      if (!signal.aborted) this.#say(refused(error), "error");
    } finally {
      this.#stop.disabled = false;
    }
  }

  // Branches

  #edit(view, { isSent = false } = {}) {
    const wasEditing = this.#editing;
    this.#editing = view;
    this.#editBar.hidden = !view;
    const outputs = view ? outputsOf(view.turn) : [];
    if (outputs.length > 0) keepOutputs(view.turn.parent, outputs);
    this.#askOutputs();
    if (view) {
      if (outputs.length > 0) this.#views.get(view.turn.parent)?.focusOutputs();
      else this.#fill(view.turn.input);
      view.element.classList.add("is-edited");
    } else if (wasEditing && !isSent && outputsOf(wasEditing.turn).length === 0) this.#fill("");
    wasEditing?.element.classList.remove("is-edited");
    this.#showRunning();
  }

  async #fork(view) {
    const { signal } = this.#work;
    try {
      const copied = await this.#context.client.forkSession(this.#id, { at: view.turn.id, signal });
      this.#acts.changed(copied);
      this.#context.toast("This is a copy of the conversation up to that reply.");
      this.#acts.go(copied.id);
    } catch (error) {
      if (!signal.aborted) this.#say(refused(error), "error");
    }
  }

  /** Shows the branch of another version of a message: its newest turn becomes the head. */
  async #step(view, by) {
    const siblings = this.#siblings(view.turn.id);
    const next = siblings[siblings.indexOf(view.turn.id) + by];
    if (!next) return;
    const parents = new Map();
    for (const { id, parent } of this.#tree.values()) parents.set(parent, id); // the newest one of each
    let leaf = next;
    while (parents.has(leaf)) leaf = parents.get(leaf);
    const { signal } = this.#work;
    try {
      await this.#context.client.switchTo(this.#id, leaf, { seenHead: this.session.head, signal });
      this.#acts.tell(this.#id);
      this.#sticks = false;
    } catch (error) {
      if (signal.aborted) return;
      this.#say(refused(error), "error");
    }
    this.#known = "";
    await this.refresh();
    this.#views.get(next)?.element.scrollIntoView({ block: "nearest" });
  }

  /** Puts the newest reply on the clipboard. */
  copyLast() {
    const view = [...this.#views.values()].at(-1);
    const pressed = view?.element.querySelector(".tools > .button");
    if (view) copy(view.text, pressed);
  }

  retryLast() {
    const view = [...this.#views.values()].at(-1);
    if (view?.hasEnded) this.#retry(view);
  }

  editLast() {
    const view = [...this.#views.values()].at(-1);
    if (view?.turn) this.#edit(view);
  }

  // The box and the scrolling

  #pressed(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.#form.requestSubmit();
    } else if (event.key === "Escape" && this.#editing) this.#edit(null);
    else if (event.key === "Escape") this.stop();
  }

  #typed() {
    this.#fit();
    this.#showRunning();
    if (this.#status.dataset.kind === "error") this.#say("");
  }

  /** The box is as high as its text, within bounds. */
  #fit() {
    const rows = Math.min(ROWS_MAX, this.#box.value.split("\n", ROWS_MAX).length);
    this.#box.rows = rows;
    if (rows < ROWS_MAX && this.#box.scrollHeight > this.#box.clientHeight + 4) this.#box.rows = Math.min(ROWS_MAX, rows + 2);
  }

  #say(words, kind = "info") {
    if (this.#status.textContent === words) return;
    this.#status.textContent = words;
    this.#status.dataset.kind = kind;
  }

  /** What was said of a wait is over; a refusal of another message stays. */
  #waitsNoLonger() {
    if (this.#status.dataset.kind === "wait") this.#say("");
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    this.#sticks = scrollHeight - scrollTop - clientHeight < NEAR;
    this.#latest.hidden = this.#sticks;
  }

  #toEnd() {
    this.#sticks = true;
    this.#stick();
    this.#latest.hidden = true;
  }

  #stick() {
    if (this.#sticks) this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  if (line.length <= TITLE_MAX) return line;
  const cut = line.lastIndexOf(" ", TITLE_MAX);
  return `${[...line.slice(0, cut > 20 ? cut : TITLE_MAX)].join("")}…`;
}

function ifGone(error) {
  if (error.status === 404) return null;
  throw error;
}
