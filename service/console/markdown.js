// Markdown of a model, shown while it arrives. Nothing of it becomes HTML: each part is an element made here, with text nodes.
//
// The work is bounded. A line is taken once; only the last paragraph, at most LEAF_MAX characters, is made anew when it
// grows. All texts of the page share one queue, which works for BUDGET_MS in each frame. A text that would need more than
// NODES_MAX elements goes on as plain text.

import { button, h, icon } from "./dom.js";
import { counted } from "./format.js";
import { toast } from "./toasts.js";

const LEAF_MAX = 4096;
const CHUNK_MAX = 8192; // of code: the browser lays out such a piece at once, and only if it can be seen
const LINE_MAX = 16384; // of code: a longer line is broken
const HELD_MAX = 300; // the beginning of a line that may still become one thing or another
const DEPTH_MAX = 6; // of quotes and of lists
const MARKS_MAX = 12; // of emphasis in emphasis
const CELLS_MAX = 64;
const NODES_MAX = 20000;
const NAMED_MAX = 40; // of the characters that are not seen, in one run of text
const SLICE = 2048;
const BUDGET_MS = 7;
const HIDDEN_MS = 250; // in place of a frame, of which a page that is hidden or covered gets none

/** Characters that are not seen and change what is seen: controls, overrides of the direction, tags. */
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]+|[\u{e0000}-\u{e007f}]+/gu;

/** A text without the characters that are not seen: what is put on the clipboard, which may end up in a terminal. */
export const cleaned = (text) => text.replace(/\r\n?/g, "\n").replace(UNSEEN, "");

/** Puts a text on the clipboard, and says so at the button that was pressed. */
export async function copy(text, pressed) {
  const clean = cleaned(text);
  try {
    await navigator.clipboard.writeText(clean);
  } catch {
    if (!copyByHand(clean)) {
      toast("The browser does not let this page write to the clipboard.", { kind: "error" });
      return;
    }
  }
  const left = text.replace(/\r\n?/g, "\n").length - clean.length;
  if (left) toast(`Copied without ${counted(left, "control character")}.`);
  const before = [...pressed.childNodes];
  if (pressed.dataset.copied) return;
  pressed.dataset.copied = "yes";
  pressed.replaceChildren(icon("check"), ...(before.length > 1 ? [h("span", { text: "Copied" })] : []));
  setTimeout(() => {
    delete pressed.dataset.copied;
    pressed.replaceChildren(...before);
  }, 1500);
}

/** For pages that are not on https or this machine, which have no clipboard. */
function copyByHand(text) {
  const area = h("textarea", { class: "visually-hidden", value: text, readOnly: true });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/**
 * Appends a text. What is not seen in it is shown, and not obeyed: the first of it by name, in at most `namedMax` elements.
 * Returns how many elements it made.
 */
export function write(parent, text, namedMax = NAMED_MAX) {
  let place = 0;
  let count = 0;
  UNSEEN.lastIndex = 0;
  for (let found; (found = UNSEEN.exec(text)); ) {
    if (count === namedMax) {
      parent.append(text.slice(place).replace(UNSEEN, "\ufffd"));
      return count;
    }
    count += 1;
    if (found.index > place) parent.append(text.slice(place, found.index));
    parent.append(named(found[0]));
    place = found.index + found[0].length;
  }
  if (place === 0) parent.append(text);
  else if (place < text.length) parent.append(text.slice(place));
  return count;
}

function named(run) {
  const points = [...run];
  const name = `U+${points[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  const words = points.length === 1 ? name : `${name} +${points.length - 1}`;
  return h("span", { class: "unseen", title: "A control character, shown and not obeyed", text: words });
}

// The queue

const waiting = new Set(); // the texts with something to show
let frame = null;
let timer = null;

function schedule() {
  if (frame !== null || waiting.size === 0) return;
  frame = requestAnimationFrame(work);
  timer = setTimeout(work, HIDDEN_MS);
}

function work() {
  cancelAnimationFrame(frame);
  clearTimeout(timer);
  frame = null;
  const until = performance.now() + BUDGET_MS;
  for (const text of waiting) {
    while (text.step()) if (performance.now() >= until) return schedule();
    waiting.delete(text);
  }
}

/** A text in an element. `append` what arrives, `end` when it is whole; `done` calls back when all of it is shown. */
export class Markdown {
  #root;
  #blocks;
  #queue = []; // pieces, the next one first
  #place = 0; // in the first piece
  #isWhole = false;
  #onShown;

  /** @param onShown Called after each step that has changed the page. */
  constructor(root, onShown = () => {}) {
    this.#root = root;
    this.#onShown = onShown;
    this.#blocks = new Blocks(root);
  }

  append(text) {
    if (!text) return;
    this.#queue.push(text);
    waiting.add(this);
    schedule();
  }

  end() {
    this.#isWhole = true;
    waiting.add(this);
    schedule();
  }

  /** Shows this text in place of all before. */
  replace(text) {
    this.#queue = [];
    this.#place = 0;
    this.#isWhole = false;
    this.#root.replaceChildren();
    this.#blocks = new Blocks(this.#root);
    this.append(text);
  }

  /** Whether all that has arrived is on the page. */
  get isShown() {
    return !waiting.has(this);
  }

  /** Shows a little more. Returns whether there is more. */
  step() {
    const piece = this.#queue[0];
    if (piece === undefined) {
      if (this.#isWhole) this.#blocks.end();
      this.#onShown();
      return false;
    }
    const end = endOf(piece, this.#place + SLICE);
    this.#blocks.feed(piece.slice(this.#place, end));
    this.#place = end;
    if (this.#place >= piece.length) {
      this.#queue.shift();
      this.#place = 0;
    }
    if (this.#queue.length === 0) this.#blocks.show();
    return this.#queue.length > 0 || this.step();
  }
}

/** A place at or right after this one, which is not inside of a character. */
function endOf(text, place) {
  return /[\udc00-\udfff]/.test(text[place] ?? "") ? place + 1 : place;
}

// Blocks

const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]+)|$)/;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const OPEN_END = /^[\s>\-*+_=~`#|:]*(?:\d{1,9}[.)]?)?\s*$/;
const OPEN_FENCE = /^[\s>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(?:`{3,}[^`]*|~{3,}.*)$/;
const TABLE_ROW = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** The blocks of a text: takes its lines, and puts elements into the root. */
class Blocks {
  #root;
  #quotes = []; // the open quotes, outermost first
  #lists = []; // the open lists, outermost first: {element, item, isOrdered, indent, content}
  #leaf = null; // what the next text goes into: {kind, element, text}
  #held = ""; // the beginning of a line whose kind is not known yet; null inside of a line
  #afterBlank = false;
  #nodes = 0;

  constructor(root) {
    this.#root = root;
  }

  feed(text) {
    text = text.replace(/\r/g, ""); // of a line end; others are of no use
    for (let place = 0; place < text.length; ) {
      const end = text.indexOf("\n", place);
      const piece = text.slice(place, end < 0 ? undefined : end);
      if (this.#held === null) this.#more(piece);
      else {
        this.#held += piece;
        if (end >= 0) this.#whole(this.#held);
        else if (this.#isKnown(this.#held)) this.#begin(this.#held);
      }
      if (end < 0) return;
      if (this.#held === null) this.#endLine();
      this.#held = "";
      place = end + 1;
    }
  }

  /** Shows what was taken. */
  show() {
    if (this.#leaf?.isDirty) this.#render(this.#leaf);
  }

  /** The text is whole: the beginning of a line that was held back is its last line. */
  end() {
    if (this.#held) this.#whole(this.#held);
    this.#held = "";
    this.show();
  }

  #isKnown(line) {
    if (line.length > HELD_MAX || this.#isPlain) return true;
    if (this.#leaf?.kind === "code") return !/^[\s>]*(?:`*|~*)\s*$/.test(line);
    if (this.#leaf?.kind === "table") return false;
    return !OPEN_END.test(line) && !OPEN_FENCE.test(line);
  }

  /** A line from its beginning to its end. */
  #whole(line) {
    this.#held = null;
    const leaf = this.#leaf;
    if (this.#isPlain) return this.#begin(line);
    if (leaf?.kind === "code") {
      const bare = stripQuotes(line, leaf.quotes);
      const fence = /^[ \t]*(`{3,}|~{3,})[ \t]*$/.exec(bare);
      if (fence && fence[1][0] === leaf.fence[0] && fence[1].length >= leaf.fence.length) this.#close();
      else this.#code(bare);
      return;
    }
    const [depth, rest] = quotesOf(line);
    if (depth === this.#quotes.length) {
      if (leaf?.kind === "table" && rest.includes("|")) return this.#row(leaf, rest, "td");
      if (leaf?.kind === "text" && rest.includes("-") && rest.length <= HELD_MAX && TABLE_ROW.test(rest) && this.#table(leaf, rest)) return;
    }
    if (/^[ \t]*$/.test(rest)) {
      if (depth !== this.#quotes.length) this.#quoteAt(depth);
      this.#close();
      this.#afterBlank = true;
      return;
    }
    this.#begin(line);
  }

  /** The beginning of a line, or all of it: which blocks it opens and closes. */
  #begin(line) {
    this.#held = null;
    if (this.#isPlain) return this.#plain(line);
    if (this.#leaf?.kind === "code") return this.#code(stripQuotes(line, this.#leaf.quotes));
    if (this.#leaf?.kind === "table") this.#close();
    const [depth, quoted] = quotesOf(line);
    if (depth !== this.#quotes.length) this.#quoteAt(depth);
    let rest = quoted;
    const indent = widthOf(/^[ \t]*/.exec(rest)[0]);
    if (RULE.test(rest)) {
      this.#closeLists();
      this.#put(h("hr"));
      return this.#after();
    }
    const item = ITEM.exec(rest);
    if (item && !(this.#leaf?.kind === "text" && !this.#lists.length && item[2].length > 2)) {
      this.#item(widthOf(item[1]), item[2], item[3] ?? " ");
      rest = rest.slice(item[0].length);
    } else if (this.#lists.length && (this.#afterBlank || !this.#leaf || HEADING.test(rest) || FENCE.test(rest))) {
      while (this.#lists.length && indent < this.#lists.at(-1).content) this.#lists.pop();
      rest = rest.trimStart();
    }
    const fence = FENCE.exec(this.#lists.length ? rest.trimStart() : rest);
    if (fence) {
      this.#openCode(fence[1], fence[2].trim(), item ? this.#lists.at(-1).content : indent);
      return this.#after();
    }
    const heading = HEADING.exec(rest);
    if (heading) {
      this.#open("heading", h(["h3", "h4", "h5", "h6"][Math.min(heading[1].length, 4) - 1], { dir: "auto" }));
      rest = rest.slice(heading[0].length);
    } else if (this.#leaf?.kind === "text") {
      if (this.#leaf.text) this.#more("\n");
    } else this.#open("text", h("p", { dir: "auto" }));
    this.#afterBlank = false;
    this.#more(rest.trimStart());
  }

  /** Whether there are so many elements that the rest is text and nothing else. */
  get #isPlain() {
    return this.#isFull && this.#leaf?.kind !== "code";
  }

  get #isFull() {
    return this.#nodes > NODES_MAX;
  }

  #plain(line) {
    if (this.#leaf?.kind !== "plain") {
      this.#closeLists();
      this.#quotes = [];
      this.#open("plain", h("p", { dir: "auto", class: "plain" }));
    }
    this.#more(this.#leaf.text ? `\n${line}` : line);
  }

  #after() {
    this.#afterBlank = false;
  }

  #endLine() {
    if (this.#leaf?.kind === "heading") this.#close();
  }

  /** More of the line that has begun. */
  #more(text) {
    const leaf = this.#leaf;
    if (!text || !leaf) return;
    if (leaf.kind === "code") return this.#codeText(text);
    leaf.text += text;
    leaf.isDirty = true;
    while (leaf.text.length > LEAF_MAX) this.#split(leaf);
  }

  /** A paragraph that is too long to be made anew each time goes on in another one. */
  #split(leaf) {
    const blank = leaf.text.lastIndexOf(" ", LEAF_MAX);
    const cut = blank > LEAF_MAX / 2 ? blank + 1 : endOf(leaf.text, LEAF_MAX);
    const rest = leaf.text.slice(cut);
    leaf.text = leaf.text.slice(0, cut);
    this.#render(leaf);
    leaf.element = h(leaf.element.tagName, { dir: "auto", class: `goes-on ${leaf.kind}` });
    this.#put(leaf.element);
    leaf.text = rest;
    leaf.nodes = 0;
    leaf.isDirty = true;
  }

  #render(leaf) {
    leaf.isDirty = false;
    leaf.element.replaceChildren();
    if (this.#isFull) return write(leaf.element, leaf.text, 0);
    leaf.nodes ??= 0;
    const made = inline(leaf.element, leaf.text);
    this.#nodes += made - leaf.nodes;
    leaf.nodes = made;
  }

  #open(kind, element) {
    this.#close();
    this.#leaf = { kind, element, text: "", isDirty: false };
    this.#put(element);
  }

  #close() {
    this.show();
    this.#leaf = null;
  }

  #put(element) {
    this.#nodes += 1;
    (this.#lists.at(-1)?.item ?? this.#quotes.at(-1) ?? this.#root).append(element);
  }

  #closeLists() {
    this.#close();
    this.#lists = [];
  }

  #quoteAt(depth) {
    this.#closeLists();
    while (this.#quotes.length > depth) this.#quotes.pop();
    while (this.#quotes.length < depth) {
      const quote = h("blockquote");
      this.#put(quote);
      this.#quotes.push(quote);
    }
  }

  #item(indent, marker, gap) {
    this.#close();
    const isOrdered = marker.length > 1;
    while (this.#lists.length && indent < this.#lists.at(-1).indent) this.#lists.pop();
    let list = this.#lists.at(-1);
    const isInside = list && indent >= list.content && this.#lists.length < DEPTH_MAX;
    if (list && !isInside && list.isOrdered !== isOrdered) {
      this.#lists.pop();
      list = null;
    }
    if (!list || isInside) {
      const start = isOrdered ? Number.parseInt(marker, 10) : 1;
      const element = isOrdered ? h("ol", { start }) : h("ul");
      this.#put(element);
      list = { element, item: null, isOrdered, indent };
      this.#lists.push(list);
    }
    list.content = indent + marker.length + Math.min(widthOf(gap), 4);
    list.item = h("li", { dir: "auto" });
    list.element.append(list.item);
    this.#nodes += 1;
  }

  // Code

  #openCode(fence, info, indent) {
    this.#close();
    const language = /^[\w+#.-]{1,24}/.exec(info)?.[0] ?? "";
    const code = h("code", { dir: "ltr" });
    const leaf = { kind: "code", fence, indent, raw: [], quotes: this.#quotes.length, code, chunk: null, size: 0, line: 0, isFirst: true };
    const press = (event) => copy(leaf.raw.join(""), event.currentTarget);
    const element = h(
      "figure",
      { class: "code" },
      h("figcaption", {}, h("span", { text: language || "text" }), button({ text: "Copy", icon: "copy", kind: "small bare", press })),
      h("pre", { tabIndex: 0, role: "group", "aria-label": language ? `Code: ${language}` : "Code" }, code),
    );
    this.#leaf = leaf;
    this.#put(element);
  }

  /** A line of code begins. */
  #code(text) {
    const leaf = this.#leaf;
    const blanks = /^[ \t]*/.exec(text)[0].length;
    text = text.slice(Math.min(blanks, leaf.indent));
    if (!leaf.isFirst) {
      leaf.raw.push("\n");
      leaf.line = 0;
      if (leaf.size > CHUNK_MAX) leaf.chunk = null; // a block of its own: its end is the line's
      else leaf.chunk.append("\n");
    }
    leaf.isFirst = false;
    this.#codeText(text);
  }

  #codeText(text) {
    const leaf = this.#leaf;
    if (leaf.chunk === null || leaf.line + text.length > LINE_MAX) {
      leaf.chunk = h("span", { class: "chunk" });
      leaf.code.append(leaf.chunk);
      leaf.size = leaf.line = 0;
      this.#nodes += 1;
    }
    leaf.raw.push(text);
    leaf.size += text.length;
    leaf.line += text.length;
    if (text) this.#nodes += write(leaf.chunk, text, this.#isFull ? 0 : NAMED_MAX);
    else if (!leaf.chunk.hasChildNodes()) leaf.chunk.append("");
  }

  // Tables

  /** The line below a line with bars: that one was the table's head. Returns whether it is so. */
  #table(leaf, line) {
    const start = leaf.text.lastIndexOf("\n") + 1;
    const head = leaf.text.slice(start);
    const cells = cellsOf(line);
    if (!head.includes("|") || cellsOf(head).length !== cells.length) return false;
    const above = leaf.text.slice(0, Math.max(0, start - 1));
    leaf.text = above;
    if (above) this.#render(leaf);
    else leaf.element.remove();
    const sides = cells.map((it) => (/^:-+:$/.test(it) ? "center" : /^-+:$/.test(it) ? "end" : null));
    const body = h("tbody");
    const table = h("table", {}, h("thead"), body);
    const element = h("div", { class: "table", tabIndex: 0, role: "group", "aria-label": "Table" }, table);
    this.#leaf = { kind: "table", element, body: table.tHead, sides };
    this.#put(element);
    this.#row(this.#leaf, head, "th");
    this.#leaf.body = body;
    return true;
  }

  #row(leaf, line, tag) {
    const row = h("tr");
    const cells = cellsOf(line.slice(0, LEAF_MAX));
    leaf.sides.forEach((side, index) => {
      const cell = h(tag, { dir: "auto", class: side, scope: tag === "th" ? "col" : null });
      if (this.#isFull) write(cell, cells[index] ?? "", 0);
      else this.#nodes += 1 + inline(cell, cells[index] ?? "");
      row.append(cell);
    });
    leaf.body.append(row);
  }
}

function quotesOf(line) {
  let depth = 0;
  for (let found; depth < DEPTH_MAX && (found = QUOTE.exec(line)); depth += 1) line = line.slice(found[0].length);
  return [depth, line];
}

function stripQuotes(line, depth) {
  for (let found; depth > 0 && (found = QUOTE.exec(line)); depth -= 1) line = line.slice(found[0].length);
  return line;
}

const widthOf = (blanks) => blanks.replace(/\t/g, "    ").length;

function cellsOf(line) {
  const bare = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return bare.split("|", CELLS_MAX).map((it) => it.trim());
}

// Marks inside of a paragraph

const MARK = /[\\`*_~[\]<\n]|https?:\/\//g;
const TARGET = /\([ \t]*<?([^\s()<>]{0,1000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500}){0,4})>?(?:[ \t]+"[^"\n]{0,200}")?[ \t]*\)/y;
const ADDRESS = /https?:\/\/[^\s<>"`|\\^{}\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]{1,1000}/y;
const IN_ANGLES = /<((?:https?:\/\/|mailto:)[^\s<>]{1,1000})>/y;
const SAFE = new Set(["http:", "https:", "mailto:"]);

/** The address of a link, if a page may lead there; null otherwise. */
export function safeAddress(text) {
  try {
    const url = new URL(text); // without a base: a relative address would be one of this server
    return SAFE.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** Puts a text with its marks into an empty element. Returns how many elements it made. */
export function inline(parent, text) {
  const ticks = ticksOf(text);
  const items = []; // texts, elements, marks, and brackets that may open a link
  let brackets = []; // indexes of open brackets in `items`
  let place = 0;
  const say = (words) => words && items.push({ text: words });
  MARK.lastIndex = 0;
  for (let found; (found = MARK.exec(text)); ) {
    const at = found.index;
    let next = at + 1;
    let item = null;
    const mark = found[0][0];
    if (mark === "\\") {
      if (/[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
        item = { text: text[at + 1] };
        next = at + 2;
      }
    } else if (mark === "\n") item = { make: () => h("br") };
    else if (mark === "`") {
      const run = runAt(text, at);
      const end = ticks.after(run, at + run);
      if (end >= 0) {
        const code = text.slice(at + run, end).replace(/\n/g, " ");
        item = { make: () => codeSpan(/^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code) };
        next = end + run;
      } else next = at + run;
    } else if (mark === "h") {
      const address = addressAt(text, at);
      if (address) {
        item = { make: () => link(address.href, [{ text: address.text }]) };
        next = at + address.text.length;
      } else next = at + 4;
    } else if (mark === "<") {
      IN_ANGLES.lastIndex = at;
      const inside = IN_ANGLES.exec(text);
      const href = inside && safeAddress(inside[1]);
      if (href) {
        item = { make: () => link(href, [{ text: inside[1] }]) };
        next = IN_ANGLES.lastIndex;
      }
    } else if (mark === "[") {
      say(text.slice(place, at));
      place = next;
      if (brackets.length < 32) brackets.push(items.length);
      items.push({ text: "[" });
    } else if (mark === "]") {
      const open = brackets.pop();
      TARGET.lastIndex = next;
      const target = open !== undefined && text[next] === "(" ? TARGET.exec(text) : null;
      if (target) {
        say(text.slice(place, at));
        const content = items.splice(open).slice(1);
        const isImage = items.at(-1)?.text?.endsWith("!");
        const href = safeAddress(target[1]);
        if (isImage) items.at(-1).text = items.at(-1).text.slice(0, -1);
        if (isImage) content.push({ text: " (image)" });
        item = { make: () => (href ? link(href, content) : refused(content, target[1])) };
        brackets = [];
        place = at;
        next = TARGET.lastIndex;
      }
    } else {
      const run = runAt(text, at);
      next = at + run;
      const marks = marksOf(text, at, run);
      if (marks) {
        say(text.slice(place, at));
        items.push(...marks);
        place = next;
      }
    }
    if (item) {
      say(text.slice(place, at));
      items.push(item);
      place = next;
    }
    MARK.lastIndex = next;
  }
  say(text.slice(place));
  build(parent, items);
  return parent.getElementsByTagName("*").length; // with those inside of links
}

function runAt(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** Where runs of so many backticks are: each is looked at once. */
function ticksOf(text) {
  const places = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!places.has(run.length)) places.set(run.length, []);
    places.get(run.length).push(index);
  }
  return {
    after(run, at) {
      const found = places.get(run) ?? [];
      while (found.length && found[0] < at) found.shift();
      return found[0] ?? -1;
    },
  };
}

/** A run of `*`, `_` or `~` as marks that open or close emphasis; null if it is text. */
function marksOf(text, at, run) {
  const sign = text[at];
  if (run > 3 || (sign === "~" && run !== 2)) return null;
  const before = text[at - 1] ?? " ";
  const after = text[at + run] ?? " ";
  let opens = /\S/.test(after);
  let closes = /\S/.test(before);
  if (sign === "_") {
    const isWord = /[\p{L}\p{N}]/u;
    if (isWord.test(before) && isWord.test(after)) return null;
    opens &&= !isWord.test(before);
    closes &&= !isWord.test(after);
  }
  if (!opens && !closes) return null;
  const mark = (count) => ({ mark: sign.repeat(count), opens, closes });
  if (run < 3) return [mark(run)];
  return closes ? [mark(1), mark(2)] : [mark(2), mark(1)];
}

const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "s" };

/** Elements of items, with the emphasis of those marks that have a partner. */
function build(parent, items) {
  const open = []; // indexes of marks
  const ends = new Map(); // of the opening mark, by the index of the closing one
  const begins = new Set();
  items.forEach((item, index) => {
    if (!item.mark) return;
    const partner = item.closes ? open.findLastIndex((it) => items[it].mark === item.mark) : -1;
    if (partner >= 0 && index > open[partner] + 1) {
      begins.add(open[partner]);
      ends.set(index, open[partner]);
      open.length = partner; // marks between the two have no partner
    } else if (item.opens && open.length < MARKS_MAX) open.push(index);
  });
  const parents = [parent];
  items.forEach((item, index) => {
    const into = parents.at(-1);
    if (begins.has(index)) {
      const element = h(TAGS[item.mark]);
      into.append(element);
      parents.push(element);
    } else if (ends.has(index)) parents.pop();
    else if (item.make) into.append(item.make());
    else write(into, item.text ?? item.mark);
  });
}

function codeSpan(text) {
  const made = h("code", { dir: "ltr" });
  write(made, text);
  return made;
}

function addressAt(text, at) {
  ADDRESS.lastIndex = at;
  const found = ADDRESS.exec(text);
  if (!found) return null;
  let address = found[0].replace(/[.,;:!?'*_~\]]+$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.replace(/\)+[.,;:!?]*$/, "");
  const href = safeAddress(address);
  return href && { href, text: address };
}

/** A link to another site: it learns nothing of this page, and gets no hold of it. */
function link(href, content) {
  const made = h("a", { href, rel: "noopener noreferrer nofollow", target: "_blank", title: href });
  build(made, content);
  return made;
}

/** The text of a link that leads where no link may lead, and the address as text. */
function refused(content, address) {
  const made = h("span", { class: "no-link", title: "An address that is not opened from here" });
  build(made, content);
  write(made, ` (${address})`);
  return made;
}
