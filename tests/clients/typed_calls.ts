// What a program in TypeScript writes with the client in clients/js: the compiler takes it, and refuses what is marked.

import { Client, ENDS, LastcallError, type Event, type Session, type Turn, type TurnEnd, type Waiting } from "./lastcall.js";

const client = new Client("https://example.com/ai", {
  apiKey: async () => "a short-lived key",
  bounds: { patienceS: null, silenceS: 60 },
  onWait: ({ attempt, delayS, error, isOffline }: Waiting) => console.log(attempt, delayS, error.code, isOffline),
});

export async function talk(signal: AbortSignal): Promise<string> {
  const session: Session = await client.createSession({ title: "Nurseries", metadata: { team: "blue" }, signal });
  const stream = client.stream(session.id, "What is a nursery?", { parent: null, on_disconnect: "cancel", signal });
  for await (const event of stream) {
    show(event);
    if (ENDS.has(event.type)) console.log(event.seq ?? "from the record");
  }
  const end: TurnEnd | null = stream.end;
  if (end?.type === "turn.failed") console.log(end.error.code);
  const turn: Turn = await client.getTurn(session.id, stream.turnId ?? "", { waitS: 30 });
  await client.edit(turn, [{ type: "message", text: "Again" }]).finish();
  await client.retry(turn.session_id, turn.id, { temperature: 1 }).cancel();
  await client.switchTo(session.id, turn.id, { seenHead: turn.id });
  for await (const found of client.search("nursery", { metadata: { team: "blue" } })) console.log(found.match?.snippet);
  const texts: string[] = (await client.messages(session.id).collect()).map((message) => message.text);
  const [, etag] = await client.sessionEtag(session.id);
  await client.deleteSession(session.id, etag === null ? {} : { ifMatch: etag });
  return texts.join("\n") + stream.text;
}

function show(event: Event): void {
  switch (event.type) {
    case "turn.delta":
      return console.log(event.text);
    case "turn.resumed":
      return console.log(event.text_length, event.mode);
    case "turn.interrupted":
      return console.log(event.reason, event.replaces);
  }
}

export function why(error: unknown): string {
  return error instanceof LastcallError ? `${error.status} ${error.code} ${error.requestId} ${error.turnId}` : "";
}

// @ts-expect-error  an option that is not there
client.stream("me", "Hi", { onConflict: "queue" });
// @ts-expect-error  no such value
client.stream("me", "Hi", { on_conflict: "wait" });
// @ts-expect-error  a retry has the parent of its turn
client.retry("me", "turn_0a", { parent: null });
