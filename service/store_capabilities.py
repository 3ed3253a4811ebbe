"""What each kind of store can do. Known from ``store_url``, before a store is open; an open store says the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class StoreCapabilities:
    """What a store can do.

    Attributes:
        durable: The store outlives the process: checkpoints are worth their cost, and sessions may idle for long.
        shared: Several processes can use the store at the same time: an owner may be another process, and may die.
    """

    durable: bool
    shared: bool


MEMORY = StoreCapabilities(durable=False, shared=False)
SQLITE = StoreCapabilities(durable=True, shared=True)
POSTGRESQL = StoreCapabilities(durable=True, shared=True)

BY_SCHEME: Mapping[str, StoreCapabilities] = MappingProxyType(
    {"memory": MEMORY, "sqlite": SQLITE, "postgresql": POSTGRESQL}
)
"""The capabilities by the scheme of ``store_url``."""
