"""
A nursery of servers: one process has imported what every server of the tests begins with, and forks each of them.

To start an interpreter and import a server, a framework and this package takes a second of a core, and the tests start
some hundred of them. What is forked runs ``python -m`` from there: with environment, path, arguments, folder, session
and output of its own, and to its end, whatever that is. `multiprocessing` keeps such a process too, but those that it
forks show themselves as its workers, which is what the package looks for.

Knows how a module is run in a process that was forked. Never knows what a server is, but for `_PRELOADED`.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Forked", "fork"]

_PRELOADED = (
    "anyio._backends._asyncio",
    "asgi_metering.asgi.app",
    "asgi_metering.prices",
    "asgi_metering.stores.memory",
    "asgi_metering.stores.sqlite",
    "asgi_metering.testing.provider",
    "autobahn.twisted.websocket",
    "fastapi.responses",
    "granian.cli",
    "httpcore2",
    "httpx2",
    "hypercorn.__main__",
    "hypercorn.asyncio.run",
    "hypercorn.protocol.h2",
    "hypercorn.protocol.ws_stream",
    "limits.aio",
    "starlette.applications",
    "tests.harness.apps",
    "twisted.web.http",
    "uvicorn.lifespan.on",
    "uvicorn.main",
    "uvicorn.protocols.http.h11_impl",
    "uvicorn.protocols.http.httptools_impl",
    "wsproto",
)
"""None of them starts a thread, opens a file or looks at the environment when it is imported."""

_ROOT = Path(__file__).parents[2]

_LONGEST = 262_144
"""Bytes of a request: an environment, mostly."""

_DESCRIPTORS = 65_536
"""More than a process has open."""

_lock = threading.Lock()

_held: dict[int, socket.socket] = {}
"""The line to the nursery, by process: one that was forked from it has a nursery of its own."""


class Forked:
    """
    A process of the nursery, as far as the one that asked for it needs it: a `subprocess.Popen` without pipes.

    Attributes:
        pid: It leads a session of its own.
        returncode: None while nobody has seen its end; negative: the signal.
    """

    def __init__(self, told: int) -> None:
        self.returncode: int | None = None
        self._told = told
        self._lock = threading.Lock()
        self.pid = self._number(None)

    def _number(self, timeout_s: float | None) -> int:
        """
        The next that the nursery tells of it.

        Raises:
            TimeoutError: Nothing is told yet.
            RuntimeError: The nursery is gone.
        """
        if not select.select([self._told], [], [], timeout_s)[0]:
            raise TimeoutError
        told = os.read(self._told, 8)
        if not told:
            raise RuntimeError("The nursery has ended. Its standard error says why.")
        return array.array("q", told)[0]

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        with contextlib.suppress(TimeoutError):
            self._look(0.0)
        return self.returncode

    def _look(self, timeout_s: float | None) -> int:
        with self._lock:
            if self.returncode is None:
                self.returncode = self._number(timeout_s)
                os.close(self._told)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """
        Wait until it has ended, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        try:
            return self._look(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired("a process of the nursery", timeout or 0.0) from None

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def fork(module: str, *arguments: str, env: Mapping[str, str], cwd: Path, output: int) -> Forked:
    """
    Run ``python -m module arguments`` in a process that has begun already, and that leads a session of its own.

    Args:
        module: What to run.
        arguments: Its arguments.
        env: Its whole environment; ``PYTHONPATH`` is heeded, other variables of the interpreter are not.
        cwd: Its folder.
        output: The descriptor of what takes both its streams.
    """
    reading, writing = os.pipe()
    request = {"module": module, "arguments": arguments, "env": dict(env), "cwd": os.fspath(cwd)}
    with _lock:
        line = _held.get(os.getpid()) or _begin()
        socket.send_fds(line, [json.dumps(request).encode()], [output, writing])
    os.close(writing)
    return Forked(reading)


def _begin() -> socket.socket:
    for inherited in _held.values():
        inherited.close()
    _held.clear()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.nursery", str(theirs.fileno())],
            cwd=_ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # Control-C is for the tests, and they end their servers themselves then.
            start_new_session=True,
        )
    # It ends with this process, when nobody asks any more.
    process.returncode = 0
    _held[os.getpid()] = ours
    atexit.register(ours.close)
    return ours


class _Nursery:
    """The process that forks, until nobody holds the other end of *line*."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._told: dict[int, int] = {}
        """Where the end of a process is told, by the descriptor that is ready when it has ended."""
        self._changes = selectors.DefaultSelector()
        self._changes.register(line, selectors.EVENT_READ)
        self._path = [entry for entry in sys.path if entry not in ("", os.fspath(_ROOT))]
        for name in _PRELOADED:
            importlib.import_module(name)
        gc.collect()
        # A collection in a process that was forked would copy every page of what was imported before.
        gc.freeze()

    def serve(self) -> str:
        """Fork what is asked for: in each process that was forked, return the module that it is to run."""
        while True:
            for key, _ in self._changes.select():
                if key.fileobj is not self._line:
                    self._bury(key.fd, key.data)
                    continue
                request, descriptors, _, _ = socket.recv_fds(self._line, _LONGEST, 2)
                if not request:
                    sys.exit()
                module = self._fork(json.loads(request), *descriptors)
                if module:
                    return module

    def _fork(self, request: dict[str, Any], output: int, told: int) -> str:
        pid = os.fork()
        if pid == 0:
            self._become(request, output)
            return str(request["module"])
        os.close(output)
        ended = os.pidfd_open(pid)
        self._told[ended] = told
        self._changes.register(ended, selectors.EVENT_READ, pid)
        os.write(told, array.array("q", [pid]).tobytes())
        return ""

    def _bury(self, ended: int, pid: int) -> None:
        self._changes.unregister(ended)
        os.close(ended)
        _, status = os.waitpid(pid, 0)
        told = self._told.pop(ended)
        with contextlib.suppress(BrokenPipeError):
            os.write(told, array.array("q", [os.waitstatus_to_exitcode(status)]).tobytes())
        os.close(told)

    def _become(self, request: dict[str, Any], output: int) -> None:
        """What an interpreter that was asked for this would have found when it began."""
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        self._changes.close()
        self._line.close()
        os.closerange(3, _DESCRIPTORS)
        cwd, env, arguments = str(request["cwd"]), request["env"], request["arguments"]
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        paths = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        sys.path[:] = list(dict.fromkeys([cwd, *paths, *self._path]))
        sys.path_importer_cache.clear()
        sys.argv[:] = ["-m", *arguments]
        time.tzset()


if __name__ == "__main__":
    # What was forked runs from here, so that it ends as an interpreter ends.
    runpy.run_module(_Nursery(socket.socket(fileno=int(sys.argv[1]))).serve(), run_name="__main__", alter_sys=True)
