"""
A served application with its books and its log: what the tests of this folder play on.

Starts and stops servers through the harness; knows where an application of this folder writes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import apps
from tests.harness.clients import Http2Client, HttpClient, ResponseHead
from tests.harness.servers import ServerKind, ServerProcess, serve
from tests.harness.waiting import wait_until
from tests.servers.app import EVENTS, GATES, OPTIONS, STORE
from tests.servers.books import Books, read_lines

__all__ = ["APP", "House", "house", "key"]

APP = "tests.servers.app:app"


def key(payer: str) -> list[tuple[str, str]]:
    """The header fields of a caller."""
    return [("x-api-key", payer)]


@dataclass(slots=True)
class House:
    """
    One running server.

    Attributes:
        server: The process.
        books: Of its store.
        folder: Of its log and its gates.
        clients: Every connection that was made, to be closed at the end at the latest.
    """

    server: ServerProcess
    books: Books
    folder: Path
    clients: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    @property
    def kind(self) -> ServerKind:
        """Which server."""
        return self.server.kind

    def client(self, **options: Any) -> HttpClient:
        """A connection; it is closed at the end at the latest."""
        return self.clients.enter_context(HttpClient(self.server.port, **options))

    def client2(self) -> Http2Client:
        """The same in HTTP/2, where the server speaks it."""
        return self.clients.enter_context(Http2Client(self.server.port))

    def ask(
        self,
        path: str,
        payer: str | None,
        method: str = "GET",
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
    ) -> tuple[ResponseHead, bytes]:
        """One whole exchange on a connection of its own."""
        with self.client() as client:
            client.send_request(method, path, headers=[*headers, *(key(payer) if payer else [])], body=body)
            head = client.read_head()
            rest = client.read_rest() if method != "HEAD" else b""
        return head, rest

    def open(self, path: str, payer: str, **options: Any) -> HttpClient:
        """Ask for a stream and read its head."""
        client = self.client(**options)
        client.send_request(path=path, headers=key(payer))
        assert client.read_head().status == 200
        return client

    def notes(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """What the application wrote down of this kind, with these fields."""
        wanted = {"event": event, **fields}.items()
        return [line for line in read_lines(self.folder / "log") if line.items() >= wanted]

    def wait_for(self, event: str, **fields: object) -> None:
        """Wait until the application wrote that down."""
        wait_until(lambda: self.notes(event, **fields), what=f"{event} {fields} in the log of {self.kind}")

    def let(self, gate: str) -> None:
        """Open a gate that an endpoint waits at."""
        (self.folder / gate).touch()


@contextlib.contextmanager
def house(kind: ServerKind, folder: Path, *, app: str = APP, **options: Any) -> Iterator[House]:
    """
    Serve *app* until the block ends, with everything it writes in *folder*; nothing of it outlives the block.

    Args:
        kind: Which server.
        folder: Empty.
        app: ``"module:attribute"``.
        options: ``metering`` for arguments of `Metering`; the others are those of `serve`.
    """
    books = Books(folder / "metering.db")
    env = {
        STORE: f"{books.url}?synchronous=OFF",
        EVENTS: str(books.delivered),
        GATES: str(folder),
        OPTIONS: json.dumps(options.pop("metering", {})),
        apps.LOG_VARIABLE: str(folder / "log"),
    }
    with serve(app, kind, env=env, **options) as server:
        running = House(server, books, folder)
        with running.clients:
            yield running
    wait_until(lambda: not _alive(server.process.pid), what=f"every process of {kind} is gone")


def _alive(group: int) -> list[int]:
    """The processes of a group that still run; a dead one that nobody has collected does not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, leads = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
                if int(leads) == group and state != "Z":
                    found.append(int(entry.name))
    return found
