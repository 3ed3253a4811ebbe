"""The store in a PostgreSQL database. Imports psycopg, so it is imported only where such a store is opened."""

from service.storage.postgres.store import PostgresStore, open_postgres_store

__all__ = ["PostgresStore", "open_postgres_store"]
