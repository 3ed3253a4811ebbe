// Follows responses in the background with the official package through stops of the server: `node openai_handover.mjs
// URL TEXT` prints what it has seen. TEXT is the whole reply. Where a check is in mid-stream, the script prints
// `restart`, and goes on with a line of its input when the server has been stopped and started again.
import assert from "node:assert/strict";
import { once } from "node:events";
import { createInterface } from "node:readline";
import OpenAI from "openai";

const [, , baseURL, TEXT] = process.argv;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 20000 });
const lines = createInterface({ input: process.stdin });
const body = { model: "scripted", input: "Count" };
const seen = [];

async function restart() {
  console.log("restart");
  await once(lines, "line");
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// What docs/openai.md says of a client that streams: come back after the last event that was seen.
async function follow(first, { cutAfter }) {
  let text = "", last = -1, id, restarted, cuts = 0, fromAnew = 0, deltas = 0;
  const numbers = [];
  for (let stream = first; ; ) {
    try {
      stream ??= await client.responses.retrieve(id, { stream: true, ...(last < 0 ? {} : { starting_after: last }) });
      for await (const event of stream) {
        id ??= event.response?.id;
        numbers.push((last = event.sequence_number));
        if (event.type === "response.output_text.delta") {
          text += event.delta;
          deltas += 1;
          if (deltas === cutAfter) restarted = restart();
        }
        if (event.type === "response.completed") return { text, numbers, cuts, fromAnew, response: event.response };
      }
      assert.fail("the stream ended without an end of the response, and without an error");
    } catch (error) {
      if (error instanceof OpenAI.BadRequestError) {
        assert.equal(error.code, "response_restarted");
        [text, last, fromAnew] = ["", -1, fromAnew + 1];
        numbers.length = 0;
      } else if (error instanceof OpenAI.APIConnectionError || error instanceof OpenAI.APIError || error instanceof TypeError) {
        assert.ok(error.status === undefined || error.status === 503, `${error.status} ${error.code}: ${error}`);
        cuts += 1;
        await pause(100);
      } else throw error;
    }
    await restarted;
    stream = undefined;
  }
}

{
  const first = await client.responses.create({ ...body, background: true, stream: true });
  const { text, numbers, cuts, fromAnew, response } = await follow(first, { cutAfter: 5 });
  assert.equal(text, TEXT);
  assert.equal(response.output_text ?? response.output[0].content[0].text, TEXT);
  assert.deepEqual(numbers, numbers.map((_, at) => at), "a number is missing, or there twice");
  assert.ok(cuts >= 1 && fromAnew === 0, `${cuts} cuts, ${fromAnew} times from anew`);
  seen.push("a stream in the background: the whole text, each number once");
}
{
  const created = await client.responses.create({ ...body, background: true });
  await pause(500);
  await restart();
  let response;
  do {
    await pause(100);
    response = await client.responses.retrieve(created.id);
    assert.ok(["queued", "in_progress", "completed"].includes(response.status), response.status);
  } while (response.status !== "completed");
  assert.equal(response.output_text, TEXT);
  seen.push("polls: the whole text");
}
{
  // A client in the foreground is told that its response has ended, with an error it can act on.
  const stream = await client.chat.completions.create({ model: body.model, messages: [{ role: "user", content: "Count" }], stream: true });
  let parts = 0, restarted;
  await assert.rejects(async () => {
    for await (const part of stream) if (part.choices[0]?.delta.content && (parts += 1) === 5) restarted = restart();
  }, OpenAI.APIError);
  await restarted;
  seen.push("a chat in the foreground: an APIError");
}
lines.close();
process.stdin.destroy();
console.log(JSON.stringify({ seen }));
