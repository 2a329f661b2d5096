"""The PostgreSQL store. One module each: the store, one connection, migrations, a batch, its statements, reading."""

from asgi_metering.stores.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
