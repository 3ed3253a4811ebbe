// The rows of the tree on the page: only those that can be seen are in the document, each keyed by its node.
//
// The pattern is ARIA's tree with `aria-activedescendant`: the focus stays on the tree, so a row may go at any time.

import { set, write } from "./admin.js";
import { h, svg } from "./dom.js";
import { count } from "./format.js";
import { isPlumbing, kindOf, shortName } from "./tree_kinds.js";

const BEYOND = 6; // rows above and below what can be seen
const SLIDES_MAX = 12; // a row that moves further than so many rows jumps
const FAREWELL_MS = 140;
const TYPED_MS = 700;
const LETTER = /^\p{L}$/u; // what a name may begin with: other keys are the page's, unless a name is being typed
const STEP = 18; // the indent of a level
const STEP_NARROW = 11;

/**
 * @param {object} options
 * @param {HTMLElement} options.scroller the element with the role `tree`
 * @param {import("./tree_model.js").TreeModel} options.model
 * @param {AbortSignal} options.signal ends with the view
 * @param {(row: Row) => {state: string, details: string, spoken: string, deadline: object | null}} options.describe
 * @param {(node: TreeNode | null) => void} options.onActive another row is the active one
 * @param {() => void} options.onChange rows were opened or closed
 * @param {() => boolean} options.isStill whether nothing may move
 */
export function treeRows({ scroller, model, signal, describe, onActive, onChange, isStill }) {
  const space = h("div", { class: "tree-space", role: "presentation" });
  scroller.append(space);
  const narrow = matchMedia("(max-width: 38rem)");
  const shown = new Map(); // elements by the id of their node
  let rows = [];
  let places = new Map(); // the index of each row, by the id of its node
  let height = 28;
  let active = null;
  let typed = "";
  let typedAt = 0;

  // What is shown

  /** Shows these rows. `removed` has the nodes that are gone, which say farewell where they can be seen. */
  function replace(next, removed, ends) {
    const anchors = anchorsOf();
    const activeAt = places.get(active);
    rows = next;
    places = new Map(rows.map(({ node }, index) => [node.id, index]));
    height = parseFloat(getComputedStyle(scroller).getPropertyValue("--row")) || 28;
    for (const node of removed) sayFarewell(node.id, ends[node.id]);
    space.style.height = `${rows.length * height}px`;
    if (active !== null && !places.has(active) && rows.length > 0 && activeAt !== undefined) {
      activate(rows[Math.min(activeAt, rows.length - 1)].node, { isAsked: false });
    }
    const anchor = anchors.find(({ id }) => places.has(id));
    const moved = anchor === undefined ? 0 : (places.get(anchor.id) - anchor.index) * height;
    if (moved !== 0) scroller.scrollTop += moved;
    paint({ slides: moved === 0 });
  }

  /** The rows that can be seen: the first of them that stays keeps its place while others come and go. At the very top
   * none has to. */
  function anchorsOf() {
    if (scroller.scrollTop < height) return [];
    const index = Math.ceil(scroller.scrollTop / height);
    return rows.slice(index, index + Math.ceil(scroller.clientHeight / height)).map(({ node }, at) => ({ id: node.id, index: index + at }));
  }

  /** Brings the document in line with what can be seen. */
  function paint({ slides = false } = {}) {
    const first = Math.max(0, Math.floor(scroller.scrollTop / height) - BEYOND);
    const last = Math.min(rows.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / height) + BEYOND);
    const seen = new Set();
    for (let index = first; index < last; index += 1) seen.add(rows[index].node.id);
    if (active !== null && places.has(active)) seen.add(active); // what `aria-activedescendant` names has to exist
    for (const [id, element] of shown) {
      if (seen.has(id)) continue;
      element.row.remove();
      shown.delete(id);
    }
    for (const id of seen) {
      const index = places.get(id);
      let element = shown.get(id);
      if (element === undefined) {
        element = makeRow(id);
        shown.set(id, element);
        space.append(element.row);
        if (slides && !isStill()) element.row.classList.add("comes");
      } else {
        const isNear = Math.abs(index - element.index) <= SLIDES_MAX;
        element.row.classList.toggle("slides", slides && isNear && !isStill());
      }
      if (element.index !== index || element.height !== height) {
        element.row.style.transform = `translateY(${index * height}px)`;
        [element.index, element.height] = [index, height];
      }
      fill(element, rows[index]);
    }
    set(scroller, "aria-activedescendant", active !== null && shown.has(active) ? rowId(active) : null);
  }

  function sayFarewell(id, end) {
    const element = shown.get(id);
    if (element === undefined) return;
    shown.delete(id);
    const { row } = element;
    if (isStill() || places.has(id)) {
      row.remove();
      return;
    }
    for (const name of ["id", "aria-level", "aria-expanded", "aria-selected", "aria-posinset", "aria-setsize", "aria-label"])
      row.removeAttribute(name);
    set(row, "role", "presentation");
    set(row, "aria-hidden", "true");
    row.dataset.end = end ?? "gone";
    row.classList.add("leaves");
    setTimeout(() => row.remove(), FAREWELL_MS);
  }

  // A row

  function makeRow(id) {
    const guide = svg("path", {});
    const lines = svg("svg", { class: "guides", "aria-hidden": "true" }, guide);
    const twist = h("span", { class: "twist", "aria-hidden": "true" });
    const glyphPath = svg("path", {});
    const glyph = svg("svg", { class: "glyph", viewBox: "0 0 16 16", "aria-hidden": "true" }, glyphPath);
    const name = h("span", { class: "row-name" });
    const state = h("span", { class: "row-state" });
    const details = h("span", { class: "row-details" });
    const left = h("span", { class: "deadline-left" });
    const leftOf = h("span", { class: "deadline-name" });
    const bar = h("span", { class: "deadline-bar" }, h("i"));
    const deadline = h("span", { class: "deadline" }, leftOf, left, bar);
    const row = h(
      "div",
      { class: "row", role: "treeitem", id: rowId(id), data: { id } },
      lines, twist, glyph, name, state, details, deadline,
    );
    return { row, lines, guide, twist, glyph, glyphPath, name, state, details, deadline, left, leftOf, bar: bar.firstChild, index: -1 };
  }

  function fill(element, row) {
    const { node } = row;
    const kind = kindOf(node.kind);
    const told = describe(row);
    if (element.kind !== node.kind) {
      element.kind = node.kind;
      element.row.dataset.kind = node.kind;
      element.row.dataset.tone = kind.tone;
      set(element.row, "data-plumbing", isPlumbing(node) ? "true" : null);
      if (node.kind === "turn") element.row.dataset.turn = node.data.turn ?? "";
      element.glyph.classList.toggle("filled", kind.isFilled === true);
      element.glyphPath.setAttribute("d", kind.glyph);
    }
    drawGuides(element, row);
    write(element.name, shortName(node.name));
    write(element.state, told.state);
    set(element.state, "data-state", told.state || null);
    write(element.details, told.details);
    set(element.row, "data-cancelled", node.data.cancelled ? "true" : null);
    set(element.row, "data-match", row.isMatch ? "true" : null);
    set(element.row, "aria-level", row.level);
    set(element.row, "aria-posinset", row.place);
    set(element.row, "aria-setsize", row.siblings);
    set(element.row, "aria-expanded", row.isOpen);
    if (row.isOpen === false) set(element.row, "aria-expanded", "false");
    set(element.row, "aria-selected", node.id === active ? "true" : "false");
    set(element.row, "aria-label", `${kind.word} ${shortName(node.name).replace(new RegExp(`^${kind.word} `), "")}${told.spoken}`);
    element.twist.dataset.open = row.isOpen === null ? "" : String(row.isOpen);
    element.told = told;
    showDeadline(element);
  }

  function drawGuides(element, { level, lines, place, siblings, isOpen }) {
    const step = narrow.matches ? STEP_NARROW : STEP;
    const key = `${step}/${height}/${level}/${place < siblings}/${lines.join()}/${isOpen}`;
    if (element.guideKey === key) return;
    element.guideKey = key;
    const width = (level - 1) * step + 8;
    const middle = height / 2;
    const under = (depth) => depth * step - step / 2 + 4.5; // the middle of the owner's mark
    let path = "";
    lines.forEach((goesOn, depth) => {
      if (goesOn && depth > 0) path += `M${under(depth)} 0V${height}`;
    });
    if (level > 1) {
      const x = under(level - 1);
      path += place < siblings ? `M${x} 0V${height}M${x} ${middle - 4}` : `M${x} 0V${middle - 4}`;
      path += `q0 4 4 4H${isOpen === null ? width + 14 : width + 1}`;
    }
    element.lines.setAttribute("width", width);
    element.lines.setAttribute("height", height);
    element.lines.setAttribute("viewBox", `0 0 ${width} ${height}`);
    element.guide.setAttribute("d", path);
  }

  function showDeadline({ deadline, left, leftOf, bar, told }) {
    const found = told.deadline?.();
    deadline.hidden = !found;
    if (!found) return;
    write(leftOf, found.of);
    write(left, found.left);
    set(deadline, "data-near", found.isNear ? "true" : null);
    set(deadline, "title", found.title);
    bar.style.transform = `scaleX(${found.share.toFixed(3)})`;
  }

  /** Counts the deadlines of the rows down that can be seen. */
  function tick() {
    for (const element of shown.values()) showDeadline(element);
  }

  // The active row

  function activate(node, { isAsked = true, scrolls = false } = {}) {
    active = node?.id ?? null;
    if (scrolls && places.has(active)) scrollTo(places.get(active));
    onActive(node, isAsked);
  }

  function scrollTo(index, { middle = false } = {}) {
    const top = index * height;
    const isSeen = top >= scroller.scrollTop && top + height <= scroller.scrollTop + scroller.clientHeight;
    if (middle && !isSeen) scroller.scrollTop = top - scroller.clientHeight / 2 + height / 2;
    else if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (top + height > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + height - scroller.clientHeight;
  }

  /** Makes a node the active one, opens what is above it and brings it into view. */
  function show(node) {
    model.reveal(node);
    active = node.id;
    onChange();
    if (places.has(node.id)) scrollTo(places.get(node.id), { middle: true });
    onActive(node, true);
    paint();
  }

  function move(index) {
    if (rows.length === 0) return;
    activate(rows[Math.max(0, Math.min(index, rows.length - 1))].node, { scrolls: true });
    paint();
  }

  function open(row, isOpen) {
    model.setOpen(row.node, isOpen);
    onChange();
  }

  const page = () => Math.max(1, Math.floor(scroller.clientHeight / height) - 1);

  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || rows.length === 0) return;
    const at = places.get(active) ?? -1;
    const row = rows[at];
    const isTyping = typed !== "" && performance.now() - typedAt < TYPED_MS;
    const act = {
      ArrowDown: () => move(at + 1),
      ArrowUp: () => move(at < 0 ? 0 : at - 1),
      Home: () => move(0),
      End: () => move(rows.length - 1),
      PageDown: () => move(at + page()),
      PageUp: () => move(at - page()),
      ArrowRight: () => row && (row.isOpen === false ? open(row, true) : row.isOpen && move(at + 1)),
      ArrowLeft: () => row && (row.isOpen ? open(row, false) : moveToOwner(at)),
      Enter: () => row && row.isOpen !== null && open(row, !row.isOpen),
      " ": () => row && row.isOpen !== null && open(row, !row.isOpen),
      "*": () => row && openSiblings(at),
    }[event.key];
    if (act !== undefined && !(event.key === " " && isTyping)) {
      typed = "";
      act();
    } else if (LETTER.test(event.key) || (isTyping && event.key.length === 1)) seek(event.key, at);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  function moveToOwner(at) {
    for (let index = at - 1; index >= 0; index -= 1) if (rows[index].level < rows[at].level) return move(index);
  }

  function openSiblings(at) {
    const { level } = rows[at];
    for (let index = at; index >= 0 && rows[index].level >= level; index -= 1)
      if (rows[index].level === level) model.setOpen(rows[index].node, true);
    for (let index = at; index < rows.length && rows[index].level >= level; index += 1)
      if (rows[index].level === level) model.setOpen(rows[index].node, true);
    onChange();
  }

  /** Goes to the next row whose name begins with what was typed. */
  function seek(letter, at) {
    const now = performance.now();
    const goesOn = now - typedAt < TYPED_MS;
    typed = goesOn ? typed + letter.toLowerCase() : letter.toLowerCase();
    typedAt = now;
    const from = goesOn && typed.length > 1 ? at : at + 1;
    for (let step = 0; step < rows.length; step += 1) {
      const index = (Math.max(from, 0) + step) % rows.length;
      if (shortName(rows[index].node.name).toLowerCase().startsWith(typed)) return move(index);
    }
  }

  function click(event) {
    const element = event.target.closest(".row");
    const index = places.get(element?.dataset.id);
    if (index === undefined) return;
    const row = rows[index];
    activate(row.node);
    if (row.isOpen !== null && (event.target.closest(".twist") || event.detail === 2)) open(row, !row.isOpen);
    paint();
  }

  scroller.addEventListener("keydown", press);
  scroller.addEventListener("click", click);
  scroller.addEventListener("focus", () => {
    if (active === null && rows.length > 0) move(Math.ceil(scroller.scrollTop / height));
  });
  let isPainting = false;
  const repaint = () => {
    if (isPainting) return;
    isPainting = true;
    requestAnimationFrame(() => {
      isPainting = false;
      paint();
    });
  };
  scroller.addEventListener("scroll", repaint, { passive: true });
  new ResizeObserver(repaint).observe(scroller);
  narrow.addEventListener("change", () => onChange(), { signal }); // the list lives as long as the page

  return {
    replace,
    tick,
    show,
    get active() {
      return active;
    },
    words: () => `${count(rows.length)} rows`,
  };
}

const rowId = (id) => `node-${id}`;
