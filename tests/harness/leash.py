"""
The leash: a process that kills the servers of a test run when the run itself is gone, however it was ended.

One for each process that starts servers, held by a pipe: when its writing end is closed, be it by a SIGKILL, what was
tied and not let go is killed. Works wherever there are pipes; a signal at the death of the parent (Linux) would also
be sent when the thread ends that started a server. Run as a script it is that process, and knows numbers alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

__all__ = ["let_go", "tie"]

_lock = threading.Lock()

_held: dict[int, int] = {}
"""The pipe, by process: one that was forked from it has a leash of its own."""


def tie(pid: int) -> None:
    """Have the process *pid*, and the group that it leads, killed when this process is gone."""
    _tell(f"tie {pid}")


def let_go(pid: int) -> None:
    """Forget the process *pid*: it is over, and its number may be given to another."""
    _tell(f"let_go {pid}")


def _tell(line: str) -> None:
    with _lock:
        pipe = _held.get(os.getpid()) or _begin()
    os.write(pipe, f"{line}\n".encode())


def _begin() -> int:
    for inherited in _held.values():
        os.close(inherited)
    _held.clear()
    reading, writing = os.pipe()
    nowhere = subprocess.DEVNULL
    # A session of its own: Control-C is for the tests, and they end their servers themselves then.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__], stdin=reading, stdout=nowhere, stderr=nowhere, start_new_session=True
    )
    os.close(reading)
    # It ends after this process, so that nobody waits for it.
    process.returncode = 0
    _held[os.getpid()] = writing
    return writing


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


def _main() -> None:
    tied: set[int] = set()
    for line in sys.stdin:
        word, _, pid = line.partition(" ")
        (tied.add if word == "tie" else tied.discard)(int(pid))
    for pid in tied:
        _kill(pid)


if __name__ == "__main__":
    _main()
