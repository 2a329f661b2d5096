"""The memory store under real servers: not among several workers, and in every way to run one process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness.clients import HttpClient
from tests.harness.servers import SERVER_KINDS, ServerKind, free_port, serve
from tests.harness.waiting import DEFAULT_TIMEOUT_S
from tests.servers.house import APP, key

SENTENCE = (
    "The memory store keeps its state in one process, and this server runs 2 workers, each of which would count for "
    "itself. Use a store that processes share, such as 'sqlite:///metering.db', or run one worker."
)

ROOT = Path(__file__).parents[2]

SEVERAL: tuple[ServerKind, ...] = ("uvicorn-h11", "hypercorn", "granian")
"""Servers that have workers."""

UVICORN = """
import uvicorn
if __name__ == "__main__":
    uvicorn.run({app!r}, port={port}, workers=2)
"""

GRANIAN = """
import multiprocessing
import granian
if __name__ == "__main__":
    multiprocessing.set_start_method({start!r})
    granian.Granian({app!r}, interface="asgi", port={port}, workers=2).serve()
"""

SCRIPTS = {
    "uvicorn.run": (UVICORN, ""),
    "Granian, forked": (GRANIAN, "fork"),
    "Granian, spawned": (GRANIAN, "spawn"),
}


def refused(kind: ServerKind) -> str:
    """Start *kind* with two workers, and return what it told."""
    with pytest.raises(RuntimeError) as failed, serve(APP, kind, workers=2):
        raise AssertionError(f"{kind} serves.")
    return str(failed.value)


def run(script: str, start: str, folder: Path) -> str:
    """Run a program that starts its server itself, until it ends, and return what it told."""
    program = folder / f"program_{start}.py"
    program.write_text(script.format(app=APP, port=free_port(), start=start))
    ended = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=DEFAULT_TIMEOUT_S,
        text=True,
        check=False,
    )
    return ended.stdout


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """What each server told; they are tried two at a time."""
    folder = tmp_path_factory.mktemp("programs")
    with ThreadPoolExecutor(2) as pool:
        futures = {str(kind): pool.submit(refused, kind) for kind in SEVERAL}
        yield futures | {name: pool.submit(run, *program, folder) for name, program in SCRIPTS.items()}


@pytest.mark.parametrize("name", [*SEVERAL, *SCRIPTS])
def test_refuse_to_start_two_workers(name: str, told: dict[str, Future[str]]) -> None:
    """The server ends before it serves, and its output has the sentence with the mend (DESIGN "Deployment")."""
    output = told[name].result()
    assert SENTENCE in output
    if name in SEVERAL:
        assert "before it served." in output


@contextlib.contextmanager
def answering(kind: ServerKind, **options: Any) -> Iterator[None]:
    """Serve, and insist that a metered route answers."""
    with serve(APP, kind, **options) as server:
        with HttpClient(server.port) as client:
            client.send_request(path="/desk?payer=ann&credits=10", headers=key("ann"))
            assert client.read_head().status == 200
            client.read_rest()
        with HttpClient(server.port) as client:
            client.send_request(path="/json", headers=key("ann"))
            assert client.read_head().status == 200
            client.read_rest()
        yield


@pytest.mark.parametrize("kind", SERVER_KINDS)
def test_serve_one_process(kind: ServerKind) -> None:
    """One process serves from memory, also where the environment asks servers that heed it for more."""
    with answering(kind, env={"WEB_CONCURRENCY": "2"}):
        pass


RELOADS: dict[ServerKind, tuple[str, ...]] = {
    "uvicorn-h11": ("--reload", "--reload-dir", "tests/harness", "--workers", "2"),
    "hypercorn": ("--reload",),
}


@pytest.mark.parametrize("kind", RELOADS)
def test_serve_with_a_reloader(kind: ServerKind) -> None:
    """A reloader's child is one process; uvicorn's ignores that more are asked for."""
    with answering(kind, extra_args=RELOADS[kind]):
        pass


@pytest.mark.parametrize("kind", ["hypercorn", "granian"])
def test_serve_two_workers_on_a_file(kind: ServerKind, tmp_path: Path) -> None:
    """What processes share serves with as many as one likes; for uvicorn see `test_workers`."""
    with answering(kind, workers=2, env={"SERVERS_STORE": f"sqlite:///{tmp_path}/metering.db?synchronous=OFF"}):
        pass
