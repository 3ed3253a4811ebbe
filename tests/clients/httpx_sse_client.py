"""Reads a stream with httpx-sse: ``httpx_sse_client.py URL`` prints the events of ``POST /chat`` as JSON."""

import json
import sys
from importlib.metadata import version

import httpx
import httpx_sse  # type: ignore[import-not-found]  # of the script's own environment

with (
    httpx.Client(timeout=60) as client,
    httpx_sse.connect_sse(client, "POST", sys.argv[1], json={"message": "Hi"}) as source,
):
    events = [event.data for event in source.iter_sse()]
seen = [json.loads(data) for data in events if data]
text = "".join(event["text"] for event in seen if event["type"] == "turn.delta")
outcome = {
    "version": version("httpx-sse"),
    "seqs": [event["seq"] for event in seen],
    "last": seen[-1]["type"],
    "text": text,
    "empty": events.count(""),
}
sys.stdout.write(json.dumps(outcome))
