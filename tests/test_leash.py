"""What was tied to a run ends with it, also when it is killed; what was let go stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.harness.waiting import wait_until

ROOT = Path(__file__).parents[1]

RUN = """
import os, signal, subprocess
from tests.harness import leash

processes = [subprocess.Popen(["sleep", "60"], start_new_session=led) for led in (True, False, False)]
for process in processes:
    leash.tie(process.pid)
leash.let_go(processes[-1].pid)
print(*(process.pid for process in processes), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and that nobody has collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_end_with_a_run_that_is_killed() -> None:
    """A server dies with the process that started it, whether or not it leads a group, unless it was let go."""
    # It says a line and no more: those that outlive it keep its output open.
    ended = subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert ended.stdout is not None
    with ended.stdout as said:
        led, tied, free = map(int, said.readline().split())
    assert ended.wait() == -signal.SIGKILL
    try:
        wait_until(lambda: not is_alive(led) and not is_alive(tied), what="both are dead")
        assert is_alive(free)
    finally:
        for pid in filter(is_alive, (led, tied, free)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
