"""The SSE frame of an event.

A frame has an ``id:`` (the seq) and one ``data:`` line of JSON, whose ``type`` names the kind of the event. There is
no ``event:`` line: it would repeat the type in each delta, and without it a browser's ``onmessage`` sees all frames.
Every character that some client takes for a line end is escaped, so that the line is one line to every client.
"""

import msgspec

from service.api.http.frame_json import frame_json
from service.ids import public_id
from service.sessions.events.events import Event, TurnDelta, TurnQueued, TurnReasoning, TurnStarted

_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode_frame(event: Event) -> bytes:
    r"""The SSE frame of an event: ``id: 3\ndata: {"type":"turn.delta","seq":3,"text":"Hi"}\n\n``.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    seq = event.seq
    if isinstance(event, TurnDelta):
        return b'id: %d\ndata: {"type":"turn.delta","seq":%d,"text":%b}\n\n' % (seq, seq, frame_json(event.text))
    if isinstance(event, TurnReasoning):
        return b'id: %d\ndata: {"type":"turn.reasoning","seq":%d,"text":%b}\n\n' % (seq, seq, frame_json(event.text))
    if isinstance(event, TurnQueued | TurnStarted):
        event = msgspec.structs.replace(event, session_id=public_id(event.session_id))
    return b"id: %d\ndata: %b\n\n" % (seq, frame_json(event))


def decode_frame(frame: bytes) -> Event:
    """The event of a frame. A piece of a text does not name its item in a frame: ``item`` is 0."""
    return _decoder.decode(frame[frame.index(b"data: ") + 6 :])
