"""What is wrong with a value, in JSON's words: msgspec says it in Python's, which a caller need not know.

``Expected `int`, got `str``` becomes ``Expected a whole number, got a string``.
"""

import re

_WANTED = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
    "object": "an object",
    "array": "an array",
    "datetime": "a string with a date and time",
    "bytes": "a string in base64",
}
_GIVEN = _WANTED | {"int": "a number", "bool": "true or false"}
_TYPE = "|".join(_WANTED)
_MISMATCH = re.compile(
    rf"^Expected `(?P<wanted>(?:{_TYPE})(?: \| (?:{_TYPE}))*)`(?P<bound>(?: of length)? [<>=]+ [-\d.e+]+)?"
    rf"(?:, got `(?P<given>{_TYPE})`)?(?= - at `|$)"
)


def in_json_words(message: str, *, of_text: bool = False) -> str:
    """A message of msgspec's with JSON's names of the types; any other message as it is.

    Args:
        of_text: The value came as a text that stands for another type, as in a query: its own type says nothing.
    """
    found = _MISMATCH.match(message)
    if found is None:
        return message
    wanted = " or ".join(_WANTED[name] for name in found["wanted"].split(" | "))
    bound = re.sub(r"\.0$", "", found["bound"] or "")
    given = f", got {_GIVEN[found['given']]}" if found["given"] and not of_text else ""
    return f"Expected {wanted}{bound}{given}{message[found.end() :]}"
