"""
Upstream: seeing what our own providers answer.

Knows HTTP clients and the readings that come out of their responses. Never knows a call, a payer or a price.
"""

from __future__ import annotations

from asgi_metering.upstream.client import (
    MeteredTransport,
    SyncMeteredTransport,
    upstream_client,
    upstream_client_sync,
    upstream_transport,
    upstream_transport_sync,
)
from asgi_metering.upstream.listener import LiveUpstreamListener, UpstreamListener
from asgi_metering.upstream.readings import QuotaReadings

__all__ = [
    "LiveUpstreamListener",
    "MeteredTransport",
    "QuotaReadings",
    "SyncMeteredTransport",
    "UpstreamListener",
    "upstream_client",
    "upstream_client_sync",
    "upstream_transport",
    "upstream_transport_sync",
]
