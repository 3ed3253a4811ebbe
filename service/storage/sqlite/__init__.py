"""The store in one SQLite file. Imports apsw, so it is imported only where such a store is opened."""

from service.storage.sqlite.store import SqliteStore, open_sqlite_store

__all__ = ["SqliteStore", "open_sqlite_store"]
