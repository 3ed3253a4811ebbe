// Short messages at the edge of the page, which go by themselves.

import { h } from "./dom.js";

const SHOWN_MS = 6000;
const TOASTS_MAX = 4;

/** Shows a message. `action` is `{text, press}`; `kind` is `info` or `error`, which stays twice as long. */
export function toast(words, { kind = "info", action } = {}) {
  const all = document.getElementById("toasts");
  const close = () => made.remove();
  const press = () => {
    close();
    action.press();
  };
  const made = h(
    "div",
    { class: "toast", role: kind === "error" ? "alert" : "status", data: { kind } },
    h("span", { text: words }),
    action ? h("button", { type: "button", class: "button small", on: { click: press } }, action.text) : null,
  );
  while (all.children.length >= TOASTS_MAX) all.firstElementChild.remove();
  all.append(made);
  let timer = setTimeout(close, kind === "error" ? 2 * SHOWN_MS : SHOWN_MS);
  for (const event of ["pointerenter", "focusin"]) made.addEventListener(event, () => clearTimeout(timer));
  for (const event of ["pointerleave", "focusout"]) {
    made.addEventListener(event, () => (timer = setTimeout(close, SHOWN_MS)));
  }
}

/** Tells screen readers, politely. For what can be seen anyway: an end of a reply, a number of results. */
export function say(words) {
  document.getElementById("said").textContent = words;
}
