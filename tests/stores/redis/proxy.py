"""A loopback TCP proxy that counts turns of talk, and can cut a connection before a request or its reply arrives."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from tests.harness.servers import HOST

__all__ = ["Proxy"]


class Proxy:
    """
    Between a client and the server at *port*.

    Attributes:
        port: Where clients connect.
        turns: How often a client spoke after the server had.
        cuts: How many requests, from now on, are passed on and then lose their connection instead of their reply.
        holds: What the next request that loses its connection before it is passed on has in it; `let_go` does that.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.turns = 0
        self.cuts = 0
        self.holds = b""
        self._held: list[tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def let_go(self) -> None:
        """Pass on what is held, and wait until the server has done it: after all that came since."""
        held, self._held = self._held, []
        for data, server_reader, server_writer in held:
            server_writer.write(data)
            assert await server_reader.read(65_536)
            server_writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        server_reader, server_writer = await asyncio.open_connection(HOST, self._server_port)
        server_spoke = True
        cutting = False

        async def back() -> None:
            nonlocal server_spoke
            while data := await server_reader.read(65_536):
                server_spoke = True
                if cutting:
                    break
                writer.write(data)
                await writer.drain()

        is_held = False
        answering = asyncio.ensure_future(back())
        self._tasks.add(answering)
        with suppress(ConnectionError, asyncio.CancelledError):
            while not cutting and (data := await reader.read(65_536)):
                if server_spoke:
                    self.turns += 1
                    server_spoke = False
                if self.holds and self.holds in data:
                    self.holds, is_held = b"", True
                    answering.cancel()
                    await asyncio.wait([answering])
                    self._held.append((data, server_reader, server_writer))
                    break
                if self.cuts:
                    self.cuts -= 1
                    cutting = True
                server_writer.write(data)
                await server_writer.drain()
            if cutting:
                # The server has done it by the time that it answers.
                await answering
        answering.cancel()
        for stream in (writer,) if is_held else (server_writer, writer):
            stream.close()
        self._tasks.discard(task)
