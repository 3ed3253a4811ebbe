// Makes every call of OpenAI's API with the official package: `node openai_calls.mjs TEXT_URL TOOLS_URL KEY` prints the
// number of checked calls. The model behind TEXT_URL says the tokens 0 to 19, that behind TOOLS_URL calls get_weather.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [, , textUrl, toolsUrl, apiKey] = process.argv;
const options = { apiKey, maxRetries: 0, timeout: 20000 };
const text = new OpenAI({ baseURL: textUrl, ...options });
const tools = new OpenAI({ baseURL: toolsUrl, ...options });
const model = "scripted";
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

async function refused(promise, kind, code) {
  const error = await promise.then(() => assert.fail("it was not refused"), (found) => found);
  assert.ok(error instanceof kind, `${error}`);
  if (code) assert.equal(error.code, code);
  assert.ok(error.requestID, "no request id");
}

async function collect(page) {
  const found = [];
  for await (const item of page) found.push(item);
  return found;
}

const checks = {
  async "create, retrieve and stream"() {
    const first = await text.responses.create({ model, input: "Hi", instructions: "Be brief." });
    assert.deepEqual([first.status, first.output_text], ["completed", SAID]);
    assert.equal((await text.responses.retrieve(first.id)).output_text, SAID);
    const streamed = await read(
      await text.responses.create({ model, input: "And?", previous_response_id: first.id, stream: true }),
    );
    assert.deepEqual(streamed.map((event) => event.sequence_number), [...streamed.keys()]);
    assert.equal(streamed.at(-1).type, "response.completed");
    assert.equal(streamed.at(-1).response.previous_response_id, first.id);
    const managed = text.responses.stream({ model, input: "Hi" });
    assert.equal((await managed.finalResponse()).output_text, SAID);
    await text.responses.delete(first.id);
    await refused(text.responses.retrieve(first.id), OpenAI.NotFoundError, "response_not_found");
  },
  async "a background stream is resumed after a dropped connection"() {
    const begun = await read(await text.responses.create({ model, input: "Hi", background: true, stream: true }), 8);
    const { id } = begun[0].response;
    const rest = await read(await text.responses.retrieve(id, { stream: true, starting_after: 8 }));
    const whole = [...begun, ...rest];
    assert.deepEqual(whole.map((event) => event.sequence_number), [...whole.keys()]);
    assert.equal(rest.at(-1).response.output[0].content[0].text, SAID);
    assert.deepEqual(await read(await text.responses.retrieve(id, { stream: true })), whole);
    assert.equal((await read(await text.responses.retrieve(id, { stream: true, starting_after: 0 })))[0].sequence_number, 1);
  },
  async cancel() {
    const { id } = await text.responses.create({ model, input: "Hi", background: true });
    assert.equal((await text.responses.cancel(id)).status, "cancelled");
    assert.equal((await text.responses.cancel(id)).status, "cancelled");
  },
  async "input items in pages"() {
    const texts = ["a", "b", "c", "d", "e"];
    const { id } = await text.responses.create({ model, input: texts.map((it) => ({ role: "user", content: it })) });
    const items = await collect(text.responses.inputItems.list(id, { limit: 2, order: "asc" }));
    assert.deepEqual(items.map((item) => item.content[0].text), texts);
  },
  async "conversations and items"() {
    const message = (content) => ({ type: "message", role: "user", content });
    const made = await text.conversations.create({ metadata: { a: "b" }, items: [message("1"), message("2")] });
    assert.deepEqual((await text.conversations.retrieve(made.id)).metadata, { a: "b" });
    assert.deepEqual((await text.conversations.update(made.id, { metadata: { c: "d" } })).metadata, { c: "d" });
    const added = await text.conversations.items.create(made.id, { items: [message("3"), message("4")] });
    assert.equal(added.data.length, 2);
    const said = await text.responses.create({ model, conversation: made.id, input: "5" });
    assert.equal(said.conversation.id, made.id);
    const listed = await collect(text.conversations.items.list(made.id, { order: "asc", limit: 2 }));
    assert.deepEqual(listed.map((item) => item.content[0].text), ["1", "2", "3", "4", "5", SAID]);
    const newest = await collect(text.conversations.items.list(made.id, { limit: 4 }));
    assert.deepEqual(newest.map((item) => item.id), listed.map((item) => item.id).reverse());
    const where = { conversation_id: made.id };
    assert.equal((await text.conversations.items.retrieve(listed[2].id, where)).content[0].text, "3");
    assert.equal((await text.conversations.items.delete(listed[2].id, where)).id, made.id);
    await refused(text.conversations.items.retrieve(listed[2].id, where), OpenAI.NotFoundError);
    assert.equal((await text.conversations.delete(made.id)).deleted, true);
    await refused(text.conversations.retrieve(made.id), OpenAI.NotFoundError, "conversation_not_found");
  },
  async "a call of a response, its output and the answer"() {
    const asked = await tools.responses.create({ model, input: "The weather?", tools: [weather] });
    const [call] = asked.output;
    assert.deepEqual([call.type, call.name, call.arguments], ["function_call", "get_weather", '{"city":"Oslo"}']);
    const input = [{ type: "function_call_output", call_id: call.call_id, output: "4 degrees" }];
    const rest = { model, input, previous_response_id: asked.id, tools: [weather] };
    assert.match((await tools.responses.create(rest)).output_text, /4 degrees/);
    const events = await read(await tools.responses.create({ ...rest, stream: true }));
    assert.equal(events.at(-1).type, "response.completed");
  },
  async "chat completions with tools, and the usage of a stream"() {
    const messages = [{ role: "user", content: "The weather?" }];
    const { name, description, strict } = weather;
    const chat = { model, messages, tools: [{ type: "function", function: { name, description, parameters, strict } }] };
    const asked = (await tools.chat.completions.create(chat)).choices[0];
    assert.equal(asked.finish_reason, "tool_calls");
    const [call] = asked.message.tool_calls;
    messages.push(asked.message, { role: "tool", tool_call_id: call.id, content: "4 degrees" });
    assert.match((await tools.chat.completions.create(chat)).choices[0].message.content, /4 degrees/);
    const usage = { stream: true, stream_options: { include_usage: true } };
    const chunks = await read(await text.chat.completions.create({ model, messages: messages.slice(0, 1), ...usage }));
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), SAID);
    assert.equal(chunks.at(-1).usage.completion_tokens, 20);
  },
  async models() {
    const [listed] = await collect(text.models.list());
    assert.equal((await text.models.retrieve(listed.id)).id, listed.id);
    await refused(text.models.retrieve("no-such-model"), OpenAI.NotFoundError, "model_not_found");
  },
  async "errors are of the package's classes"() {
    const other = new OpenAI({ baseURL: textUrl, ...options, apiKey: "another key that is not known" });
    await refused(other.models.list(), OpenAI.AuthenticationError, "invalid_api_key");
    await refused(text.responses.create({ model, input: "Hi", top_logprobs: 2 }), OpenAI.BadRequestError);
    await refused(text.responses.create({ model, input: "Hi", nothing: 1 }), OpenAI.BadRequestError, "unknown_parameter");
    await refused(text.post("/responses/compact", { body: {} }), OpenAI.NotFoundError);
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
console.log(JSON.stringify(Object.keys(checks)));
