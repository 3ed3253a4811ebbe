// The tree as data: what has come, changed and gone, and which rows are to be seen. It knows no document.

/**
 * @typedef {object} TreeNode
 * @property {string} id stays the same while the thing lives
 * @property {string | null} parent
 * @property {string} kind
 * @property {string} name
 * @property {Record<string, any>} data the node as the server tells it
 * @property {number} deadlineSetAt when its deadline was heard of first, on the clock of the process
 * @property {TreeNode[]} children in the order in which they came
 * @property {number} size how many nodes are below
 *
 * @typedef {object} Row
 * @property {TreeNode} node
 * @property {number} level from 1
 * @property {number} place among its siblings, from 1
 * @property {number} siblings with itself
 * @property {boolean | null} isOpen null without children
 * @property {boolean[]} lines for each level above: whether a sibling follows there, so that its line goes on
 * @property {boolean} isMatch whether it is what the filter looks for
 */

/** A tree of nodes that come and go. */
export class TreeModel {
  /** @param {{isShown?: (node: TreeNode) => boolean}} options which nodes have rows of their own */
  constructor({ isShown = () => true } = {}) {
    this.nodes = new Map();
    this.roots = [];
    this.isShown = isShown;
    this.filter = "";
    this.branch = null; // the id of the node whose branch is shown alone
    this._opened = new Map(); // what a person has opened and closed, by id
  }

  /**
   * Takes a whole snapshot.
   *
   * @param {object[]} nodes each parent before its children
   * @param {number} clock the moment of the snapshot, on the clock of the process
   * @returns {{added: TreeNode[], removed: TreeNode[]}} what has come and gone since the last one
   */
  replace(nodes, clock = 0) {
    const added = [];
    const before = this.nodes;
    this.nodes = new Map();
    this.roots = [];
    for (const data of nodes) {
      const old = before.get(data.id);
      const node = old ?? { id: data.id, children: [], size: 0 };
      if (old === undefined) added.push(node);
      before.delete(data.id);
      this._put(node, data, clock);
    }
    for (const id of before.keys()) this._opened.delete(id);
    return { added, removed: [...before.values()] };
  }

  /**
   * Takes what has changed since. Nodes that are not known are left out: the next snapshot has them.
   *
   * @param {{removed?: string[], added?: object[], changed?: object[]}} change
   * @returns {{added: TreeNode[], removed: TreeNode[]}}
   */
  change({ removed = [], added = [], changed = [] }, clock = 0) {
    const gone = this._take(removed);
    const come = [];
    for (const data of added)
      if (!this.nodes.has(data.id) && this.nodes.has(data.parent))
        come.push(this._put({ id: data.id, children: [], size: 0 }, data, clock));
    for (const { id, ...fields } of changed) {
      const node = this.nodes.get(id);
      if (node !== undefined) this._update(node, fields, clock);
    }
    return { added: come, removed: gone };
  }

  _take(ids) {
    const gone = ids.map((id) => this.nodes.get(id)).filter((node) => node !== undefined);
    for (const { id } of gone) {
      this.nodes.delete(id);
      this._opened.delete(id);
    }
    const stays = (node) => this.nodes.get(node.id) === node;
    for (const parent of new Set(gone.map((node) => node.parent))) {
      const owner = this.nodes.get(parent);
      if (owner !== undefined) owner.children = owner.children.filter(stays);
    }
    this.roots = this.roots.filter(stays);
    return gone;
  }

  _put(node, data, clock) {
    node.parent = data.parent ?? null;
    node.kind = data.kind;
    node.name = data.name;
    if (node.data?.deadline !== data.deadline) node.deadlineSetAt = clock;
    node.data = data;
    node.children = [];
    this.nodes.set(node.id, node);
    const parent = this.nodes.get(node.parent);
    (parent === undefined ? this.roots : parent.children).push(node);
    return node;
  }

  _update(node, fields, clock) {
    if ("deadline" in fields) node.deadlineSetAt = clock;
    for (const [name, value] of Object.entries(fields)) {
      if (value === null) delete node.data[name];
      else node.data[name] = value;
    }
    node.name = node.data.name;
    node.kind = node.data.kind; // a scope is a turn's from the moment at which the turn says so
  }

  // What is open

  isOpen(node) {
    return this._opened.get(node.id) ?? true;
  }

  setOpen(node, isOpen) {
    this._opened.set(node.id, isOpen);
  }

  /** Opens or closes all, apart from the roots, which stay open. */
  setAllOpen(isOpen) {
    for (const node of this.nodes.values()) if (node.children.length > 0) this._opened.set(node.id, isOpen);
    for (const root of this.roots) this._opened.set(root.id, true);
  }

  /** Opens all that is above a node. */
  reveal(node) {
    for (const above of this.ancestors(node)) this._opened.set(above.id, true);
  }

  /** The owners of a node, the root first. */
  ancestors(node) {
    const above = [];
    for (let at = this.nodes.get(node.parent); at !== undefined; at = this.nodes.get(at.parent)) above.unshift(at);
    return above;
  }

  /** The shown owner of a node: the nearest one above that has a row of its own. */
  owner(node) {
    return this.ancestors(node).findLast((above) => this.isShown(above));
  }

  // Rows

  /** The rows that are to be seen, from the top to the bottom. */
  rows() {
    const start = this.branch === null ? this.roots : [this.nodes.get(this.branch)].filter(Boolean);
    const wanted = this.filter.trim().toLowerCase();
    const rows = [];
    this._addRows(rows, start, { level: 1, lines: [], kept: wanted === "" ? null : this._keep(wanted) });
    return rows;
  }

  /** What a filter keeps, by id: the matches, and the owners of matches. */
  _keep(wanted) {
    const kept = new Map();
    for (const node of this.nodes.values()) {
      if (!this.isShown(node) || !matches(node, wanted)) continue;
      kept.set(node.id, "match");
      for (let at = this.nodes.get(node.parent); at !== undefined && !kept.has(at.id); at = this.nodes.get(at.parent))
        kept.set(at.id, "owner");
    }
    return kept;
  }

  /** These nodes as far as the filter keeps them, each that has no row of its own replaced by its children. */
  _shown(nodes, kept) {
    const wanted = kept === null ? nodes : nodes.filter((node) => kept.has(node.id));
    if (wanted.every(this.isShown)) return wanted;
    return wanted.flatMap((node) => (this.isShown(node) ? [node] : this._shown(node.children, kept)));
  }

  _addRows(rows, nodes, { level, lines, kept }) {
    const siblings = this._shown(nodes, kept);
    siblings.forEach((node, index) => {
      const isMatch = kept?.get(node.id) === "match";
      const row = { node, level, lines, place: index + 1, siblings: siblings.length, isOpen: null, isMatch };
      rows.push(row);
      const keptBelow = isMatch ? null : kept; // all that belongs to a match is to be seen
      if (this._shown(node.children, keptBelow).length === 0) return;
      row.isOpen = keptBelow !== null || this.isOpen(node);
      if (!row.isOpen) return;
      const below = { level: level + 1, lines: [...lines, index + 1 < siblings.length], kept: keptBelow };
      this._addRows(rows, node.children, below);
    });
  }

  /** Counts, for each node, the nodes below it; and all nodes by kind. */
  count() {
    const kinds = new Map();
    const nodes = [...this.nodes.values()];
    for (const node of nodes) {
      node.size = 0;
      kinds.set(node.kind, (kinds.get(node.kind) ?? 0) + 1);
    }
    // Parents come before their children: from the end on, each node is complete when its parent takes it.
    for (const node of nodes.reverse()) {
      const parent = this.nodes.get(node.parent);
      if (parent !== undefined) parent.size += node.size + 1;
    }
    return kinds;
  }
}

const matches = (node, wanted) =>
  node.name.toLowerCase().includes(wanted) || node.kind.includes(wanted) || node.id.toLowerCase().includes(wanted);
