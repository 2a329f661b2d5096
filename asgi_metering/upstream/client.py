"""
The HTTP client for calls to model providers that shows what they answer.

Knows how the transports of httpx2 and httpx are wrapped, and which options the OpenAI and Anthropic SDKs give
their own clients. Never knows calls, payers or prices: a listener hears of every exchange.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name
from asgi_metering.upstream.exchange import Exchange, Source
from asgi_metering.upstream.libraries import choose_library
from asgi_metering.upstream.listener import UpstreamListener
from asgi_metering.upstream.proxies import environment_proxies
from asgi_metering.usage.reader import UsageReader

if TYPE_CHECKING:
    from httpx2 import AsyncBaseTransport, AsyncClient, BaseTransport, Client, Request, Response
else:
    # Clients of both libraries take any object with the right methods, so at run time neither is needed here.
    AsyncBaseTransport = BaseTransport = object

__all__ = [
    "CONNECT_TIMEOUT_S",
    "MAX_CONNECTIONS",
    "MAX_KEEPALIVE_CONNECTIONS",
    "TIMEOUT_S",
    "MeteredTransport",
    "SyncMeteredTransport",
    "upstream_client",
    "upstream_client_sync",
    "upstream_transport",
    "upstream_transport_sync",
]

TIMEOUT_S = 600.0
"""Seconds to read, write, or wait for a connection from the pool: the default of the OpenAI and Anthropic SDKs."""

CONNECT_TIMEOUT_S = 5.0
"""Seconds to connect: the default of both SDKs."""

MAX_CONNECTIONS = 1000
"""Connections of one client: the default of both SDKs."""

MAX_KEEPALIVE_CONNECTIONS = 100
"""Idle connections that are kept: the default of both SDKs."""

_KEEPALIVE_S = 60  # Idle seconds before, and between, TCP probes; 5 unanswered ones end a connection.
_KEEPALIVE_PROBES = 5

_TRANSPORT_OPTIONS = ("verify", "cert", "trust_env", "http1", "http2", "limits")

_READABLE_CODINGS = frozenset({"gzip", "deflate", "identity"})


class _Metered:
    """What both transports share: whom they wrap, and how an exchange begins."""

    _needs: str

    def __init__(
        self,
        name: str,
        listener: UpstreamListener,
        wrap: Any,
        *,
        usage_dialect: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_name(name, "provider")
        if not isinstance(listener, UpstreamListener):
            raise ConfigurationError(
                f"The upstream listener {listener!r} lacks a method of UpstreamListener. Add it, if only as a no-op."
            )
        if isinstance(wrap, _Metered):
            raise ConfigurationError(
                f"The transport to wrap for {name!r} is metered already, so usage would count twice. Wrap it once."
            )
        if not callable(getattr(wrap, self._needs, None)):
            raise ConfigurationError(
                f"The transport {wrap!r} has no {self._needs}(). Pass an asynchronous transport to an "
                f"asynchronous client, and a synchronous one to a synchronous client."
            )
        UsageReader(dialect=usage_dialect)  # An unknown dialect fails here, not on the first response.
        self._source = Source(name, listener, usage_dialect)
        self._wrapped = wrap
        self._clock = clock

    def _begin(self, request: Request) -> Exchange:
        _ask_for_readable(request)
        return Exchange(self._source, self._clock(), fetches=request.method == "GET")


class MeteredTransport(_Metered, AsyncBaseTransport):
    """
    An asynchronous transport that shows every exchange to a listener and changes no byte of it.

    Args:
        name: The provider's name, as quotas and usage are booked under it.
        listener: Hears of every answer, errors and streams included, and of the usage in its body.
        wrap: The transport that does the work, of httpx2 or httpx, or any object with its methods. It is opened
            and closed with this one.
        usage_dialect: Name of the dialect of `usage.dialects` in which bodies report, where detection would be
            wrong, such as for an OpenAI-shaped gateway before another provider.
        clock: Epoch seconds.

    Raises:
        ConfigurationError: The name, the listener, the transport or the dialect is not usable.

    Nothing is buffered or delayed. The one change to a request: a coding that the usage reader cannot undo
    (Brotli, Zstandard) is taken out of ``Accept-Encoding``. Source: S1.44, S1.46, S1.47.
    """

    _needs = "handle_async_request"

    async def handle_async_request(self, request: Request) -> Response:
        """Send *request* by the wrapped transport; what that raises comes through unchanged."""
        exchange = self._begin(request)
        response: Response = await self._wrapped.handle_async_request(request)
        exchange.watch(response, asynchronous=True)
        return response

    async def aclose(self) -> None:
        """Close the wrapped transport."""
        await self._wrapped.aclose()

    async def __aenter__(self) -> Self:
        await self._wrapped.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._wrapped.__aexit__(exc_type, exc_value, traceback)


class SyncMeteredTransport(_Metered, BaseTransport):
    """The synchronous `MeteredTransport`: same arguments, same promises; the listener may hear from any thread."""

    _needs = "handle_request"

    def handle_request(self, request: Request) -> Response:
        """Send *request* by the wrapped transport; what that raises comes through unchanged."""
        exchange = self._begin(request)
        response: Response = self._wrapped.handle_request(request)
        exchange.watch(response, asynchronous=False)
        return response

    def close(self) -> None:
        """Close the wrapped transport."""
        self._wrapped.close()

    def __enter__(self) -> Self:
        self._wrapped.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._wrapped.__exit__(exc_type, exc_value, traceback)


def upstream_transport(
    name: str,
    listener: UpstreamListener,
    wrap: AsyncBaseTransport | None = None,
    *,
    library: str | None = None,
    usage_dialect: str | None = None,
) -> MeteredTransport:
    """
    Return a transport for an asynchronous client of your own; `MeteredTransport` says what it does.

    Args:
        name: The provider's name.
        listener: Hears of every exchange.
        wrap: Your transport; `None` makes one with the SDKs' limits and socket options. A client that is given a
            transport ignores proxies of the environment; `upstream_client` heeds them.
        library: ``"httpx2"`` or ``"httpx"`` where *wrap* does not tell and the first one installed is wrong.
        usage_dialect: See `MeteredTransport`.

    Raises:
        ConfigurationError: An argument is not usable.
        MissingExtraError: Neither library is installed.
    """
    inner = wrap if wrap is not None else _transport(choose_library(library).AsyncHTTPTransport, {})
    return MeteredTransport(name, listener, inner, usage_dialect=usage_dialect)


def upstream_transport_sync(
    name: str,
    listener: UpstreamListener,
    wrap: BaseTransport | None = None,
    *,
    library: str | None = None,
    usage_dialect: str | None = None,
) -> SyncMeteredTransport:
    """Return a transport for a synchronous client of your own; otherwise as `upstream_transport`."""
    inner = wrap if wrap is not None else _transport(choose_library(library).HTTPTransport, {})
    return SyncMeteredTransport(name, listener, inner, usage_dialect=usage_dialect)


def upstream_client(
    name: str,
    listener: UpstreamListener,
    wrap: AsyncBaseTransport | None = None,
    *,
    library: str | None = None,
    usage_dialect: str | None = None,
    **client_options: Any,
) -> AsyncClient:
    """
    Return an asynchronous client to pass to an SDK as ``http_client``, with the defaults of the SDK's own client.

    Timeouts (600 s, 5 s to connect), limits (1000 connections, 100 kept), redirects (followed) and proxies of the
    environment are those of the OpenAI and Anthropic SDKs, TCP keep-alive that of Anthropic's.

    Args:
        name: The provider's name.
        listener: Hears of every exchange.
        wrap: A transport to use instead of the default one; then proxies of the environment do not count.
        library: ``"httpx2"`` (both SDKs) or ``"httpx"`` (OpenAI's takes it too, and others need it), where
            *wrap* does not tell and the first one installed is wrong.
        usage_dialect: See `MeteredTransport`.
        client_options: Any option of ``AsyncClient`` but ``transport``; transports in ``mounts`` are metered too.

    Raises:
        ConfigurationError: An argument is not usable.
        MissingExtraError: Neither library is installed.

    Source: ``DefaultAsyncHttpxClient`` of openai 3.54 and anthropic 2.12.
    """
    chosen = choose_library(library, wrap)

    def metered(inner: Any) -> MeteredTransport:
        return MeteredTransport(name, listener, inner, usage_dialect=usage_dialect)

    options = _client_options(chosen, chosen.AsyncHTTPTransport, metered, wrap, client_options)
    return cast("AsyncClient", chosen.AsyncClient(**options))


def upstream_client_sync(
    name: str,
    listener: UpstreamListener,
    wrap: BaseTransport | None = None,
    *,
    library: str | None = None,
    usage_dialect: str | None = None,
    **client_options: Any,
) -> Client:
    """Return a synchronous client; otherwise as `upstream_client`."""
    chosen = choose_library(library, wrap)

    def metered(inner: Any) -> SyncMeteredTransport:
        return SyncMeteredTransport(name, listener, inner, usage_dialect=usage_dialect)

    options = _client_options(chosen, chosen.HTTPTransport, metered, wrap, client_options)
    return cast("Client", chosen.Client(**options))


def _client_options(
    library: ModuleType,
    transport_class: Callable[..., Any],
    metered: Callable[[Any], _Metered],
    wrap: object,
    given: dict[str, Any],
) -> dict[str, Any]:
    if "transport" in given:
        raise ConfigurationError("An upstream client makes its transport itself. Pass yours as wrap= instead.")
    options = {**_sdk_defaults(library), **given}
    shared = {option: options[option] for option in _TRANSPORT_OPTIONS if option in options}
    proxy = options.pop("proxy", None)
    if proxy is not None:
        proxies = {"all://": proxy}
    else:
        # As in the libraries: whoever brings a transport decides about proxies.
        heeds = wrap is None and options.get("trust_env", True)
        proxies = environment_proxies(library) if heeds else {}
    mounts = {
        pattern: None if address is None else _transport(transport_class, shared, proxy=address)
        for pattern, address in proxies.items()
    }
    mounts.update(options.get("mounts") or {})
    options["mounts"] = {
        pattern: inner if inner is None or isinstance(inner, _Metered) else metered(inner)
        for pattern, inner in mounts.items()
    }
    options["transport"] = metered(wrap if wrap is not None else _transport(transport_class, shared))
    return options


def _sdk_defaults(library: ModuleType) -> dict[str, Any]:
    return {
        "timeout": library.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        "limits": library.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_KEEPALIVE_CONNECTIONS),
        "follow_redirects": True,
    }


def _transport(transport_class: Callable[..., Any], options: dict[str, Any], **more: Any) -> Any:
    return transport_class(socket_options=_socket_options(), **options, **more)


def _socket_options() -> list[tuple[int, int, int]]:
    """Return TCP keep-alive, as Anthropic's SDK sets it: a model's silent minutes then outlive a NAT's patience."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (
        ("TCP_KEEPINTVL", _KEEPALIVE_S),
        ("TCP_KEEPCNT", _KEEPALIVE_PROBES),
        ("TCP_KEEPIDLE", _KEEPALIVE_S),
    ):
        # Not every system has all of them.
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


def _ask_for_readable(request: Request) -> None:
    accepted = request.headers.get("accept-encoding")
    if accepted is None:
        return
    codings = [coding.strip() for coding in accepted.split(",")]
    readable = [coding for coding in codings if coding.partition(";")[0].strip().lower() in _READABLE_CODINGS]
    if len(readable) < len(codings):
        request.headers["accept-encoding"] = ", ".join(readable) or "identity"
