"""The SQLite store. One module each: the store, its threads, the file, the rows of a batch, and reading."""

from asgi_metering.stores.sqlite.store import SQLiteStore

__all__ = ["SQLiteStore"]
