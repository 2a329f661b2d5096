"""The Redis and Valkey store, also on Sentinel and Cluster. Importing it imports no driver."""

from asgi_metering.stores.redis.cluster import ClusterStore
from asgi_metering.stores.redis.places import ClusterPlace, Place, SentinelPlace, ServerPlace
from asgi_metering.stores.redis.store import RedisStore

__all__ = ["ClusterPlace", "ClusterStore", "Place", "RedisStore", "SentinelPlace", "ServerPlace"]
