// Makes every call of OpenAI's API with the official package: `node openai_calls.mjs URL TINY_URL KEY READING_KEY` prints
// the checks that it has made. The server behind URL has a model for each behaviour; the one behind TINY_URL runs one
// response at a time, for 2 seconds at most. Where a check needs it, the script prints `restart`, and goes on with a line
// of its input when the server behind URL has been stopped and started again.
import assert from "node:assert/strict";
import { once } from "node:events";
import { createInterface } from "node:readline";
import OpenAI from "openai";

const [, , baseURL, tinyURL, apiKey, readingKey] = process.argv;
const options = { baseURL, apiKey, maxRetries: 0, timeout: 20000 };
const client = new OpenAI(options);
const reader = new OpenAI({ ...options, apiKey: readingKey });
const lines = createInterface({ input: process.stdin });
const model = "text"; // says the tokens 0 to 19
const SAID = Array.from({ length: 20 }, (_, number) => `${number} `).join("");
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const weather = { type: "function", name: "get_weather", description: "The weather.", parameters, strict: true };

async function read(stream, until = Infinity) {
  const events = [];
  for await (const event of stream) {
    events.push(event);
    if (event.sequence_number === until) break; // leaving the loop drops the connection
  }
  return events;
}

// The last event of a stream of a reply that was cut; the error after it is raised.
async function lastOfCut(stream, code) {
  let last;
  try {
    for await (const event of stream) last = event;
  } catch (error) {
    assert.ok(error instanceof OpenAI.APIError, `${error}`);
    assert.equal(error.code, code);
    return last;
  }
  assert.fail("the stream ended as if the reply were whole");
}

async function refused(promise, kind, code) {
  const error = await promise.then(() => assert.fail("it was not refused"), (found) => found);
  assert.ok(error instanceof kind, `${error}`);
  if (code) assert.equal(error.code, code);
  assert.ok(error.requestID, "no request id");
}

async function restart() {
  console.log("restart");
  await once(lines, "line");
}

// A client that notes the time and the status of each answer to it.
function counting(more) {
  const answers = [];
  const counted = async (url, init) => {
    const response = await fetch(url, init);
    answers.push({ at: performance.now(), status: response.status });
    return response;
  };
  return { answers, sent: new OpenAI({ ...options, ...more, fetch: counted }) };
}

async function collect(page) {
  const found = [];
  for await (const item of page) found.push(item);
  return found;
}

const checks = {
  async "create, retrieve and stream"() {
    const first = await client.responses.create({ model, input: "Hi", instructions: "Be brief." });
    assert.deepEqual([first.status, first.output_text], ["completed", SAID]);
    assert.equal((await client.responses.retrieve(first.id)).output_text, SAID);
    const streamed = await read(
      await client.responses.create({ model, input: "And?", previous_response_id: first.id, stream: true }),
    );
    assert.deepEqual(streamed.map((event) => event.sequence_number), [...streamed.keys()]);
    assert.equal(streamed.at(-1).type, "response.completed");
    assert.equal(streamed.at(-1).response.previous_response_id, first.id);
    await client.responses.delete(first.id);
    await refused(client.responses.retrieve(first.id), OpenAI.NotFoundError, "response_not_found");
  },
  async "a background stream is resumed after a dropped connection"() {
    const begun = await read(await client.responses.create({ model, input: "Hi", background: true, stream: true }), 8);
    const { id } = begun[0].response;
    const rest = await read(await client.responses.retrieve(id, { stream: true, starting_after: 8 }));
    const whole = [...begun, ...rest];
    assert.deepEqual(whole.map((event) => event.sequence_number), [...whole.keys()]);
    assert.equal(rest.at(-1).response.output[0].content[0].text, SAID);
    assert.deepEqual(await read(await client.responses.retrieve(id, { stream: true })), whole);
    assert.equal((await read(await client.responses.retrieve(id, { stream: true, starting_after: 0 })))[0].sequence_number, 1);
  },
  async "a background response outlives a stop of the server, and its stream is resumed after the restart"() {
    const begun = await read(await client.responses.create({ model, input: "Hi", background: true, stream: true }), 8);
    const { id } = begun[0].response;
    const endless = await client.responses.create({ model: "endless", input: "Hi", background: true });
    const [cut] = await read(await client.responses.retrieve(endless.id, { stream: true, starting_after: 3 }), 4);
    await restart();
    const whole = [...begun, ...(await read(await client.responses.retrieve(id, { stream: true, starting_after: 8 })))];
    assert.deepEqual(whole.map((event) => event.sequence_number), [...whole.keys()]);
    assert.equal(whole.at(-1).type, "response.completed");
    assert.equal(whole.at(-1).response.output_text ?? whole.at(-1).response.output[0].content[0].text, SAID);
    const rest = await client.responses.retrieve(endless.id, { stream: true, starting_after: 3 });
    const end = await lastOfCut(rest, "interrupted");
    assert.equal(cut.sequence_number, 4);
    assert.deepEqual([end.type, end.response.lastcall.reason], ["response.incomplete", "shutdown"]);
    assert.equal((await client.responses.retrieve(endless.id)).status, "incomplete");
    assert.equal((await client.responses.stream({ response_id: id }).finalResponse()).output_text, SAID);
  },
  async "the helper for streams of responses"() {
    const managed = client.responses.stream({ model, input: "Hi" });
    const pieces = [];
    managed.on("response.output_text.delta", (event) => pieces.push(event.delta));
    const said = await managed.finalResponse();
    assert.deepEqual([said.output_text, pieces.join("")], [SAID, SAID]);
    const again = [];
    for await (const event of client.responses.stream({ response_id: said.id, starting_after: 8 })) again.push(event);
    assert.deepEqual(again.map((event) => event.sequence_number), [...again.keys()].map((number) => number + 9));
    const called = client.responses.stream({ model: "tools", input: "The weather?", tools: [weather] });
    assert.equal((await called.finalResponse()).output[0].arguments, '{"city":"Oslo"}');
  },
  async "structured output"() {
    const schema = { ...parameters, properties: { city: { type: "string", enum: ["Oslo"] } } };
    const format = { type: "json_schema", name: "place", schema, strict: true };
    const said = await client.responses.parse({ model: "answer", input: "Where?", text: { format } });
    assert.deepEqual(said.output_parsed, { city: "Oslo" });
  },
  async cancel() {
    const { id } = await client.responses.create({ model, input: "Hi", background: true });
    assert.equal((await client.responses.cancel(id)).status, "cancelled");
    assert.equal((await client.responses.cancel(id)).status, "cancelled");
    const [{ response }] = await read(await client.responses.create({ model: "endless", input: "Hi", stream: true }), 0);
    assert.equal((await client.responses.cancel(response.id)).status, "incomplete"); // a foreground response
  },
  async "input items in pages"() {
    const texts = ["a", "b", "c", "d", "e"];
    const { id } = await client.responses.create({ model, input: texts.map((it) => ({ role: "user", content: it })) });
    const items = await collect(client.responses.inputItems.list(id, { limit: 2, order: "asc" }));
    assert.deepEqual(items.map((item) => item.content[0].text), texts);
  },
  async "conversations and items"() {
    const message = (content) => ({ type: "message", role: "user", content });
    const made = await client.conversations.create({ metadata: { a: "b" }, items: [message("1"), message("2")] });
    assert.deepEqual((await client.conversations.retrieve(made.id)).metadata, { a: "b" });
    assert.deepEqual((await client.conversations.update(made.id, { metadata: { c: "d" } })).metadata, { c: "d" });
    const added = await client.conversations.items.create(made.id, { items: [message("3"), message("4")] });
    assert.equal(added.data.length, 2);
    const said = await client.responses.create({ model, conversation: made.id, input: "5" });
    assert.equal(said.conversation.id, made.id);
    const listed = await collect(client.conversations.items.list(made.id, { order: "asc", limit: 2 }));
    assert.deepEqual(listed.map((item) => item.content[0].text), ["1", "2", "3", "4", "5", SAID]);
    const newest = await collect(client.conversations.items.list(made.id, { limit: 4 }));
    assert.deepEqual(newest.map((item) => item.id), listed.map((item) => item.id).reverse());
    const where = { conversation_id: made.id };
    assert.equal((await client.conversations.items.retrieve(listed[2].id, where)).content[0].text, "3");
    assert.equal((await client.conversations.items.delete(listed[2].id, where)).id, made.id);
    await refused(client.conversations.items.retrieve(listed[2].id, where), OpenAI.NotFoundError);
    assert.equal((await client.conversations.delete(made.id)).deleted, true);
    await refused(client.conversations.retrieve(made.id), OpenAI.NotFoundError, "conversation_not_found");
  },
  async "a call of a response, its output and the answer"() {
    const asked = await client.responses.create({ model: "tools", input: "The weather?", tools: [weather] });
    const [call] = asked.output;
    assert.deepEqual([call.type, call.name, call.arguments], ["function_call", "get_weather", '{"city":"Oslo"}']);
    const input = [{ type: "function_call_output", call_id: call.call_id, output: "4 degrees" }];
    const rest = { model: "tools", input, previous_response_id: asked.id, tools: [weather] };
    assert.match((await client.responses.create(rest)).output_text, /4 degrees/);
    const events = await read(await client.responses.create({ ...rest, stream: true }));
    assert.equal(events.at(-1).type, "response.completed");
  },
  async "chat completions with tools, and the usage of a stream"() {
    const messages = [{ role: "user", content: "The weather?" }];
    const { name, description, strict } = weather;
    const chat = { model: "tools", messages, tools: [{ type: "function", function: { name, description, parameters, strict } }] };
    const asked = (await client.chat.completions.create(chat)).choices[0];
    assert.equal(asked.finish_reason, "tool_calls");
    const [call] = asked.message.tool_calls;
    messages.push(asked.message, { role: "tool", tool_call_id: call.id, content: "4 degrees" });
    assert.match((await client.chat.completions.create(chat)).choices[0].message.content, /4 degrees/);
    const usage = { stream: true, stream_options: { include_usage: true } };
    const chunks = await read(await client.chat.completions.create({ model, messages: messages.slice(0, 1), ...usage }));
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), SAID);
    assert.equal(chunks.at(-1).usage.completion_tokens, 20);
  },
  async "the helpers of chat completions: a stream, and functions that it runs by itself"() {
    const messages = [{ role: "user", content: "The weather?" }];
    const stream = client.chat.completions.stream({ model, messages });
    assert.equal(await stream.finalContent(), SAID);
    const ran = [];
    const get = ({ city }) => (ran.push(city), "4 degrees");
    const { name, description } = weather;
    const tools = [{ type: "function", function: { name, description, parameters, parse: JSON.parse, function: get } }];
    for (const stream of [false, true]) {
      const runner = client.chat.completions.runTools({ model: "tools", messages, tools, stream });
      assert.match(await runner.finalContent(), /4 degrees/);
    }
    assert.deepEqual(ran, ["Oslo", "Oslo"]);
  },
  async models() {
    const listed = await collect(client.models.list());
    assert.deepEqual(listed.map((it) => it.id), ["text", "answer", "tools", "endless", "limited", "broken"]);
    assert.equal((await client.models.retrieve(model)).id, model);
    await refused(client.models.retrieve("no-such-model"), OpenAI.NotFoundError, "model_not_found");
  },
  async "errors are of the package's classes"() {
    const { responses } = client;
    const other = new OpenAI({ ...options, apiKey: "another key that is not known" });
    await refused(other.models.list(), OpenAI.AuthenticationError, "invalid_api_key");
    await refused(responses.create({ model, input: "Hi", top_logprobs: 2 }), OpenAI.BadRequestError);
    await refused(responses.create({ model, input: "Hi", nothing: 1 }), OpenAI.BadRequestError, "unknown_parameter");
    await refused(reader.responses.create({ model, input: "Hi" }), OpenAI.PermissionDeniedError, "not_permitted");
    await refused(client.post("/responses/compact", { body: {} }), OpenAI.NotFoundError);
    await refused(responses.create({ model: "none", input: "Hi" }), OpenAI.BadRequestError, "model_not_found");
    const made = await responses.create({ model, input: "Hi" }, { headers: { "Idempotency-Key": "a-key" } });
    assert.equal((await responses.create({ model, input: "Hi" }, { headers: { "Idempotency-Key": "a-key" } })).id, made.id);
    const reused = responses.create({ model, input: "Another" }, { headers: { "Idempotency-Key": "a-key" } });
    await refused(reused, OpenAI.UnprocessableEntityError, "idempotency_key_reused");
    for (const stream of [false, true]) {
      const chat = { messages: [{ role: "user", content: "Hi" }], stream };
      const limited = client.chat.completions.create({ model: "limited", ...chat });
      await refused(limited, OpenAI.RateLimitError, "rate_limit_exceeded");
    }
    await refused(responses.create({ model: "limited", input: "Hi" }), OpenAI.RateLimitError, "rate_limit_exceeded");
    await refused(responses.create({ model: "broken", input: "Hi" }), OpenAI.InternalServerError, "upstream_error");
    const streamed = await responses.create({ model: "broken", input: "Hi", stream: true });
    const failed = await lastOfCut(streamed, "upstream_error");
    assert.deepEqual([failed.type, failed.response.error.code], ["response.failed", "server_error"]);
    const nobody = new OpenAI({ ...options, baseURL: "http://127.0.0.1:1/v1" });
    const lost = await nobody.models.list().then(() => assert.fail("it was answered"), (error) => error);
    assert.ok(lost instanceof OpenAI.APIConnectionError, `${lost}`);
  },
  async "retries: as often as asked, and not at all where the answer forbids it"() {
    const limited = counting({ maxRetries: 1 });
    await refused(limited.sent.responses.create({ model: "limited", input: "Hi" }), OpenAI.RateLimitError);
    assert.deepEqual(limited.answers.map((it) => it.status), [429, 429]);
    const { id: conversation } = await client.conversations.create();
    const twice = counting({ maxRetries: 1 });
    const broken = { model: "broken", input: "Hi", conversation };
    await refused(twice.sent.responses.create(broken), OpenAI.InternalServerError);
    assert.deepEqual(twice.answers.map((it) => it.status), [502]); // the conversation would have the input twice
    assert.equal((await collect(client.conversations.items.list(conversation))).filter((it) => it.role === "user").length, 1);
    const late = counting({ baseURL: tinyURL, maxRetries: 1 });
    await refused(late.sent.responses.create({ model: "endless", input: "Hi" }), OpenAI.InternalServerError, "turn_timeout");
    assert.deepEqual(late.answers.map((it) => it.status), [504]); // it would take as long again
  },
  async "retries wait as long as Retry-After says"() {
    const tiny = new OpenAI({ ...options, baseURL: tinyURL });
    const { id } = await tiny.responses.create({ model: "endless", input: "Hi", background: true });
    const { answers, sent } = counting({ baseURL: tinyURL, maxRetries: 4 });
    const waiting = sent.responses.create({ model, input: "Hi" });
    while (!answers.length) await new Promise((resolve) => setTimeout(resolve, 10));
    await tiny.responses.cancel(id);
    assert.equal((await waiting).output_text, SAID);
    assert.deepEqual(answers.map((it) => it.status), [503, 200]);
    const waited = answers[1].at - answers[0].at;
    assert.ok(waited >= 990, `${waited} ms`); // by itself it waits 500 ms at most
  },
  async "a client that times out has left: its conversation is free again"() {
    const { id: conversation } = await client.conversations.create();
    const hasty = new OpenAI({ ...options, timeout: 300 });
    const late = hasty.responses.create({ model: "endless", input: "Hi", conversation });
    const error = await late.then(() => assert.fail("it was answered"), (found) => found);
    assert.ok(error instanceof OpenAI.APIConnectionTimeoutError, `${error}`);
    for (let tries = 0; ; tries += 1) {
      try {
        const said = await client.responses.create({ model, input: "Again", conversation });
        assert.equal(said.output_text, SAID);
        return;
      } catch (error) {
        if (error.code !== "conversation_locked" || tries === 100) throw error;
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
    }
  },
};

for (const [name, run] of Object.entries(checks)) {
  try {
    await run();
  } catch (error) {
    process.stderr.write(`${name}: ${error.stack}\n`);
    process.exit(1);
  }
}
console.log(JSON.stringify({ seen: Object.keys(checks) }));
lines.close();
