"""Real servers for the demo, in this process and on free loopback ports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

__all__ = ["serving"]


class _QuietServer(uvicorn.Server):
    """A server that leaves the process's signals alone: the demo is stopped as a whole."""

    @property
    def _socket(self) -> socket.socket:
        return self.servers[0].sockets[0]

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
    """
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=5)
    server = _QuietServer(config)
    serve = asyncio.create_task(server.serve())
    while not server.started:
        if serve.done():
            await serve
            raise RuntimeError("The server stopped before it had started.")
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server._socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serve
