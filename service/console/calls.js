// The calls of functions in a reply, and the form for their outputs while the model waits for them.

import { button, h } from "./dom.js";
import { laidOut } from "./json_text.js";
import { write } from "./markdown.js";

const drafts = new Map(); // outputs that were written and not sent yet, by turn and call
const draftOf = (turnId, callId) => `${turnId} ${callId}`;

/** The outputs that a turn was asked with, as its input: none, if it was asked with a text. */
export const outputsOf = ({ items = [] }) =>
  items
    .filter((it) => it.type === "function_call_output")
    .map(({ type, call_id, output }) => ({ type, call_id, output }));

/** Keeps outputs for the form of the turn with their calls. */
export function keepOutputs(turnId, outputs) {
  for (const { call_id, output } of outputs) drafts.set(draftOf(turnId, call_id), output);
}

/** Forgets them: they are sent. */
export function dropOutputs(turnId, outputs) {
  for (const { call_id } of outputs) drafts.delete(draftOf(turnId, call_id));
}

/** The calls of one reply. `send(outputs)` is called with the outputs as items of the API, one for each call. */
export class Calls {
  element;
  #send;
  #shown = new Map(); // by the item of the call: its element, its code and its arguments
  #boxes = []; // {callId, box, mark} while the outputs are asked for
  #foot = null;

  constructor(send) {
    this.#send = send;
    this.element = h("form", { class: "calls", on: { submit: (event) => this.#submitted(event), keydown: (event) => this.#pressed(event) } });
  }

  get isEmpty() {
    return this.#shown.size === 0;
  }

  /** Shows a call. Its arguments come in pieces, or with the call. */
  add(item, name, callId, text = "") {
    const code = h("code", { dir: "ltr" });
    const summary = h("summary", {}, "Calls ", h("b", { class: "mono" }));
    write(summary.lastElementChild, name);
    const element = h("details", { class: "folded call", title: callId }, summary, h("pre", { tabIndex: 0 }, code));
    this.element.append(element);
    this.#shown.set(item, { element, summary, code, name, callId, text: "" });
    this.append(item, text);
  }

  append(item, text) {
    const call = this.#shown.get(item);
    call.text += text;
    write(call.code, text);
  }

  /** Lays the arguments out: they are whole. */
  end() {
    for (const call of this.#shown.values()) {
      if (call.isWhole) continue;
      call.isWhole = true;
      call.code.parentElement.hidden = call.text === "";
      call.code.replaceChildren();
      write(call.code, laidOut(call.text));
    }
  }

  clear() {
    this.ask(null);
    this.#shown.clear();
    this.element.replaceChildren();
  }

  /** Asks for the outputs of this turn's calls, from now on or, with null, no longer. A call that was cut off has none. */
  ask(turn) {
    const cut = new Set(turn?.items.filter((it) => it.complete === false).map((it) => it.call_id));
    const open = turn ? [...this.#shown.values()].filter(({ callId }) => !cut.has(callId)) : [];
    if ((open.length === 0) === (this.#boxes.length === 0)) return;
    for (const { box, mark, element } of this.#boxes) {
      box.parentElement.remove();
      mark.remove();
      element.open = false;
    }
    this.#foot?.remove();
    this.#foot = null;
    this.#boxes = open.map((call) => this.#box(turn.id, call));
    if (open.length === 0) return this.element.removeAttribute("aria-label");
    this.element.setAttribute("aria-label", "Outputs of the calls");
    const [those, words] =
      open.length === 1
        ? ["the output", "The model waits for the output of its call. An empty box is an empty output. A message in its place leaves the call without an answer."]
        : [`${open.length} outputs`, "The model waits for the outputs of its calls. An empty box is an empty output. A message in their place leaves the calls without an answer."];
    const send = button({ text: `Send ${those}`, icon: "send", kind: "primary", type: "submit" });
    send.title = "Ctrl + Enter";
    this.#foot = h("div", { class: "calls-foot" }, h("p", { text: words }), send);
    this.element.append(this.#foot);
  }

  /** Leads to the first output. */
  focus() {
    this.#boxes[0]?.box.focus();
  }

  #box(turnId, { element, summary, name, callId }) {
    const draft = draftOf(turnId, callId);
    const box = h("textarea", { class: "input", rows: 3, value: drafts.get(draft) ?? "" });
    box.spellcheck = false;
    box.addEventListener("input", () => drafts.set(draft, box.value));
    const words = h("span", {});
    write(words, `Output of ${name}`);
    element.append(h("label", { class: "field" }, words, box));
    const mark = h("span", { class: "due", text: "waits for its output" });
    summary.append(" ", mark);
    element.open = true;
    return { callId, box, mark, element };
  }

  #pressed(event) {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing || !this.#foot) return;
    event.preventDefault();
    this.element.requestSubmit();
  }

  #submitted(event) {
    event.preventDefault();
    this.#send(this.#boxes.map(({ callId, box }) => ({ type: "function_call_output", call_id: callId, output: box.value })));
  }
}
