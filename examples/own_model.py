"""A model server of your own: a chat-completions endpoint that streams an answer word by word.

    python examples/own_model.py 9999

Then point Lastcall at it: LASTCALL_MODEL_URL=http://127.0.0.1:9999/v1 LASTCALL_MODEL=mine
Put what you like in answer(): retrieval, tools, another model. Needs the standard library only.
"""

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(messages: list[dict[str, str]]) -> Iterator[str]:
    """The reply to the last message, in pieces. ``messages`` is the whole conversation, oldest first."""
    questions = sum(message["role"] == "user" for message in messages)
    yield from f"This is answer {questions} to: {messages[-1]['content']}".split(" ")


class Endpoint(BaseHTTPRequestHandler):
    """``POST /v1/chat/completions``."""

    def do_POST(self) -> None:
        """Stream the answer as server-sent events. A client that closes the connection ends it: a write fails."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for number, word in enumerate(answer(request["messages"])):
                self.send({"delta": {"content": word if number == 0 else f" {word}"}, "finish_reason": None})
            self.send({"delta": {}, "finish_reason": "stop"})
            self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:  # the turn was cancelled: stop working
            pass

    def send(self, choice: dict[str, object]) -> None:
        """Send one chunk."""
        chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, **choice}]}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Endpoint)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}/v1\n")
    sys.stdout.flush()
    server.serve_forever()
