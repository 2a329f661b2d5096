"""Real servers for the demo, in this process and on free loopback ports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from asgi_metering.errors import ConfigurationError

__all__ = ["serving"]


class _QuietServer(uvicorn.Server):
    """A server that leaves the process's signals alone: the demo is stopped as a whole."""

    def capture_signals(self) -> Any:
        """Install no handlers."""
        from contextlib import nullcontext

        return nullcontext()


@asynccontextmanager
async def serving(app: Any, port: int = 0) -> AsyncIterator[str]:
    """
    Serve *app* over HTTP on 127.0.0.1 until the block ends; gives its base URL.

    Args:
        app: An ASGI app.
        port: 0 takes a free one.

    Raises:
        ConfigurationError: Somebody else has the port.
    """
    listening = _bound(port)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = _QuietServer(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    serve = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        if serve.done():
            await serve
            raise RuntimeError("The server stopped before it had started.")
        await asyncio.sleep(0.01)
    try:
        yield url
    finally:
        server.should_exit = True
        await serve


def _bound(port: int) -> socket.socket:
    # Bound here and not by the server, which would end the process where it cannot.
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as failure:
        listening.close()
        raise ConfigurationError(
            f"Port {port} cannot be used: {failure.strerror}. Choose another, or 0 for a free one."
        ) from failure
    return listening
