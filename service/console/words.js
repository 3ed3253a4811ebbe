// What a person reads of refusals and of ends.

const REFUSALS = {
  turn_in_progress: "Another reply is being written in this conversation, perhaps for another tab. Your message is still in the box.",
  queue_full: "Too many messages wait in this conversation already",
  turn_limit: "The server writes as many replies as it may",
  stream_limit: "The server has as many open streams as it may",
  session_limit: "The server keeps as many conversations as it may",
  branch_limit: "Too many branches of this conversation are being written at once.",
  held_bytes_limit: "The server is busy with large requests",
  shutting_down: "The server is shutting down",
  not_ready: "The server is starting",
  owned_elsewhere: "The process that has this conversation does not answer",
  store_unavailable: "The server's store does not answer",
  rate_limited: "The model's server asks to wait",
  input_too_large: "This message is longer than the server takes.",
  head_moved: "This conversation has changed meanwhile, perhaps in another tab. It is shown as it is now.",
  session_not_found: "This conversation is gone: it was deleted, or has expired.",
  turn_not_found: "This message is gone: it was deleted.",
  unreachable: "The server does not answer",
  timeout: "The server does not answer",
  cut: "The connection was cut",
  loopback_only: "This server serves its own machine only, because it has no keys.",
  proxied_without_keys: "This server has no keys, so it serves nobody behind a proxy.",
  unauthorized: "The server asks for a key.",
  not_permitted: "This key may not do that.",
};

/** A refusal in words. */
export function refused(error) {
  const words = REFUSALS[error.code] ?? error.detail ?? error.message;
  return /[.!?]$/.test(words) ? words : `${words}.`;
}

/** What a wait is for, in words. */
export function waits({ error, delayS, attempt, isOffline }) {
  if (isOffline) return "This device is offline. The page goes on when the network is back.";
  const words = (REFUSALS[error.code] ?? error.detail ?? error.message).replace(/\.$/, "");
  return `${words}. Attempt ${attempt + 1} in ${delayS < 1 ? "a moment" : `${Math.round(delayS)} s`}.`;
}

const INTERRUPTIONS = {
  shutdown: "The server was stopped before the end of this reply. What had arrived is kept.",
  crash: "The server crashed before the end of this reply. What it had stored is kept.",
};
const RESUMES = {
  retry: "The server was gone in the middle of this reply, so the model is asked anew.",
  continue: "The server was gone in the middle of this reply, which goes on after what was kept.",
};
const CANCELS = {
  requested: "Stopped.",
  superseded: "Stopped, because another message took its place.",
  disconnected: "Stopped, because its reader had left.",
  session_deleted: "Stopped, because the conversation was deleted.",
};
const FINISHES = { length: "Cut off at the limit of tokens.", content_filter: "Cut off by the model's content filter." };

/** That a turn goes on in another process than the one that began it. */
export const resumed = ({ mode }) => RESUMES[mode] ?? "The server was gone in the middle of this reply.";

/** How a turn ended, where the end is worth a word. */
export function ended({ state, reason, error, finish_reason: finish, stored }) {
  const words = {
    completed: FINISHES[finish] ?? "",
    failed: error ? `${error.message} (${error.code})` : "Failed.",
    cancelled: CANCELS[reason] ?? "Stopped.",
    interrupted: INTERRUPTIONS[reason] ?? "Interrupted.",
  }[state];
  const unstored = stored === false ? " The server's store has not taken this end yet." : "";
  return `${words ?? ""}${unstored}`.trim();
}
