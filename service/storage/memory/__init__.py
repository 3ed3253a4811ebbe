"""The store in this process's memory."""

from service.storage.memory.store import MemoryStore, open_memory_store

__all__ = ["MemoryStore", "open_memory_store"]
