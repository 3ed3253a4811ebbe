"""The codes of failed turns: what each means and who can fix it.

This is the one list of them. Types (:data:`FailureCode`), the OpenAPI document, the page ``/docs`` and the table of
``docs/failures.md`` are made from it or compared with it. A code is stable: it is added, and not renamed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FailureCode = Literal[
    "connect_timeout",
    "upstream_unreachable",
    "upstream_dns",
    "upstream_tls",
    "upstream_auth",
    "model_not_found",
    "context_too_long",
    "content_filter",
    "unsupported_content",
    "parameter_refused",
    "rate_limited",
    "upstream_rejected",
    "upstream_error",
    "upstream_protocol",
    "upstream_truncated",
    "first_token_timeout",
    "next_token_timeout",
    "turn_timeout",
    "reply_too_large",
    "log_too_large",
    "store_unavailable",
    "resources_exhausted",
    "internal_error",
]
"""What ``error.code`` of a failed turn may be."""


@dataclass(frozen=True)
class FailureMeaning:
    """What happened, and who can fix it: two texts without a full stop, with code in backticks."""

    cause: str
    fixed_by: str


FAILURES: Mapping[FailureCode, FailureMeaning] = {
    "connect_timeout": FailureMeaning(
        "the model server did not take the connection within `connect_timeout_s`", "operator: address, network"
    ),
    "upstream_unreachable": FailureMeaning("the model server refused or closed the connection", "operator"),
    "upstream_dns": FailureMeaning("the name of the model server is not known", "operator: `model_url`"),
    "upstream_tls": FailureMeaning(
        "the certificate of the model server is not trusted, or the server does not speak TLS", "operator"
    ),
    "upstream_auth": FailureMeaning("the model server did not accept the key", "operator: `model_api_key`"),
    "model_not_found": FailureMeaning(
        "the model server does not have this model", "caller: `model`; operator: `models`"
    ),
    "context_too_long": FailureMeaning(
        "the conversation is too long for the model, also once the oldest turns were left out", "user: a shorter input"
    ),
    "content_filter": FailureMeaning(
        "the model server refused the content of the input; the input is not sent again", "user"
    ),
    "unsupported_content": FailureMeaning(
        "the model server does not take input of this kind; the input is not sent again", "user"
    ),
    "parameter_refused": FailureMeaning(
        "the model server does not take a parameter of the request, or its value: `param` names the parameter",
        "caller: without this parameter, or another `model`",
    ),
    "rate_limited": FailureMeaning(
        "the model server answered 429, also after `model_retries_max` more attempts",
        "wait; operator: the provider's limits",
    ),
    "upstream_rejected": FailureMeaning(
        "the model server refused the request with another status below 500", "operator or caller, as the message says"
    ),
    "upstream_error": FailureMeaning("the model server failed (5xx), or broke its reply off", "wait; the provider"),
    "upstream_protocol": FailureMeaning(
        "the answer of the model server is not chat completions", "operator: is `model_url` right, up to `/v1`?"
    ),
    "upstream_truncated": FailureMeaning(
        "the model server closed the connection before the end of the reply",
        "wait; operator: a proxy on the way that cuts long answers",
    ),
    "first_token_timeout": FailureMeaning(
        "no token came within `first_token_timeout_s`", "operator: a busy model, or the setting"
    ),
    "next_token_timeout": FailureMeaning(
        "no further token came within `next_token_timeout_s`", "operator: a busy model, or the setting"
    ),
    "turn_timeout": FailureMeaning("the turn took longer than `turn_timeout_s`", "operator: the setting"),
    "reply_too_large": FailureMeaning(
        "the reply is larger than `reply_bytes_max`; the text before that is kept", "caller: `max_output_tokens`"
    ),
    "log_too_large": FailureMeaning(
        "the turn's events are larger than `log_bytes_max`; the text before that is kept",
        "caller: `max_output_tokens`",
    ),
    "store_unavailable": FailureMeaning(
        "the store refused or did not answer while the turn began", "operator: the disk"
    ),
    "resources_exhausted": FailureMeaning(
        "this process may open no more files or connections", "operator: `ulimit -n`"
    ),
    "internal_error": FailureMeaning("an error in Lastcall; its log has the cause", "report it"),
}
"""Each code with its meaning, in the order in which readers are shown them."""
