// Does steps with the client in clients/js, as client_driver.py does with the one in clients/python: it takes jobs
// [{url, steps, bounds, options}, …] as JSON on its input, and prints the results of each as JSON. Runs in a page, too.

export async function doSteps(client, { url, steps, bounds, options }, { onWait = () => {}, onEvent = () => {} } = {}) {
  const results = [];
  const kept = {};
  let waits = [];
  const note = (waiting) => {
    waits.push([waiting.delayS, waiting.error.code]);
    onWait(waiting);
  };
  const fetch = steps.some((step) => step.split) ? fetchInBytes : undefined;
  let made;
  for (const step of steps) {
    waits = [];
    made ??= new client.Client(url, { ...inCamelCase(options), bounds: inCamelCase(bounds), onWait: note, fetch });
    const result = await doStep(client, made, step, kept, onEvent);
    results.push({ ...result, waits });
  }
  return results;
}

/** A `fetch` whose answers come in chunks of one byte: engines join chunks that arrive together. */
async function fetchInBytes(...request) {
  const response = await fetch(...request);
  const split = (chunk, controller) => {
    for (let place = 0; place < chunk.length; place += 1) controller.enqueue(chunk.slice(place, place + 1));
  };
  return new Response(response.body.pipeThrough(new TransformStream({ transform: split })), response);
}

async function doStep({ LastcallError, Pages, TurnStream }, client, step, kept, onEvent) {
  const result = {};
  try {
    const args = (step.args ?? []).map((it) => filled(it, kept));
    const { abort_after: abortAfter } = step;
    const abort = new AbortController();
    const options = filledAll(inCamelCase(step.options ?? {}), kept);
    if (abortAfter || step.abort_on_wait) options.signal = abort.signal;
    if (step.abort_on_wait) options.onWait = () => abort.abort();
    const made = client[camel(step.do)](...args, options);
    if (made instanceof TurnStream) {
      await read(made, step, abort, result, onEvent);
      kept[step.as] = { id: made.turnId, session_id: made.sessionId };
    } else {
      result.value = (await (made instanceof Pages ? made.collect() : made)) ?? null;
      kept[step.as] = result.value;
    }
  } catch (error) {
    if (error instanceof RangeError) result.refused = true;
    else if (error instanceof LastcallError) {
      const { status, code, title, detail, requestId, retryAfterS, turnId } = error;
      const ids = { request_id: requestId, retry_after_s: retryAfterS, turn_id: turnId };
      result.error = { status, code, title, detail, ...ids };
    } else throw error;
  }
  return result;
}

async function read(stream, step, abort, result, onEvent) {
  const events = [];
  result.aborted = false;
  try {
    for await (const event of stream) {
      events.push(shown(event));
      onEvent();
      // The event loop is held up, as in a page that was hidden or on a machine that slept.
      // Not from a timer: Node.js looks at the network before it looks at the clock again then.
      if (step.block_ms && events.length === 1) setImmediate(block, step.block_ms);
      if (events.length === step.leave_after) break;
      if (events.length === step.abort_after) abort.abort();
      if (events.length === step.cancel_after) await stream.cancel();
    }
    if (step.go_on) for await (const event of stream) events.push(shown(event));
  } catch (error) {
    if (error !== abort.signal.reason) throw error;
    result.aborted = true;
  } finally {
    const { text, end, sessionId, turnId } = stream;
    Object.assign(result, { events, text, end: end?.type ?? null, session_id: sessionId, turn_id: turnId });
  }
}

const shown = ({ seq = null, type, text = "" }) => [seq, type, text];

function block(ms) {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
}

/** The fields of the API keep their names; the options of the client have names as JavaScript has them. */
const OF_CLIENT = /^(idempotency_key|request_id|if_match|seen_head|wait_s|session_id|api_key|.*_(s|max))$/;
const OF_API = /^(idle_timeout_s)$/;
const camel = (name) => name.replace(/_([a-z])/g, (_, letter) => letter.toUpperCase());
const inCamelCase = (options) =>
  Object.fromEntries(
    Object.entries(options).map(([name, value]) => [
      OF_CLIENT.test(name) && !OF_API.test(name) ? camel(name) : name,
      value,
    ]),
  );

const filledAll = (options, kept) =>
  Object.fromEntries(Object.entries(options).map(([name, value]) => [name, filled(value, kept)]));

function filled(value, kept) {
  if (typeof value !== "string" || !value.startsWith("$")) return value;
  const [name, ...path] = value.slice(1).split(".");
  return path.reduce((found, key) => found[key], kept[name]);
}

if (globalThis.process !== undefined) {
  const input = [];
  for await (const chunk of process.stdin) input.push(chunk);
  const client = await import("../../clients/js/lastcall.js");
  const jobs = JSON.parse(Buffer.concat(input));
  console.log(JSON.stringify(await Promise.all(jobs.map((job) => doSteps(client, job)))));
}
