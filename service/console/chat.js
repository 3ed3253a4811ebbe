// The view of conversations: their list at the left, one of them in the middle. Tabs of this browser tell each other of changes.

import { Conversation } from "./conversation.js";
import { counted } from "./format.js";
import { ADDRESS } from "./service.js";
import { SessionList } from "./sessions.js";
import { refused } from "./words.js";

export async function mount(root, context) {
  const { client, service, signal } = context;
  const tabs = new BroadcastChannel(`lastcall ${ADDRESS}`);
  signal.addEventListener("abort", () => tabs.close());

  const list = new SessionList(context, { rename, remove, create });
  const talk = new Conversation(context, {
    rename,
    remove,
    changed: (session) => list.put(session),
    tell,
    go: (id) => context.go(id),
    back: () => context.go(),
    gone(id) {
      list.remove(id);
      context.go();
    },
  });
  root.append(list.element, talk.element);

  /** Tells other tabs. A conversation may end its work after the view is gone, and with it this channel. */
  function tell(id) {
    if (!signal.aborted) tabs.postMessage({ changed: id });
  }

  let shown = null;

  async function show([id = ""]) {
    shown = id === "" || id === "new" ? null : id;
    root.dataset.shows = id === "" ? "list" : "talk";
    list.select(shown);
    await talk.open(shown);
    if (matchMedia("(min-width: 52rem)").matches || root.dataset.shows === "talk") talk.focusBox();
  }

  function create() {
    context.go("new");
  }

  async function rename(session) {
    const fields = [{ name: "title", label: "Title", value: session.title ?? "", maxLength: 200, autofocus: true }];
    const given = await context.ask({ title: "Rename this conversation", fields, yes: "Rename" });
    if (!given) return;
    await attempt(async () => {
      list.put(await client.renameSession(session.id, given.title.trim() || null, { signal }));
      await changed(session.id);
    });
  }

  async function remove(session) {
    const title = session.title || "Untitled";
    const running = session.status === "running" ? " The reply that is written now ends." : "";
    const words = `“${title}” with ${counted(session.message_count, "message")} is gone for good.${running}`;
    if (!(await context.ask({ title: "Delete this conversation?", words, yes: "Delete", kind: "danger" }))) return;
    await attempt(async () => {
      await client.deleteSession(session.id, { signal });
      list.remove(session.id);
      tabs.postMessage({ removed: session.id });
      context.toast(`“${title}” is deleted.`);
      if (session.id === shown) context.go();
    });
  }

  async function attempt(action) {
    try {
      await action();
    } catch (error) {
      if (!signal.aborted) context.toast(refused(error), { kind: "error" });
    }
  }

  async function changed(id) {
    tell(id);
    if (id === shown) await talk.refresh();
  }

  const refresh = () => {
    list.refresh();
    talk.refresh();
  };
  const whenShown = () => document.visibilityState === "visible" && refresh();
  service.addEventListener("back", refresh, { signal });
  document.addEventListener("visibilitychange", whenShown, { signal });
  tabs.addEventListener("message", ({ data }) => {
    if (data.removed) list.remove(data.removed);
    else list.refresh();
    if (data.changed === shown || data.removed === shown) talk.refresh();
  });

  context.shortcut("n", "begin a conversation", create);
  context.shortcut("/", "search", () => list.focusSearch());
  context.shortcut("m", "write a message", () => talk.focusBox());
  context.shortcut("Escape", "stop the reply, or the edit", () => talk.stop());
  context.shortcut("r", "ask the last message again", () => talk.retryLast());
  context.shortcut("e", "edit the last message", () => talk.editLast());
  context.shortcut("c", "copy the last reply", () => talk.copyLast());
  context.onRoute(show);
  await Promise.all([list.begin(), show(context.parts)]);
}
