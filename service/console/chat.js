// The view of conversations.

import { h } from "./dom.js";

export function mount(root) {
  root.append(h("div", { class: "blank" }, h("h2", { text: "Conversations" }), h("p", { text: "They come here." })));
}
