// One turn on the page: what was asked, what was answered, how it ended, and what can be done with it.

import { Calls } from "./calls.js";
import { button, h } from "./dom.js";
import { clock, counted, date, duration } from "./format.js";
import { Markdown, copy, write } from "./markdown.js";
import { Timeline, logOf } from "./timeline.js";
import { ended, resumed } from "./words.js";

const LONG_INPUT = 1600;
const LONG_TEXT = 60_000; // from here on the browser lays out only what can be seen

/** A turn. `acts` are what its buttons do: `retry`, `edit`, `fork`, `step(view, -1 | 1)`, `answer(view, outputs)`, `shown`, `nameOf(turn, callId)`; `wantsTimeline`, `reasoning`. */
export class TurnView {
  element;
  turn = null; // its record, as the server has last told it
  text = "";
  #acts;
  #follower = null;
  #input;
  #parts; // reasoning, the text and calls
  #reply;
  #markdown;
  #reasoning = null;
  #calls;
  #end;
  #siblings;
  #place = "";
  #when;
  #timeline = null;
  #timelineButton;
  #cutButton = null;
  #tools;

  constructor(input, acts) {
    this.#acts = acts;
    this.#input = h("div", { class: "asked", dir: "auto" });
    this.#when = h("time", { class: "when" });
    this.#reply = h("div", { class: "markdown" });
    this.#markdown = new Markdown(this.#reply, acts.shown);
    this.#calls = new Calls((outputs) => acts.answer(this, outputs));
    this.#parts = h("div", { class: "parts" }, this.#reply, this.#calls.element);
    this.#end = h("p", { class: "turn-end", hidden: true });
    this.#siblings = h("div", { class: "siblings", role: "group", "aria-label": "Versions of this message", hidden: true });
    const tool = (text, icon, press, more = {}) => button({ text, icon, kind: "small bare", press, ...more });
    this.#timelineButton = tool("Timeline", "clock", () => this.showTimeline(!this.#timeline), { "aria-pressed": "false" });
    this.#tools = h(
      "div",
      { class: "tools" },
      this.#siblings,
      tool("Copy", "copy", (event) => copy(this.text, event.currentTarget)),
      tool("Retry", "retry", () => acts.retry(this)),
      tool("Edit", "edit", () => acts.edit(this)),
      tool("Fork", "branch", () => acts.fork(this)),
      this.#timelineButton,
    );
    this.element = h(
      "article",
      { class: "turn", data: { state: "sending" } },
      h("div", { class: "margin" }, h("h3", { text: "You" }), this.#when),
      this.#input,
      h("div", { class: "margin" }, h("span", { class: "author", text: "Reply" }), h("span", { class: "pulse", "aria-hidden": "true" })),
      h("div", { class: "answer" }, this.#parts, this.#end, this.#tools),
    );
    this.#showInput(input);
  }

  get id() {
    return this.turn?.id ?? this.#follower?.stream?.turnId ?? null;
  }

  get hasEnded() {
    return !["sending", "queued", "running"].includes(this.element.dataset.state);
  }

  /** Shows the turn as its record says. A turn that is followed gets its text from its events. */
  show(turn, { place, total }) {
    this.turn = turn;
    this.element.dataset.turn = turn.id;
    this.#showInput(turn.input, turn.items);
    this.#when.textContent = clock(turn.created_at);
    this.#when.dateTime = turn.created_at;
    this.#when.title = date(turn.created_at);
    this.#showSiblings(place, total);
    const isFollowed = this.#follower && !turn.ended_at;
    if (isFollowed) return;
    if (turn.items && this.#calls.isEmpty) this.#showItems(turn.items);
    if (this.text !== turn.text) this.#replace(turn.text);
    if (turn.ended_at) {
      this.#markdown.end();
      this.#calls.end();
    }
    if (turn.usage?.reasoning_tokens && !this.#reasoning) this.#offerReasoning(turn);
    this.#showState(turn.state, turn);
  }

  /** Shows what a follower reads from now on. */
  follow(follower) {
    this.#follower = follower;
    if (follower.log.isReplay && this.text) this.#replace("");
    this.#forgetParts();
    if (this.element.dataset.state === "sending" && this.turn) this.#showState(this.turn.state, this.turn);
    this.showTimeline(this.#timeline !== null || follower.log.isReplay || this.#acts.wantsTimeline());
  }

  /** An event of the follower's stream. */
  take(event, stream) {
    switch (event.type) {
      case "turn.queued":
        return this.#showState("queued");
      case "turn.started":
        return this.#showState("running");
      case "turn.delta":
        this.text += event.text;
        this.#markdown.append(event.text);
        this.#markLong();
        break;
      case "turn.reasoning":
        this.#reason(event.text);
        break;
      case "turn.call":
        this.#calls.add(event.item, event.name, event.call_id);
        break;
      case "turn.arguments":
        this.#calls.append(event.item, event.text);
        break;
      case "turn.resumed":
        if (event.mode === "retry") this.#forgetParts();
        this.#replace(stream.text);
        this.#sayEnd(resumed(event));
        break;
      default:
        if (event.replaces !== undefined) this.#replace(event.text);
        if (event.text_length !== undefined && event.type !== "turn.delta") {
          this.#markdown.end();
          this.#calls.end();
          this.#showState(event.type.slice("turn.".length), event);
        }
    }
    this.#timeline?.touch();
  }

  /** The stream waits for its connection, or has it. */
  waiting(isWaiting) {
    this.element.classList.toggle("is-away", isWaiting);
    if (this.#cutButton) this.#cutButton.disabled = isWaiting;
    this.#timeline?.touch();
  }

  close() {
    this.#follower?.leave();
    this.#timeline?.close();
  }

  /** Whether the form for the outputs of the reply's calls is shown. A reply that did not complete has none. */
  askOutputs(isAsked) {
    this.#calls.ask(isAsked && this.turn?.state === "completed" && this.turn.items ? this.turn : null);
  }

  focusOutputs() {
    this.#calls.focus();
  }

  showTimeline(isShown) {
    this.#timelineButton.setAttribute("aria-pressed", String(isShown));
    if (!isShown) {
      this.#timeline?.close();
      this.#timeline?.element.remove();
      this.#timeline = null;
      return;
    }
    if (this.#timeline) return this.#timeline.show(this.#log());
    this.#cutButton = null;
    if (this.#follower && !this.hasEnded) {
      const press = () => this.#follower.cut();
      this.#cutButton = button({ text: "Cut my connection", icon: "cut", kind: "small danger", press });
      this.#cutButton.title = "Closes this page's connection under the stream. Watch it come back, with nothing lost.";
    }
    this.#timeline = new Timeline(this.#log(), this.#cutButton ? [this.#cutButton] : []);
    this.element.lastElementChild.append(this.#timeline.element);
    this.#timeline.draw();
    this.#acts.shown();
  }

  #log() {
    return this.#follower?.log ?? logOf(this.turn);
  }

  /** What is beside the text of the reply comes anew. */
  #forgetParts() {
    this.#reasoning?.element.remove();
    this.#reasoning = null;
    this.#calls.clear();
  }

  #replace(text) {
    this.text = text;
    this.#markdown.replace(text);
    this.#markLong();
  }

  #markLong() {
    if (this.text.length > LONG_TEXT) this.#reply.classList.add("long");
  }

  /** `input` is a text, or items as they were sent. */
  #showInput(input, items = []) {
    if (typeof input !== "string") [input, items] = ["", input];
    const words = items.filter((it) => it.type === "message" && it.role === "system").map((it) => `System: ${it.text}`);
    const outputs = items.filter((it) => it.type === "function_call_output");
    const text = [...words, input].filter(Boolean).join("\n\n");
    const shown = h("div", { class: "asked-text" });
    const markdown = text.length > LONG_INPUT ? `${text.slice(0, LONG_INPUT)}…` : text;
    shown.textContent = markdown;
    const more = () => {
      shown.textContent = text;
      moreButton.remove();
    };
    const moreButton = button({ text: `Show all of ${counted(text.length, "character")}`, kind: "small", press: more });
    this.#input.replaceChildren(
      ...(text ? [shown] : []),
      ...(text.length > LONG_INPUT ? [moreButton] : []),
      ...outputs.map((it) => folded(`Result of ${this.#acts.nameOf(this.turn, it.call_id)}`, it.output)),
    );
  }

  #showSiblings(place, total) {
    const words = `${place} of ${total}`;
    if (words === this.#place) return; // a button that is made anew while it is pressed is not clicked
    this.#place = words;
    this.#siblings.hidden = !(total > 1);
    if (!(total > 1)) return;
    const step = (by, label, name) => button({ label, icon: name, kind: "small bare", press: () => this.#acts.step(this, by), disabled: place + by < 1 || place + by > total });
    this.#siblings.replaceChildren(
      step(-1, "Previous version", "left"),
      h("span", { text: words }),
      step(1, "Next version", "right"),
    );
  }

  #showItems(items) {
    for (const item of items) {
      if (item.type === "reasoning" && item.text && !this.#reasoning) this.#reason(item.text);
      if (item.type === "function_call") this.#calls.add(item.id, item.name, item.call_id, item.arguments);
    }
  }

  #reason(text) {
    if (!this.#reasoning) this.#foldReasoning("Reasoning");
    this.#reasoning.markdown.append(text);
  }

  /** The record does not have the reasoning: its events do, if somebody wants to read it. */
  #offerReasoning(turn) {
    this.#foldReasoning(`Reasoning, ${counted(turn.usage.reasoning_tokens, "token")}`);
    const { element } = this.#reasoning;
    element.addEventListener("toggle", () => this.#acts.reasoning(turn, this.#reasoning.markdown), { once: true });
  }

  #foldReasoning(title) {
    const body = h("div", { class: "markdown" });
    const element = h("details", { class: "folded" }, h("summary", { text: title }), body);
    this.#parts.prepend(element);
    this.#reasoning = { element, markdown: new Markdown(body, this.#acts.shown) };
  }

  #showState(state, told = {}) {
    this.element.dataset.state = state;
    if (this.#cutButton) this.#cutButton.hidden = this.hasEnded;
    if (state === "queued") return this.#sayEnd("Waits until the reply before it has ended.");
    const words = this.hasEnded ? ended({ state, ...told }) : "";
    const tokens = this.hasEnded ? told.usage?.output_tokens : undefined;
    const usage = tokens === undefined ? "" : `${counted(tokens, "token")}${this.#spent(told)}`;
    this.#sayEnd(words, { usage, isTrouble: ["interrupted", "failed"].includes(state) });
  }

  #spent(told) {
    const log = this.#follower?.log;
    if (log?.end && !log.isReplay) return ` in ${duration(log.end.at - log.startedAt)}`;
    if (told.started_at && told.ended_at) return ` in ${duration(Date.parse(told.ended_at) - Date.parse(told.started_at))}`;
    return "";
  }

  /** Says below the reply how it stands, and how many tokens it has. */
  #sayEnd(words, { usage = "", isTrouble = false } = {}) {
    const said = `${words}\n${usage}`;
    if (this.#end.dataset.said === said) return; // its button may be pressed just now
    this.#end.dataset.said = said;
    this.#end.hidden = !words && !usage;
    this.#end.classList.toggle("trouble", isTrouble);
    this.#end.replaceChildren(words);
    if (isTrouble) this.#end.append(" ", button({ text: "Ask again", icon: "retry", kind: "small", press: () => this.#acts.retry(this) }));
    if (usage) this.#end.append(words ? " " : "", h("span", { class: "usage", text: usage }));
  }
}

function folded(title, text) {
  const code = h("code", { dir: "ltr" });
  write(code, text);
  const summary = h("summary");
  write(summary, title);
  return h("details", { class: "folded" }, summary, h("pre", { tabIndex: 0 }, code));
}
