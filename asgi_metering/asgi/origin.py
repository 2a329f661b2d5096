"""Where an HTTP request came from, as far as policies may ask; nothing is looked at before it is asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

from asgi_metering.asgi.types import Scope
from asgi_metering.correlating import clean_id

__all__ = ["HTTPOrigin"]


class HTTPOrigin:
    """
    The origin of one request: of itself, where what is made for a request is one.

    Args:
        scope: The connection's scope; read only.
    """

    scope: Scope
    _connection: Any = None

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    @property
    def connection(self) -> Any:
        """A Starlette ``HTTPConnection``: headers, path, query, cookies, client, state."""
        if self._connection is None:
            self._connection = _connection_class()(self.scope)
        return self._connection

    @property
    def address(self) -> str | None:
        """The client's address as the server reports it: behind a proxy only what the server was told to trust."""
        client = self.scope.get("client")
        return str(client[0]) if client else None

    @property
    def target(self) -> tuple[bytes, bytes, bytes]:
        """Method, path and query, as the client sent them."""
        scope = self.scope
        path = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogatepass")
        # A WebSocket begins as a GET, and its scope does not say so (RFC 6455, section 4.1).
        return scope.get("method", "GET").encode("latin-1"), path, scope.get("query_string", b"")

    def fields(self, name: str) -> list[str]:
        """The lines of the header field *name*, in lower case."""
        wanted = name.encode("latin-1")
        return [value.decode("latin-1") for key, value in self.scope.get("headers", ()) if key == wanted]

    @property
    def request_id(self) -> str | None:
        """``X-Request-ID``, cleaned; None if the client sent none (S2.13)."""
        # Of several the first counts. To put all of them into a dict takes three times as long.
        for name, value in self.scope.get("headers", ()):
            if name == b"x-request-id":
                return clean_id(value.decode("latin-1"))
        return None


@cache
def _connection_class() -> Any:
    # Not imported before it is needed: naming the middleware imports no framework. And not for each request: to ask for
    # a module that is there takes longer than to make a connection.
    from starlette.requests import HTTPConnection

    return HTTPConnection
