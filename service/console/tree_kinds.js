// How each kind of node looks and is called.

/**
 * `tone` names a colour of the page, `glyph` is a path on a field of 16 by 16. Of kinds with `isPlumbing` the rows
 * without a name of their own are for readers who want everything.
 */
const KINDS = {
  process: { word: "process", tone: "ink", glyph: "M8 1.500l5.600 3.250v6.500L8 14.500l-5.600-3.250v-6.500zM8 5.500v5" },
  task: { word: "task", tone: "soft", glyph: "M8 4.500a3.500 3.500 0 1 1 0 7 3.500 3.500 0 0 1 0-7z" },
  loop: { word: "loop", tone: "soft", glyph: "M13 5.500A5.500 5.500 0 1 0 13.500 9M13.500 2.500v3.500H10" },
  nursery: { word: "nursery", tone: "soft", glyph: "M5.500 3C3.500 3 4.500 7 2.800 8c1.700 1 .7 5 2.700 5M10.500 3c2 0 1 4 2.700 5-1.700 1-.7 5-2.700 5", isPlumbing: true },
  scope: { word: "cancel scope", tone: "soft", glyph: "M5 2.500H2.500V5M11 2.500h2.500V5M5 13.500H2.500V11M11 13.500h2.500V11", isPlumbing: true },
  listener: { word: "listener", tone: "soft", glyph: "M3.500 13.500v-11h9v11M1.500 13.500h13M9.800 8.200v.010" },
  session: { word: "session", tone: "green", glyph: "M2.500 3h11v8H8l-3.500 2.800V11h-2z" },
  turn: { word: "turn", tone: "green", glyph: "M4.500 2.500L13 8l-8.500 5.500z", isFilled: true },
  stream: { word: "event stream", tone: "blue", glyph: "M1.500 6c2.200-2.600 4.300-2.600 6.500 0s4.300 2.600 6.500 0M1.500 11c2.200-2.600 4.300-2.600 6.500 0s4.300 2.600 6.500 0" },
  connection: { word: "client connection", tone: "blue", glyph: "M6.500 4.500l1.700-1.700a3.200 3.200 0 0 1 4.500 4.500L11 9M9.500 11.500l-1.700 1.700a3.200 3.200 0 0 1-4.500-4.500L5 7M6 10l4-4" },
  request: { word: "request", tone: "blue", glyph: "M2 8h11M9 4l4 4-4 4" },
  model_client: { word: "model client", tone: "brass", glyph: "M4 4h8v8H4zM6.500 1.500V4M9.500 1.500V4M6.500 12v2.500M9.500 12v2.500M1.500 6.500H4M1.500 9.500H4M12 6.500h2.500M12 9.500h2.500" },
  model_connection: { word: "model connection", tone: "brass", glyph: "M9 1.500L3.500 9H8l-1 5.500L12.500 7H8z" },
};

/** A kind; one that this page does not know looks like a task. */
export const kindOf = (name) => KINDS[name] ?? { ...KINDS.task, word: name.replaceAll("_", " ") };

const UNNAMED = new Set(["nursery", "cancel scope", "time limit"]);

/** Whether a node is plumbing: a nursery or a scope to which the service gives no name. */
export const isPlumbing = ({ kind, name }) => KINDS[kind]?.isPlumbing === true && UNNAMED.has(name);

/** The kinds that the summary counts, in its order. */
export const COUNTED = [
  ["session", "session"],
  ["turn", "turn"],
  ["stream", "stream"],
  ["model_connection", "model connection"],
  ["connection", "client"],
];

const DEADLINES = {
  first_token_timeout: "first token",
  next_token_timeout: "next token",
  turn_timeout: "whole turn",
  disconnect_grace: "its client is gone",
};

/** What a deadline is for, in words. */
export const deadlineWords = (name) => DEADLINES[name] ?? (name ? name.replaceAll("_", " ") : "time limit");

const ID = /\b(sess|turn|msg|resp|conv)_([0-9a-f]{8})[0-9a-f]{24}\b/g;

/** A name with its ids cut to what a person can tell apart: `turn 77ab12cd`. */
export const shortName = (name) => name.replace(ID, (_, __, start) => start);
