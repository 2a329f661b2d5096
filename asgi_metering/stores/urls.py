"""
Store URLs: from ``memory://`` or ``sqlite:///metering.db`` to a store.

Imports a driver only for the URL that needs it.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from asgi_metering.errors import ConfigurationError
from asgi_metering.stores.contract import Store

__all__ = ["masked", "store_from_url"]

SCHEMES = ("memory", "sqlite", "postgresql", "postgres", "redis", "rediss", "redis+sentinel", "redis+cluster")
"""What this version has; the others come behind the same contract."""

POSTGRES_SCHEMES = ("postgresql", "postgres")

_PASSWORD: Final = re.compile(r"(password=)[^&]*", re.IGNORECASE)


def store_from_url(url: str) -> Store:
    """
    Make the store that *url* names; nothing is opened yet.

    ``memory://`` keeps everything in this process. ``sqlite:///relative.db`` and ``sqlite:////absolute.db`` name a
    file; ``?synchronous=NORMAL`` trades the last milliseconds before a power cut for speed.
    ``postgresql://user:password@host:5432/database`` takes all parameters of libpq, ``namespace=`` for the schema, and
    ``prepare=no`` behind a pooler that loses prepared statements.
    ``redis://``, ``rediss://``, ``redis+sentinel://`` and ``redis+cluster://``: see `redis.urls.store_from_redis_url`.

    Raises:
        MissingExtraError: The driver that the scheme needs is not installed.
        ConfigurationError: Not a URL, an unknown scheme, or options that the scheme does not have.
    """
    if not isinstance(url, str):
        raise ConfigurationError(f"The store {url!r} is neither a Store nor a URL. Write 'sqlite:///metering.db'.")
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ConfigurationError(
            f"The store URL {masked(url)!r} has the scheme {parts.scheme!r}. Use one of: memory://, sqlite:///file.db, "
            f"postgresql://host/database, redis://host, rediss://host, redis+sentinel://hosts/master, "
            f"redis+cluster://hosts."
        )
    if parts.scheme in POSTGRES_SCHEMES:
        return _postgres(url)
    if parts.scheme.startswith("redis"):
        from asgi_metering.stores.redis.urls import store_from_redis_url

        return store_from_redis_url(url, masked(url))
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "memory":
        if parts.netloc or parts.path.strip("/") or options:
            raise ConfigurationError(
                f"The store URL {masked(url)!r} says more than memory can take. Write 'memory://'."
            )
        from asgi_metering.stores.memory import MemoryStore

        return MemoryStore()
    if parts.fragment:
        raise ConfigurationError(
            f"The store URL {url!r} has a '#', which ends the path of its file. Write %23 for one in its name."
        )
    return _sqlite(url, parts.netloc, unquote(parts.path), options)


def _sqlite(url: str, host: str, path: str, options: dict[str, str]) -> Store:
    file = path[1:]
    if host or not file:
        raise ConfigurationError(
            f"The store URL {masked(url)!r} names no file. Write sqlite:///relative.db or sqlite:////absolute.db."
        )
    if "\0" in file:
        raise ConfigurationError(f"The store URL {masked(url)!r} has a NUL, %00, in the name of its file. Take it out.")
    unknown = options.keys() - {"synchronous"}
    if unknown:
        raise ConfigurationError(
            f"The store URL {masked(url)!r} has unknown options: {', '.join(sorted(unknown))}. Use "
            f"synchronous=FULL or synchronous=NORMAL."
        )
    from asgi_metering.stores.sqlite import SQLiteStore

    return SQLiteStore(file, synchronous=options.get("synchronous", "FULL").upper())


def _postgres(url: str) -> Store:
    """Whatever the URL says beside the namespace and `prepare` is libpq's."""
    address, _, query = url.partition("?")
    ours = {name: value for name, value in parse_qsl(query, keep_blank_values=True) if name in ("namespace", "prepare")}
    prepare = ours.get("prepare", "yes")
    if prepare not in ("yes", "no"):
        raise ConfigurationError(
            f"The store URL {masked(url)!r} says prepare={prepare}. Write prepare=no where a pooler loses prepared "
            f"statements, and nothing elsewhere."
        )
    rest = "&".join(each for each in query.split("&") if each and not each.startswith(("namespace=", "prepare=")))
    from asgi_metering.stores.postgres import PostgresStore
    from asgi_metering.stores.postgres.database import DEFAULT_NAMESPACE

    url = f"{address}?{rest}" if rest else address
    return PostgresStore(url, namespace=ours.get("namespace", DEFAULT_NAMESPACE), prepare=prepare == "yes")


def masked(url: str) -> str:
    """
    *url* without what may be a password.

    All before the last ``@`` is left out: a password that is written as it is, with a slash say, ends the part of the
    URL where it should be.
    """
    scheme, between, rest = url.partition("://")
    if scheme == "sqlite":
        return url
    _, at, address = rest.rpartition("@")
    return scheme + between + _PASSWORD.sub(r"\1***", f"***@{address}" if at else rest)
