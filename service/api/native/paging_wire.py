"""What the pages and the moments of all bodies have in common."""

from datetime import datetime
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from service.api.http.wire_types import Limit, Query

Time = Annotated[datetime, Meta(tz=True)]
After = Annotated[str, Meta(max_length=512, description="The `next` of the previous page.")]


class PageQuery(Query, frozen=True, kw_only=True):
    """``?limit=50&after=WyJ0IiwxMl0``"""

    limit: Limit = 20
    after: After | UnsetType = UNSET
