"""Redis URLs, and what is imported for them."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.errors import ConfigurationError, MissingExtraError
from asgi_metering.stores.redis import ClusterStore, RedisStore, SentinelPlace, ServerPlace
from asgi_metering.stores.redis.names import Names, escaped, restored
from asgi_metering.stores.redis.places import driver
from asgi_metering.stores.urls import store_from_url
from tests.harness.valkey import ValkeyServer


def store_of(url: str) -> RedisStore:
    """The store that *url* names."""
    store = store_from_url(url)
    assert isinstance(store, RedisStore)
    return store


def cluster_of(url: str) -> ClusterStore:
    """The same, of a Cluster."""
    store = store_from_url(url)
    assert isinstance(store, ClusterStore)
    return store


def test_make_the_store_of_one_server() -> None:
    """Host, port, database, credentials and TLS are the driver's; namespace and times are ours."""
    store = store_of(
        "rediss://me:se%20cret@host:7000/3?namespace=shop&timeout=0.5&connect_timeout=2&health_check_interval=9"
    )
    place = store._place
    assert isinstance(place, ServerPlace)
    assert (place.options["host"], place.options["port"], place.options["db"]) == ("host", 7000, 3)
    assert (place.options["username"], place.options["password"]) == ("me", "se cret")
    assert (place.options["connection_class"], place.options["health_check_interval"]) == (
        driver().connection.SSLConnection,
        9,
    )
    assert (place.timeout_s, store._timeout_s, store._names.prefix) == (2.0, 0.5, "{shop}:")
    assert str(place) == "host:7000"


def test_make_the_store_of_a_sentinels_master() -> None:
    """Sentinels are listed, with their port where it is not the usual one; the master is named behind them."""
    place = store_of("redis+sentinel://secret@a:1,b/main/2?tls=true")._place
    assert isinstance(place, SentinelPlace)
    assert (place.sentinels, place.master) == ((("a", 1), ("b", 26_379)), "main")
    assert (place.options["password"], place.options["db"]) == ("secret", 2)
    assert "host" not in place.options
    assert str(place) == "'main' of the sentinels a:1, b:26379"


def test_make_the_store_of_a_cluster() -> None:
    """Nodes are listed; a namespace has 64 partitions unless the URL says otherwise."""
    store = cluster_of("redis+cluster://a,b:7001?namespace=shop")
    assert store.place.seeds == (("a", 6_379), ("b", 7_001))
    assert store.partitions.count == 64
    assert cluster_of("redis+cluster://a?partitions=8").partitions.count == 8


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://host?timeout=soon", "timeout='soon', which is no number of seconds"),
        ("redis://host?timeout=inf", "no number of seconds"),
        ("redis://host?connect_timeout=0", "connect_timeout='0'"),
        ("redis://host?namespace=a%20b", "The namespace 'a b' is not usable"),
        ("redis://host?socket_keepalive=1&health_check_interval=often", "Invalid value for 'health_check_interval'"),
        ("redis+sentinel://host", "names no master"),
        ("redis+sentinel:///main", "names no servers"),
        ("redis+cluster://a,,b", "names no servers"),
        ("redis+cluster://a:port", "names no servers"),
        ("redis+cluster://a/1", "A Cluster has only number 0"),
        ("redis+cluster://a?partitions=many", "partitions='many', which is no whole number"),
        ("redis+cluster://a?partitions=0", "A namespace of 0 partitions cannot be kept"),
        ("redis+other://a", "has the scheme 'redis\\+other'"),
    ],
)
def test_url_that_is_a_mistake(url: str, said: str) -> None:
    """What is wrong is said when the store is made, before any server is asked."""
    with pytest.raises(ConfigurationError, match=said):
        store_from_url(url)


def test_error_of_a_url_hides_its_password() -> None:
    """A password in a URL that is refused is not shown."""
    with pytest.raises(ConfigurationError) as caught:
        store_from_url("redis://:secret@host?timeout=soon")
    assert "secret" not in str(caught.value)


def test_use_the_store_of_a_url(server: ValkeyServer) -> None:
    """A URL is all that it takes."""

    async def run() -> None:
        store = store_of(f"{server.url}?namespace=by_url")
        await store.open()
        await store.open()
        await store.close()
        await store.close()

    asyncio.run(run())


def test_driver_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without redis-py the error names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "redis.asyncio.connection", None)
    driver.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match=r"asgi-metering\[redis\]"):
            store_from_url("redis://host")
    finally:
        driver.cache_clear()


def test_import_without_the_driver() -> None:
    """Importing the package, or the store, imports no driver."""
    program = (
        "import sys, asgi_metering, asgi_metering.stores.redis as store\n"
        "store.RedisStore(store.ServerPlace({}, 1.0))\n"
        "print({'redis', 'hiredis'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@given(st.text(max_size=12), st.text(max_size=12))
def test_keys_name_what_they_were_made_of(payer: str, unit: str) -> None:
    """Whatever a payer or a unit is called, its key has no control characters of its own and gives the names back."""
    names = Names("shop")
    key = names.account(payer, unit)
    assert names.pair(key) == (payer, unit)
    assert key.startswith("{shop}:a:")
    assert restored(escaped(payer)) == payer
    assert not any(char in escaped(payer) for char in "\t\n\x1f")
