"""Large answers as JSON, encoded in steps, between which other tasks run."""

import msgspec

from service.long_texts import LONG, text_encoded
from service.steps import Steps, in_steps


async def encode_json(body: msgspec.Struct) -> bytes:
    """Encode a wire type, as ``msgspec.json.encode`` does.

    Where no text is long there is no checkpoint, unless the texts take milliseconds together.
    """
    return msgspec.json.encode(await in_steps(_with_encoded_texts(body)))


def _with_encoded_texts(value: msgspec.Struct) -> Steps[msgspec.Struct]:
    """The struct with its long texts encoded already, those of its parts included."""
    changes: dict[str, object] = {}
    for name in value.__struct_fields__:
        field = getattr(value, name)
        if isinstance(field, str) and len(field) >= LONG:
            changes[name] = msgspec.Raw(b"".join((yield from text_encoded(field))))
        elif isinstance(field, msgspec.Struct):
            changes[name] = yield from _with_encoded_texts(field)
        elif isinstance(field, tuple):
            parts: list[object] = []
            for part in field:
                yield
                parts.append((yield from _with_encoded_texts(part)) if isinstance(part, msgspec.Struct) else part)
            changes[name] = tuple(parts)
    return msgspec.structs.replace(value, **changes) if changes else value
