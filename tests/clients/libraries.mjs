// Reads a stream with a library: `node libraries.mjs NAME URL [BODY]` prints the events it has given out as JSON.
import { createRequire } from "node:module";
import { setTimeout as sleep } from "node:timers/promises";

const require = createRequire(import.meta.url);
const [, , name, url, body] = process.argv;
const seen = { seqs: [], empty: 0, last: null, statuses: [] };
const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
const AFTER_THE_END_MS = 4000; // what comes back after a completed turn does so within that

function take(data) {
  if (!data) {
    seen.empty += 1;
    return false;
  }
  const event = JSON.parse(data);
  seen.seqs.push(event.seq);
  seen.last = event.type;
  return event.type !== "turn.delta" && event.type !== "turn.started" && event.type !== "turn.queued";
}

async function untilClosed(source) {
  const ended = new Promise((resolve) => {
    source.onmessage = (message) => take(message.data) && resolve();
    source.onerror = () => source.readyState === 2 && resolve();
  });
  await ended;
  await sleep(AFTER_THE_END_MS);
  seen.statuses.push(source.readyState === 2 ? "closed" : "open");
  source.close();
}

const libraries = {
  async "fetch-event-source"() {
    // This library is written for browsers.
    globalThis.window = globalThis;
    globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };
    const { fetchEventSource } = require("@microsoft/fetch-event-source");
    await fetchEventSource(url, {
      method: "POST",
      headers,
      body,
      openWhenHidden: true,
      onmessage: (message) => take(message.data),
    });
  },
  async "event-source-plus"() {
    const { EventSourcePlus } = await import("event-source-plus");
    const source = new EventSourcePlus(url, { method: "post", headers, body });
    await new Promise((resolve) => {
      const controller = source.listen({
        onResponse: ({ response }) => void seen.statuses.push(response.status),
        async onMessage(message) {
          if (take(message.data)) {
            await sleep(AFTER_THE_END_MS);
            controller.abort();
            resolve();
          }
        },
      });
    });
  },
  async "event-source-polyfill"() {
    const { EventSourcePolyfill } = require("event-source-polyfill");
    await untilClosed(new EventSourcePolyfill(url));
  },
  async eventsource() {
    const { EventSource } = await import("eventsource");
    await untilClosed(new EventSource(url));
  },
};

console.error = console.warn = () => {};
try {
  await libraries[name]();
} catch (error) {
  process.stderr.write(`${error.stack}\n`);
  process.exit(1);
}
console.log(JSON.stringify(seen));
process.exit(0);
