"""
Redis URLs: ``redis://``, ``rediss://``, ``redis+sentinel://`` and ``redis+cluster://`` to a store. Opens nothing.

What the driver knows of such URLs stays the driver's: user, password, database, TLS and all options of a connection.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from asgi_metering.errors import ConfigurationError
from asgi_metering.stores.redis.cluster import ClusterStore
from asgi_metering.stores.redis.names import Names
from asgi_metering.stores.redis.partitions import PARTITIONS
from asgi_metering.stores.redis.places import Address, ClusterPlace, Place, SentinelPlace, ServerPlace, driver
from asgi_metering.stores.redis.store import RedisStore

__all__ = ["store_from_redis_url"]

CONNECT_S = 5.0
TIMEOUT_S = 5.0

SENTINEL_PORT, REDIS_PORT = 26_379, 6_379


def store_from_redis_url(url: str, shown: str) -> RedisStore | ClusterStore:
    """
    Make the store that *url* names.

    ``redis://user:password@host:6379/0``, ``rediss://`` with TLS;
    ``redis+sentinel://password@host1:26379,host2:26379/master/0`` asks sentinels for the master called *master*;
    ``redis+cluster://host1:6379,host2:6379`` asks nodes of a Cluster. Options of ours: ``namespace=``, ``timeout=``
    (seconds for a batch), ``connect_timeout=``, ``tls=true`` for Sentinel and Cluster, and for a Cluster
    ``partitions=`` (over how many shards a namespace may spread); all others are the driver's.

    Args:
        url: Whole.
        shown: The same without what may be a password, for errors.

    Raises:
        MissingExtraError: redis-py is not installed.
        ConfigurationError: It names no server, or an option's value is not one.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    namespace = options.pop("namespace", "metering")
    Names(namespace)
    timeout_s = _seconds(options, "timeout", TIMEOUT_S, shown)
    connect_s = _seconds(options, "connect_timeout", CONNECT_S, shown)
    kind = parts.scheme.partition("+")[2]
    place: Place
    if not kind:
        place = ServerPlace(_parsed(urlunsplit(parts._replace(query=urlencode(options))), shown), connect_s)
    else:
        credentials, _, hosts = parts.netloc.rpartition("@")
        path = unquote(parts.path).strip("/")
        if kind == "sentinel":
            master, _, database = path.partition("/")
            if not master:
                raise ConfigurationError(
                    f"The store URL {shown!r} names no master. Write redis+sentinel://host1,host2/master-name/0."
                )
            more = _many(options, credentials, database, shown)
            place = SentinelPlace(_addresses(hosts, SENTINEL_PORT, shown), master, more, connect_s)
        else:
            if path not in ("", "0"):
                raise ConfigurationError(f"The store URL {shown!r} names a database. A Cluster has only number 0.")
            partitions = _whole(options.pop("partitions", str(PARTITIONS)), shown)
            more = _many(options, credentials, "", shown)
            seeds = _addresses(hosts, REDIS_PORT, shown)
            cluster = ClusterPlace(seeds, more, connect_s)
            return ClusterStore(cluster, namespace=namespace, partitions=partitions, timeout_s=timeout_s)
    return RedisStore(place, namespace=namespace, timeout_s=timeout_s)


def _seconds(options: dict[str, str], name: str, default: float, shown: str) -> float:
    told = options.pop(name, None)
    try:
        seconds = default if told is None else float(told)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise ConfigurationError(f"The store URL {shown!r} has {name}={told!r}, which is no number of seconds above 0.")
    return seconds


def _whole(told: str, shown: str) -> int:
    if not (told.isascii() and told.isdigit()):
        raise ConfigurationError(f"The store URL {shown!r} has partitions={told!r}, which is no whole number.")
    return int(told)


def _parsed(url: str, shown: str) -> dict[str, Any]:
    parse = driver().connection.parse_url
    try:
        return dict(parse(url))
    except ValueError as error:
        told = str(error)
        if "@" in shown and "@" not in urlsplit(url).netloc:
            # What the driver takes for a port is of the password.
            told = "something before its '@' ends the address. Write %2F, %3F and %23 for '/', '?' and '#' there."
        raise ConfigurationError(f"The store URL {shown!r} is none of a Redis server: {told}") from None


def _many(options: dict[str, str], credentials: str, database: str, shown: str) -> dict[str, Any]:
    """The options of the connection to one of many servers, without its address."""
    scheme = "rediss" if options.pop("tls", "false").lower() in ("true", "1", "yes") else "redis"
    if credentials and ":" not in credentials:
        credentials = f":{credentials}"
    before = f"{credentials}@" if credentials else ""
    parsed = _parsed(f"{scheme}://{before}localhost/{database or 0}?{urlencode(options)}", shown)
    parsed.pop("host", None)
    if not parsed.get("db"):
        parsed.pop("db", None)
    return parsed


def _addresses(hosts: str, port: int, shown: str) -> list[Address]:
    found: list[Address] = []
    for host in hosts.split(","):
        try:
            parts = urlsplit(f"//{host}")
            found.append((parts.hostname or "", parts.port or port))
        except ValueError:
            found.append(("", 0))
    if not all(host for host, _ in found):
        raise ConfigurationError(f"The store URL {shown!r} names no servers. Write host1:port,host2:port.")
    return found
