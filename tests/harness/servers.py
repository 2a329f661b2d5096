"""
Real servers: each one a process of its own on a free loopback port, or uvicorn in a thread.

Knows how each server is started, asked to stop and killed. Never knows what the applications do.

What a test must know of each (measured on uvicorn 0.54, hypercorn 0.18, granian 2.8, daphne 4.2):

===========  =====================  ==================================================================
server       lifespan, ``state``    at SIGTERM with an open stream
===========  =====================  ==================================================================
uvicorn      yes                    waits for ever; with a graceful timeout it cancels the tasks and does
                                    not wait for them before ``lifespan.shutdown``
hypercorn    yes                    waits `graceful_timeout_s` (3 s), cancels, then shuts down; on Python 3.12
                                    and later it waits for ever (`Server.wait_closed` does what it says there)
granian      yes                    waits for ever; with a timeout the worker is killed: no cancellation,
                                    no ``lifespan.shutdown``
daphne       no                     cancels at once
===========  =====================  ==================================================================
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

import uvicorn

from tests.harness import leash
from tests.harness.nursery import Forked, fork
from tests.harness.waiting import DEFAULT_TIMEOUT_S, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from starlette.types import ASGIApp

__all__ = [
    "HOST",
    "PATIENT",
    "SERVER_KINDS",
    "ServerKind",
    "ServerProcess",
    "ThreadServer",
    "free_port",
    "serve",
    "serve_in_thread",
]

HOST = "127.0.0.1"

ServerKind = Literal["uvicorn-h11", "uvicorn-httptools", "hypercorn", "granian", "daphne"]
SERVER_KINDS: tuple[ServerKind, ...] = get_args(ServerKind)

PATIENT: frozenset[ServerKind] = frozenset({"hypercorn"} if sys.version_info >= (3, 12) else ())
"""Those whose graceful timeout does not end an open stream: they wait until the client leaves."""

_ROOT = Path(__file__).parents[2]

_START_ATTEMPTS = 3
"""Between choosing a free port and the server's bind another process may take it; three times is no accident."""

_READY_LINE = {
    "uvicorn-h11": "Application startup complete",
    "uvicorn-httptools": "Application startup complete",
    "hypercorn": "Running on http://",
    "granian": "Started worker-",
    "daphne": "Listening on TCP address",
}
"""A listening socket is not yet a worker: hypercorn and granian bind before the worker exists."""


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(slots=True)
class ServerProcess:
    """
    One running server.

    Attributes:
        kind: Which server.
        port: Its port on `HOST`.
        process: The main process; it leads a process group of its own, so that nothing it starts outlives it.
    """

    kind: ServerKind
    port: int
    process: Forked
    _log: IO[bytes]
    _output: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"http://{HOST}:{self.port}"

    def output(self) -> str:
        """Return what the server has printed so far, both streams; also after it was stopped."""
        if self._log.closed:
            return self._output
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def worker_pids(self) -> list[int]:
        """Return the processes that run the application: the children, or the main process if it has none."""
        return [pid for pid in self._children() if not _is_resource_tracker(pid)] or [self.process.pid]

    def terminate(self, *, whole_group: bool = False) -> None:
        """Send SIGTERM: to the main process as a supervisor does, or to the group as a terminal does."""
        self._signal(signal.SIGTERM, whole_group=whole_group)

    def kill(self) -> None:
        """Send SIGKILL to the main process and every worker, and wait until all are dead and their sockets closed."""
        children = self._children()
        self.process.kill()
        self._bury(children)

    def wait(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """
        Wait until the main process has ended, and return its exit code (negative: the signal).

        Raises:
            TimeoutError: It still runs; the message carries its output.
        """
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.kind} still runs after {timeout_s} s. Its output:\n{self.output()}") from None

    def stop(self, *, grace_s: float = 5.0) -> None:
        """End it, by SIGTERM and after *grace_s* seconds by SIGKILL, with all its children. Idempotent."""
        if self._log.closed:
            return
        children = self._children()
        self.terminate()
        try:
            self.wait(timeout_s=grace_s)
        except TimeoutError:
            self.process.kill()
        self._bury(children)
        self._output = self.output()
        self._log.close()

    def _bury(self, children: list[int]) -> None:
        """Kill the workers and wait; multiprocessing's helper then removes their semaphores and ends by itself."""
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                # A number that was given to a stranger meanwhile is in another group.
                if not _is_resource_tracker(pid) and os.getpgid(pid) == self.process.pid:
                    os.kill(pid, signal.SIGKILL)
        self.wait()
        wait_until(lambda: not any(map(_is_alive, children)), what=f"the processes of {self.kind} are dead")
        self._signal(signal.SIGKILL, whole_group=True)
        leash.let_go(self.process.pid)

    def _children(self) -> list[int]:
        try:
            listing = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except FileNotFoundError:
            return []
        return [int(pid) for pid in listing.split()]

    def _signal(self, number: signal.Signals, *, whole_group: bool) -> None:
        with contextlib.suppress(ProcessLookupError):
            if whole_group:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)


@contextlib.contextmanager
def serve(
    app: str,
    kind: ServerKind = "uvicorn-h11",
    *,
    graceful_timeout_s: int | None = None,
    workers: int = 1,
    env: Mapping[str, str] | None = None,
    pythonpath: Sequence[Path] = (),
    extra_args: Sequence[str] = (),
) -> Iterator[ServerProcess]:
    """
    Run *app* under a real server until the block ends.

    Args:
        app: ``"module:attribute"``; the repository's root is importable, and so is each of *pythonpath*.
        kind: Which server.
        graceful_timeout_s: uvicorn ``--timeout-graceful-shutdown``, hypercorn ``--graceful-timeout``, granian
            ``--workers-kill-timeout``. daphne has none: it cancels at once, and the value is not used.
        workers: Worker processes; daphne knows one only.
        env: Added to the environment of this process.
        pythonpath: Folders put before the repository's root.
        extra_args: Passed through to the server.

    Raises:
        RuntimeError: The server ended, or was not ready in time; the message carries its output.
    """
    server = _start(app, kind, graceful_timeout_s, workers, _environment(env, pythonpath), extra_args)
    try:
        yield server
    finally:
        server.stop()


def _start(
    app: str, kind: ServerKind, grace_s: int | None, workers: int, env: dict[str, str], extra: Sequence[str]
) -> ServerProcess:
    for attempt in range(1, _START_ATTEMPTS + 1):
        port = free_port()
        command = [*_arguments(app, kind, port, grace_s, workers), *extra]
        log = tempfile.TemporaryFile()  # noqa: SIM115 (`stop` closes it)
        process = fork(*command, env=env, cwd=_ROOT, output=log.fileno())
        leash.tie(process.pid)
        server = ServerProcess(kind, port, process, log)
        try:
            wait_until(lambda server=server: _is_ready(server, workers), what=f"{kind} serves {app}")  # type: ignore[misc]
        except (TimeoutError, RuntimeError) as error:
            server.stop()
            if attempt < _START_ATTEMPTS and "address already in use" in server.output().lower():
                continue
            raise RuntimeError(f"{error} Its output:\n{server.output()}") from error
        except BaseException:
            server.stop()
            raise
        return server
    raise AssertionError("The last attempt returns or raises.")


def _is_ready(server: ServerProcess, workers: int) -> bool:
    code = server.process.poll()
    if code is not None:
        raise RuntimeError(f"{server.kind} ended with {code} before it served.")
    if server.output().count(_READY_LINE[server.kind]) < workers:
        return False
    try:
        socket.create_connection((HOST, server.port), timeout=1).close()
    except OSError:
        return False
    return True


def _arguments(app: str, kind: ServerKind, port: int, grace_s: int | None, workers: int) -> list[str]:
    grace = [] if grace_s is None or kind == "daphne" else [_GRACE_OPTION[kind], str(grace_s)]
    if kind == "hypercorn":
        return ["hypercorn", "--bind", f"{HOST}:{port}", "--workers", str(workers), *grace, app]
    if kind == "granian":
        where = ["--interface", "asgi", "--host", HOST, "--port", str(port), "--workers", str(workers)]
        return ["granian", *where, *grace, app]
    if kind == "daphne":
        if workers != 1:
            raise ValueError(f"daphne runs 1 process, not {workers}. Choose another server.")
        return ["daphne", "--bind", HOST, "--port", str(port), app]
    where = ["--host", HOST, "--port", str(port), "--workers", str(workers), "--no-access-log"]
    return ["uvicorn", "--http", kind.removeprefix("uvicorn-"), *where, *grace, app]


_GRACE_OPTION = {
    "uvicorn-h11": "--timeout-graceful-shutdown",
    "uvicorn-httptools": "--timeout-graceful-shutdown",
    "hypercorn": "--graceful-timeout",
    "granian": "--workers-kill-timeout",
}


def _environment(env: Mapping[str, str] | None, pythonpath: Sequence[Path]) -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    path = [*map(str, pythonpath), str(_ROOT), *([inherited] if inherited else [])]
    return {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), "PYTHONPATH": os.pathsep.join(path)}


def _is_resource_tracker(pid: int) -> bool:
    """Whether it is multiprocessing's own helper process, which runs no application."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


def _is_alive(pid: int) -> bool:
    """Whether any thread of the process runs: its first may be a zombie while another still holds the sockets."""
    return any(_state(stat) not in ("", "Z", "X") for stat in Path(f"/proc/{pid}/task").glob("*/stat"))


def _state(stat: Path) -> str:
    """The scheduler's letter for one thread, or "" if it is gone."""
    try:
        # It follows the name, which stands in parentheses and may contain anything.
        return stat.read_text(errors="replace").rpartition(") ")[2][:1]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class _AnnouncedServer(uvicorn.Server):
    """uvicorn, telling another thread when it serves."""

    def __init__(self, config: uvicorn.Config, changed: threading.Event) -> None:
        super().__init__(config)
        self._changed = changed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._changed.set()


@dataclass(frozen=True, slots=True)
class ThreadServer:
    """uvicorn in a thread of this process: the application's objects can be looked at while it serves."""

    port: int
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"http://{HOST}:{self.port}"

    def stop(self) -> None:
        """
        End it as SIGTERM would, and wait for its thread. Idempotent.

        Raises:
            RuntimeError: The thread did not end; it is told to stop without grace then.
        """
        self.server.should_exit = True
        self.thread.join(DEFAULT_TIMEOUT_S)
        if self.thread.is_alive():
            self.server.force_exit = True
            raise RuntimeError(f"uvicorn on port {self.port} did not stop within {DEFAULT_TIMEOUT_S} s.")


@contextlib.contextmanager
def serve_in_thread(app: ASGIApp, *, graceful_timeout_s: int | None = 1, **config: Any) -> Iterator[ThreadServer]:
    """
    Run *app* under uvicorn in a thread until the block ends; its lifespan is run if it has one.

    Args:
        app: The application object.
        graceful_timeout_s: How long open responses may still take at the end before their tasks are cancelled.
        config: Passed to `uvicorn.Config`; ``http="h11"``, ``ws="none"`` and no logging set-up unless given.

    Raises:
        RuntimeError: The application's startup failed.
    """
    options: dict[str, Any] = {"http": "h11", "ws": "none", "log_config": None, "access_log": False, **config}
    changed = threading.Event()
    server = _AnnouncedServer(uvicorn.Config(app, timeout_graceful_shutdown=graceful_timeout_s, **options), changed)
    listener = socket.create_server((HOST, 0))

    def run() -> None:
        try:
            server.run([listener])
        except SystemExit:
            # uvicorn's way to say that the startup failed; `server.started` tells the other thread.
            pass
        finally:
            listener.close()
            changed.set()

    thread = threading.Thread(target=run, name="uvicorn", daemon=True)
    running = ThreadServer(listener.getsockname()[1], server, thread)
    thread.start()
    changed.wait(DEFAULT_TIMEOUT_S)
    try:
        if not server.started:
            raise RuntimeError(f"uvicorn did not start {app!r}. Its log says why.")
        yield running
    finally:
        running.stop()
