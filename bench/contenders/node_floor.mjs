// A floor: a bare node server that makes its own tokens and ends its streams on SIGTERM.
// It does less than any contender: no framework, no model server behind it, nothing kept.
import http from "node:http";

const streams = new Set();
const event = (type, text) => `data: ${JSON.stringify({ type, text })}\n\n`;

const server = http.createServer((request, response) => {
  if (request.method !== "POST") return response.end("{}");
  let body = "";
  request.on("data", (data) => (body += data));
  request.on("end", () => {
    const word = (name, otherwise) => Number(body.match(`${name}=(\\d+)`)?.[1] ?? otherwise);
    const [rate, tokens, silentAfter] = [word("rate", 20), word("tokens", 0), word("silent_after", 0)];
    let number = 0;
    response.writeHead(200, { "content-type": "text/event-stream" });
    const send = () => {
      number += 1;
      response.write(event("turn.delta", `<${number}@${process.hrtime.bigint()}> `));
      if (number === silentAfter) clearInterval(timer);
      if (number === tokens) end("turn.completed");
    };
    const end = (type) => {
      clearInterval(timer);
      streams.delete(end);
      response.end(event(type));
    };
    const timer = setInterval(send, rate ? 1000 / rate : 0);
    streams.add(end);
    response.on("close", () => (clearInterval(timer), streams.delete(end)));
    send();
  });
});

process.on("SIGTERM", () => {
  server.close(() => process.exit(0));
  for (const end of streams) end("turn.interrupted");
  server.closeIdleConnections();
});
server.listen(0, "127.0.0.1", () => console.log(`Running on http://127.0.0.1:${server.address().port}`));
