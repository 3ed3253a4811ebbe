// One question and its answer through the browser's own EventSource, which comes back by itself after a cut.

import { ENDS, ask, newKey, pause, textAfter } from "./small_client.js";

const server = new URLSearchParams(location.search).get("server") ?? "http://127.0.0.1:8000";
const [form, message, reply, status] =
  ["form", "message", "reply", "status"].map((id) => document.getElementById(id));

/** Calls `onEvent` with each event of a turn, to its last one. */
export function listen(turnUrl, { onEvent, onWait }, seen = 0, attempt = 0) {
  const source = new EventSource(`${turnUrl}/events?after=${seen}`);
  source.onmessage = ({ data }) => {
    const event = JSON.parse(data);
    seen = event.seq;
    attempt = 0;
    if (ENDS.includes(event.type)) source.close(); // otherwise it would come back, and be answered 204
    onEvent(event);
  };
  source.onerror = async () => {
    if (source.readyState !== EventSource.CLOSED) return onWait(); // cut: it comes back with Last-Event-ID
    onWait(); // refused, and it does not say why: look
    await pause(attempt);
    const { state, reason, error, text, ended_at } = await ask(turnUrl, { onWait });
    if (ended_at) onEvent({ type: `turn.${state}`, reason, error, text });
    else listen(turnUrl, { onEvent, onWait }, seen, attempt + 1);
  };
}

async function talk() {
  const onWait = () => (status.textContent = "waiting for the server");
  const make = (url, body) => {
    const headers = { "Content-Type": "application/json", ...newKey() };
    return ask(url, { method: "POST", headers, body: JSON.stringify(body), onWait });
  };
  const session = await make(`${server}/sessions`, {});
  const turnsUrl = `${server}/sessions/${session.id}/turns`;
  const turn = await make(turnsUrl, { input: message.value, background: true });
  reply.textContent = "";
  status.textContent = "running";
  listen(`${turnsUrl}/${turn.id}`, {
    onEvent(event) {
      if (event.type === "turn.delta") reply.append(event.text);
      else reply.textContent = textAfter(reply.textContent, event);
      status.textContent = ENDS.includes(event.type) ? event.type.slice("turn.".length) : "running";
    },
    onWait,
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  talk().catch((error) => (status.textContent = error.message));
});
