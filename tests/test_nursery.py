"""What the nursery forks runs and ends as ``python -m`` does, and the nursery itself ends with who asked for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.nursery import Forked, fork
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uncounted

ROOT = Path(__file__).parents[1]

TELL = """
import json, os, sys
leads = os.getsid(0) == os.getpid()
print(json.dumps([__name__, sys.argv[1:], os.environ["WORD"], os.getcwd(), leads, os.environ.get("HOME")]))
"""

ENDS = {
    "pass": (0, ""),
    "raise SystemExit(3)": (3, ""),
    "raise SystemExit('words')": (1, "words"),
    "raise LookupError('broken')": (1, "LookupError: broken"),
    "import atexit; atexit.register(print, 'last')": (0, "last"),
    "import os; os.kill(os.getpid(), 15)": (-signal.SIGTERM, ""),
}

ASK = """
import os, sys
from tests.harness import nursery
forked = nursery.fork("said", env={**os.environ, "PYTHONPATH": sys.argv[1]}, cwd=nursery._ROOT, output=1)
forked.wait()
print("asked", flush=True)
sys.stdin.read()
"""


def run(source: str, folder: Path, *arguments: str, **env: str) -> tuple[Forked, Path]:
    """Run a module with this *source*; the process, and the file that it prints to."""
    (folder / "said.py").write_text(source)
    with (folder / "printed").open("wb") as output:
        forked = fork("said", *arguments, env={"PYTHONPATH": str(folder), **env}, cwd=ROOT, output=output.fileno())
    return forked, folder / "printed"


def test_run_a_module_with_what_was_given_and_nothing_else(tmp_path: Path) -> None:
    """A module is the main one of a session of its own, with these arguments, this folder and no other environment."""
    forked, printed = run(TELL, tmp_path, "--flag", "word", WORD="given")
    assert forked.wait(20) == 0
    assert json.loads(printed.read_text()) == ["__main__", ["--flag", "word"], "given", str(ROOT), True, None]


@pytest.mark.parametrize("source", ENDS)
def test_end_as_an_interpreter_does(source: str, tmp_path: Path) -> None:
    """Exit codes, tracebacks, what is registered for the end, and signals are those of any Python process."""
    forked, printed = run(source, tmp_path)
    code, said = ENDS[source]
    assert (forked.wait(20), forked.poll()) == (code, code)
    assert said in printed.read_text()


def test_wait_no_longer_than_one_likes(tmp_path: Path) -> None:
    """A process that runs has no code, waiting for it ends in time, and a signal reaches it."""
    forked, _ = run("import signal; signal.pause()", tmp_path)
    assert forked.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0)
    forked.kill()
    assert forked.wait(20) == -signal.SIGKILL
    forked.send_signal(signal.SIGTERM)


def test_end_with_who_asked(tmp_path: Path) -> None:
    """The nursery of a process that was killed is gone as well."""
    (tmp_path / "said.py").write_text("import os; print(os.getppid(), flush=True)")
    command = [sys.executable, "-c", ASK, str(tmp_path)]
    asking = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with asking:
        assert asking.stdout is not None
        nursery = int(asking.stdout.readline())
        assert asking.stdout.readline() == "asked\n"
        os.kill(nursery, 0)
        asking.kill()
    wait_until(
        lambda: not Path(f"/proc/{nursery}/cmdline").exists() or not Path(f"/proc/{nursery}/cmdline").read_bytes()
    )
