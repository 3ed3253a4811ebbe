// Calls every operation with openapi-fetch and the types of openapi-typescript: `generated_client.js URL KEY` prints what it
// saw as JSON. What a client may leave out is left out here; the compiler refuses a type that asks for it.

import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

declare const process: { argv: string[] };
type Event = components["schemas"]["Event"];

const [url, key] = process.argv.slice(2) as [string, string];
const called: string[] = [];
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${key}` } });
client.use({
  onRequest({ request, schemaPath }) {
    called.push(`${request.method} ${schemaPath}`);
  },
});

function must<T>(answer: { data?: T; error?: unknown; response: Response }): T {
  if (answer.error !== undefined || answer.data === undefined) {
    throw new Error(`${answer.response.status} ${answer.response.url}: ${JSON.stringify(answer.error)}`);
  }
  return answer.data;
}

async function eventsOf(stream: ReadableStream<Uint8Array> | null): Promise<Event[]> {
  const events: Event[] = [];
  let rest = "";
  for await (const text of stream!.pipeThrough(new TextDecoderStream() as never) as unknown as AsyncIterable<string>) {
    const frames = (rest + text).split("\n\n");
    rest = frames.pop()!;
    for (const line of frames.flatMap((frame) => frame.split("\n"))) {
      if (line.startsWith("data: ")) events.push(JSON.parse(line.slice(6)) as Event);
    }
  }
  return events;
}

function textOf(events: Event[]): string {
  return events.map((event) => (event.type === "turn.delta" ? event.text : "")).join("");
}

const session = must(await client.POST("/sessions", { body: {} }));
const byId = { path: { session_id: session.id } };
must(await client.PATCH("/sessions/{session_id}", { params: byId, body: { title: "A title" } }));
const turn = must(await client.POST("/sessions/{session_id}/turns", { params: byId, body: { input: "Hi" } }));
if (typeof turn === "string") throw new Error("without Accept the answer is the turn");
const streamed = await eventsOf(
  must(
    await client.POST("/sessions/{session_id}/turns", {
      params: byId,
      body: { input: "Hi again", on_conflict: "queue" },
      headers: { Accept: "text/event-stream" },
      parseAs: "stream",
    }),
  ) as unknown as ReadableStream<Uint8Array>, // openapi-fetch does not narrow an answer of two media types
);
const turnById = { path: { ...byId.path, turn_id: turn.id } };
const replayed = await eventsOf(
  must(
    await client.GET("/sessions/{session_id}/turns/{turn_id}/events", {
      params: { ...turnById, query: { after: 0 } },
      parseAs: "stream",
    }),
  ),
);
const chatted = await eventsOf(must(await client.POST("/chat", { body: { message: "Hi" }, parseAs: "stream" })));
must(await client.POST("/sessions/{session_id}/turns/{turn_id}/cancel", { params: turnById }));
const retried = must(
  await client.POST("/sessions/{session_id}/turns/{turn_id}/retry", { params: turnById, body: { temperature: 1 } }),
);
if (typeof retried === "string" || retried.siblings?.place !== 2 || !retried.is_head) throw new Error("it is no sibling");
const tree = must(await client.GET("/sessions/{session_id}/tree", { params: byId })).data;
must(await client.PATCH("/sessions/{session_id}", { params: byId, body: { head: tree[1]!.id, seen_head: retried.id } }));
const seen = {
  called,
  title: must(await client.GET("/sessions/{session_id}", { params: byId })).title,
  sessions: must(await client.GET("/sessions", { params: { query: { count: true } } })).count,
  turns: must(await client.GET("/sessions/{session_id}/turns", { params: byId })).data.map((it) => it.state),
  messages: must(await client.GET("/sessions/{session_id}/messages", { params: byId })).data.length,
  text: must(await client.GET("/sessions/{session_id}/turns/{turn_id}", { params: turnById })).text,
  texts: [streamed, replayed, chatted].map(textOf),
  last: [streamed, replayed, chatted].map((events) => events.at(-1)!.type),
  code: "",
};
must(await client.POST("/sessions/{session_id}/fork", { params: byId, body: {} }));
const added = must(
  await client.POST("/sessions/{session_id}/messages", {
    params: byId,
    body: { items: [{ type: "message", role: "user", text: "Hm" }] },
  }),
);
await client.DELETE("/sessions/{session_id}/messages/{item_id}", {
  params: { path: { ...byId.path, item_id: added.messages[0]!.id } },
});
await client.DELETE("/sessions/{session_id}/turns/{turn_id}", {
  params: { path: { ...byId.path, turn_id: added.turns[0]! } },
});
await client.DELETE("/sessions/{session_id}", { params: byId });
const { error } = await client.GET("/sessions/{session_id}", { params: byId });
seen.code = error!.code;
must(await client.GET("/healthz"));
must(await client.GET("/readyz"));
must(await client.GET("/openapi.json"));
must(await client.GET("/docs", { parseAs: "text" }));
await client.GET("/", { parseAs: "text" });
console.log(JSON.stringify(seen));
