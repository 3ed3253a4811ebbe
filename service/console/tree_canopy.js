// The whole tree in one picture: each level is a line of boxes, each box as wide as what it owns. For the eye and the
// mouse; the rows below say the same to the keyboard and to screen readers.

import { isPlumbing, kindOf } from "./tree_kinds.js";

const LEVEL = 9;
const GAP = 1;
const LEVELS_MAX = 16;
const TONES = {
  ink: "--ink",
  soft: "--ink-soft",
  green: "--green",
  blue: "--blue",
  brass: "--brass",
};
const SHADES = { soft: 0.45, ink: 0.8 };

/**
 * @param {HTMLCanvasElement} canvas
 * @param {{model: import("./tree_model.js").TreeModel, onChoose: (node: TreeNode) => void, onPoint: (node: TreeNode | null) => void}} options
 */
export function treeCanopy(canvas, { model, onChoose, onPoint, signal }) {
  const context = canvas.getContext("2d");
  let colours = null;
  let boxes = []; // by level: [{from, to, node}], from the left to the right
  let levels = 1;

  /** The theme's colours as a canvas takes them: a custom property itself is not computed (`light-dark(…)`). */
  function readColours() {
    const style = getComputedStyle(canvas);
    const computed = (name) => {
      canvas.style.color = `var(${name})`;
      return style.color;
    };
    colours = Object.fromEntries(Object.entries(TONES).map(([tone, name]) => [tone, computed(name)]));
    colours.red = computed("--red");
    colours.mark = computed("--ink");
  }

  /** Lays the boxes out: a leaf is one part wide, an owner as wide as all its leaves. */
  function layOut() {
    const leaves = new Map();
    const nodes = [...model.nodes.values()];
    for (let at = nodes.length - 1; at >= 0; at -= 1) {
      const node = nodes[at];
      const own = leaves.get(node.id) ?? 1;
      leaves.set(node.id, own);
      if (node.parent !== null) leaves.set(node.parent, (leaves.get(node.parent) ?? 0) + own);
    }
    boxes = [];
    const put = (siblings, from, level) => {
      if (level >= LEVELS_MAX) return;
      boxes[level] ??= [];
      let at = from;
      for (const node of siblings) {
        const width = leaves.get(node.id);
        if (!isPlumbing(node)) {
          boxes[level].push({ from: at, to: at + width, node });
          put(node.children, at, level + 1);
        } else put(node.children, at, level);
        at += width;
      }
    };
    put(model.roots, 0, 0);
    levels = Math.max(levels, boxes.length); // it never shrinks: the rows below would jump
    return model.roots.reduce((total, root) => total + (leaves.get(root.id) ?? 0), 0);
  }

  // Plumbing is left out of the picture: a chain of it would push what matters off the edge.

  /** Draws the tree. `active` is the id of the active row; `isBright` says whether a node has just come. */
  function draw({ active, isBright }) {
    if (colours === null) readColours();
    const all = Math.max(1, layOut());
    const ratio = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = levels * LEVEL;
    if (canvas.style.height !== `${height}px`) canvas.style.height = `${height}px`;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const scale = width / all;
    let mark = null;
    boxes.forEach((line, level) => {
      let drawnTo = -1; // boxes that are thinner than a pixel are drawn once for all that share it
      for (const { from, to, node } of line) {
        const x = from * scale;
        const wide = (to - from) * scale;
        if (node.id === active) mark = [x, level * LEVEL, Math.max(2, wide), LEVEL - GAP];
        if (x + wide < drawnTo + 0.6) continue;
        const { tone } = kindOf(node.kind);
        const isBad = node.data.cancelled || node.data.state === "ending";
        context.fillStyle = isBad ? colours.red : (colours[tone] ?? colours.soft);
        context.globalAlpha = isBright(node) ? 1 : (SHADES[tone] ?? (node.kind === "turn" ? 0.85 : 0.6));
        context.fillRect(x, level * LEVEL, Math.max(0.8, wide - (wide > 3 ? GAP : 0)), LEVEL - GAP);
        drawnTo = x + Math.max(0.8, wide);
      }
    });
    if (mark !== null) {
      context.globalAlpha = 1;
      context.strokeStyle = colours.mark;
      context.lineWidth = 2;
      context.strokeRect(mark[0] + 1, mark[1] + 1, Math.max(2, mark[2] - 2), mark[3] - 2);
    }
    context.globalAlpha = 1;
    scaleOf = scale;
  }

  let scaleOf = 1;

  function at(event) {
    const box = canvas.getBoundingClientRect();
    const line = boxes[Math.floor((event.clientY - box.top) / LEVEL)] ?? [];
    const part = (event.clientX - box.left) / scaleOf;
    return line.find(({ from, to }) => part >= from && part < to)?.node ?? null;
  }

  canvas.addEventListener("click", (event) => {
    const node = at(event);
    if (node !== null) onChoose(node);
  });
  canvas.addEventListener("pointermove", (event) => onPoint(at(event)));
  canvas.addEventListener("pointerleave", () => onPoint(null));
  const forget = () => (colours = null);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", forget, { signal });
  const themes = new MutationObserver(forget);
  themes.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  signal.addEventListener("abort", () => themes.disconnect());

  return { draw };
}
