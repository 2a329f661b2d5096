"""
The server of mutated runs: imports what every run needs once, and forks a pytest for each that is asked for.

Reads one JSON object a line from its input (``id``, ``change``, ``tests``, ``directory``) and writes the id back when
the run has ended; output and report of the run are files in the directory. Imports the modules of the tests that are
asked for, and the package with them: a run changes what it has of them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.mutations.plugin import CHANGE, REPORT

__all__ = ["OPTIONS", "PRELOADED", "main"]

PRELOADED = (
    "_pytest.assertion.rewrite",
    "_pytest.capture",
    "_pytest.logging",
    "_pytest.python",
    "_pytest.terminal",
    "anyio._backends._asyncio",
    "asyncio",
    "pytest_timeout",
    "tests.conftest",
)
"""Imported before the fork, as are the tests: together they take longer than most runs."""

OPTIONS = (
    "-q",
    "--no-header",
    # The plugin has a bound of its own.
    "--timeout=0",
    # Nobody looks at what failed as it should: showing its sources takes as long as its run.
    "--tb=native",
    # Plugins that were imported before the fork have their own assertions as they are.
    "-Wignore::pytest.PytestAssertRewriteWarning",
    *("-p", "no:cacheprovider"),
    *("-p", "pytest_timeout"),
    *("-p", "tests.mutations.plugin"),
)


def main() -> None:
    """Serve until the input ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    del sys.modules["tests.mutations.plugin"]
    # Nobody waits for the runs here, and none may stay a zombie.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        asked = json.loads(line)
        _import(asked["tests"])
        if os.fork() == 0:
            _run(asked)


def _import(tests: list[str]) -> None:
    """Import the modules that *tests* are in, and what they import."""
    names = {test.partition(".py::")[0].replace("/", ".") for test in tests}
    if names <= sys.modules.keys():
        return
    for name in sorted(names):
        # One that cannot be imported fails in its run, and says why there.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    # What is imported by now is never garbage, and the runs need not look at it.
    gc.collect()
    gc.freeze()


def _run(asked: dict[str, Any]) -> None:
    """Be the run, write its id, and end the process without another word."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    directory = Path(asked["directory"])
    answers = os.dup(1)
    output = os.open(directory / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Looking for plugins, and importing those that no run needs, takes as long as a short run.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ[REPORT] = str(directory / "report.json")
    if asked["change"] is not None:
        os.environ[CHANGE] = json.dumps(asked["change"])
    try:
        import pytest

        pytest.main([*OPTIONS, *asked["tests"]])
    except BaseException:
        # Whatever it is, it belongs to the run and must not come back to the server's loop.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.write(answers, f"{asked['id']}\n".encode())
        os._exit(0)


if __name__ == "__main__":
    main()
