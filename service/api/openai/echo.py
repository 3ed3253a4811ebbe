"""What a response shows of its request, kept with its turn. The core keeps it, and does not look in.

Turns of other faces have none: then a response shows the defaults.
"""

from typing import Any

import msgspec

from service.api.openai.errors import ParameterError

_KEY = "openai"
_BYTES_MAX = 256 * 1024


class Echo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The parts of a request that its response shows, and that the turn itself does not have.

    Attributes:
        conversation: Whether the request named a conversation. Otherwise the session was made for the response, or is
            that of its previous response, and is no conversation of which the caller knows.
        own_session: The public id of the session if that was made for this response, or for one that it follows: such
            a session is no conversation, needs no title, and goes with its last response. A fork of it has another id.
        tools: As they were given.
        tools_left_out: What the model did not get to know.
        namespaces: The namespace and the name of each function that the model knows by a flat name: of the request's
            tools, and of the calls in its input.
        encrypted: Whether encrypted reasoning is included.
    """

    conversation: bool = False
    own_session: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    metadata: dict[str, str] = {}
    truncation: str = "auto"
    parallel_tool_calls: bool = True
    tool_choice: Any = "auto"
    tools: list[dict[str, Any]] = []
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: str = "default"
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    user: str | None = None
    max_tool_calls: int | None = None
    tools_left_out: tuple[str, ...] = ()
    namespaces: dict[str, tuple[str, str]] = {}
    encrypted: bool = False

    def face(self) -> dict[str, msgspec.Raw]:
        """The echo as it is kept with a turn. Raises: ParameterError: It is too large."""
        encoded = msgspec.json.encode(self)
        if len(encoded) > _BYTES_MAX:
            names = len(msgspec.json.encode(self.namespaces))
            if len(encoded) - names <= _BYTES_MAX:
                raise ParameterError(
                    f"The names of the calls that have a namespace have {names} bytes of JSON, and {len(encoded)} with "
                    f"the tools, the metadata and the form of the text; at most {_BYTES_MAX} are taken.",
                    param="input",
                )
            raise ParameterError(
                f"The tools, the metadata and the form of the text have {len(encoded)} bytes of JSON together; at most "
                f"{_BYTES_MAX} are taken.",
                param="tools",
            )
        return {_KEY: msgspec.Raw(encoded)}

    @classmethod
    def of_face(cls, face: dict[str, msgspec.Raw] | msgspec.UnsetType) -> "Echo":
        """The echo that is kept with a turn; the defaults for a turn of another face."""
        kept = None if face is msgspec.UNSET else face.get(_KEY)
        return cls() if kept is None else msgspec.json.decode(kept, type=cls)
