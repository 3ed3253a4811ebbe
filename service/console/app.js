// The shell: the header, the views, the state of the connection, the key, the theme and the keys of the keyboard.

import { ask, button, h, icon } from "./dom.js";
import { duration } from "./format.js";
import { Service } from "./service.js";
import { say, toast } from "./toasts.js";
import { VIEWS } from "./views.js";

const THEME = "lastcall.theme";
const BACK_SHOWN_MS = 4000;
const STATES = {
  connecting: "Connecting",
  online: "Connected",
  closing: "Shutting down",
  unreachable: "No answer",
  offline: "Offline",
};

const service = new Service();
const main = document.getElementById("main");
const shortcuts = new Map(); // by key: {words, act}
let shown = null; // the view on the page: {id, end}

// The views

/** The address behind the `#`, in parts: `#/chat/sess_1` is `["chat", "sess_1"]`. */
const partsOf = () => location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);

function addressOf(parts) {
  return `#/${parts.map(encodeURIComponent).join("/")}`;
}

async function route() {
  let parts;
  try {
    parts = partsOf();
  } catch {
    parts = [""]; // an address that is no address
  }
  const view = VIEWS.find((it) => it.id === parts[0]);
  if (!view) {
    location.replace(addressOf([VIEWS[0].id]));
    return;
  }
  if (shown?.id === view.id) {
    shown.parts = parts.slice(1); // of a view that is still being loaded: it begins with them
    shown.routes.forEach((it) => it(shown.parts));
    return;
  }
  shown?.end.abort();
  const end = new AbortController();
  const mine = (shown = { id: view.id, end, routes: new Set(), parts: parts.slice(1) });
  for (const link of document.querySelectorAll("#views a")) {
    if (link.dataset.view === view.id) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  title(view.title);
  const root = h("div", { class: `view ${view.id}` });
  main.replaceChildren(root);
  try {
    const { mount } = await view.load();
    if (shown === mine) await mount(root, contextOf(view, mine));
  } catch (error) {
    if (end.signal.aborted) return;
    console.error(error);
    const again = button({ text: "Load the page again", icon: "retry", press: () => location.reload() });
    const words = h("p", { text: "A file of the page did not arrive, or is of another version than the page." });
    root.replaceChildren(h("div", { class: "blank" }, h("h2", { text: `${view.title} cannot be shown` }), words, again));
  }
}

function contextOf(view, mine) {
  const { signal } = mine.end;
  return {
    service,
    client: service.client,
    signal,
    toast,
    say,
    ask,
    get parts() {
      return mine.parts;
    },
    /** Changes the address: `go("sess_1")` in the view `chat` leads to `#/chat/sess_1`. */
    go(...rest) {
      location.hash = addressOf([view.id, ...rest]);
    },
    /** Calls with the parts of the address behind the view, when they change. */
    onRoute(act) {
      mine.routes.add(act);
    },
    /** Whether to stay still: no movement that is not asked for. */
    isStill: () => matchMedia("(prefers-reduced-motion: reduce)").matches,
    title: (words) => title(words || view.title),
    /** Adds a key of the keyboard, for as long as the view is shown, with what it does in words. */
    shortcut(key, words, act) {
      shortcuts.set(key, { words, act });
      signal.addEventListener("abort", () => shortcuts.get(key)?.act === act && shortcuts.delete(key));
    },
  };
}

function title(words) {
  document.title = `${words} · Lastcall`;
}

document.getElementById("views").append(
  ...VIEWS.map(({ id, title }) => h("a", { href: addressOf([id]), data: { view: id }, text: title })),
);

// The connection

const linkState = document.getElementById("link-state");
const linkWords = document.getElementById("link-words");
const notice = document.getElementById("notice");
let noticeTimer;
let awaySince = null;

function showNotice(state, ...content) {
  clearTimeout(noticeTimer);
  notice.hidden = content.length === 0;
  notice.dataset.state = state;
  notice.replaceChildren(...content);
}

function showState() {
  const { state } = service;
  linkState.dataset.state = state;
  linkState.title = `The server: ${STATES[state]}`;
  linkWords.textContent = STATES[state];
  const told = {
    closing: "The server is shutting down. Replies that run may finish; this page waits for its return.",
    unreachable: "The server does not answer. This page tries again each second, and nothing that was sent is lost.",
    offline: "This device is offline. The page goes on when the network is back.",
  }[state];
  if (told) {
    awaySince ??= service.since;
    showNotice(state, icon("wait"), h("span", { text: told }));
    say(told);
  } else if (awaySince === null) showNotice(state);
}

service.addEventListener("state", showState);
service.addEventListener("back", () => {
  const words = `The server is back, after ${duration(Date.now() - (awaySince ?? Date.now()))}.`;
  awaySince = null;
  showNotice("online", icon("check"), h("span", { text: words }));
  say(words);
  noticeTimer = setTimeout(() => showNotice("online"), BACK_SHOWN_MS);
});

// The key

let isAsking = false;

async function askKey() {
  if (isAsking) return;
  isAsking = true;
  const given = await ask({
    title: service.wantsKey ? "This server asks for a key" : "Key of this tab",
    words: "Enter one of the server's API keys. It is kept for this tab until the tab is closed, and is never in an address.",
    fields: [{ name: "key", label: "API key", type: "password", required: true, autofocus: true }],
    yes: "Use this key",
  });
  isAsking = false;
  if (given?.key) {
    service.key = given.key.trim();
    reload();
  }
}

/** Shows the view anew. */
function reload() {
  shown?.end.abort();
  shown = null;
  route();
}

service.addEventListener("key", () => service.wantsKey && askKey());

// Tools

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const themeButton = button({ label: "Dark or light", icon: "moon", kind: "bare", press: switchTheme });

function showTheme() {
  const dark = isDark();
  const words = dark ? "Use the light theme" : "Use the dark theme";
  themeButton.setAttribute("aria-label", words);
  themeButton.title = words;
  themeButton.replaceChildren(icon(dark ? "sun" : "moon"));
}

function switchTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
  showTheme();
}

function showKeys() {
  const rows = [...shortcuts].flatMap(([key, { words }]) => [
    h("dt", {}, ...key.split("+").flatMap((it, index) => [index ? " + " : null, h("kbd", { text: it })])),
    h("dd", { text: words }),
  ]);
  const list = h("dl", { class: "keys" }, rows);
  ask({ title: "Keys", body: list, yes: "Close", no: null });
}

document.getElementById("bar-tools").append(
  button({ label: "Enter a key", icon: "key", kind: "bare", press: askKey }),
  themeButton,
  button({ label: "Keys of the keyboard", icon: "help", kind: "bare wide", press: showKeys }),
  h("a", { class: "button bare wide", href: "docs", text: "API" }),
);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);

VIEWS.forEach(({ id, title }, index) => {
  shortcuts.set(String(index + 1), { words: `go to ${title}`, act: () => (location.hash = addressOf([id])) });
});
shortcuts.set("?", { words: "show these keys", act: showKeys });
shortcuts.set("d", { words: "dark or light", act: switchTheme });

/** Whether a key that was pressed is part of a text, or of a window over the page. */
function isTyping(target) {
  return target.closest("input, textarea, select, dialog, [contenteditable]") !== null;
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  const shortcut = shortcuts.get(event.key);
  if (!shortcut || isTyping(event.target)) return;
  event.preventDefault();
  shortcut.act();
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is that of the view
  main.focus();
});
addEventListener("hashchange", route);
showTheme();
service.probe();
route();
