// Reads replies that are cut with the official package: `node openai_cuts.mjs cut URL MODEL…` prints `begun` for each
// stream whose reply has begun as far as it ever will, and what each request gave at its end as JSON. All run at once.
import OpenAI from "openai";

const [, , , baseURL, ...models] = process.argv;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 30000 });
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const functions = ["get_weather", "get_time"].map((name) => ({ name, description: "A tool.", parameters }));
const bodies = {
  responses: (model) => ({ model, input: "Hi", tools: functions.map((it) => ({ type: "function", ...it })) }),
  chat: (model) => ({
    model,
    messages: [{ role: "user", content: "Hi" }],
    tools: functions.map((it) => ({ type: "function", function: it })),
  }),
};

function note(part) {
  const delta = part.choices?.[0]?.delta;
  const piece = delta ? (delta.tool_calls?.[0]?.function?.arguments ?? delta.content) : part.delta;
  if (typeof piece === "string" && (piece.endsWith("is not ") || piece.endsWith('{"city":'))) console.log("begun");
}

function cause({ state, code, reason }) {
  return `${state} ${code ?? reason}`;
}

function seen(end) {
  const response = end?.response ?? end;
  if (!["incomplete", "failed", "cancelled"].includes(response?.status)) return `taken for a success: ${JSON.stringify(end)}`;
  return `${end.type ?? response.status} ${cause(response.lastcall)}`;
}

function seenError(error) {
  const told = error.error?.lastcall ?? error.lastcall;
  return [error.constructor.name, error.status, told && cause(told)].filter(Boolean).join(" ") + `: ${error.message}`;
}

const ways = {
  whole: (calls, body) => calls.create(body),
  async stream(calls, body) {
    let last;
    for await (const part of await calls.create({ ...body, stream: true })) note((last = part));
    return last;
  },
  async helper(calls, body) {
    const stream = calls.stream(body);
    for await (const part of stream) note(part);
    return await (stream.finalResponse ? stream.finalResponse() : stream.finalChatCompletion());
  },
};

const found = {};
await Promise.all(
  Object.entries({ responses: client.responses, chat: client.chat.completions }).flatMap(([face, calls]) =>
    models.flatMap((model) =>
      Object.entries(ways).map(async ([way, ask]) => {
        found[`${face} ${way} ${model}`] = await ask(calls, bodies[face](model)).then(seen, seenError);
      }),
    ),
  ),
);
console.log(JSON.stringify({ ran: [], seen: found }));
