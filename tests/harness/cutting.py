"""
A TCP proxy that cuts connections in the middle of a conversation.

Knows bytes and connections. Never knows what is said.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.harness.servers import HOST

__all__ = ["CuttingProxy", "cutting_proxy"]


class CuttingProxy:
    """
    A port of its own that leads to another one.

    Args:
        target: The other port, on `HOST`.

    Attributes:
        port: Its own port.
        cut_reply_to: When a client says this, it reaches the server, and the reply is lost with the connection. Once.
        cuts: How often that happened.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.cut_reply_to: bytes | None = None
        self.cuts = 0
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection((HOST, self._target))
            except OSError:
                return
            self._sockets |= {client, server}
            waits_for_reply = threading.Event()
            for one, other, is_client in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass, args=(one, other, is_client, waits_for_reply), daemon=True).start()

    def _pass(
        self, one: socket.socket, other: socket.socket, is_client: bool, waits_for_reply: threading.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while said := one.recv(65_536):
                wanted = self.cut_reply_to
                if is_client and wanted is not None and wanted in said:
                    self.cut_reply_to = None
                    waits_for_reply.set()
                elif not is_client and waits_for_reply.is_set():
                    self.cuts += 1
                    break
                other.sendall(said)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the port and every connection."""
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextlib.contextmanager
def cutting_proxy(target: int) -> Iterator[CuttingProxy]:
    """A proxy before port *target* until the block ends."""
    proxy = CuttingProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
