"""Lastcall in front of the model servers that are installed with the tests: what the table in docs/openai.md says.

`just upstreams` does the same with the others, which are large.
"""

from pathlib import Path

import pytest

from tests.upstreams.kinds import KINDS, Kind
from tests.upstreams.observations import observe
from tests.upstreams.table import DOCUMENT, LABELS, columns_in

pytestmark = pytest.mark.parallel

SMALL = ("fakellm", "llmock")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in SMALL], ids=lambda kind: kind.name)
@pytest.mark.filterwarnings(r"ignore:Async generator '(openai|httpx2?|httpcore2?)\.:ResourceWarning")
async def test_what_the_table_says_of_a_server_is_seen(tmp_path: Path, kind: Kind) -> None:
    cells, broken = await observe(kind, tmp_path)
    assert broken == []
    seen = dict(zip(LABELS[1:], cells, strict=True))
    assert seen == dict(zip(LABELS[1:], columns_in(DOCUMENT.read_text())[kind.head], strict=True))
