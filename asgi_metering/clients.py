"""
Clients: the HTTP clients that an application gives to model SDKs, so that their answers are metered.

Knows which arguments they take, and no HTTP library before one is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asgi_metering.booking import UpstreamBooking
from asgi_metering.events.metrics import Meters
from asgi_metering.names import check_name
from asgi_metering.upstream.headroom import Headroom
from asgi_metering.upstream.readings import QuotaReadings

if TYPE_CHECKING:
    from httpx2 import AsyncBaseTransport, AsyncClient, BaseTransport, Client

    from asgi_metering.upstream.client import MeteredTransport, SyncMeteredTransport

__all__ = ["UpstreamClients"]


class UpstreamClients:
    """
    Makes clients for providers. `Metering` is one.

    Attributes:
        quotas: Gets the readings of every answer.
        headroom: What was let in for providers and is in no reading yet.
        meters: Counts what comes too late.
    """

    quotas: QuotaReadings
    headroom: Headroom
    meters: Meters

    def upstream_client(
        self,
        provider: str,
        wrap: AsyncBaseTransport | None = None,
        *,
        library: str | None = None,
        usage_dialect: str | None = None,
        label: str | None = None,
        **client_options: Any,
    ) -> AsyncClient:
        """
        An async HTTP client for the model SDKs: ``AsyncOpenAI(http_client=metering.upstream_client("openai"))``.

        The quotas of every answer go to `quotas`, refusals included (S1.44); the usage of an answer goes to the metered
        call in which the request was begun, whatever else runs beside it. Outside of a call only quotas are kept; other
        processes are told of them, and theirs are heard, while the metering is open: a script, or a worker without
        metered calls, that shall share them opens it by ``async with metering:``.
        Close it as any client, or let the SDK's client do so.

        Args:
            provider: Names the provider in readings and events, such as ``"openai"``.
            wrap: A transport to use instead of the default one; then proxies of the environment do not count.
            library: ``"httpx2"`` or ``"httpx"``, where *wrap* does not tell and the first one installed is wrong.
            usage_dialect: In which dialect of `usage.dialects` bodies report, where detection would be wrong.
            label: Names this key, or model, of the provider where several have quotas of their own; no secret.
            client_options: As for ``AsyncClient``, without ``transport``; timeouts, limits and redirects are the SDKs'
                own by default.

        Raises:
            ConfigurationError: An argument is not usable.
            MissingExtraError: No HTTP client library is installed.
        """
        from asgi_metering.upstream.client import upstream_client

        return upstream_client(
            provider, self._listener(label), wrap, library=library, usage_dialect=usage_dialect, **client_options
        )

    def upstream_client_sync(
        self,
        provider: str,
        wrap: BaseTransport | None = None,
        *,
        library: str | None = None,
        usage_dialect: str | None = None,
        label: str | None = None,
        **client_options: Any,
    ) -> Client:
        """
        A sync HTTP client, ``OpenAI(http_client=metering.upstream_client_sync("openai"))``; else as `upstream_client`.

        A sync endpoint, and whatever else runs in a thread with the call's context (``asyncio.to_thread``, anyio's
        threads), books to its call. A thread that is started without the context books to none: pass it on by
        ``contextvars.copy_context().run``.
        """
        from asgi_metering.upstream.client import upstream_client_sync

        return upstream_client_sync(
            provider, self._listener(label), wrap, library=library, usage_dialect=usage_dialect, **client_options
        )

    def upstream_transport(
        self,
        provider: str,
        wrap: AsyncBaseTransport | None = None,
        *,
        library: str | None = None,
        usage_dialect: str | None = None,
        label: str | None = None,
    ) -> MeteredTransport:
        """The transport of `upstream_client` alone, around *wrap*, for clients that you build yourself."""
        from asgi_metering.upstream.client import upstream_transport

        return upstream_transport(provider, self._listener(label), wrap, library=library, usage_dialect=usage_dialect)

    def upstream_transport_sync(
        self,
        provider: str,
        wrap: BaseTransport | None = None,
        *,
        library: str | None = None,
        usage_dialect: str | None = None,
        label: str | None = None,
    ) -> SyncMeteredTransport:
        """The transport of `upstream_client_sync` alone, around *wrap*, for clients that you build yourself."""
        from asgi_metering.upstream.client import upstream_transport_sync

        return upstream_transport_sync(
            provider, self._listener(label), wrap, library=library, usage_dialect=usage_dialect
        )

    def _listener(self, label: str | None) -> UpstreamBooking:
        if label is not None:
            check_name(label, "quota label")
        return UpstreamBooking(self, label)
