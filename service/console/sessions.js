// The list of conversations: in pages while it is scrolled, with a search.

import { button, h, icon } from "./dom.js";
import { ago, count, counted, date, until } from "./format.js";
import { refused } from "./words.js";

const PAGE = 50;
const ROWS_MAX = 2 * PAGE; // with more, and nothing but the first of them seen, the list begins anew
const TOP_PX = 600;
const SEARCH_PAUSE_MS = 250;
const REFRESH_MS = 10_000;
const CLOCKS_MS = 30_000;
const SOON_MS = 24 * 3600 * 1000;

/** `acts`: `rename(session)`, `remove(session)`, `create()`. */
export class SessionList {
  element;
  #context;
  #acts;
  #rows = new Map(); // by id: {element, session, parts}
  #list;
  #status;
  #sentinel;
  #search;
  #total;
  #next = null; // where the next page begins; null at the end
  #newest; // the newest conversation when the first page was last shown
  #isBehind = false; // whether newer ones are not shown yet
  #isLoading = false;
  #load = new AbortController();
  #selected = null;
  #query = "";

  constructor(context, acts) {
    this.#context = context;
    this.#acts = acts;
    this.#list = h("ul", { class: "session-rows", "aria-label": "Conversations" });
    this.#status = h("p", { class: "list-status soft", hidden: true });
    this.#sentinel = h("div", { class: "sentinel", "aria-hidden": "true" });
    this.#total = h("span", { class: "soft" });
    let timer;
    const typed = () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.#find(), SEARCH_PAUSE_MS);
    };
    this.#search = h("input", {
      class: "input",
      type: "search",
      placeholder: "Search all conversations",
      "aria-label": "Search all conversations",
      on: { input: typed },
    });
    const scroller = h("div", { class: "session-scroll" }, this.#list, this.#status, this.#sentinel);
    this.element = h(
      "aside",
      { class: "sessions", "aria-label": "Conversations" },
      h("div", { class: "sessions-head" }, h("h2", { text: "Conversations" }), this.#total, button({ text: "New", label: "Begin a conversation", icon: "plus", kind: "small", press: () => acts.create() })),
      h("div", { class: "sessions-search" }, icon("search"), this.#search),
      scroller,
    );
    this.#list.addEventListener("keydown", (event) => this.#move(event));
    const { signal } = context;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    const refresh = setInterval(() => document.visibilityState === "visible" && this.refresh(), REFRESH_MS);
    const clocks = setInterval(() => this.#showTimes(), CLOCKS_MS);
    signal.addEventListener("abort", () => {
      clearInterval(refresh);
      clearInterval(clocks);
      clearTimeout(timer);
      this.#load.abort();
    });
  }

  focusSearch() {
    this.#search.focus();
    this.#search.select();
  }

  /** Marks the conversation that is open. */
  select(id) {
    this.#selected = id;
    for (const [it, { parts }] of this.#rows) {
      if (it === id) parts.link.setAttribute("aria-current", "true");
      else parts.link.removeAttribute("aria-current");
    }
  }

  /** Shows a conversation as it is now; one that is not there comes first. */
  put(session) {
    if (this.#query && !this.#rows.has(session.id)) return;
    this.#show(session, { isNew: true });
    this.#showStatus();
  }

  remove(id) {
    const row = this.#rows.get(id);
    if (!row) return;
    this.#rows.delete(id);
    const beside = row.element.nextElementSibling ?? row.element.previousElementSibling;
    const hadFocus = row.element.contains(document.activeElement);
    row.element.remove();
    if (hadFocus) beside?.querySelector("a")?.focus();
    this.#showStatus();
  }

  /** Reads the newest conversations, and shows what has changed in them. */
  async refresh() {
    if (this.#query || this.#isLoading) return;
    try {
      const { signal } = this.#load;
      const page = await this.#context.client.listSessions({ limit: PAGE, count: true, signal });
      if (signal.aborted || this.#query || this.#isLoading) return;
      this.#showTotal(page.count);
      const ids = new Set(page.data.map((it) => it.id));
      const oldest = page.data.at(-1)?.created_at ?? "";
      for (const [id, { session }] of [...this.#rows]) {
        if (!ids.has(id) && (page.next === null || session.created_at > oldest)) this.remove(id);
      }
      const isJoined = this.#newest !== undefined && (ids.has(this.#newest.id) || oldest < this.#newest.created_at);
      const isAtTop = this.#isAtTop();
      if (isAtTop) {
        if (this.#rows.size === 0 || page.next === null || !isJoined || this.#rows.size > ROWS_MAX) this.#keep(ids, page.next);
        this.#newest = page.data[0];
      }
      // Further down nothing is put above what is read: it comes with the way back to the top.
      this.#isBehind = !isAtTop && page.data.some((it) => !this.#rows.has(it.id));
      for (const session of page.data.toReversed()) if (isAtTop || this.#rows.has(session.id)) this.#show(session, { isNew: true });
      this.#showStatus();
      this.#fill();
    } catch (error) {
      this.#trouble(error);
    }
  }

  /** Takes the rows of others than these away: the list goes on at `next`. The open conversation keeps its row. */
  #keep(ids, next) {
    this.#next = next;
    for (const [id, { element }] of [...this.#rows]) {
      if (ids.has(id) || id === this.#selected || element.contains(document.activeElement)) continue;
      this.#rows.delete(id);
      element.remove();
    }
  }

  /** Shows the list from its beginning. */
  async begin() {
    this.#load.abort();
    this.#load = new AbortController();
    this.#isLoading = false;
    this.#rows.clear();
    this.#list.replaceChildren();
    this.#next = undefined;
    this.#newest = undefined;
    this.#isBehind = false;
    await this.#more();
  }

  async #find() {
    const query = this.#search.value.trim();
    if (query === this.#query) return;
    this.#query = query;
    await this.begin();
    const found = counted(this.#rows.size, "conversation");
    if (query) this.#context.say(this.#next ? `${found} and more` : `${found} found`);
  }

  async #more() {
    if (this.#isLoading || this.#next === null) return;
    const { signal } = this.#load;
    this.#isLoading = true;
    this.#tell(this.#rows.size ? "" : "Loading…");
    try {
      const first = this.#next === undefined;
      const q = this.#query || undefined;
      const page = await this.#context.client.listSessions({ limit: PAGE, after: this.#next, q, count: first && !q ? true : undefined, signal });
      if (signal.aborted) return;
      this.#next = page.next;
      if (page.count !== undefined) this.#showTotal(page.count);
      else if (first) this.#total.textContent = "";
      if (first && !q) this.#newest = page.data[0];
      for (const session of page.data) this.#show(session, { isNew: false });
      this.#showStatus();
      this.#fill();
    } catch (error) {
      this.#trouble(error);
    } finally {
      if (!signal.aborted) this.#isLoading = false;
    }
  }

  /** Reads the next page, too, if the end of the list is seen after this one. */
  #fill() {
    if (this.#next !== null && this.#isNear()) setTimeout(() => this.#more());
  }

  #scrolled() {
    if (this.#isNear()) this.#more();
    if (!this.#isBehind || !this.#isAtTop()) return;
    this.#isBehind = false;
    this.refresh();
  }

  #isAtTop() {
    return this.#sentinel.parentElement.scrollTop < TOP_PX;
  }

  /** Whether the end of the list is seen, or will be soon. */
  #isNear() {
    const scroller = this.#sentinel.parentElement;
    return this.#sentinel.offsetTop < scroller.scrollTop + scroller.clientHeight + 600 && scroller.clientHeight > 0;
  }

  #trouble(error) {
    if (this.#load.signal.aborted || this.#context.signal.aborted) return;
    if (!this.#rows.size) this.#tell(refused(error));
  }

  #tell(words) {
    this.#status.hidden = !words;
    this.#status.textContent = words;
  }

  #showStatus() {
    if (this.#rows.size) return this.#tell("");
    this.#tell(this.#query ? "Nothing found. A search goes through all titles, questions and replies." : "No conversations yet.");
  }

  #showTotal(total) {
    this.#total.textContent = total ? count(total) : "";
  }

  #show(session, { isNew }) {
    let row = this.#rows.get(session.id);
    if (!row) {
      row = this.#row(session);
      this.#rows.set(session.id, row);
      if (isNew) this.#list.prepend(row.element);
    }
    if (!isNew && !row.element.contains(document.activeElement)) this.#list.append(row.element);
    row.session = session;
    const { parts } = row;
    row.element.dataset.status = session.status;
    const title = session.title || "Untitled";
    parts.title.textContent = title;
    parts.link.title = `${title}\n${session.id}\ncreated ${date(session.created_at)}`;
    parts.snippet.textContent = session.match?.snippet ?? "";
    parts.snippet.hidden = !session.match;
    parts.state.textContent = session.status === "running" ? "running, " : "";
    if (session.id === this.#selected) parts.link.setAttribute("aria-current", "true");
    this.#showTime(row);
  }

  #row(session) {
    const parts = {
      title: h("span", { class: "row-title", dir: "auto" }),
      snippet: h("span", { class: "row-snippet", dir: "auto" }),
      state: h("span", { class: "visually-hidden" }),
      when: h("span"),
      expiry: h("span"),
    };
    parts.link = h(
      "a",
      { class: "session-row", href: `#/chat/${encodeURIComponent(session.id)}` },
      parts.title,
      parts.snippet,
      h("span", { class: "row-facts" }, h("span", { class: "lamp", "aria-hidden": "true" }), parts.state, parts.when, parts.expiry),
    );
    const current = () => this.#rows.get(session.id).session;
    const tools = h(
      "span",
      { class: "row-tools" },
      button({ label: "Rename", icon: "edit", kind: "small bare", press: () => this.#acts.rename(current()) }),
      button({ label: "Delete", icon: "trash", kind: "small bare", press: () => this.#acts.remove(current()) }),
    );
    return { element: h("li", {}, parts.link, tools), parts, session };
  }

  #showTimes() {
    for (const row of this.#rows.values()) this.#showTime(row);
  }

  #showTime({ parts, session }) {
    parts.when.textContent = `${counted(session.message_count, "message")} · ${ago(session.updated_at)}`;
    const left = Date.parse(session.expires_at) - Date.now();
    parts.expiry.textContent = ` · ${left > 0 ? `expires in ${until(session.expires_at)}` : "expired"}`;
    parts.expiry.classList.toggle("soon", left < SOON_MS);
  }

  /** Up and down in the list with the arrow keys. */
  #move(event) {
    const by = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!by || !event.target.matches("a.session-row")) return;
    event.preventDefault();
    event.target.closest("li")[by]?.querySelector("a.session-row").focus();
  }
}
